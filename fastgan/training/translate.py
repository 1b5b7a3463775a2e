"""Translation: an encoder and decoder from scratch on parallel lines, or a pretrained pair fine-tuned on them.

    from fastgan.training.finetune import finetune
    from fastgan.training.translate import TRANSLATE, TranslateConfig, translate

    config = TranslateConfig(train=("train.de", "train.en"), validation=("val.de", "val.en"), from_scratch="small")
    finetune(TRANSLATE, config, "runs/de-en")
    translate("runs/de-en", ["Ein Hund läuft."])

From scratch it is transformers' Marian with one byte-level BPE vocabulary for both sides, learnt on the training files,
and one embedding for encoder, decoder and output. Labels are smoothed in the fused head, where the logits are never
stored. The best weights are those with the best BLEU of greedy translations of the validation file; what the result
reports is their BLEU with beam search.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastgan.data.labelled import read_pairs
from fastgan.metrics import bleu
from fastgan.metrics.results import Evaluation
from fastgan.metrics.translation import _sacrebleu
from fastgan.training.finetune import Prepared, Task
from fastgan.training.pairs import PairConfig, prepare_pairs, write


@dataclass(frozen=True)
class TranslateConfig(PairConfig):
    """What ``fastgan finetune translate`` is told. Defaults suit some ten thousand sentences, from scratch."""

    train: tuple[str, str] = ("", "")  # source and target, line by line parallel, plain or .gz
    validation: tuple[str, str] = ("", "")
    epochs: int = 15
    batch_size: int = 64
    lr: float = 1e-3
    dropout: float | None = 0.15
    length: int = 100
    average: int = 5

    FILES: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __post_init__(self) -> None:
        for name in self.FILES:
            value = getattr(self, name)
            if isinstance(value, str) or len(value) != 2 or not all(value):
                raise ValueError(f"{name} must name two files, source and target")
        super().__post_init__()


def _prepare(config: TranslateConfig, say: Callable[[str], None]) -> Prepared:
    _sacrebleu()  # that it is missing is said before the work, not after the first epoch
    train, validation = read_pairs(*config.train), read_pairs(*config.validation)

    def measure(pair: Any, beams: int) -> dict[str, float]:
        lines = translate(pair, validation[0], beams=beams)
        return {"bleu": bleu(lines, [validation[1]], samples=0)["BLEU"]}

    return prepare_pairs(config, train, validation, config.length, measure, "bleu", say)


TRANSLATE = Task("translate", TranslateConfig, _prepare)


def translate(
    model: str | os.PathLike[str] | tuple[Any, Any],
    texts: Sequence[str],
    *,
    beams: int = 5,
    batch_size: int = 64,
    attention: str = "fastgan",
) -> list[str]:
    """The translation of each text, by beam search (greedy with one beam), by transformers' ``generate``.

    ``model``: a folder that :func:`finetune` or transformers wrote, a name on the hub, or a (model, tokenizer) pair.
    Texts longer than the model are cut at its end. Raises ValueError or FileNotFoundError, naming the folder.
    """
    return write(model, texts, beams=beams, batch_size=batch_size, attention=attention)


def evaluate_translate(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    beams: int = 5,
    samples: int = 1000,
) -> tuple[Evaluation, list[str]]:
    """BLEU and chrF2 (sacrebleu, cased) of a model's translations of ``source``, and the translations.

    Raises ValueError (TextError for what the files hold) or FileNotFoundError, naming the file or folder.
    """
    from fastgan.metrics import chrf

    texts, references = read_pairs(source, target)
    lines = translate(model, texts, beams=beams)
    measured = [measure(lines, [references], samples=samples).results for measure in (bleu, chrf)]
    return Evaluation([result for results in measured for result in results]), lines
