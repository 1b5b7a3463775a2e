"""Causal models on a text file, what is drawn from them, and the measures of it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("sacrebleu")

from fastgan.training.finetune import finetune, resume_finetune
from fastgan.training.generate import GENERATE, GenerateConfig, evaluate_generate, generate, load, repeats_itself
from tests.training.test_pretrain import LINES, StopsAt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("\n".join(LINES[:100]) + "\n")
    (folder / "b.txt").write_text("\n".join(LINES[100:]) + "\n")
    return folder


def tiny(files, **options):
    settings = {"train": files / "a.txt", "validation": files / "b.txt", "from_scratch": "small",
                "layers": 1, "width": 32, "heads": 2, "vocab_size": 300, "length": 32, "batch_size": 4, "epochs": 2,
                **options}  # fmt: skip
    return GenerateConfig(**settings)


@pytest.fixture(scope="module")
def learnt(files, tmp_path_factory):
    torch.set_num_threads(1)
    config = tiny(files, epochs=12, lr=1e-2, dropout=0.0, early_stopping=0)
    return finetune(GENERATE, config, tmp_path_factory.mktemp("learnt") / "run")


def test_it_learns_and_writes(files, learnt):
    assert learnt.figures["loss"] < 1.5
    assert learnt.figures["perplexity"] == pytest.approx(math.exp(learnt.figures["loss"]))
    assert 0 < learnt.figures["loss_per_character"] < learnt.figures["loss"]
    text = generate(learnt.folder, "the red cat number", max_tokens=12, temperature=0)[0][0]
    assert text.startswith("the red cat number ")
    assert "is red" in text


def test_seed_temperature_and_place(learnt):
    pair = load(str(learnt.folder))
    state = torch.get_rng_state()
    one = generate(pair, ["the red", "the blue"], n=3, max_tokens=8, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert [len(each) for each in one] == [3, 3]
    assert len(set(one[0])) > 1
    assert generate(pair, ["the red", "the blue"], n=3, max_tokens=8, seed=1) == one
    assert generate(pair, "the blue", n=3, max_tokens=8, seed=1, first=1) == one[1:]
    assert generate(pair, ["the red", "the blue"], n=3, max_tokens=8, seed=2) != one
    # The best word each time, three ways.
    greedy = generate(pair, "the red", max_tokens=8, temperature=0)
    assert generate(pair, "the red", max_tokens=8, top_k=1) == greedy
    assert generate(pair, "the red", max_tokens=8, top_p=1e-6) == greedy
    assert len(generate(pair, "the red", n=2, beams=3, max_tokens=4)[0]) == 2


def test_prompts_that_are_long_or_empty_and_what_cannot_be(learnt):
    pair = load(str(learnt.folder))
    with pytest.warns(UserWarning, match="loses its first"):
        text = generate(pair, "the red cat " * 30, max_tokens=50, temperature=0)[0][0]
    assert len(pair[1](text)["input_ids"]) <= 33
    assert isinstance(generate(pair, "", max_tokens=3)[0][0], str)
    for options, words in [
        ({"n": 0}, "n must"), ({"max_tokens": 0}, "max_tokens"), ({"temperature": -1}, "temperature"),
        ({"top_k": -1}, "top_k"), ({"top_p": 0}, "top_p"), ({"n": 2, "temperature": 0}, "n must"),
        ({"beams": 2, "top_k": 5}, "beams must be 1"), ({"beams": 2, "n": 3}, "n must be at most the 2 beams"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            generate(pair, "the", **options)


def test_measures_beside_the_files_own(files, learnt):
    found = evaluate_generate(learnt.folder, files / "b.txt", n=10, length=24, samples=50)
    # Blocks that do not fill the length count here; the trainer leaves them out.
    assert found["loss"] == pytest.approx(learnt.figures["loss"], rel=0.1)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["loss per character"] == pytest.approx(learnt.figures["loss_per_character"], rel=0.1)
    loss = found.results[0]
    assert loss.low < loss.score < loss.high
    for name in ("distinct-2", "data distinct-2"):
        assert 0 < found[name] <= 1
    assert found["self-BLEU"] > 5
    assert found["data self-BLEU"] > 5
    assert (
        found["self-BLEU"] == evaluate_generate(learnt.folder, files / "b.txt", n=10, length=24, samples=0)["self-BLEU"]
    )


def test_R77_a_model_that_repeats_itself_is_said_and_temperature_is_the_baseline(files, learnt, tmp_path):
    from typer.testing import CliRunner

    from fastgan.cli import app

    varied = evaluate_generate(learnt.folder, files / "b.txt", n=10, length=24, samples=0)
    assert repeats_itself(varied) == ""
    # The last hidden state no longer depends on the text, and one word has nearly all of the chance.
    network, tokenizer = load(str(learnt.folder))
    with torch.no_grad():
        network.transformer.ln_f.weight.zero_()
        network.transformer.ln_f.bias.copy_(50 * network.lm_head.weight[tokenizer("the red")["input_ids"][-1]])
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "collapsed")
    arguments = ["evaluate", "generate", "--model", str(tmp_path / "collapsed"), "--data", str(files / "b.txt"), "--n",
                 "10", "--length", "24", "--samples", "0"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "the model repeats itself: " in result.stderr
    assert "distinct-2" in result.stdout
    assert "data distinct-2" in result.stdout
    found = evaluate_generate(tmp_path / "collapsed", files / "b.txt", n=10, length=24, samples=0)
    assert found["distinct-2"] < 0.75 * found["data distinct-2"]
    assert found["self-BLEU"] > varied["self-BLEU"]
    # So hot that the chances are even: what it draws is various again, and the loss is as bad as before.
    hot = evaluate_generate(tmp_path / "collapsed", files / "b.txt", n=10, length=24, temperature=1e6, samples=0)
    assert hot["distinct-2"] > found["distinct-2"]
    assert hot["loss"] == found["loss"]
    assert repeats_itself(hot) == ""


def test_R65_stopped_and_resumed_and_gone_on_from(files, tmp_path):
    whole = finetune(GENERATE, tiny(files), tmp_path / "whole")
    first = finetune(GENERATE, tiny(files), tmp_path / "run", reporter=StopsAt(7))
    assert first.interrupted
    second = resume_finetune(GENERATE, tmp_path / "run")
    assert dataclasses.replace(second, folder=whole.folder) == whole
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    third = finetune(GENERATE, tiny(files, from_scratch=None, model=str(tmp_path / "run"), epochs=1), tmp_path / "on")
    assert third.figures["loss"] < second.figures["loss"]


def test_too_little_text_is_said(files, tmp_path):
    (tmp_path / "c.txt").write_text("the cat\n")
    with pytest.raises(ValueError, match=r"c\.txt: its \d+ tokens do not fill one block of length 32"):
        finetune(GENERATE, tiny(files, validation=tmp_path / "c.txt"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
