"""Adversaries in whole runs: plain training at radius zero, accumulation, resuming to the same bits, and every task."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastgan import adversarial
from fastgan.adversarial.trainer import PerturbingTrainer
from fastgan.training.checkpoint import RunError
from fastgan.training.finetune import finetune, resume_finetune
from fastgan.training.generate import GENERATE, GenerateConfig
from fastgan.training.qa import QA
from fastgan.training.sentiment import SENTIMENT
from fastgan.training.translate import TRANSLATE
from tests.adversarial.test_gan_bert import DiesAt
from tests.training import test_qa, test_translate
from tests.training.test_finetune import files, rows, tiny, weights  # noqa: F401  files is a fixture
from tests.training.test_pretrain import StopsAt

DOCUMENTS, LINES = test_qa.files, test_translate.files  # fixtures, too: a name apart for each


pytestmark = pytest.mark.usefixtures("one_thread")


def short(files, **options):  # noqa: F811
    return tiny(files, **{"epochs": 1, "max_steps": 4, "eval_every": 2, **options})


def test_one_step_at_radius_0_is_plain_training_to_the_bit(files, tmp_path):  # noqa: F811
    finetune(SENTIMENT, short(files), tmp_path / "plain")
    config = short(files, adversary="freelb", adversary_steps=1, adversary_radius=0.0)
    finetune(SENTIMENT, config, tmp_path / "freelb")
    assert weights(tmp_path / "freelb") == weights(tmp_path / "plain")
    assert rows(tmp_path / "freelb") == rows(tmp_path / "plain")
    finetune(SENTIMENT, dataclasses.replace(config, adversary_radius=0.1), tmp_path / "some")
    assert weights(tmp_path / "some") != weights(tmp_path / "plain")


@pytest.mark.parametrize("name", ["freelb", "pgd", "gradient-r3f"])
def test_accumulated_batches_are_one_batch(files, tmp_path, monkeypatch, name):  # noqa: F811
    """Without dropout and a random start, which every batch draws for itself; the third is a divergence without one."""
    settings = adversarial.Perturbation(adds="divergence", weight=5.0, radius=0.3)
    monkeypatch.setattr(adversarial, "_TABLE", dict(adversarial._TABLE))
    adversarial.register("gradient-r3f", lambda config: adversarial.Perturbing(name, settings))
    config = short(files, dropout=0.0, max_steps=2, eval_every=1, lr=1e-3, adversary=name)
    found = []
    for folder, options in (("one", {}), ("four", {"batch_size": 2, "gradient_accumulation": 4})):
        finetune(SENTIMENT, dataclasses.replace(config, **options), tmp_path / folder)
        found.append([row[each] for row in rows(tmp_path / folder) for each in ("loss", "grad_norm") if each in row])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("name", ["freelb", "smart"])
def test_stopped_and_resumed_it_has_the_same_weights(files, tmp_path, name):  # noqa: F811
    options = {"adversary_masks": "fresh"} if name == "freelb" else {}
    config = short(files, adversary=name, gradient_accumulation=2, batch_size=4, **options)
    whole = finetune(SENTIMENT, config, tmp_path / "whole")
    first = finetune(SENTIMENT, config, tmp_path / "run", reporter=StopsAt(3))
    assert (first.step, first.interrupted) == (3, True)
    with pytest.raises(MemoryError):
        finetune(SENTIMENT, config, tmp_path / "killed", reporter=DiesAt(3))
    resume_finetune(SENTIMENT, tmp_path / "killed")
    with pytest.raises(RunError, match=r"adversary_radius = None, not 0\.3"):
        resume_finetune(SENTIMENT, tmp_path / "run", {"adversary_radius": 0.3})
    torch.rand(7)
    second = resume_finetune(SENTIMENT, tmp_path / "run")
    assert dataclasses.replace(second, folder=whole.folder) == whole
    assert weights(tmp_path / "run") == weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", list(adversarial.PRESETS))
def test_every_method_learns(files, tmp_path, name):  # noqa: F811
    config = tiny(files, max_steps=24, epochs=4, eval_every=24, lr=2e-2, dropout=0.1, adversary=name)
    result = finetune(SENTIMENT, config, tmp_path / "run")
    assert result.figures["accuracy"] >= 0.7
    losses = [row["validation_loss"] for row in rows(tmp_path / "run") if "validation_loss" in row]
    assert losses[-1] < 0.65


@pytest.mark.parametrize("name", ["freelb", "r3f"])
def test_questions(DOCUMENTS, tmp_path, monkeypatch, name):
    monkeypatch.setattr(test_qa.sentiment, "_SMALL", {"num_hidden_layers": 1, "hidden_size": 16,
                                                     "num_attention_heads": 2, "intermediate_size": 32})  # fmt: skip
    config = test_qa.tiny(DOCUMENTS, max_steps=2, adversary=name)
    assert finetune(QA, config, tmp_path / "run").step == 2


@pytest.mark.parametrize("attention", ["fastgan", "sdpa"])
def test_pairs(LINES, tmp_path, attention):
    """Fused or not, K = 1 at radius 0 is plain training, label smoothing included."""
    pytest.importorskip("sacrebleu")
    config = test_translate.tiny(LINES, max_steps=2, epochs=1, attention=attention, dropout=0.1)
    finetune(TRANSLATE, config, tmp_path / "plain")
    same = dataclasses.replace(config, adversary="freelb", adversary_steps=1, adversary_radius=0.0)
    finetune(TRANSLATE, same, tmp_path / "same")
    assert weights(tmp_path / "same") == weights(tmp_path / "plain")

    other = dataclasses.replace(config, adversary="vat", adversary_weight=0.5)
    assert finetune(TRANSLATE, other, tmp_path / "vat").step == 2
    assert weights(tmp_path / "vat") != weights(tmp_path / "plain")


def test_generation_counts_every_next_word(tmp_path):
    """A causal model divides by the labels of a step itself."""
    (tmp_path / "a.txt").write_text("the cat is red , and the boat is blue .\n" * 60)
    config = GenerateConfig(
        train=str(tmp_path / "a.txt"), validation=str(tmp_path / "a.txt"), from_scratch="small", layers=1, width=16,
        heads=2, vocab_size=280, length=16, batch_size=8, max_steps=2, epochs=1, lr=1e-2, dropout=0.0,
    )  # fmt: skip
    plain = finetune(GENERATE, config, tmp_path / "plain")
    same = dataclasses.replace(config, adversary="fgm", adversary_radius=0.0)
    assert finetune(GENERATE, same, tmp_path / "same").figures == plain.figures
    assert weights(tmp_path / "same") == weights(tmp_path / "plain")
    # Without dropout R-Drop has nothing to compare, and is plain training as well.
    drop = dataclasses.replace(config, adversary="r-drop")
    assert finetune(GENERATE, drop, tmp_path / "drop").figures["loss"] == pytest.approx(plain.figures["loss"], rel=1e-5)
    other = finetune(GENERATE, dataclasses.replace(config, adversary="vat"), tmp_path / "vat")
    assert other.figures["loss"] != plain.figures["loss"]


def test_bfloat16(files, tmp_path):  # noqa: F811
    for name in ("freelb", "vat"):
        config = short(files, adversary=name, precision="bfloat16", max_steps=2)
        assert finetune(SENTIMENT, config, tmp_path / name).step == 2


def test_an_encoders_words_are_attacked_and_nothing_of_the_decoder():
    """One embedding for both: what reaches the decoder is unchanged, and in the encoder padding and the end token."""
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    size = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20, "dropout": 0.0}  # fmt: skip
    model = MarianMTModel(MarianConfig(**size, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)).train()
    ids = torch.tensor([[5, 6, 7, 1], [8, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([[9, 1], [9, 1]])}
    seen = {"encoder": [], "decoder": []}
    for name, states in seen.items():
        layer = getattr(model.model, name).layers[0]
        layer.register_forward_pre_hook(
            lambda module, arguments, named, states=states: states.append(
                (arguments[0] if arguments else named["hidden_states"]).detach()
            ),
            with_kwargs=True,
        )
    attack = adversarial.Attack(model, adversarial.preset("fgm"), [0, 1])
    for share in attack.passes(batch, lambda: model(**batch).loss, 0):
        (share * model(**batch).loss).backward()
    clean, perturbed = seen["encoder"]
    moved = (clean != perturbed).any(-1)
    assert moved.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert torch.equal(*seen["decoder"])


def test_a_method_of_ones_own_needs_no_change_elsewhere(files, tmp_path, monkeypatch):  # noqa: F811
    class Doubled(PerturbingTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            type(self).calls.append(type(self).strength)
            return super(PerturbingTrainer, self).training_step(model, inputs, num_items_in_batch)

        def compute_loss(self, *arguments, **named):
            return super(PerturbingTrainer, self).compute_loss(*arguments, **named)

    class Mine:
        def join(self, prepared, config, say):
            return adversarial.with_trainer(prepared, Doubled, calls=calls, strength=config.lr)

    calls = []
    monkeypatch.setattr(adversarial, "_TABLE", dict(adversarial._TABLE))
    adversarial.register("mine", lambda config: Mine())
    assert "mine" in adversarial.names()
    finetune(SENTIMENT, short(files, adversary="mine", max_steps=2), tmp_path / "run")
    assert calls == [5e-3, 5e-3]
    with pytest.raises(ValueError, match="name must be a new one, got 'vat'"):
        adversarial.register("vat", lambda config: Mine())


def test_what_cannot_be_is_refused_by_name(files):  # noqa: F811
    for options, error, words in [
        ({"adversary": "freeLB"}, ValueError, "adversary must be one of noise, .*gan-bert, got 'freeLB'"),
        ({"adversary_steps": 2}, ValueError, "adversary_steps is no option of plain training, got 2"),
        ({"adversary": "freelb", "adversary_steps": 0}, ValueError, "adversary_steps must be at least 1, got 0"),
        ({"adversary": "pgd", "adversary_steps": 1.5}, TypeError, "adversary_steps must be an integer"),
        ({"adversary": "vat", "adversary_radius": -0.1}, ValueError, "adversary_radius"),
        ({"adversary": "vat", "adversary_norm": "l1"}, ValueError, "adversary_norm must be one of l2, linf"),
        ({"adversary": "freelb", "unlabelled": "a.txt"}, ValueError, "unlabelled is no option of freelb"),
        ({"adversary": "r-drop", "unlabelled": "a.txt"}, ValueError, "unlabelled is no option of r-drop"),
        ({"unlabelled": "a.txt"}, ValueError, "unlabelled is no option of plain training"),
        ({"adversary": "gan-bert"}, ValueError, "unlabelled must name a file"),
        ({"adversary": "gan-bert", "unlabelled": "a", "adversary_steps": 2}, ValueError, "adversary_steps is no opt"),
        ({"adversary": "gan-bert", "unlabelled": "a", "adversary_lr": 0}, ValueError, "adversary_lr must be positive"),
    ]:  # fmt: skip
        with pytest.raises(error, match=f"^{words}"):
            tiny(files, **options)
    with pytest.raises(ValueError, match=r"^adversary gan-bert .* sentiment alone"):
        test_qa.QAConfig(train="a", validation="b", from_scratch="small", adversary="gan-bert")
