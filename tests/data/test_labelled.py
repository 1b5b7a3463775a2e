"""Labelled texts and parallel lines: what is read, and what is said of files that are wrong."""

from __future__ import annotations

import gzip

import pytest

from fastgan.data.labelled import label_names, read_labelled, read_pairs
from fastgan.data.units import TextError

GOOD = ["a fine film", "dull, and long", 'the "end" , at last']
LABELS = ["1", "0", "1"]


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.tsv", 'a fine film\t1\ndull, and long\t0\n\nthe "end" , at last\t1'),
        ("b.tsv", "\ufeffid\tLabel\tSentence\r\n7\t1\ta fine film\r\n8\t0\tdull, and long\r\n"
                  '9\t1\tthe "end" , at last\r\n'),
        ("c.csv", 'a fine film,1\n"dull, and long",0\n"the ""end"" , at last",1\n'),
        ("d.CSV", 'sentiment,text\n1,a fine film\n0,"dull, and long"\n1,"the ""end"" , at last"\n'),
        ("e.jsonl", '{"text": "a fine film", "label": 1}\n{"text": "dull, and long", "label": 0.0}\n\n'
                    '{"text": "the \\"end\\" , at last", "label": "1"}\n'),
    ],
)  # fmt: skip
def test_each_way_of_writing_is_read(tmp_path, name, data):
    for path in (put(tmp_path, name, data), put(tmp_path, name + ".gz", gzip.compress(data.encode()))):
        read = read_labelled(path)
        assert read.texts == GOOD
        assert read.labels == LABELS
        assert label_names(read, path) == ["0", "1"]


def test_columns_are_named(tmp_path):
    path = put(tmp_path, "a.csv", "id,body,mood,label\n1,a fine film,good,x\n2,dull,bad,x\n")
    read = read_labelled(path, text_column="Body", label_column="mood")
    assert (read.texts, read.labels, read.lines) == (["a fine film", "dull"], ["good", "bad"], [2, 3])
    path = put(tmp_path, "a.jsonl", '{"body": "a fine film", "mood": "good"}\n')
    assert read_labelled(path, text_column="body", label_column="mood").labels == ["good"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", "x\t1\n", "must end in .tsv"),
        ("a.tsv", "", "no text in it"),
        ("a.tsv", "text\tlabel\n", "no labelled text"),
        ("a.tsv", "good\t1\nbad\t0\textra\n", "line 2: has 3 columns (parted by tabs), and 2 are expected"),
        ("a.tsv", "good\t1\nbad\n", "line 2: has 1 columns"),
        ("a.tsv", "good\t1\n \t0\n", "line 2: the text is empty"),
        ("a.tsv", "good\t1\nbad\t \n", "line 2, column 2: the label is empty"),
        ("a.tsv", "good\t1\nbad\t2\n", "line 2, column 2: the label is '2', which is none of 0, 1"),
        ("a.tsv", "id\ttext\tmood\n1\tgood\t1\n", "line 1: which column is the label? Columns are id, text, mood"),
        ("a.tsv", "good\t1\nb\xe4d\t0\n".encode("latin-1"), "line 2, column 2: byte 8 (0xe4) is not UTF-8; is it"),
        ("a.tsv", "good\t1\n".encode("utf-16"), "is UTF-16 text"),
        ("a.tsv", b"good\t1\nb\0d\t0\n", "line 2, column 2: byte 8 is zero"),
        ("a.csv", 'good,1\nnice,1\n"open,1\n', "line 3: not CSV"),
        ("a.csv", '"two\nlines",1\n"x",0,5\n', "line 3: has 3 columns (parted by commas)"),
        ("a.jsonl", '{"text": "good", "label": 1}\n{"text": \n', "line 2, column"),
        ("a.jsonl", '{"text": "good", "label": 1}\n["bad", 0]\n', "line 2: must be an object"),
        ("a.jsonl", '{"txt": "good", "label": 1}\n', "line 1: has no text (looked for text, sentence"),
        ("a.jsonl", '{"text": "good", "label": 0.5}\n', "line 1, key 'label': a label is a word or a whole number"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "line 1, key 'text': must be a string"),
        ("a.tsv.gz", b"not gzip", "not gzip"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, data, words):
    path = put(tmp_path, name, data)
    with pytest.raises(TextError) as error:
        read_labelled(path, allowed=["0", "1"])
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))


def test_a_column_that_is_not_there_and_labels_that_are_none(tmp_path):
    path = put(tmp_path, "a.tsv", "text\tlabel\ngood\t1\n")
    with pytest.raises(TextError, match="line 1: there is no column 'mood'"):
        read_labelled(path, label_column="mood")
    with pytest.raises(TextError, match="every label is '1'"):
        label_names(read_labelled(path), path)
    path = put(tmp_path, "b.tsv", "\n".join(f"{n % 2}\ttext number {n}" for n in range(9)))
    with pytest.raises(TextError, match="9 different labels on 9 lines"):
        label_names(read_labelled(path), path)
    path = put(tmp_path, "c.tsv", "\n".join(f"text\t{n}" for n in (10, 9, -1, 10, 9, -1)))
    assert label_names(read_labelled(path), path) == ["-1", "9", "10"]


def test_a_line_of_ten_megabytes_is_read(tmp_path):
    long = "word " * 2_000_000 + "end"
    for name, mark in (("a.tsv", "\t"), ("a.csv", ",")):
        assert read_labelled(put(tmp_path, name, f"{long}{mark}1\nshort{mark}0\n")).texts == [long, "short"]


def test_parallel_lines(tmp_path):
    source = put(tmp_path, "a.de.gz", gzip.compress("ein Hund\r\n\r\nzwei größere\r\n".encode()))
    target = put(tmp_path, "a.en", "a dog\n\ntwo bigger ones\n")
    assert read_pairs(source, target) == (["ein Hund", "zwei größere"], ["a dog", "two bigger ones"])
    for data, words in [
        ("a dog\n\n", f"{source} has 3 lines and {tmp_path / 'b.en'} has 2"),
        ("a dog\n\n \n", f"{tmp_path / 'b.en'}: line 3: is blank, and the line of {source} is not"),
        ("a dog\nx\ntwo", f"{source}: line 2: is blank"),
        ("\n\n", "no text in it"),
    ]:
        with pytest.raises(TextError) as error:
            read_pairs(source, put(tmp_path, "b.en", data))
        assert words in str(error.value)
    with pytest.raises(TextError, match="as source and as target"):
        read_pairs(target, target)
