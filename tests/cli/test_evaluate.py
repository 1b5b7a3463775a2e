"""``fastgan evaluate``: the lines and the JSON it prints, and what it says of files that cannot be measured."""

from __future__ import annotations

import gzip
import json

import pytest
from typer.testing import CliRunner

from fastgan import metrics
from fastgan.cli import app

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

LINES = ["the cat sat on the mat .", "", "a dog ran home , größer .", "it sleeps ."]
SYSTEM = ["the cat sat on a mat .", "", "a dog ran , größer .", "it sleeps now ."]


def fastgan(*arguments):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def printed(*arguments):
    result = fastgan(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


@pytest.fixture
def folder(tmp_path):
    for name, lines in (("sys", SYSTEM), ("ref", LINES), ("ref2", SYSTEM[::-1]), ("bad", SYSTEM[::-1])):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("measure", ["bleu", "chrf", "rouge"])
def test_each_prints_what_its_function_returns(folder, measure):
    function = getattr(metrics, measure)
    given = (measure, "--hypotheses", folder / "sys", "--references", folder / "ref")
    assert printed(*given) == str(function(SYSTEM, [LINES]))
    both = function(SYSTEM, [LINES, SYSTEM[::-1]], other=SYSTEM[::-1], samples=50)
    several = printed(*given, folder / "ref2", "--other", folder / "bad", "--samples", 50)
    assert several == str(both)
    assert several == printed(*given, "--references", folder / "ref2", "--other", folder / "bad", "--samples", 50)
    assert "p = " in several
    assert json.loads(printed(*given, folder / "ref2", "--other", folder / "bad", "--samples", 50, "--json")) == (
        json.loads(json.dumps(both.as_dict()))
    )


def test_diversity(folder):
    assert printed("distinct", "--hypotheses", folder / "sys", "--orders", "1,4") == str(
        metrics.distinct(SYSTEM, orders=[1, 4])
    )
    assert printed("self-bleu", "--hypotheses", folder / "sys") == str(metrics.self_bleu(SYSTEM))
    assert fastgan("distinct", "--hypotheses", folder / "sys", "--orders", "x").exit_code == 2


def test_answers_as_lines_and_as_squads_json(folder):
    (folder / "golds").write_text("the mat\tmat\n\nParis\n")
    (folder / "answers").write_text("Mat\n\nin Paris\n")
    expected = str(metrics.em_f1(["Mat", "", "in Paris"], [["the mat", "mat"], [""], ["Paris"]]))
    assert printed("em-f1", "--hypotheses", folder / "answers", "--references", folder / "golds") == expected
    golds = {"q1": ["the mat", "mat"], "q2": [], "q3": ["Paris"]}
    questions = [{"id": name, "answers": [{"text": text} for text in texts]} for name, texts in golds.items()]
    (folder / "dev.json").write_text(json.dumps({"data": [{"paragraphs": [{"qas": questions}]}]}))
    given = ("em-f1", "--hypotheses", folder / "out.json", "--references", folder / "dev.json")
    (folder / "out.json").write_text(json.dumps({"q3": "in Paris", "q1": "Mat", "q2": "", "more": "x"}))
    assert printed(*given) == expected
    for text, words in [
        ('{"q1": "Mat"}', "out.json: no answer to 2 of 3 questions, the first 'q2'"),
        ('{\n"q1": }', "out.json: line 2, column 7"),
        ("[1]", "out.json: must be one object"),
    ]:
        (folder / "out.json").write_text(text)
        result = fastgan(*given)
        assert result.exit_code == 1
        assert words in result.output
    (folder / "dev.json").write_text('{"data": [{"paragraphs": [{"qas": [{"id": 1}]}]}]}')
    assert "dev.json: not SQuAD's form" in fastgan(*given).output


def test_compressed_windows_and_marked_files_are_read(folder):
    expected = printed("bleu", "--hypotheses", folder / "sys", "--references", folder / "ref")
    (folder / "sys.gz").write_bytes(gzip.compress("\n".join(SYSTEM).encode()))
    (folder / "ref").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*LINES, ""]).encode())
    assert printed("bleu", "--hypotheses", folder / "sys.gz", "--references", folder / "ref") == expected


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "sys: there is no text in it (0 bytes)"),
        (b"\n\n \n", "sys: there is no text in it (4 bytes)"),
        (b"one\ntwo\n", "sys ends after line 2, {ref} has 4 lines: line 3"),
        (b"1\n2\n3\n4\n5", "{ref} ends after line 4, {sys} has 5 lines: line 5"),
        ("one\nzwei größer\n".encode("latin-1"), "sys: line 2: byte 11 (0xf6) is not UTF-8"),
        (b"\xef\xbb\xbfone\n\xff\n", "sys: line 2: byte 7 (0xff) is not UTF-8"),
        ("one\n".encode("utf-16"), "sys: line 1: UTF-16 (byte order mark at byte 0)"),
        ("one\n".encode("utf-16-le"), "sys: line 1: a NUL byte at byte 1"),
        (b"one\ntwo\0\n", "sys: line 2: a NUL byte at byte 7"),
        (None, "sys: is a folder"),
    ],
)
@pytest.mark.parametrize("measure", ["bleu", "em-f1"])
def test_bad_files_are_named_with_their_line(folder, data, words, measure):
    (folder / "sys").unlink()
    if data is None:
        (folder / "sys").mkdir()
    else:
        (folder / "sys").write_bytes(data)
    result = fastgan(measure, "--hypotheses", folder / "sys", "--references", folder / "ref")
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert words.format(ref=folder / "ref", sys=folder / "sys") in result.output


def test_missing_and_broken_files(folder):
    (folder / "sys.gz").write_bytes(gzip.compress(b"one\n" * 100)[:-9])
    for name, words in (("none", "No such file"), ("sys.gz", "broken or not gzip")):
        result = fastgan("chrf", "--hypotheses", folder / name, "--references", folder / "ref")
        assert result.exit_code == 1
        assert name in result.output
        assert words in result.output
