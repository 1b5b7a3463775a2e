"""Text: the embedded reference cleaned, sentences with their chapters, splits, tokens and blocks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fastgan.data import text


def test_python_reference_is_clean():
    reference = text.python_reference()
    assert sum(map(len, reference.values())) > 200_000
    everything = "\n".join(reference.values())
    assert "   " not in everything
    assert not any(set(line) <= set("*=-~ ") for line in everything.splitlines())
    assert any("statement" in line for line in reference["import"].splitlines())


def test_paragraphs_are_unwrapped():
    assert text.paragraphs("Title\n*****\n\nOne line\nwraps   here.\n\n+----+\n| a  |\n+----+\n") == [
        "Title",
        "One line wraps here.",
        "a",
    ]
    assert text.unique_paragraphs(["a\nb", "b\nc\n\n"]) == ["a", "b", "c"]


def test_labelled_sentences_are_balanced_and_have_one_chapter():
    sentences, labels, names = text.labelled_sentences(per_chapter=100)
    assert len(set(sentences)) == len(sentences) == len(labels)
    counts = Counter(labels)
    assert sorted(counts) == list(range(len(names)))
    assert len(names) >= 5
    assert min(counts.values()) >= 80
    assert text.labelled_sentences(per_chapter=100)[0] == sentences


def test_equal_texts_fall_on_one_side_and_stay_there():
    texts = [f"Sentence number {number}." for number in range(400)]
    training, held_out = text.split_by_hash(texts, 0.25)
    assert sorted(training + held_out) == list(range(400))
    assert 60 < len(held_out) < 140
    twice = texts + [entry.upper().replace(" ", "  ") for entry in texts]
    training, held_out = text.split_by_hash(twice, 0.25)
    assert {index % 400 for index in training}.isdisjoint(index % 400 for index in held_out)
    assert text.split_by_hash(texts, 0.0)[1] == []
    assert text.split_by_hash(texts, 1.0)[0] == []
    with pytest.raises(ValueError, match="validation"):
        text.split_by_hash(texts, 1.5)


def test_texts_are_read_from_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond")
    (tmp_path / "a.MD").write_text("first")
    (tmp_path / "c.csv").write_text("no text")
    assert text.read_texts(tmp_path) == ["first", "second"]
    assert text.read_texts(tmp_path / "b.txt") == ["second"]
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"d\.txt.*UTF-8"):
        text.read_texts(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        text.read_texts(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text"):
        text.read_texts(tmp_path / "empty")


def test_pack_fills_every_block_and_loses_nothing_but_the_end():
    sequences = [[10, 11, 12], [13], [14, 15, 16, 17]]
    blocks = text.pack(sequences, 6, cls_id=1, sep_id=2)
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [[1, 10, 11, 12, 2, 2], [1, 13, 2, 14, 15, 2]]
    with pytest.raises(ValueError, match="do not fill"):
        text.pack([[1]], 64, 1, 2)
    with pytest.raises(ValueError, match="length"):
        text.pack([[1]], 2, 1, 2)


def test_tokenizer_has_berts_tokens_and_is_read_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    lines = text.unique_paragraphs(text.python_reference().values())[:300]
    tokenizer = text.train_tokenizer(lines, 500)
    assert len(tokenizer) <= 500
    ids = tokenizer("The [MASK] of Objects")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id
    assert ids.count(tokenizer.mask_token_id) == 1
    assert tokenizer.unk_token_id not in ids
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("The [MASK] of Objects")["input_ids"] == ids
    assert text.train_tokenizer(lines, 500).get_vocab() == tokenizer.get_vocab()
    for options in ({"texts": [], "vocab_size": 500}, {"texts": lines, "vocab_size": 5}):
        with pytest.raises(ValueError):
            text.train_tokenizer(**options)


def test_files_of_every_line_ending_and_of_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    assert text.read_texts(tmp_path) == ["one\ntwo\nthree"]
    for content, words in ((b"PK\x03\x04\0\0", "not text"), ("hi".encode("utf-16"), "UTF-16")):
        (tmp_path / "b.txt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"b\.txt.*{words}"):
            text.read_texts(tmp_path)


def test_R66_the_vocabulary_is_the_same_in_every_run():
    pytest.importorskip("transformers")
    lines = text.unique_paragraphs(text.python_reference().values())[:300]
    first = text.train_tokenizer(lines, 500).get_vocab()
    # the trainer's hash tables differed in every second run
    assert all(text.train_tokenizer(lines, 500).get_vocab() == first for _ in range(8))


def test_other_scripts_a_file_without_spaces_and_a_single_string():
    pytest.importorskip("transformers")
    for line in ("日本語のテキスト", "مرحبا بالعالم", "x" * 100_000):  # the last took minutes
        tokenizer = text.train_tokenizer([line], 200)
        assert tokenizer.unk_token_id not in tokenizer(line[:50])["input_ids"]
    assert (
        text.train_tokenizer("a text alone", 50).get_vocab() == text.train_tokenizer(["a text alone"], 50).get_vocab()
    )
    with pytest.raises(TypeError, match="texts must be strings, got bytes"):
        text.train_tokenizer([b"x"])
