"""Questions about a text: fine-tuning an encoder to point at the answer, and finding it.

    from fastgan.training.finetune import finetune
    from fastgan.training.qa import QA, QAConfig, answer

    finetune(QA, QAConfig(train="train.json", validation="dev.json", model="bert-base-uncased"), "runs/mine")
    answer("runs/mine", "Who wrote it?", ["It was written by Mary Shelley in 1818."])

A text that is longer than the model is read in windows that overlap; the best span of all windows is the answer. Where
the training file has questions without an answer, the model may say that there is none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fastgan.data.grouped import batches_of_like_length, longest_first
from fastgan.data.squad import Question, read_questions
from fastgan.metrics.answers import em_f1
from fastgan.metrics.results import SAMPLES, SEED, Evaluation
from fastgan.training.finetune import FinetuneConfig, Prepared, Task
from fastgan.training.hub import evaluating, load_model, load_tokenizer, most_tokens
from fastgan.training.language import _quiet
from fastgan.training.language_run import check_integers
from fastgan.training.sentiment import small_bert

_MAYBE_NONE = "may_have_no_answer"  # in config.json


@dataclass(frozen=True)
class QAConfig(FinetuneConfig):
    """What ``fastgan finetune qa`` is told."""

    train: str = ""  # SQuAD's JSON, 1.1 or 2.0
    validation: str = ""
    length: int = 256  # tokens of question and window together
    stride: int = 96  # tokens that a window shares with the next
    epochs: int = 4

    FILES: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"stride": 0})
        if self.stride >= self.length // 2:
            raise ValueError(f"stride must be less than half the length of {self.length}, got {self.stride}")


@dataclass(frozen=True)
class Answer:
    """A span of a text: ``score`` is its logits' sum less that of "no answer"; ``text`` is "" for no answer."""

    text: str
    score: float
    start: int
    end: int


@dataclass
class _Window:
    """A piece of a text as the model reads it: its question's number, and each token's characters (None outside)."""

    question: int
    offsets: list[tuple[int, int] | None]


def _prepare(config: QAConfig, say: Callable[[str], None]) -> Prepared:
    from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, DataCollatorWithPadding

    from fastgan.training.language_trainer import Goal

    train, validation = read_questions(config.train), read_questions(config.validation)
    shared = len({each.context for each in validation} & {each.context for each in train})
    if shared:
        say(f"{shared} texts of {config.validation} are in {config.train} as well: figures flatter")
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
        model = load_model(
            AutoModelForQuestionAnswering, config.model, tokenizer, config.attention, "questions",
            dropout=config.dropout,
        )  # fmt: skip
    else:
        texts = [*dict.fromkeys(each.context for each in train), *(each.question for each in train)]
        tokenizer, model = small_bert(BertForQuestionAnswering, config, texts, {})
    if not tokenizer.is_fast:
        raise ValueError(f"{config.model}: its tokenizer has no tokenizer.json, which finding answers needs")
    setattr(model.config, _MAYBE_NONE, any(not each.answers for each in train))
    length = most_tokens(model, tokenizer, config.length)
    rows, windows = _windows(tokenizer, train, length, config.stride)
    lost = len(train) - len({window.question for row, window in zip(rows, windows, strict=True)
                             if row["start_positions"] or not train[window.question].answers})  # fmt: skip
    if lost:
        say(f"{lost} of {len(train)} answers are cut by every window: longer than the stride of {config.stride}")
    held, held_windows = _windows(tokenizer, validation, length, config.stride)
    order = longest_first(_lengths(held))
    held, held_windows = [held[index] for index in order], [held_windows[index] for index in order]
    maybe_none = may_have_no_answer(model)

    def measure(predicted: Any) -> dict[str, float]:
        begins, ends = (np.asarray(each) for each in predicted.predictions[:2])
        found = _best(validation, held_windows, list(begins), list(ends), maybe_none)
        evaluation = em_f1([each.text for each in found], _golds(validation), samples=0)
        return {"f1": evaluation["F1"], "exact_match": evaluation["EM"]}

    return Prepared(
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        lengths=_lengths(rows),
        held_out=held,
        collator=DataCollatorWithPadding(tokenizer),
        goal=Goal("f1", greater=True),
        length=length,
        label="loss",
        measure=measure,
        counts={"train": len(train), "validation": len(validation), "train_windows": len(rows),
                "validation_windows": len(held), "train_cut": lost, "in_both": shared},
        arguments={"prediction_loss_only": False, "per_device_eval_batch_size": max(32, config.batch_size)},
    )  # fmt: skip


QA = Task("qa", QAConfig, _prepare)


