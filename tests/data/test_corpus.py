"""Text files as streams of lines, and corpora made of them: nothing lost, nothing on both sides, whole or not there."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from fastgan.data import corpus as corpora
from fastgan.data import units
from fastgan.data.blocks import Blocks, make_blocks
from fastgan.data.corpus import Corpus, prepare_text
from fastgan.data.units import Read, TextError, read_units

LINES = [f"The {color} {noun} number {n} is {color}, again." for n in range(60) for color, noun in
         (("red", "cat"), ("blue", "boat"), ("grün", "Baum"))]  # fmt: skip


def read(file, unit="line", **options):
    counts = Read()
    return list(read_units(file, unit, counts, **options)), counts


def whole(pieces):
    """Pieces joined to the lines or paragraphs that they were."""
    texts = []
    for text, begins, _ in pieces:
        if begins:
            texts.append(text)
        else:
            texts[-1] += text
    return texts


@pytest.mark.parametrize("block", [5, 16, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_and_paragraphs_do_not_depend_on_blocks(tmp_path, monkeypatch, block, newline):
    monkeypatch.setattr(units, "BLOCK", block)
    file = tmp_path / "a.txt"
    file.write_bytes("eins zwei\ndrei ü\n\n\nvier\n \t\nfünf sechs sieben".replace("\n", newline).encode("utf-8-sig"))
    assert whole(read(file)[0]) == ["eins zwei", "drei ü", "vier", "fünf sechs sieben"]
    if block > 20:
        assert whole(read(file, "paragraph")[0]) == ["eins zwei\ndrei ü", "vier", "fünf sechs sieben"]


def test_a_long_line_comes_in_pieces_and_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "BLOCK", 100)
    file = tmp_path / "a.txt"
    text = "wörter " * 200 + "ü" * 333
    file.write_text(f"before\n{text}\nafter\n", encoding="utf-8")
    pieces, counts = read(file)
    assert whole(pieces) == ["before", text, "after"]
    assert counts.long == 1
    assert max(len(piece.encode()) for piece, _, _ in pieces) <= 200
    assert [ends for _, _, ends in pieces].count(True) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ä\nab".encode("utf-16"), "UTF-16"),
        (b"one\ntwo caf\xe9 au lait\n", r"line 2, column 8: byte 11 \(0xe9\).*Latin-1"),
        ("ü\nü".encode() + b"\0", "line 2, column 2: byte 5 is zero"),
        (b"ok\n\xc3", r"line 2, column 1: byte 3 \(0xc3\)"),
        (b"\xef\xbb\xbfa\xe9\n", r"line 1, column 2: byte 4 \(0xe9\)"),
    ],
)
def test_what_is_no_utf8_is_named_by_line_column_and_byte(tmp_path, content, words):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(TextError, match=rf"bad\.txt.*{words}"):
        read(file)
    with pytest.raises(TextError, match="bad"):
        prepare_text([file], tmp_path / "out", vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_bad_lines_can_be_skipped_and_are_counted(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\ntw\xe9\nthr\0e\nfour\n")
    pieces, counts = read(file, skip_bad_lines=True)
    assert whole(pieces) == ["one", "four"]
    assert counts.bad_lines == 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    (folder / "b.txt").write_text("\n".join(line.upper() for line in LINES), encoding="utf-8")
    (folder / "empty.txt").touch()
    prepared = prepare_text(
        [folder / "a.txt", folder / "b.txt", folder / "empty.txt"], folder / "out", vocab_size=400, validation=0.25
    )
    return folder, prepared


def test_nothing_is_lost_and_nothing_is_on_both_sides(made):
    folder, prepared = made
    corpus = Corpus(folder / "out")
    tokenizer = corpus.tokenizer()
    sides = {}
    for split in corpora.SPLITS:
        ids = corpus.ids(split)
        assert ids.dtype == np.uint16
        assert len(ids) == prepared.counts[split]["tokens"]
        text = tokenizer.decode(ids.tolist())
        assert text.count("<|endoftext|>") == 2  # one for each file with text
        sides[split] = [line for line in text.replace("<|endoftext|>", "").split("\n") if line]
    assert sorted(sides["train"] + sides["validation"]) == sorted([*LINES, *(line.upper() for line in LINES)])
    assert {line.lower() for line in sides["train"]}.isdisjoint(line.lower() for line in sides["validation"])
    assert 0.1 < len(sides["validation"]) / 360 < 0.4
    assert prepared.read.blank_files == 1
    assert sum(count["units"] for count in prepared.counts.values()) == 360


def test_the_same_text_gives_the_same_bytes(made, tmp_path):
    folder, _ = made
    prepare_text([folder / "a.txt", folder / "b.txt"], tmp_path / "again", vocab_size=400, validation=0.25)
    for name in ("train.bin", "validation.bin", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_a_small_batch_gives_the_same_ids(made, tmp_path, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(corpora, "_PIECE", 64)
    monkeypatch.setattr(corpora, "_BATCH", 200)
    monkeypatch.setattr(units, "BLOCK", 256)
    prepare_text([folder / "a.txt", folder / "b.txt"], tmp_path / "again", vocab_size=400, validation=0.25)
    assert (tmp_path / "again" / "train.bin").read_bytes() == (folder / "out" / "train.bin").read_bytes()


def test_wordpiece_parts_its_texts_and_takes_no_text_for_a_special_token(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join([*LINES, "look : [MASK] is text"]), encoding="utf-8")
    prepared = prepare_text(
        [tmp_path / "a.txt"], tmp_path / "out", vocab_size=300, lowercase=True, tokenizer="wordpiece", validation=0.0
    )
    corpus = Corpus(tmp_path / "out")
    ids, tokenizer = corpus.ids("train"), corpus.tokenizer()
    assert (ids == tokenizer.sep_token_id).sum() == len(LINES) + 1
    assert tokenizer.mask_token_id not in ids
    assert prepared.counts["validation"]["tokens"] == 0
    assert len(corpus.ids("validation")) == 0
    # ... and the tokenizer of one corpus serves another
    prepare_text([tmp_path / "a.txt"], tmp_path / "other", tokenizer=tmp_path / "out", validation=0.0)
    assert (Corpus(tmp_path / "other").ids("train") == ids).all()


def test_a_big_input_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_SAMPLE", 4000)
    monkeypatch.setattr(corpora, "_WINDOW", 500)
    (tmp_path / "a.txt").write_text("\n".join(LINES * 5), encoding="utf-8")
    prepared = prepare_text([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300)
    assert 2000 < prepared.sampled <= 4000


def test_refusals_name_what_is_wrong_and_leave_nothing(tmp_path):
    file, empty = tmp_path / "a.txt", tmp_path / "empty.txt"
    file.write_text("\n".join(LINES), encoding="utf-8")
    empty.touch()
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine").touch()
    out = tmp_path / "out"
    for arguments, error, words in [
        (([empty], out), ValueError, "empty"),
        (([tmp_path / "nowhere"], out), FileNotFoundError, "nowhere"),
        (([file, file], out), ValueError, "twice"),
        (([used], out), ValueError, "no .txt"),
        (([file], used), FileExistsError, "used"),
    ]:
        with pytest.raises(error, match=words):
            prepare_text(*arguments, vocab_size=300)
    for options, words in [
        ({"vocab_size": 260}, "261"),
        ({"unit": "word"}, "unit"),
        ({"validation": 1.0}, "validation"),
        ({"tokenizer": "gpt"}, "tokenizer"),
    ]:
        with pytest.raises(ValueError, match=words):
            prepare_text([file], out, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "empty.txt", "used"]
    assert os.listdir(used) == ["mine"]


def test_a_damaged_corpus_is_refused(made, tmp_path):
    folder, _ = made
    with pytest.raises(FileNotFoundError, match="no corpus"):
        Corpus(tmp_path)
    (tmp_path / "corpus.json").write_text((folder / "out" / "corpus.json").read_text())
    (tmp_path / "train.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"train\.bin"):
        Corpus(tmp_path)
    (tmp_path / "corpus.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match=r"corpus\.json"):
        Corpus(tmp_path)


def test_blocks_are_a_pure_function_of_seed_and_number(made):
    corpus = Corpus(made[0] / "out")
    tokenizer = corpus.tokenizer()
    first, again = (make_blocks(corpus, "train", length=16, objective="mlm", seed=3, count=1000) for _ in range(2))
    other = make_blocks(corpus, "train", length=16, objective="mlm", seed=4, count=1000)
    assert all((first[700][name] == again[700][name]).all() for name in ("input_ids", "labels"))
    assert any((first[n]["input_ids"] != other[n]["input_ids"]).any() for n in range(5))
    count = first.blocks
    for epoch in range(2):  # each block once in an epoch
        seen = [first[epoch * count + n] for n in range(count)]
        bodies = sorted(tuple(torch.where(e["labels"] >= 0, e["labels"], e["input_ids"]).tolist()[1:-1]) for e in seen)
        assert bodies == sorted(map(tuple, corpus.ids("train")[: count * 14].reshape(-1, 14).tolist()))
    drawn = [first[n] for n in range(1000)]
    predicted = np.concatenate([(e["labels"] >= 0).numpy() for e in drawn])
    assert 0.10 < predicted.mean() < 0.17  # of 16, two are [CLS] and [SEP]
    for example in drawn[:50]:
        ids, labels = example["input_ids"].numpy(), example["labels"].numpy()
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert (labels >= 0).any()
        assert labels[0] == labels[-1] == -100
    masked = np.concatenate([(e["input_ids"] == tokenizer.mask_token_id).numpy() for e in drawn])
    assert 0.7 < masked[predicted].mean() < 0.9
    assert not masked[~predicted].any()


def test_causal_blocks_are_every_token_once(made):
    corpus = Corpus(made[0] / "out")
    ids = corpus.ids("train")
    blocks = Blocks(ids, corpus.tokenizer(), 32, "clm", 0, count=len(ids) // 32)
    got = sorted(tuple(blocks[n]["input_ids"].tolist()) for n in range(len(blocks)))
    assert got == sorted(map(tuple, ids[: len(ids) // 32 * 32].reshape(-1, 32).tolist()))
    assert (blocks[0]["labels"] == blocks[0]["input_ids"]).all()
    evaluated = make_blocks(corpus, "train", length=32, objective="clm", seed=0, most=3)
    assert len(evaluated) == 3
