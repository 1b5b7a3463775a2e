"""Data sets of the hub: what each task makes of one, and a hub that is not there, said within seconds."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import datasets

from fastgan.data.documents import read_documents
from fastgan.data.labelled import read_labelled, read_pairs, read_text
from fastgan.data.squad import read_questions
from fastgan.data.units import TextError
from fastgan.training.checkpoint import RunError
from fastgan.training.finetune import finetune, resume_finetune
from fastgan.training.generate import GenerateConfig
from fastgan.training.hub_sets import is_name, localise
from fastgan.training.qa import QAConfig
from fastgan.training.sentiment import SENTIMENT, SentimentConfig
from fastgan.training.summarize import SummarizeConfig
from fastgan.training.translate import TranslateConfig
from tests.training.test_pretrain import StopsAt


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch):
    """A hub of ``hub.sets``: (name, config, split) → rows; ``hub.asked`` says what was loaded."""

    stub = SimpleNamespace(sets={}, asked=[])

    def load_dataset(name, config=None, split=None):
        stub.asked.append((name, config, split))
        if (name, config, split) not in stub.sets:
            raise ValueError(f"Unknown split {split!r}.\nmore lines")
        return stub.sets[name, config, split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return stub


def rows(columns, **features):
    made = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        made = made.cast_column(name, feature)
    return made


SENTENCES = {"sentence": [f"a {word} film {n}" for n in range(8) for word in ("warm", "dull")], "label": [1, 0] * 8}


def test_labelled_rows_keep_their_classes_names(hub):
    hub.sets["o/films", "two", "train"] = rows(SENTENCES, label=datasets.ClassLabel(names=["bad", "good"]))
    hub.sets["o/films", "two", "test"] = rows({"sentence": ["one"], "label": [-1]})
    config = SentimentConfig(train="o/films@two", validation="o/films@two:test", from_scratch="small")
    with pytest.raises(TextError, match="o/films@two:test: row 0, column 'label': there is no label"):
        localise(config, "sentiment")
    hub.sets["o/films", "two", "test"] = hub.sets["o/films", "two", "train"]
    found = read_labelled(localise(config, "sentiment").train)
    assert (found.texts[:2], found.labels[:2]) == (["a warm film 0", "a dull film 0"], ["good", "bad"])
    count = len(hub.asked)
    localise(config, "sentiment")
    assert len(hub.asked) == count  # it is there already


def test_questions_summaries_translations_and_text(hub):
    answers = [{"text": ["blue"], "answer_start": [12]}, {"text": [], "answer_start": []}]
    hub.sets["squad", None, "train"] = rows({"id": ["a", "b"], "title": ["t"] * 2, "context": ["the boat is blue"] * 2,
                                             "question": ["what ?", "who ?"], "answers": answers})  # fmt: skip
    hub.sets["squad", None, "validation"] = hub.sets["squad", None, "train"]
    config = localise(QAConfig(train="squad", validation="squad", from_scratch="small"), "qa")
    read = read_questions(config.train)
    assert [(each.id, each.answers) for each in read] == [("a", (("blue", 12),)), ("b", ())]

    hub.sets["o/news", None, "train[:10%]"] = rows({"article": ["A long\ntext."], "highlights": ["A text."]})
    config = localise(
        SummarizeConfig(train="o/news:train[:10%]", validation="o/news:train[:10%]", model="m"), "summarize"
    )
    assert read_documents(config.train) == (["A long text."], [["A text."]])

    pairs = [{"de": "ein\nHund", "en": "a dog"}, {"de": "zwei", "en": "two"}]
    hub.sets["o/pairs", "de-en", "train"] = rows({"translation": pairs})
    hub.sets["o/flat", None, "validation"] = rows({"de": ["drei"], "en": ["three"]})
    config = TranslateConfig(train=("o/pairs@de-en#de", "o/pairs@de-en#en"), validation=("o/flat#de", "o/flat#en"),
                             from_scratch="small")  # fmt: skip
    local = localise(config, "translate")
    assert read_pairs(*local.train) == (["ein Hund", "zwei"], ["a dog", "two"])
    assert read_pairs(*local.validation) == (["drei"], ["three"])

    hub.sets["o/text", None, "train"] = hub.sets["o/text", None, "validation"] = rows({"text": ["one", "two\nthree"]})
    local = localise(GenerateConfig(train="o/text", validation="o/text", from_scratch="small"), "generate")
    assert read_text(local.train) == "one\ntwo\nthree\n"


def test_it_trains_and_resumes_by_name(hub, tmp_path, monkeypatch):
    from fastgan.training import sentiment

    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(sentiment, "_SMALL", shape)
    for split in ("train", "validation"):
        hub.sets["o/films", None, split] = rows(SENTENCES)
    config = SentimentConfig(train="o/films", validation="o/films", from_scratch="small", batch_size=4, epochs=2)
    assert finetune(SENTIMENT, config, tmp_path / "run", reporter=StopsAt(3)).interrupted
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["train"] == "o/films"
    assert resume_finetune(SENTIMENT, tmp_path / "run").step == 8
    other = finetune(SENTIMENT, config, tmp_path / "other", reporter=StopsAt(3))
    for file in (tmp_path / "cache").rglob("o--films-*"):
        file.write_text(file.read_text().replace("warm", "cold"))
    assert other.interrupted
    with pytest.raises(RunError, match=r"o/films \(o--films-.*\): is not what the run"):
        resume_finetune(SENTIMENT, tmp_path / "other")


def test_what_is_wrong_is_said_by_name(hub, tmp_path):
    hub.sets["o/odd", None, "train"] = rows({"a": [1], "translation": [{"de": "x"}]})
    for task, config, words in [
        ("sentiment", SentimentConfig(train="o/none", validation="x.tsv", from_scratch="small"),
         r"o/none: cannot be loaded as a data set \(Unknown split 'train'.\)"),
        ("sentiment", SentimentConfig(train="o/odd", validation="x.tsv", from_scratch="small"),
         r"o/odd: has no column for the text \(looked for text, sentence.*it has a, translation"),
        ("qa", QAConfig(train="o/odd", validation="x.json", from_scratch="small"), "no column for the id"),
        ("translate", TranslateConfig(train=("o/odd", "o/odd"), validation=("x", "x"), from_scratch="small"),
         "o/odd: which language"),
        ("translate", TranslateConfig(train=("o/odd#fr", "o/odd#de"), validation=("x", "x"), from_scratch="small"),
         "row 0, column 'fr': must be text, got None"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            localise(config, task)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_what_is_a_name(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("o/name", "squad", "nyu-mll/glue@sst2", "a/b@c-d:train[:10%]#de"):
        assert is_name(name), name
    for name in ("a/b/c", "./a", "/a/b", "~/a", "train.tsv", "o/train.jsonl.gz", "", str(tmp_path / "data")):
        assert not is_name(name), name


@pytest.fixture
def silent_hub():
    """An address on this machine that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []
        server.settimeout(0.2)
        ended = threading.Event()

        def take():
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    held.append(server.accept()[0])

        thread = threading.Thread(target=take)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        ended.set()
        thread.join()
        for each in held:
            each.close()


def refusing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["silent", "refusing", "offline"])
def test_a_hub_that_is_not_there_is_said_within_seconds(silent_hub, tmp_path, monkeypatch, kind):
    import huggingface_hub

    if kind != "offline":
        address = silent_hub if kind == "silent" else refusing()
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        real = huggingface_hub.HfApi
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=address))
    config = SentimentConfig(train="nobody/nothing", validation="x.tsv", from_scratch="small")
    begin = time.monotonic()
    with pytest.raises(FileNotFoundError, match="no such file, and the hub") as error:
        finetune(SENTIMENT, config, tmp_path / "run")
    assert time.monotonic() - begin < 30
    assert error.value.filename == "nobody/nothing"
    assert not (tmp_path / "run").exists()
