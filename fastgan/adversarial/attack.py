"""The loop that perturbs word embeddings, for any model of transformers and any training loop.

    attack = Attack(model, preset("freelb"), tokenizer.all_special_ids)
    for step, inputs in enumerate(batches):
        for share in attack.passes(inputs, lambda: model(**inputs).loss, seed=step):
            (share * model(**inputs).loss).backward()
        optimizer.step()
        optimizer.zero_grad()

δ is added to what the embedding returns, by a hook: the model sees its token ids as ever, so that positions, decoder
inputs and the search for padding are unchanged, and no weight is ever moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.adversarial.perturbation import Perturbation

Rows = list[Tensor]


class Attack:
    """Perturbs the word embeddings of a model's inputs as ``settings`` say.

    Args:
        model: of transformers, or any module with ``get_input_embeddings()``. The mean norm of its word vectors, the
            unit of every radius, is taken now.
        settings: what is done; :data:`fastgan.adversarial.PRESETS` has the published methods.
        special_ids: tokens that are never attacked (a tokenizer's ``all_special_ids``).
    """

    def __init__(self, model: Any, settings: Perturbation, special_ids: Iterable[int] = ()) -> None:
        self.settings = settings
        self.embeddings = word_embeddings(model)
        # BART's embedding multiplies by a scale of its own before it returns.
        scale = float(getattr(self.embeddings, "embed_scale", 1.0))
        self.unit = scale * float(self.embeddings.weight.detach().float().norm(dim=1).mean())
        self.width = int(self.embeddings.weight.shape[1])
        self._special = torch.tensor(sorted(set(special_ids)), dtype=torch.int64)

    def attackable(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Which tokens of ``input_ids`` (batch, tokens) may be attacked, bool of that shape: no padding, no special."""
        ids = inputs["input_ids"]
        mask = ~torch.isin(ids, self._special.to(ids.device))
        given = inputs.get("attention_mask")
        return mask if given is None else mask & given.bool()

    def passes(self, inputs: Mapping[str, Tensor], loss: Callable[[], Tensor], seed: int) -> Iterator[float]:
        """The passes of a step with ``adds="loss"``: while the caller handles one, its δ is in force.

        For each share that comes, the caller makes a forward pass and calls ``backward`` on that share of its loss; the
        shares sum to 1. ``loss`` makes a forward pass that is only searched with (PGD). ``seed`` alone decides the
        random δ, and torch's generators end where one pass leaves them.
        """
        settings = self.settings
        if settings.adds != "loss":
            raise ValueError(f"adds must be loss for passes(), got {settings.adds!r}: use regularized()")
        place = _Place(self, inputs, seed)
        share, delta = 1.0 / settings.trained, place.random(settings.start)
        if settings.clean:
            climbs = settings.raises == "loss" and not settings.start
            clean = torch.zeros_like(delta, requires_grad=climbs)
            with place.added(clean if climbs else None):
                yield share
            if climbs:
                delta = place.ascended(clean.detach(), _gradient(clean))
        for step in range(1, settings.steps + 1):
            last = step == settings.steps
            if step > 1 and settings.raises == "nothing":
                delta = place.random(settings.start)
            delta = delta.detach().requires_grad_(settings.raises == "loss" and not last)
            with place.added(delta):
                if settings.every or last:
                    yield share
                    gradient = _gradient(delta) if delta.requires_grad else None
                else:
                    (gradient,) = torch.autograd.grad(loss(), delta)
            if gradient is not None:
                delta = place.ascended(delta.detach(), gradient)

    def regularized(
        self,
        inputs: Mapping[str, Tensor],
        forward: Callable[[bool], tuple[Tensor, Any]],
        rows: Callable[[Any], Rows],
        seed: int,
        share: float | Tensor = 1.0,
    ) -> tuple[Tensor, Any]:
        """The loss of a step with a divergence, one graph of both passes, and the clean pass's output.

        Args:
            inputs: the batch, for what is attacked in it.
            forward: makes a pass and gives loss and output; True where it only searches, without a gradient to weights.
            rows: the output → logits of each distribution that is compared, each (rows, classes).
            seed: decides the random δ.
            share: of the divergence, which is a mean over this batch's rows: 1 / the number of batches of a step.
        """
        settings = self.settings
        if settings.adds == "loss":
            raise ValueError("adds must be divergence or both for regularized(), got 'loss': use passes()")
        place = _Place(self, inputs, seed)
        with place.added(None):
            clean_loss, clean = forward(False)
        compared = rows(clean)
        held = [each.detach() for each in compared]
        delta = place.random(settings.start)
        for _ in range(settings.steps if settings.raises != "nothing" else 0):
            delta = delta.detach().requires_grad_()
            with place.added(delta):
                value, output = forward(True)
                if settings.raises == "divergence":
                    value = divergence(held, rows(output), settings.symmetric)
                (gradient,) = torch.autograd.grad(value, delta)
            delta = place.ascended(delta.detach(), gradient)
        with place.added(delta.detach()):
            perturbed_loss, output = forward(False)
        between = divergence(compared if settings.symmetric else held, rows(output), settings.symmetric)
        loss = (clean_loss + perturbed_loss) / 2 if settings.adds == "both" else clean_loss
        return loss + settings.weight * share * between, clean


class _Place:
    """One batch: where δ may be, how large, and the state of the generators before its first pass."""

    def __init__(self, attack: Attack, inputs: Mapping[str, Tensor], seed: int) -> None:
        self.attack, self.settings, self.ids = attack, attack.settings, inputs["input_ids"]
        self.mask = attack.attackable(inputs).unsqueeze(-1)
        self.shape = (*self.ids.shape, attack.width)
        # A sentence's radius in l2 for ε = 1, (batch, 1, 1).
        self.unit = attack.unit * self.mask.sum(1, keepdim=True).float().sqrt()
        self.noise = torch.Generator().manual_seed(seed)
        self.states = _Generators(self.ids.device) if self.settings.masks == "shared" else None
        self.begun = False

    def random(self, share: float) -> Tensor:
        """A δ of ``share`` of the radius: in l2 a uniform direction, in linf uniform in the cube."""
        if share == 0:
            return torch.zeros(self.shape, device=self.ids.device)
        size = share * self.settings.radius
        # Drawn on the CPU: the same numbers on every device.
        if self.settings.norm == "linf":
            drawn = (2 * torch.rand(self.shape, generator=self.noise) - 1).to(self.ids.device)
            return drawn * self.mask * (size * self.attack.unit * self.attack.width**-0.5)
        drawn = torch.randn(self.shape, generator=self.noise).to(self.ids.device) * self.mask
        return _direction(drawn) * (size * self.unit)

    def ascended(self, delta: Tensor, gradient: Tensor) -> Tensor:
        """δ a step further up, and back on the ball where that left it."""
        settings = self.settings
        rate = settings.radius if settings.lr is None else settings.lr
        gradient = gradient.float() * self.mask
        if settings.norm == "linf":
            unit = self.attack.unit * self.attack.width**-0.5
            return (delta + rate * unit * gradient.sign().nan_to_num()).clamp(-settings.radius * unit,
                                                                               settings.radius * unit)  # fmt: skip
        delta = delta + _direction(gradient) * (rate * self.unit)
        norm, most = delta.norm(dim=(1, 2), keepdim=True), settings.radius * self.unit
        return torch.where(norm > most, delta * (most / norm.clamp_min(1e-30)), delta)

    @contextlib.contextmanager
    def added(self, delta: Tensor | None) -> Iterator[None]:
        """One forward pass in which δ (None: none) is added, with the step's dropout mask where it is shared."""
        if self.states is not None and self.begun:
            self.states.set()
        self.begun = True
        if delta is None:
            yield
            return
        seen = 0

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            nonlocal seen
            ids = arguments[0] if arguments else None
            # A decoder that shares the embedding comes later, with other ids.
            if seen or ids is None or ids.numel() != self.ids.numel():
                return None
            if not torch.equal(ids.reshape(self.ids.shape), self.ids):
                return None
            seen += 1
            return output + delta.reshape(output.shape).to(output.dtype)

        handle = self.attack.embeddings.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        if not seen:
            raise RuntimeError(
                f"the {type(self.attack.embeddings).__name__} of the model was not called with this batch's input_ids, "
                "so nothing was perturbed: no pass was made, or the model is compiled or cut into parts"
            )


class _Generators:
    """The state of torch's generators that dropout draws from: the CPU's, and the device's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def word_embeddings(model: Any) -> Any:
    """The embedding of the input's tokens; of an encoder with a decoder, the encoder's."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return model.get_encoder().get_input_embeddings()
    return model.get_input_embeddings()


def divergence(clean: Sequence[Tensor], perturbed: Sequence[Tensor], symmetric: bool) -> Tensor:
    """The Kullback-Leibler divergence of two lists of logits (rows, classes), the mean over rows and lists.

    KL(clean ‖ perturbed), or with ``symmetric`` the mean of both directions. Zero for no rows.
    """
    total = torch.zeros((), device=clean[0].device)
    for left, right in zip(clean, perturbed, strict=True):
        p, q = left.float().log_softmax(-1), right.float().log_softmax(-1)
        each = p.exp() * (p - q)
        if symmetric:
            each = (each + q.exp() * (q - p)) / 2
        total = total + each.sum() / max(1, len(left))
    return total / len(clean)


def _gradient(delta: Tensor) -> Tensor:
    if delta.grad is None:
        raise RuntimeError("no backward reached the perturbation: call backward on each pass's share of the loss")
    return delta.grad


def _direction(vector: Tensor) -> Tensor:
    """Of length 1 for each sentence; zero where there is no direction (a gradient of zero, or not finite)."""
    norm = vector.norm(dim=(1, 2), keepdim=True)
    fine = norm.isfinite() & (norm > 0)
    return torch.where(fine, vector / torch.where(fine, norm, torch.ones_like(norm)), torch.zeros_like(vector))
