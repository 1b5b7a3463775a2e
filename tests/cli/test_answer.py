"""The commands ``fastgan answer`` and ``fastgan evaluate retrieval``."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("bm25s")

from tests.cli.test_language import fastgan
from tests.training.test_answer import corpus, model  # noqa: F401  fixtures
from tests.training.test_qa import _document

pytestmark = pytest.mark.usefixtures("one_thread")


def test_answers_are_shown_with_their_place(model, corpus, tmp_path):  # noqa: F811
    given = [model, "--corpus", corpus / "a.txt", corpus / "b.md", "--retrieval", "bm25", "--passages", 1]
    result = fastgan("answer", *given, "--question", "what is the boat ?")
    assert result.exit_code == 0, result.output
    for words in (
        "what is the boat ?\n",
        "  blue  (score ",
        f"{corpus / 'a.txt'}, line 4)",
        "the boat is [blue] today",
    ):
        assert words in result.output
    (tmp_path / "questions.txt").write_text("what is the house ?\n\nzebra\n")
    result = fastgan("answer", *given, "--questions", tmp_path / "questions.txt", "--json", "--top", 2)
    first, second = (json.loads(line) for line in result.output.splitlines())
    assert (first["question"], first["answers"][0]["text"], first["answers"][0]["line"]) == (
        "what is the house ?",
        "old",
        4,
    )
    assert second == {"question": "zebra", "answers": [], "margin": None}
    result = fastgan("answer", *given, "--question", "zebra")
    assert "no answer in these texts (no passage shares a word with it)" in result.output
    result = fastgan("answer", *given, "--question", "what is the boat ?", "--threshold", 1e6)
    assert "no answer in these texts (margin " in result.output


def test_failures_are_one_line(model, corpus, tmp_path):  # noqa: F811
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    asked = ["--question", "what ?"]
    for arguments, status, words in [
        ((model, "--corpus", corpus), 2, "--question"),
        ((model, *asked), 2, "--corpus"),
        ((model, "--corpus", corpus, *asked, "--retrieval", "tfidf"), 1, "retrieval must be one of"),
        ((model, "--corpus", corpus, *asked, "--top", 0), 1, "top must be at least 1"),
        ((model, "--corpus", corpus, "--question", " "), 1, "number 1 is blank"),
        ((model, "--corpus", tmp_path / "latin.txt", *asked), 1, "byte 3"),
        ((model, "--corpus", tmp_path / "no", *asked), 1, "no such file or folder"),
        ((tmp_path / "no", "--corpus", corpus, *asked), 1, "no such folder"),
        ((model, "--corpus", corpus, "--questions", tmp_path / "no.txt"), 1, "no.txt"),
    ]:
        result = fastgan("answer", *arguments)
        assert result.exit_code == status, result.output
        assert words in result.output
        assert status == 2 or len(result.output.strip().splitlines()) == 1


def test_recall_is_measured(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(_document(0, 12)))
    result = fastgan("evaluate", "retrieval", "--data", tmp_path / "a.json", "--retrieval", "bm25", "--samples", 0)
    assert result.exit_code == 0, result.output
    assert "R@1|retrieval:bm25|questions:12" in result.output
    result = fastgan("evaluate", "retrieval", "--data", tmp_path / "a.json")
    assert result.exit_code == 1
    assert "model must name an encoder" in result.output
