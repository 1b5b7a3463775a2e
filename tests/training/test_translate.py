"""Translation on a tiny language: it learns, resumes to the same bits, and searches as transformers does."""

from __future__ import annotations

import dataclasses
import gzip
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("sacrebleu")

from fastgan.data.units import TextError
from fastgan.training.finetune import finetune, resume_finetune
from fastgan.training.pairs import shared_bpe
from fastgan.training.translate import TRANSLATE, TranslateConfig, evaluate_translate, translate
from tests.training.test_pretrain import StopsAt

WORDS = {"rot": "red", "blau": "blue", "hund": "dog", "katze": "cat", "haus": "house", "läuft": "runs"}


def _pairs(seed, count):
    draws = np.random.default_rng(seed)
    lines = [draws.choice(list(WORDS), draws.integers(2, 5)) for _ in range(count)]
    return ["\n".join(" ".join(each) for each in side) + "\n"
            for side in (lines, [[WORDS[word] for word in line] for line in lines])]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for name, (source, target) in (("train", _pairs(0, 400)), ("val", _pairs(1, 20))):
        (folder / f"{name}.de.gz").write_bytes(gzip.compress(source.encode()))
        (folder / f"{name}.en").write_text(target)
    return folder


def tiny(files, **options):
    settings = {"train": (files / "train.de.gz", files / "train.en"), "from_scratch": "small", "layers": 1, "width": 32,
                "validation": (files / "val.de.gz", files / "val.en"), "heads": 2, "vocab_size": 300, "length": 24,
                "batch_size": 32, "dropout": 0.0, "beams": 2, "epochs": 2, **options}  # fmt: skip
    return TranslateConfig(**settings)


@pytest.fixture(scope="module")
def learnt(files, tmp_path_factory):
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("learnt") / "run"
    return finetune(TRANSLATE, tiny(files, epochs=16, lr=1e-2, eval_every=104), run)


def test_it_learns_and_transformers_reads_the_folder(files, learnt):
    from transformers import AutoTokenizer, MarianMTModel

    run = learnt.folder
    assert learnt.total == 16 * 13
    assert learnt.figures["bleu"] > 60
    assert learnt.figures["bleu_beam_2"] > 60
    evaluation, lines = evaluate_translate(run, files / "val.de.gz", files / "val.en", beams=2, samples=20)
    assert evaluation["BLEU"] == pytest.approx(learnt.figures["bleu_beam_2"])
    assert evaluation["chrF2"] > 60
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    # transformers alone, without our kernels, one sentence at a time
    model, tokenizer = MarianMTModel.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    for number in (0, 7):
        text = gzip.decompress((files / "val.de.gz").read_bytes()).decode().splitlines()[number]
        ids = model.generate(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), num_beams=2,
                             max_new_tokens=20)  # fmt: skip
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == lines[number]


def test_batches_do_not_change_translations(files, learnt):
    texts = ["rot hund", "blau katze läuft haus", "haus", "hund " * 40]
    together = translate(learnt.folder, texts, beams=2)
    alone = [translate(learnt.folder, [text], beams=2, batch_size=1)[0] for text in texts]
    assert together == alone
    with pytest.raises(ValueError, match="beams"):
        translate(learnt.folder, texts, beams=0)


def test_R65_stopped_and_resumed_it_has_the_same_weights(files, tmp_path):
    config = tiny(files, dropout=0.2, epochs=1, gradient_accumulation=2, batch_size=16, eval_every=6)
    whole = finetune(TRANSLATE, config, tmp_path / "whole")
    first = finetune(TRANSLATE, config, tmp_path / "run", reporter=StopsAt(5))
    assert (first.step, first.interrupted) == (5, True)
    second = resume_finetune(TRANSLATE, tmp_path / "run")
    assert dataclasses.replace(second, folder=whole.folder) == whole
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("validation_bleu" in row for row in rows) == 3


def test_R40_accumulated_batches_are_weighted_by_their_tokens(files, tmp_path):
    """Two batches of unlike lengths are one batch: each token counts alike. Fused head and transformers' own."""
    losses = {}
    for name, options in (("one", {"batch_size": 400}), ("ten", {"batch_size": 40, "gradient_accumulation": 10}),
                          ("sdpa", {"batch_size": 400, "attention": "sdpa"})):  # fmt: skip
        finetune(TRANSLATE, tiny(files, max_steps=2, eval_every=1, **options), tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row[figure] for row in rows for figure in ("loss", "grad_norm") if figure in row]
        assert len(losses[name]) == 4
    assert losses["ten"] == pytest.approx(losses["one"], rel=1e-4)
    assert losses["sdpa"] == pytest.approx(losses["one"], rel=1e-4)


def test_the_mean_of_the_last_weights_is_kept_where_it_is_the_best(files, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from fastgan.training import language_trainer

    seen = []

    def watched(job, ended, real=language_trainer.try_average):
        means = [load_file(path / "model.safetensors") for path in sorted(job.folder.glob("recent-*"))]
        seen.append({name: sum(each[name].double() for each in means) / len(means) for name in means[0]})
        assert len(means) == 3
        ended.best = (ended.best[0], -1.0)  # BLEU is 0 or more: any mean is better
        return real(job, ended)

    config = tiny(files, epochs=1, eval_every=3, average=3, lr=1e-3)
    monkeypatch.setattr(language_trainer, "try_average", watched)
    first = finetune(TRANSLATE, config, tmp_path / "run", reporter=StopsAt(7))
    assert first.interrupted
    result = resume_finetune(TRANSLATE, tmp_path / "run")
    assert result.averaged
    kept = load_file(tmp_path / "run" / "model.safetensors")
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor.double(), seen[0][name], rtol=1e-6, atol=1e-7)
    assert not list((tmp_path / "run").glob("recent-*"))


def test_the_tokenizer_ends_every_text_and_reads_back():
    tokenizer = shared_bpe(["ein größerer Hund läuft", "a bigger dog runs"] * 3, 300)
    ids = tokenizer("größer 🐕")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "größer 🐕"


def test_what_cannot_be_is_refused_by_name(files, tmp_path):
    for options, words in [
        ({"train": "a"}, "train must name two files"), ({"validation": ("a", "")}, "validation must name two"),
        ({"width": 30, "heads": 4}, "width"), ({"label_smoothing": 1.0}, "label_smoothing"), ({"beams": 0}, "beams"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            tiny(files, **options)
    short = tmp_path / "short.en"
    short.write_text("red\n")
    with pytest.raises(TextError, match=r"train\.de\.gz has 400 lines and .*short\.en has 1"):
        finetune(TRANSLATE, tiny(files, train=(files / "train.de.gz", short)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