def _lengths(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [len(row["input_ids"]) for row in rows]


def _golds(questions: Sequence[Question]) -> list[list[str]]:
    return [[text for text, _ in each.answers] for each in questions]


def _windows(
    tokenizer: Any, questions: Sequence[Question], length: int, stride: int
) -> tuple[list[dict[str, Any]], list[_Window]]:
    """The windows of each question's text as examples; an answer that a window does not hold whole is at 0, "none"."""
    rows, windows = [], []
    for number, each in enumerate(questions):
        # A question that leaves its text no room is cut; its beginning says most.
        asked = tokenizer(each.question.strip(), add_special_tokens=False, truncation=True, max_length=length // 2)
        question = tokenizer.decode(asked["input_ids"]) if len(asked["input_ids"]) == length // 2 else each.question
        taken = len(asked["input_ids"]) + tokenizer.num_special_tokens_to_add(pair=True)
        shared = max(0, min(stride, (length - taken) // 2))  # a window must come forward
        encoded = tokenizer(
            question.strip(), each.context, truncation="only_second", max_length=length, stride=shared,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        for index, ids in enumerate(encoded["input_ids"]):
            sides = encoded.sequence_ids(index)
            mapping = encoded["offset_mapping"][index]
            offsets = [tuple(span) if side == 1 and span[1] > span[0] else None
                       for span, side in zip(mapping, sides, strict=True)]  # fmt: skip
            start, end = _place(offsets, each)
            row = {name: encoded[name][index] for name in ("attention_mask", "token_type_ids") if name in encoded}
            rows.append({"input_ids": ids, **row, "start_positions": start, "end_positions": end})
            windows.append(_Window(number, offsets))
    return rows, windows


def _place(offsets: list[Any], question: Question) -> tuple[int, int]:
    """The first answer's tokens in a window; (0, 0) if it is not in it whole."""
    if not question.answers:
        return 0, 0
    text, begin = question.answers[0]
    finish = begin + len(text)
    inside = [at for at, span in enumerate(offsets) if span is not None and span[0] < finish and span[1] > begin]
    if not inside:
        return 0, 0
    first, last = offsets[inside[0]], offsets[inside[-1]]
    whole = first[0] <= begin + len(text) - len(text.lstrip()) and last[1] >= begin + len(text.rstrip())
    return (inside[0], inside[-1]) if whole else (0, 0)


def _best(
    questions: Sequence[Question],
    windows: Sequence[_Window],
    begins: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
    maybe_none: bool,
    longest: int = 30,
) -> list[Answer]:
    """The best span of each question over its windows, at most ``longest`` tokens."""
    best: list[tuple[float, int, int] | None] = [None] * len(questions)
    none = [np.inf] * len(questions)
    for window, begin, end in zip(windows, begins, ends, strict=True):
        at = np.array([number for number, span in enumerate(window.offsets) if span is not None])
        none[window.question] = min(none[window.question], float(begin[0] + end[0]))
        if not len(at):
            continue
        scores = begin[at][:, None] + end[at][None, :]
        far = at[None, :] - at[:, None]
        scores = np.where((far >= 0) & (far < longest), scores, -np.inf)
        first, last = np.unravel_index(int(scores.argmax()), scores.shape)
        score, known = float(scores[first, last]), best[window.question]
        if known is None or score > known[0]:
            spans = window.offsets[int(at[first])], window.offsets[int(at[last])]
            assert spans[0] is not None
            assert spans[1] is not None
            best[window.question] = (score, spans[0][0], spans[1][1])
    found = []
    for question, known, without in zip(questions, best, none, strict=True):
        score = known[0] - without if known is not None else -np.inf
        if known is None or (maybe_none and score < 0):
            found.append(Answer("", score, 0, 0))
        else:
            found.append(Answer(question.context[known[1] : known[2]], score, known[1], known[2]))
    return found


def may_have_no_answer(model: Any) -> bool:
    """Whether a model was trained on questions without an answer."""
    return bool(getattr(model.config, _MAYBE_NONE, False))


@torch.no_grad()
def answer(
    model: str | os.PathLike[str] | tuple[Any, Any],
    questions: str | Sequence[str],
    contexts: Sequence[str],
    *,
    batch_size: int = 32,
    length: int = 256,
    stride: int = 96,
    may_have_none: bool | None = None,
    attention: str = "fastgan",
) -> list[Answer]:
    """The answer to each question in its text.

    Args:
        model: a folder that :func:`finetune` or transformers wrote, a name on the hub, or a (model, tokenizer) pair.
        questions: one for each text, or one for all.
        contexts: the texts, of any length.
        batch_size: windows at a time.
        length, stride: tokens of question and window together, and those that windows share.
        may_have_none: whether "no answer" may be the answer; None: as the model was trained.

    Raises ValueError (unequal numbers, no such model) or FileNotFoundError.
    """
    asked = [questions] * len(contexts) if isinstance(questions, str) else list(questions)
    if len(asked) != len(contexts):
        raise ValueError(f"as many questions as texts are needed, got {len(asked)} and {len(contexts)}")
    pairs = [Question(str(number), question, context, ())
             for number, (question, context) in enumerate(zip(asked, contexts, strict=True))]  # fmt: skip
    with evaluating(model, "AutoModelForQuestionAnswering", attention, "questions") as (network, tokenizer):
        device = next(network.parameters()).device
        rows, windows = _windows(tokenizer, pairs, most_tokens(network, tokenizer, length), stride)
        begins: list[Any] = [None] * len(rows)
        ends: list[Any] = [None] * len(rows)
        for chosen in batches_of_like_length(_lengths(rows), batch_size):
            inputs = [{name: value for name, value in rows[index].items() if not name.endswith("positions")}
                      for index in chosen]  # fmt: skip
            with _quiet():
                batch = tokenizer.pad(inputs, return_tensors="pt").to(device)
            outputs = network(**batch)
            for place, index in enumerate(chosen):
                begins[index] = outputs.start_logits[place].float().cpu().numpy()
                ends[index] = outputs.end_logits[place].float().cpu().numpy()
    if may_have_none is None:
        may_have_none = may_have_no_answer(network)
    return _best(pairs, windows, begins, ends, may_have_none)


def evaluate_qa(
    model: str | os.PathLike[str], data: str | os.PathLike[str], *, samples: int = SAMPLES, seed: int = SEED
) -> tuple[Evaluation, dict[str, str]]:
    """Exact match and F1 (SQuAD's) of a model on SQuAD's JSON, and its predictions, question's id → answer.

    Raises ValueError (TextError for what the file holds) or FileNotFoundError, naming the file or folder.
    """
    questions = read_questions(data)
    found = answer(model, [each.question for each in questions], [each.context for each in questions])
    evaluation = em_f1([each.text for each in found], _golds(questions), samples=samples, seed=seed)
    return evaluation, {question.id: each.text for question, each in zip(questions, found, strict=True)}
