"""Adversaries of language models: extra passes over perturbed embeddings, and second players.

Two ways to use it. In a training loop of one's own, :class:`Attack` with one of :data:`PRESETS`. In ``fastgan finetune
--adversary NAME`` (``FinetuneConfig.adversary``) a whole run, which resumes bit for bit.

**How to add a method.** Write a class with one method, and give it a name:

    class Mine:
        def join(self, prepared, config, say):
            return with_trainer(prepared, MyTrainer, strength=0.1)

    register("mine", lambda config: Mine())

``join`` is told what a task has prepared (model at step 0, tokenizer, examples) and returns it changed. It must be a
pure function of that and the configuration: a resumed run calls it again. ``MyTrainer`` is a subclass of
``fastgan.training.language_trainer.LanguageTrainer`` with transformers' hooks: ``training_step`` makes several passes,
``compute_loss`` is one of them (evaluation comes here, too, with the model in eval mode), ``create_optimizer``,
``_save_optimizer_and_scheduler`` and ``_load_optimizer_and_scheduler`` are a second player's. Random numbers come from
``step_seed(trainer, use)`` or from torch's generator, which each step seeds. ``fastgan/adversarial/trainer.py`` is the
plainest, ``gan_bert.py`` the one with a player; ``unlabelled.py`` has batches of texts without labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from fastgan.adversarial.attack import Attack, divergence, word_embeddings
from fastgan.adversarial.perturbation import PRESETS, Perturbation, preset

if TYPE_CHECKING:
    from fastgan.training.finetune import FinetuneConfig, Prepared
    from fastgan.training.language_trainer import LanguageTrainer

__all__ = [
    "PRESETS",
    "Adversary",
    "Attack",
    "Perturbation",
    "Perturbing",
    "attach",
    "divergence",
    "make",
    "names",
    "preset",
    "register",
    "step_seed",
    "with_trainer",
    "word_embeddings",
]

#: the fields of a configuration that change a preset
OPTIONS = ("steps", "radius", "lr", "norm", "weight", "masks")


class Adversary(Protocol):
    """A method, made from a run's configuration."""

    def join(self, prepared: Prepared, config: Any, say: Callable[[str], None]) -> Prepared: ...


@dataclasses.dataclass(frozen=True)
class Perturbing:
    """Passes over perturbed embeddings, as ``settings`` say.

    Where the configuration has ``unlabelled`` texts, the divergence is theirs, and the labelled batch has one pass.
    """

    name: str
    settings: Perturbation

    def join(self, prepared: Prepared, config: Any, say: Callable[[str], None]) -> Prepared:
        from fastgan.adversarial.trainer import PerturbingTrainer

        attack = Attack(prepared.model, self.settings, prepared.tokenizer.all_special_ids)
        passes, own = f"{self.settings.passes} passes", {}
        if getattr(config, "unlabelled", None) is not None:
            from fastgan.adversarial.unlabelled import unlabelled_texts

            own["unlabelled"], counts = unlabelled_texts(prepared, config, say)
            prepared = dataclasses.replace(prepared, counts=prepared.counts | counts)
            passes = f"1 pass over labelled and {self.settings.passes} over unlabelled texts"
        say(
            f"{self.name}: {passes} a step, radius {self.settings.radius:g} of the word vectors' mean norm of "
            f"{attack.unit:.3g}"
        )
        return with_trainer(prepared, PerturbingTrainer, attack=attack, **own)


def _perturbing(name: str) -> Callable[[Any], Adversary]:
    def make_it(config: Any) -> Adversary:
        settings = PRESETS[name]
        if settings.adds != "divergence" or settings.raises == "loss":  # which needs labels
            _refuse(config, ("unlabelled",), name)
        changes = {option: getattr(config, f"adversary_{option}") for option in OPTIONS}
        try:
            return Perturbing(name, preset(name, **changes))
        except (TypeError, ValueError) as error:  # begins with the field's name
            raise type(error)(f"adversary_{error}") from None

    return make_it


def _gan_bert(config: Any) -> Adversary:
    from fastgan.adversarial.gan_bert import GANBert

    _refuse(config, tuple(f"adversary_{option}" for option in OPTIONS if option != "lr"), "gan-bert")
    if not hasattr(config, "unlabelled"):
        raise ValueError("adversary gan-bert tells classes of texts apart: it is for sentiment alone")
    if config.unlabelled is None:
        raise ValueError("unlabelled must name a file of texts for the adversary gan-bert")
    lr = config.lr if config.adversary_lr is None else config.adversary_lr
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < float("inf"):
        raise ValueError(f"adversary_lr must be positive and finite, got {lr!r}")
    return GANBert(lr=float(lr))


_TABLE: dict[str, Callable[[Any], Adversary]] = {
    **{name: _perturbing(name) for name in PRESETS},
    "gan-bert": _gan_bert,
}


def names() -> tuple[str, ...]:
    """What ``adversary`` may be."""
    return tuple(_TABLE)


def register(name: str, factory: Callable[[Any], Adversary]) -> None:
    """Makes ``adversary=name`` stand for ``factory(config)``, which raises ValueError with the name of a bad field."""
    if name in _TABLE:
        raise ValueError(f"name must be a new one, got {name!r}")
    _TABLE[name] = factory


def make(config: FinetuneConfig) -> Adversary | None:
    """The adversary that a configuration names; None for none.

    Raises ValueError or TypeError that begins with the field: an unknown name, or an option that it does not have.
    """
    if config.adversary is None:
        _refuse(config, (*(f"adversary_{option}" for option in OPTIONS), "unlabelled"), "plain training")
        return None
    if config.adversary not in _TABLE:
        raise ValueError(f"adversary must be one of {', '.join(_TABLE)}, got {config.adversary!r}")
    return _TABLE[config.adversary](config)


def attach(prepared: Prepared, config: FinetuneConfig, say: Callable[[str], None]) -> Prepared:
    """What a task has prepared, with the configuration's adversary in it."""
    adversary = make(config)
    return prepared if adversary is None else adversary.join(prepared, config, say)


def with_trainer(prepared: Prepared, kind: type[LanguageTrainer], **attributes: Any) -> Prepared:
    """``prepared`` with a trainer that is of ``kind`` and of the task's own class, and has these attributes."""
    from fastgan.training.language_trainer import LanguageTrainer

    base = prepared.trainer or LanguageTrainer
    bases = (kind,) if base is LanguageTrainer else (kind, base)
    return dataclasses.replace(prepared, trainer=type(kind.__name__, bases, attributes))


def step_seed(trainer: Any, use: int) -> int:
    """A seed for one batch of a step, and stream ``use`` of ``fastgan.training.streams``: another for each batch, step
    and process, the same in a resumed run. Called once a batch."""
    from fastgan.training.streams import mixed_seed

    step = trainer.state.global_step
    before, batch = getattr(trainer, "_batch_of_step", (-1, 0))
    batch = batch + 1 if before == step else 0
    trainer._batch_of_step = (step, batch)
    number = (step * trainer.args.gradient_accumulation_steps + batch) * trainer.args.world_size
    return mixed_seed(trainer.args.seed, use, number + trainer.args.process_index)


def _refuse(config: Any, fields: tuple[str, ...], name: str) -> None:
    for field in fields:
        if getattr(config, field, None) is not None:
            raise ValueError(f"{field} is no option of {name}, got {getattr(config, field)!r}")
