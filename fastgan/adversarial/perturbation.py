"""What a perturbation of the word embeddings is to be: one description, of which the published methods are presets.

A training step makes several passes over its batch. In some of them a perturbation δ, float32 (batch, tokens, width),
is added to the word embeddings of the input. Its size is stated relative to the mean norm m of the model's word vectors
and does not depend on how long a sentence is or on what stands beside it: with n tokens that may be attacked and a
radius ε, a sentence's δ has norm ε·m·√n at most, that is ε·m a token (root mean square). With ``norm="linf"`` every
coordinate is ε·m/√width at most, which is the same at the corners. Padding and special tokens have δ = 0.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

RAISES = ("loss", "divergence", "nothing")
ADDS = ("loss", "divergence", "both")
NORMS = ("l2", "linf")
MASKS = ("shared", "fresh")


@dataclass(frozen=True)
class Perturbation:
    """The settings of the loop in :class:`fastgan.adversarial.Attack`.

    Attributes:
        steps: K. With ``adds="loss"`` the perturbed passes, with an ascent of δ between each and the next; otherwise
            the ascents before the last pass.
        radius: ε, the most that δ may be.
        lr: how far an ascent moves δ, in ε's unit; None: the radius.
        start: the size of the random δ that it begins with, as a share of the radius; 0: at δ = 0.
        raises: what an ascent raises: the "loss" of the label, the "divergence" from the clean pass, or "nothing": δ is
            then drawn anew for each pass.
        adds: what the perturbed passes add. "loss": the step's loss is the mean over all passes trained on, so that
            neither K nor the clean batch changes the learning rate. "divergence": the loss of the clean pass, and
            ``weight`` times the Kullback-Leibler divergence. "both": the mean of both passes' losses, and that.
        clean: whether the batch itself is trained on too. Without it a method with a random start never sees it.
        every: with ``adds="loss"``, whether all K passes are trained on (FreeLB) or the last alone (PGD).
        weight: of the divergence.
        symmetric: (KL(p‖q) + KL(q‖p)) / 2 with a gradient through both; else KL(p‖q) with the clean p held constant.
        norm: "l2" (of a sentence) or "linf".
        masks: of dropout. "shared": the same in every pass of a step, by setting the generators back. "fresh": another
            in each, so that the divergence is that of two dropout masks, too.
    """

    steps: int = 1
    radius: float = 0.01  # MiniLM, fine-tuned for sentiment: one step of 0.03 takes the loss from 0.5 to 1.3
    lr: float | None = None
    start: float = 0.0
    raises: str = "loss"
    adds: str = "loss"
    clean: bool = True
    every: bool = True
    weight: float = 1.0
    symmetric: bool = True
    norm: str = "l2"
    masks: str = "shared"

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"steps must be an integer, got {self.steps!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for name in ("radius", "lr", "start", "weight"):
            value = getattr(self, name)
            if value is None and name == "lr":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        if self.start > 1:
            raise ValueError(f"start must be a share of the radius, 0 to 1, got {self.start}")
        for name, known in (("raises", RAISES), ("adds", ADDS), ("norm", NORMS), ("masks", MASKS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.raises == "divergence" and self.adds == "loss":
            raise ValueError("raises must be loss or nothing where adds is loss, got 'divergence'")
        if self.raises == "divergence" and not self.start:
            # Its gradient at the clean pass is zero.
            raise ValueError("start must be more than 0 where the divergence is raised, got 0")
        if not self.clean and self.adds != "loss":
            raise ValueError(f"clean must be True where adds is {self.adds}: the divergence is from the clean pass")

    @property
    def trained(self) -> int:
        """Passes whose losses are averaged, with ``adds="loss"``."""
        return int(self.clean) + (self.steps if self.every else 1)

    @property
    def passes(self) -> int:
        """Forward and backward passes of a step; plain training has 1."""
        if self.adds != "loss":
            return 2 + (self.steps if self.raises != "nothing" else 0)
        return int(self.clean) + self.steps


#: As published but for what ``Perturbation`` fixes: sizes a sentence and relative, losses averaged, the clean batch
#: kept, and, other than in R-Drop and R3F, the same dropout mask in every pass.
PRESETS: dict[str, Perturbation] = {
    # Random vectors of exactly the radius: the control of every method beneath.
    "noise": Perturbation(steps=2, start=1.0, raises="nothing"),
    # Two dropout masks and no perturbation (a radius makes it noise as well).
    "r-drop": Perturbation(radius=0.0, start=1.0, raises="nothing", adds="both", masks="fresh"),
    "r3f": Perturbation(start=1.0, raises="nothing", adds="divergence", masks="fresh"),
    "fgm": Perturbation(every=False),
    "pgd": Perturbation(steps=3, every=False),
    "freelb": Perturbation(steps=2),
    "smart": Perturbation(start=0.1, raises="divergence", adds="divergence", norm="linf"),
    "vat": Perturbation(start=0.1, raises="divergence", adds="divergence", symmetric=False),
}


def preset(name: str, **changes: object) -> Perturbation:
    """The preset of that name with the ``changes`` that are not None. ValueError for a name that is none."""
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
    given = {field: value for field, value in changes.items() if value is not None}
    return dataclasses.replace(PRESETS[name], **given)  # type: ignore[arg-type]
