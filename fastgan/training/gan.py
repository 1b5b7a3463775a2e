"""GANTrainer: the usual DCGAN step, for any pair of modules, without its waste."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.nn import functional
from fastgan.ops.gan_loss import LOSSES
from fastgan.replace import replace_modules
from fastgan.training.joining import DROPOUTS, statistics_per_half, why_two_passes
from fastgan.training.outputs import Outputs
from fastgan.training.penalties import PENALTIES, r1_penalty, wgan_gp_penalty

PRECISIONS = ("float32", "float64", "bfloat16")


class GANTrainer:
    """Trains a generator and a discriminator against each other, exactly as the usual DCGAN loop does.

    A step is the PyTorch tutorial's: the discriminator learns from real (label 1) and fake (label 0) pictures, their
    losses added; then the generator learns to have the same fakes called real by the updated discriminator. What
    differs is the work: real and fake are one batch where every layer allows it (see ``fastgan.training.joining``; else
    two passes, said once), the discriminator's weights get no gradients in the generator's step, and Adam is fused.

    Modules keep their training flags, ``requires_grad``, names and state dicts. The modules are changed in place.

    Args:
        generator: noise (N, *latent_shape) to pictures (N, ...).
        discriminator: pictures to logits (N, ...) or, with Sigmoid last, probabilities; several an image are averaged.
        latent_shape: of one noise vector. None: (C, 1, 1) or (C,) if the generator begins with a transposed convolution
            or a linear layer of C inputs, else (100, 1, 1).
        lr: learning rate of both, or a pair (generator's, discriminator's).
        betas: Adam's.
        loss: "bce" (non-saturating), "hinge", "lsgan" or "wasserstein".
        real_label: what the discriminator's "bce" and "lsgan" losses call real; 0.9 is one-sided label smoothing.
        penalty: None, "r1" or "wgan-gp", added to the discriminator's loss.
        penalty_weight: None takes 10, both papers' default.
        replace: call ``fastgan.replace_modules`` on both.
        discriminator_output: "auto", "logits" or "probabilities", see ``fastgan.training.outputs``.
        seed: noise becomes a pure function of (seed, step). None draws it from torch's generator, as the tutorial does.
        device: where to train. None: where the generator is.
        precision: "float32" or "float64" convert the modules, "bfloat16" is autocast. None leaves them as they are.
        channels_last: keep convolution weights and pictures in that memory format, the faster one. None: unless a
            layer is a dropout, which draws its mask in the order of the memory and so would draw another one.
        optimizers: (generator's, discriminator's), in place of Adam.

    Raises ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        latent_shape: Sequence[int] | None = None,
        lr: float | tuple[float, float] = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        loss: str = "bce",
        *,
        real_label: float = 1.0,
        penalty: str | None = None,
        penalty_weight: float | None = None,
        replace: bool = True,
        discriminator_output: str = "auto",
        seed: int | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
        channels_last: bool | None = None,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer] | None = None,
    ) -> None:
        for name, module in (("generator", generator), ("discriminator", discriminator)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
        if penalty is not None and penalty not in PENALTIES:
            raise ValueError(f"penalty must be None or one of {tuple(PENALTIES)}, got {penalty!r}")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        if not 0 < real_label <= 1:
            raise ValueError(f"real_label must be above 0 and at most 1, got {real_label}")
        self.generator, self.discriminator = generator, discriminator
        self.loss, self.real_label, self.seed, self.precision = loss, float(real_label), seed, precision
        self.penalty = penalty
        self.penalty_weight = PENALTIES.get(penalty or "", 0.0) if penalty_weight is None else float(penalty_weight)
        self.latent_shape = _latent_shape(generator, latent_shape)
        if channels_last is None:
            layers = (*generator.modules(), *discriminator.modules())
            channels_last = not any(isinstance(layer, DROPOUTS) for layer in layers)
        self.channels_last = channels_last
        self._outputs = Outputs(discriminator, discriminator_output)
        parameter = next(generator.parameters(), None)
        self.device = torch.device(device) if device is not None else parameter.device if parameter is not None else (
            torch.device("cpu"))  # fmt: skip
        for module in (generator, discriminator):
            module.to(device=self.device, dtype=_converted(precision))
            if channels_last:
                _to_channels_last(module)
            if replace:
                replace_modules(module)
        self.dtype = parameter.dtype if parameter is not None else torch.float32
        self.optimizer_g, self.optimizer_d = optimizers or _adams(generator, discriminator, lr, betas)
        #: steps made so far
        self.step = 0
        self._joined: tuple[Any, bool] | None = None
        self._said = False

    # ---- one step ----

    def train_step(self, real: Tensor, noise: Tensor | None = None) -> dict[str, float]:
        """One step of each player on a batch of real pictures.

        Args:
            real: (N, ...) as the generator makes them, floating (in [-1, 1] for a generator that ends in Tanh).
            noise: (N, *latent_shape), in place of the trainer's own.

        Returns:
            ``loss_d`` (real + fake + penalty), ``loss_g``, and ``d_real``, ``d_fake``: the mean probability that the
            discriminator gave to each before its update.

        Raises ValueError or TypeError for a batch that is empty or does not fit, FloatingPointError where a loss is not
        finite; the player whose loss it is has not been updated then.
        """
        real = self._check_real(real)
        noise = self._noise(len(real)) if noise is None and self.seed is not None else noise
        self.optimizer_d.zero_grad(set_to_none=True)
        fake, loss_d, logits_real, logits_fake = self._discriminator_gradients(real, noise)
        self._refuse_not_finite("loss_d", loss_d)
        self.optimizer_d.step()
        self.optimizer_g.zero_grad(set_to_none=True)
        with self._discriminator_frozen():
            with self._autocast():
                loss_g = self._generator_loss(self._outputs(fake))
            self._refuse_not_finite("loss_g", loss_g)
            loss_g.backward()
        self.optimizer_g.step()
        self.step += 1
        with torch.no_grad():
            means = [torch.sigmoid(logits.detach()).mean().float() for logits in (logits_real, logits_fake)]
            values = torch.stack([loss_d.float(), loss_g.detach().float(), *means]).tolist()
        result = dict(zip(("loss_d", "loss_g", "d_real", "d_fake"), values, strict=True))
        if self.device.type != "cpu":
            for name in ("loss_d", "loss_g"):
                self._refuse_value(name, result[name])
        return result

    def _discriminator_gradients(self, real: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Backward through the discriminator's loss: (fake with its graph, loss, logits of real, logits of fake)."""
        count = len(real)
        if self._one_batch():
            with self._autocast():
                fake = self._generate(noise, real)
                both = torch.cat([real, fake.detach().to(real.dtype)])
                with statistics_per_half(self.discriminator):
                    logits = self._outputs(both)
                if logits.shape[0] % 2 or logits.shape[0] < 2:
                    raise ValueError(f"discriminator must return (N, ...) for N pictures, got {tuple(logits.shape)}")
                logits_real, logits_fake = logits.chunk(2)
                loss = self._loss(logits_real, self.real_label) + self._loss(logits_fake, 0.0)
            loss.backward()
        else:
            # The usual loop's own order, so that whatever draws random numbers in a forward draws the same ones.
            with self._autocast():
                logits_real = self._outputs_of_real(real)
                loss_real = self._loss(logits_real, self.real_label)
            loss_real.backward()
            with self._autocast():
                fake = self._generate(noise, real)
                logits_fake = self._outputs(fake.detach())
                loss_fake = self._loss(logits_fake, 0.0)
            loss_fake.backward()
            loss = loss_real.detach() + loss_fake.detach()
        loss = loss.detach()
        if self.penalty is not None:
            with self._autocast():
                if self.penalty == "r1":
                    penalty = r1_penalty(self._outputs, real, self.penalty_weight)
                else:
                    draws = self._generator_of(_PENALTY) if self.seed is not None else None
                    penalty = wgan_gp_penalty(self._outputs, real, fake.detach(), self.penalty_weight, draws)
            penalty.backward()
            loss = loss + penalty.detach()
        assert len(fake) == count
        return fake, loss, logits_real, logits_fake

    def _outputs_of_real(self, real: Tensor) -> Tensor:
        try:
            return self._outputs(real)
        except RuntimeError as error:
            # The layer that failed says nothing about `real`; the generator knows what it should have been.
            expected = self.sample(1).shape[1:]
            if real.shape[1:] != expected:
                raise _wrong_shape(real, expected) from error
            raise

    def _loss(self, logits: Tensor, target: float) -> Tensor:
        """The discriminator's loss of one half, the mean over all logits."""
        return functional.gan_loss_with_logits(logits, target, loss=self.loss)

    def _generator_loss(self, logits: Tensor) -> Tensor:
        # The generator of the hinge loss maximises the logits themselves (Lim & Ye, 2017).
        loss = "wasserstein" if self.loss == "hinge" else self.loss
        return functional.gan_loss_with_logits(logits, 1.0, loss=loss)

    def _one_batch(self) -> bool:
        state = tuple(
            (id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
             len(module._backward_hooks))
            for module in self.discriminator.modules()
        )  # fmt: skip
        if self._joined is None or self._joined[0] != state:
            reason = why_two_passes(self.discriminator)
            self._joined = (state, reason is None)
            if reason is not None and not self._said:
                self._said = True
                warnings.warn(
                    f"real and fake go through the discriminator in two passes, not as one batch: {reason}",
                    stacklevel=4,
                )
        return self._joined[1]

    @contextmanager
    def _discriminator_frozen(self):
        """No gradients of the discriminator's weights, which the generator's step has no use for."""
        shared = {id(parameter) for parameter in self.generator.parameters()}
        frozen = [p for p in self.discriminator.parameters() if p.requires_grad and id(p) not in shared]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _autocast(self):
        if self.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # ---- noise and pictures ----

    def _generator_of(self, use: int, number: int | None = None) -> torch.Generator:
        """A generator that is a pure function of (seed, use, step): nothing of it has to be saved."""
        assert self.seed is not None
        number = self.step if number is None else number
        return torch.Generator(self.device).manual_seed(mixed_seed(self.seed, use, number))

    def _noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        if generator is None and self.seed is not None:
            generator = self._generator_of(_NOISE)
        return torch.randn(count, *self.latent_shape, generator=generator, device=self.device, dtype=self.dtype)

    def _generate(self, noise: Tensor | None, real: Tensor) -> Tensor:
        noise = self._noise(len(real)) if noise is None else noise.to(self.device, self.dtype)
        if len(noise) != len(real):
            raise ValueError(f"noise must have real's batch of {len(real)}, got {tuple(noise.shape)}")
        try:
            fake = self.generator(noise)
        except RuntimeError as error:
            if tuple(noise.shape[1:]) == self.latent_shape and self.step == 0:
                raise RuntimeError(
                    f"the generator does not take noise of shape {tuple(noise.shape)} (latent_shape="
                    f"{self.latent_shape}): {error}"
                ) from error
            raise
        if fake.shape != real.shape:
            raise _wrong_shape(real, fake.shape[1:])
        return fake

    @torch.no_grad()
    def sample(self, count: int, seed: int | None = None) -> Tensor:
        """``count`` pictures of the generator in evaluation mode, float32 on the CPU; its flags are restored.

        Args:
            count: at least 1.
            seed: the noise's; None draws from torch's generator.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        with self._autocast():
            return self.sample_from(self.generator, self.latent_shape, count, seed)

    @staticmethod
    @torch.no_grad()
    def sample_from(generator: nn.Module, latent_shape: Sequence[int], count: int, seed: int | None = None) -> Tensor:
        """``sample`` for a generator without a trainer; the same seed gives the same pictures."""
        parameter = next(generator.parameters())
        draws = None
        if seed is not None:
            draws = torch.Generator(parameter.device).manual_seed(mixed_seed(seed, _SAMPLES, 0))
        noise = torch.randn(count, *latent_shape, generator=draws, device=parameter.device, dtype=parameter.dtype)
        flags = [(module, module.training) for module in generator.modules()]
        generator.eval()
        try:
            pictures = [generator(part) for part in noise.split(64)]
        finally:
            for module, training in flags:
                module.training = training
        return torch.cat(pictures).float().cpu().contiguous()

    def _check_real(self, real: Tensor) -> Tensor:
        if not isinstance(real, Tensor):
            raise TypeError(f"real must be a tensor (N, ...), got {type(real).__name__}")
        if real.dim() < 2:
            raise ValueError(f"real must be a batch (N, ...), got shape {tuple(real.shape)}")
        if not real.is_floating_point():
            raise TypeError(f"real must be floating, scaled as the generator's pictures; got {real.dtype}")
        if real.numel() == 0:
            raise ValueError(f"real must not be empty, got shape {tuple(real.shape)}")
        real = real.to(self.device, self.dtype, non_blocking=True)
        if self.channels_last and real.dim() == 4:
            # Tensor.to, not contiguous: of one channel the latter leaves NCHW's strides, which a convolution goes by.
            real = real.to(memory_format=torch.channels_last)
        return real

    def _refuse_not_finite(self, name: str, loss: Tensor) -> None:
        # On a GPU this would wait for it in the middle of a step; train_step looks at the end there.
        if self.device.type == "cpu":
            self._refuse_value(name, loss.item())

    def _refuse_value(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {self.step}: training has diverged. A lower learning rate, a penalty or "
                "another seed may help"
            )

    # ---- many steps ----

    def fit(
        self,
        data: Iterable[Any] | Tensor,
        *,
        epochs: int = 1,
        max_steps: int | None = None,
        batch_size: int = 64,
        callback: Callable[[int, dict[str, float]], object] | None = None,
    ) -> list[dict[str, float]]:
        """Trains on ``data`` and returns what each step returned.

        Args:
            data: an ``fastgan.data.ImageArray``, pictures as one tensor (N, ...), or an iterable of batches, each a
                tensor or a tuple that begins with one (a DataLoader).
            epochs: how often to go through ``data``.
            max_steps: stop after so many steps.
            batch_size: where ``data`` is not in batches yet. The last batch of an epoch may be smaller.
            callback: called with the step's number and what it returned.

        Runs that are saved and resumed are ``fastgan.training.run_dcgan``'s.
        """
        from fastgan.training.loop import batches_of, check_positive

        check_positive(epochs=epochs, max_steps=max_steps, batch_size=batch_size)
        history: list[dict[str, float]] = []
        for epoch in range(epochs):
            before = len(history)
            for batch in batches_of(data, batch_size, 0 if self.seed is None else self.seed, epoch):
                if max_steps is not None and len(history) >= max_steps:
                    return history
                history.append(self.train_step(batch))
                if callback is not None:
                    callback(self.step, history[-1])
            if len(history) == before:
                raise ValueError("data gave no batch" if epoch == 0 else "data can be gone through only once")
        return history


# What noise is drawn for: each use has its own stream.
_NOISE, _PENALTY, _SAMPLES, _INIT, _DROPOUT = range(5)


def mixed_seed(seed: int, use: int, number: int) -> int:
    """63 bits that depend on all bits of the arguments (splitmix64's finaliser, once an argument)."""
    state = 0
    for value in (seed, use, number):
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


_MASK = (1 << 64) - 1


def _wrong_shape(real: Tensor, expected: torch.Size) -> ValueError:
    sizes = ", ".join(map(str, expected))
    return ValueError(f"real must be shaped as the generator's pictures, (N, {sizes}); got {tuple(real.shape)}")


def _latent_shape(generator: nn.Module, latent_shape: Sequence[int] | None) -> tuple[int, ...]:
    if latent_shape is not None:
        shape = (latent_shape,) if isinstance(latent_shape, int) else tuple(int(size) for size in latent_shape)
        if not shape or min(shape) < 1:
            raise ValueError(f"latent_shape must have positive sizes, got {shape}")
        return shape
    first = next((module for module in generator.modules() if not list(module.children())), None)
    if isinstance(first, nn.ConvTranspose2d):
        return (first.in_channels, 1, 1)
    if isinstance(first, nn.Linear):
        return (first.in_features,)
    return (100, 1, 1)


def _converted(precision: str | None) -> torch.dtype | None:
    return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}.get(precision or "")


def _to_channels_last(module: nn.Module) -> None:
    # Not Module.to(memory_format=...): that would reach user tensors of four dimensions too, such as constant inputs.
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            for parameter in layer.parameters(recurse=False):
                if parameter.dim() == 4:
                    parameter.data = parameter.data.to(memory_format=torch.channels_last)


def _adams(
    generator: nn.Module, discriminator: nn.Module, lr: float | tuple[float, float], betas: tuple[float, float]
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    rates = lr if isinstance(lr, (tuple, list)) else (lr, lr)
    for rate in rates:
        if not rate > 0 or not math.isfinite(rate):
            raise ValueError(f"lr must be positive and finite, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    optimizers = []
    for name, module, rate in zip(("generator", "discriminator"), (generator, discriminator), rates, strict=True):
        parameters = list(module.parameters())
        if not any(parameter.requires_grad for parameter in parameters):
            raise ValueError(f"{name} has no parameter that requires a gradient")
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        optimizers.append(torch.optim.Adam(parameters, lr=rate, betas=betas, fused=fused))
    return optimizers[0], optimizers[1]
