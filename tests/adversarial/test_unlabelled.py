"""A divergence on texts without labels: by hand, in whole runs, and beside the labelled batch's own pass."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers.modeling_outputs import SequenceClassifierOutput

from fastgan.adversarial import Attack, preset
from fastgan.adversarial.trainer import PerturbingTrainer
from fastgan.training.finetune import finetune, resume_finetune
from fastgan.training.language_trainer import make_arguments
from fastgan.training.sentiment import SENTIMENT
from tests.adversarial.test_attack import CLS, PAD, Bag
from tests.adversarial.test_gan_bert import DiesAt
from tests.training.test_finetune import _sentences, files, rows, tiny, weights  # noqa: F401  files is a fixture
from tests.training.test_pretrain import StopsAt

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(Bag):
    """``Bag`` as transformers' Trainer takes it: labels may lack, and the output is a mapping."""

    def forward(self, input_ids, attention_mask, labels=None, **_):  # what tells the Trainer to leave scaling to it
        known = torch.zeros(len(input_ids), dtype=torch.long) if labels is None else labels
        output = super().forward(input_ids, attention_mask, known)
        return SequenceClassifierOutput(loss=None if labels is None else output.loss, logits=output.logits)


def collate(given):
    width = max(len(row["input_ids"]) for row in given)
    ids = torch.tensor([row["input_ids"] + [PAD] * (width - len(row["input_ids"])) for row in given])
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    return batch | ({"labels": torch.tensor([row["labels"] for row in given])} if "labels" in given[0] else {})


LABELLED = [{"input_ids": [CLS, 2, 3, CLS], "labels": 1}, {"input_ids": [CLS, 6], "labels": 0}]
TEXTS = [{"input_ids": [CLS, 4, 5, 7, CLS]}, {"input_ids": [CLS, 8]}]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_labels_loss_and_the_texts_divergence_by_hand(files, tmp_path, accumulation):  # noqa: F811
    """z = w·mean of the words' vectors. The divergence of σ(z) is largest along ±w, and each of the n words of a text
    moves by ε·m that way: z moves by ε·m·|w|·n/tokens. σ(z) itself is constant to the gradient."""
    model, config = Model(), tiny(files, batch_size=2, gradient_accumulation=accumulation)
    attack = Attack(model, preset("vat", radius=0.5, weight=3.0), [PAD, CLS])
    attack.settings = dataclasses.replace(attack.settings, start=1e-3)  # so small that it leaves the direction alone
    made = type("VAT", (PerturbingTrainer,), {"attack": attack, "unlabelled": [None, None, *TEXTS] * 4})
    arguments = make_arguments(config, tmp_path, max_steps=4, warmup=0, eval_every=2, eval_strategy="no")
    trainer = made(model=model, args=arguments, data_collator=collate)
    trainer.current_gradient_accumulation_steps = accumulation
    trainer._batch_of_step = (0, 0)  # the second batch of a step, or the first of the second step: number 1
    trainer.state.global_step = 0 if accumulation == 2 else 1
    items = torch.tensor(2 * accumulation)
    loss = trainer.training_step(model, collate(LABELLED), items)
    got = model.w.grad.clone()

    w, table = model.w.detach(), model.embedding.weight.detach()
    expected, gradient = 0.0, torch.zeros_like(w)
    for row in LABELLED:
        mean = table[row["input_ids"]].mean(0)
        p, y = torch.sigmoid(mean @ w), row["labels"]
        expected -= (math.log(p) if y else math.log(1 - p)) / 2 / accumulation
        gradient += (p - y) * mean / 2 / accumulation
    for row, sign in zip(TEXTS, signs(model, attack), strict=True):
        ids = row["input_ids"]
        words = sum(each != CLS for each in ids)
        moved = sign * 0.5 * attack.unit * words / len(ids) * w / w.norm()
        mean = table[ids].mean(0)
        p, q = torch.sigmoid(mean @ w), torch.sigmoid((mean + moved) @ w)
        expected += 3 * float(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()) / 2 / accumulation
        gradient += 3 * (q - p) * (mean + moved) / 2 / accumulation
    assert float(loss) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(got, gradient, rtol=2e-3, atol=1e-5)


def signs(model, attack):
    """To which side of a text the search has gone, from the last pass that saw it."""
    clean = model.embedding(model_ids(TEXTS))
    delta = (model.vectors[-1] - clean).detach()
    assert not delta[1, 2:].any()
    assert not delta[:, 0].any()
    return [float(torch.sign(each[1] @ model.w.detach())) for each in delta]


def model_ids(given):
    return collate(given)["input_ids"]


@pytest.fixture
def vat(files, tmp_path):  # noqa: F811
    texts = [line.split("\t")[0] for line in _sentences(300, 30).splitlines()]
    (tmp_path / "raw.txt").write_text("\n".join(texts) + "\n")

    def config(**options):
        settings = {"adversary": "vat", "unlabelled": tmp_path / "raw.txt", "epochs": 1, "max_steps": 4,
                    "eval_every": 2, **options}  # fmt: skip
        return tiny(files, **settings)

    return config


def test_at_weight_0_it_is_plain_training_to_the_bit(vat, files, tmp_path):  # noqa: F811
    finetune(SENTIMENT, vat(adversary_weight=0.0), tmp_path / "vat")
    finetune(SENTIMENT, vat(adversary=None, unlabelled=None), tmp_path / "plain")
    assert weights(tmp_path / "vat") == weights(tmp_path / "plain")
    result = finetune(SENTIMENT, vat(), tmp_path / "some")
    assert weights(tmp_path / "some") != weights(tmp_path / "plain")
    assert result.counts["unlabelled"] == 30


@pytest.mark.parametrize("ends", [StopsAt, DiesAt])
def test_stopped_or_killed_and_resumed_it_has_the_same_weights(vat, tmp_path, ends):
    config = vat(gradient_accumulation=2, batch_size=4)
    whole = finetune(SENTIMENT, config, tmp_path / "whole")
    with contextlib.suppress(MemoryError):
        finetune(SENTIMENT, config, tmp_path / "run", reporter=ends(3))
    torch.rand(7)
    second = resume_finetune(SENTIMENT, tmp_path / "run")
    assert dataclasses.replace(second, folder=whole.folder) == whole
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", ["vat", "smart", "r3f"])
def test_every_method_of_a_divergence_learns(vat, tmp_path, name):
    config = vat(adversary=name, max_steps=24, epochs=4, eval_every=24, lr=2e-2, dropout=0.1)
    assert finetune(SENTIMENT, config, tmp_path / "run").figures["accuracy"] >= 0.7
    losses = [row["validation_loss"] for row in rows(tmp_path / "run") if "validation_loss" in row]
    assert losses[-1] < 0.65


def test_each_batch_and_each_process_has_texts_of_its_own(vat):
    from types import SimpleNamespace

    from fastgan.adversarial.unlabelled import batch_beside

    seen = []
    for process in (0, 1):
        arguments = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=2, world_size=2,
                                    process_index=process)  # fmt: skip
        for step, batch in ((0, 0), (0, 1), (1, 0)):
            trainer = SimpleNamespace(_batch_of_step=(step, batch), args=arguments, unlabelled=list(range(12)),
                                      data_collator=list, _prepare_inputs=lambda given: given)  # fmt: skip
            seen.append(batch_beside(trainer))
    assert seen == [[0, 1], [4, 5], [8, 9], [2, 3], [6, 7], [10, 11]]
