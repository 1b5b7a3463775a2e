"""A BERT of one thin layer: it learns, says what it measured, and its folder is read back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastgan.data.text import train_tokenizer
from fastgan.training.language import fill_mask, finetune_classifier, pretrain_bert

# A language of two kinds of sentence: what was red comes first with cats, what was blue with boats.
KINDS = (("red", "cat"), ("blue", "boat"))
TEXTS = [f"the {color} {noun} number {n} is {color} ." for n in range(40) for color, noun in KINDS]
PROBE = "the [MASK] cat number 3 is red ."


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = train_tokenizer(TEXTS, 120)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    result = pretrain_bert(
        TEXTS, tokenizer, out=folder, layers=1, width=32, heads=2, length=16, batch_size=16, steps=150, lr=1e-2,
        validation=0.2, probes=[PROBE], attn_implementation="sdpa",
    )  # fmt: skip
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    return result


def test_pretraining_learns_and_says_so(pretrained):
    assert pretrained.history[0][1] > 1.5 * pretrained.history[-1][1]
    assert pretrained.validation_after < 0.6 * pretrained.validation_before
    assert pretrained.history[-1][0] == pretrained.steps == 150
    guesses = pretrained.guesses[PROBE]
    assert len(guesses["before"]) == len(guesses["after"]) == 5
    best = [word for word, _ in guesses["after"]]
    assert {"red", "is", "blue", "the"} & set(best[:3])  # words of this language, no longer any fragment
    assert guesses["after"][0][1] > 2 * guesses["before"][0][1]


def test_pretraining_folder_is_read_back(pretrained):
    after = fill_mask(pretrained.folder, PROBE, top=3)
    assert [word for word, _ in after] == [word for word, _ in pretrained.guesses[PROBE]["after"][:3]]
    written = json.loads(Path(pretrained.folder, "loss.json").read_text())
    assert written["validation_after"] == pretrained.validation_after
    with Image.open(f"{pretrained.folder}/loss.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 10


def test_fill_mask_wants_one_mask(pretrained):
    for text in ("no mask at all", "[MASK] and [MASK]"):
        with pytest.raises(ValueError, match="one"):
            fill_mask(pretrained.folder, text)


def test_finetuning_tells_classes_apart(pretrained, tmp_path):
    labels = [int("boat" in text) for text in TEXTS]
    result = finetune_classifier(
        pretrained.folder, TEXTS, labels, out=tmp_path, label_names=["cat", "boat"], epochs=3, lr=2e-3,
        attn_implementation="sdpa",
    )  # fmt: skip
    assert result.accuracy > 0.9 > result.commonest
    assert result.training_sentences + result.validation_sentences == len(TEXTS)
    assert result.history[-1][0] == result.steps
    from transformers import AutoModelForSequenceClassification

    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.id2label == {0: "cat", 1: "boat"}


def test_impossible_arguments_are_refused(pretrained, tmp_path):
    tokenizer = train_tokenizer(TEXTS, 120)
    with pytest.raises(ValueError, match="heads"):
        pretrain_bert(TEXTS, tokenizer, out=tmp_path, width=30, heads=4)
    with pytest.raises(ValueError, match="do not fill"):
        pretrain_bert(["a cat"], tokenizer, out=tmp_path, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="labels"):
        finetune_classifier(pretrained.folder, TEXTS, [0], out=tmp_path)
    with pytest.raises(ValueError, match="labels must be 0 to 1"):
        finetune_classifier(pretrained.folder, ["a", "b"], [0, 2], out=tmp_path, label_names=["x", "y"])
