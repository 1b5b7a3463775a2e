"""The search for passages: BM25 by its formula, cosines by hand, and both together."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from fastgan.data.text import train_tokenizer
from fastgan.training import retrieval as module
from fastgan.training.retrieval import Found, bm25, combine, dense, embed, evaluate_retrieval, retrieve

TEXTS = ["The cat sat on the mat.", "Boats are blue; this boat is old.", "", "A cat and a boat: cats!", "Nothing else."]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder():
    from transformers import BertConfig, BertModel

    tokenizer = train_tokenizer(TEXTS * 4, 200)
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).eval(), tokenizer


def by_formula(question, texts, k1=1.5, b=0.75):
    """Robertson's and Zaragoza's formula with Lucene's inverse document frequency, in float64."""
    documents = [Counter(module.words_of(text)) for text in texts]
    mean = sum(map(Counter.total, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in module.words_of(question):
            holding = sum(word in each for each in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            score += idf * document[word] / (document[word] + k1 * (1 - b + b * document.total() / mean))
        scores.append(score)
    return np.array(scores)


def test_bm25_is_the_formula_and_finds_nothing_where_no_word_is_shared():
    pytest.importorskip("bm25s")
    questions = ["Where is the cat?", "boats and cats, cats", "zebra", "?"]
    found = bm25(questions, iter(TEXTS))
    for question, each in zip(questions, found, strict=True):
        scores = by_formula(question, TEXTS)
        order = sorted(np.flatnonzero(scores > 0).tolist(), key=lambda number: (-scores[number], number))
        assert each.numbers.tolist() == order
        np.testing.assert_allclose(each.scores, scores[order], rtol=1e-5)
    assert [len(each.numbers) for each in found[2:]] == [0, 0]
    assert bm25(questions, iter(TEXTS), most=1)[0].numbers.tolist() == found[0].numbers[:1].tolist()


def test_words_are_compared_without_case_and_endings():
    assert module.words_of("Plagues, PLAGUE: Größe 42") == ["plague", "plague", "größe", "42"]


def test_embeddings_are_means_over_real_tokens(encoder):
    network, tokenizer = encoder
    texts = [text for text in TEXTS if text]
    found = embed(network, tokenizer, texts, batch_size=3)
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            alone = network(**tokenizer(text, return_tensors="pt"))[0][0].mean(0)
        np.testing.assert_allclose(row, alone / alone.norm(), atol=1e-5)


def test_dense_goes_through_pools_and_keeps_the_best(encoder, monkeypatch):
    monkeypatch.setattr(module, "_POOL", 7)
    texts = [f"the cat number {number} sat on the mat {'and the boat ' * (number % 5)}" for number in range(30)]
    questions = ["the cat", "boat and boat"]
    found = dense(questions, iter(texts), encoder, most=6)
    scores = embed(*encoder, questions) @ embed(*encoder, texts).T
    for row, each in zip(scores, found, strict=True):
        np.testing.assert_allclose(each.scores, np.sort(row)[::-1][:6], atol=1e-6)
        np.testing.assert_allclose(row[each.numbers], each.scores, atol=1e-6)


def test_combining_by_hand():
    left = Found(np.array([3, 1, 2]), np.array([8.0, 4.0, 0.0], np.float32))
    right = Found(np.array([2, 1, 9]), np.array([0.9, 0.8, 0.7], np.float32))
    found = combine([left], [right], share=0.25)[0]
    assert found.numbers.tolist() == [2, 1, 3, 9]
    np.testing.assert_allclose(found.scores, [0.75, 0.25 * 0.5 + 0.75 * 0.5, 0.25, 0.0], atol=1e-6)
    nothing = Found(np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert combine([nothing], [right])[0].numbers.tolist() == [2, 1, 9]
    assert combine([nothing], [nothing])[0].numbers.tolist() == []
    alone = Found(np.array([5]), np.array([2.0], np.float32))
    assert combine([alone], [nothing])[0].scores.tolist() == pytest.approx([module._SHARE])


def test_recall_is_counted_over_the_different_texts(tmp_path, encoder):
    pytest.importorskip("bm25s")
    paragraphs = [{"context": text, "qas": [{"id": str(number), "question": asked, "answers": []}]}
                  for number, (text, asked) in enumerate([(TEXTS[0], "mat?"), (TEXTS[1], "blue?"),
                                                          (TEXTS[0], "old boat?")])]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    evaluation = evaluate_retrieval([tmp_path / "a.json"], retrieval="bm25", samples=0)
    assert evaluation["R@1"] == pytest.approx(200 / 3)
    assert "passages:2" in evaluation.results[0].signature
    assert evaluate_retrieval([tmp_path / "a.json"], encoder, ranks=(1, 2), samples=10)["R@2"] == 100.0
    with pytest.raises(ValueError, match="retrieval must be one of"):
        evaluate_retrieval([tmp_path / "a.json"], retrieval="tfidf")
    with pytest.raises(ValueError, match="model must name an encoder"):
        evaluate_retrieval([tmp_path / "a.json"])
    with pytest.raises(ValueError, match="needs an encoder"):
        retrieve(["a"], lambda: TEXTS, "dense")


def test_real_questions_find_their_paragraphs(shared_data):
    pytest.importorskip("bm25s")
    files = [shared_data / "xquad" / f"{name}.en.json" for name in ("train", "dev")]
    evaluation = evaluate_retrieval(files, retrieval="bm25", samples=0)
    assert evaluation["R@1"] > 93
    assert evaluation["R@5"] > 98.5
