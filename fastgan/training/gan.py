"""GANTrainer: the usual DCGAN step, for any pair of modules, without its waste."""

from __future__ import annotations

import functools
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
from fastgan.training._gan_inputs import (
    device_of,
    latent_shape_of,
    one_argument,
    refuse_meta,
    warn_of_range,
    wrong_shape,
)
from fastgan.training._optimizers import adams, match_layouts, own_optimizers
from fastgan.training.joining import (
    DROPOUTS,
    has_gradient_hook,
    one_batch_pays,
    statistics_per_half,
    why_two_passes,
)
from fastgan.training.outputs import Outputs
from fastgan.training.penalties import PENALTIES, penalty_points, r1_penalty, wgan_gp_penalty
from fastgan.training.step_graph import CUDAGraph, Graph, GraphedStep
from fastgan.training.step_result import NAMES, StepResult, fetching
from fastgan.training.streams import NOISE, PENALTY, SAMPLES, mixed_seed

PRECISIONS = ("float32", "float64", "bfloat16")
_PARTS = ("generator", "discriminator", "optimizer_g", "optimizer_d")


class GANTrainer:
    """Trains a generator and a discriminator against each other, exactly as the usual DCGAN loop does.

    A step is the PyTorch tutorial's: the discriminator learns from real (label 1) and fake (label 0) pictures, their
    losses added; then the generator learns to have the same fakes called real by the updated discriminator. What
    differs is the work: real and fake are one batch where that is less work (``one_batch_pays``) and every layer allows
    it (see ``fastgan.training.joining``; else two passes, said once), the discriminator's weights get no gradients in
    the generator's step, and Adam is fused.

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
            layer is a dropout, which draws its mask in the order of the memory and so would draw another one, or
            DistributedDataParallel, whose layout of the gradients is fixed when it is made.
        optimizers: (generator's, discriminator's), in place of Adam.
        cuda_graph: on a CUDA device, record the whole step as one graph and replay it; see
            ``fastgan.training.step_graph``. Where that cannot be, steps run one kernel after the other, and one warning
            says why. Forwards and hooks are called for the recording only: what they do on the host is done once.

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
        cuda_graph: bool = True,
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
        if generator is discriminator:
            raise ValueError("generator and discriminator are one module; they must be two")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed must be None or an integer, got {seed!r}")
        if penalty_weight is not None and not (penalty_weight >= 0 and math.isfinite(penalty_weight)):
            raise ValueError(f"penalty_weight must not be negative, and finite, got {penalty_weight}")
        if not 0 < real_label <= 1:
            raise ValueError(f"real_label must be above 0 and at most 1, got {real_label}")
        self.generator, self.discriminator = generator, discriminator
        self.loss, self.real_label, self.seed, self.precision = loss, float(real_label), seed, precision
        self.penalty = penalty
        self.penalty_weight = PENALTIES.get(penalty or "", 0.0) if penalty_weight is None else float(penalty_weight)
        self.latent_shape = latent_shape_of(generator, latent_shape)
        layers = (*generator.modules(), *discriminator.modules())
        # DDP writes gradients into buckets laid out as the weights were when it was made, and mixes them up afterwards.
        wrapped = any(isinstance(layer, nn.parallel.DistributedDataParallel) for layer in layers)
        if channels_last and wrapped:
            raise ValueError("channels_last: change the memory format before wrapping in DistributedDataParallel")
        if channels_last is None:
            channels_last = not wrapped and not any(isinstance(layer, DROPOUTS) for layer in layers)
        self.channels_last = channels_last
        self._outputs = Outputs(discriminator, discriminator_output)
        self.device = device_of(device, generator)
        refuse_meta(self.device, generator=generator, discriminator=discriminator)
        for module in (generator, discriminator):
            module.to(device=self.device, dtype=_converted(precision))
            if channels_last:
                _to_channels_last(module)
            if replace:
                replace_modules(module)
        self.dtype = next((p.dtype for p in generator.parameters()), torch.float32)
        if optimizers is None:
            optimizers = adams(generator, discriminator, lr, betas)
        self.optimizer_g, self.optimizer_d = own_optimizers(optimizers, generator, discriminator)
        #: steps made so far
        self.step = 0
        self._joined: tuple[Any, bool] | None = None
        self._said = False
        self._range_checked = False
        self._graphed: GraphedStep | None = None
        self._started: StepResult | None = None  # the last step, of which nobody may have looked at the result yet
        if cuda_graph and self.device.type == "cuda":
            self._graphed = self._graphed_by(CUDAGraph(self.device))

    def _graphed_by(self, graph: Graph) -> GraphedStep:
        return GraphedStep(
            self._update,
            graph,
            optimizers=(self.optimizer_d, self.optimizer_g),
            modules=(self.generator, self.discriminator),
            device=self.device,
            settings=lambda: (self.loss, self.real_label, self.penalty, self.penalty_weight, self.precision),
        )

    # ---- one step ----

    def train_step(self, real: Tensor, noise: Tensor | None = None) -> dict[str, float]:
        """One step of each player on a batch of real pictures.

        Args:
            real: (N, ...) as the generator makes them, floating (in [-1, 1] for a generator that ends in Tanh).
            noise: (N, *latent_shape), in place of the trainer's own.

        Returns:
            ``loss_d`` (real + fake + penalty), ``loss_g``, and ``d_real``, ``d_fake``: the mean probability that the
            discriminator gave to each before its update. On a GPU nobody waits for them until they are looked at, or
            until the next step has been started.

        Raises ValueError or TypeError for a batch that is empty or does not fit, FloatingPointError where a loss is not
        finite. On the CPU the player whose loss it is has not been updated then; on a GPU it has, and the error comes
        when the result is looked at, from the next step or from ``state_dict``.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_step needs gradients, but was called under torch.no_grad or inference_mode")
        real = self._check_real(real)
        if not self._range_checked:
            self._range_checked = True
            warn_of_range(self.generator, real)
        points = None
        if self.seed is not None:  # drawn here, for they are the step's; without a seed torch's generator goes on
            noise = self._noise(len(real)) if noise is None else noise
            if self.penalty == "wgan-gp":
                points = penalty_points(real, self._generator_of(PENALTY))
        noise = None if noise is None else noise.to(self.device, self.dtype)
        update = self._update if self._graphed is None else self._graphed
        values = update(real, noise, points)
        self.step += 1
        if self._looks_early:
            return dict(zip(NAMES, values.tolist(), strict=True))
        result = StepResult(fetching(values), functools.partial(self._refuse_values, self.step))
        before, self._started = self._started, result
        if before is not None:
            before.wait()  # the device has this step to do meanwhile
        return result

    @property
    def _looks_early(self) -> bool:
        """Whether a loss is looked at before its player's update; on a GPU that would wait in the middle of a step."""
        return self.device.type == "cpu" and self._graphed is None

    def _update(self, real: Tensor, noise: Tensor | None, points: Tensor | None) -> Tensor:
        """Updates both players: (loss_d, loss_g, d_real, d_fake) on the device, which the host does not wait for."""
        self.optimizer_d.zero_grad(set_to_none=True)
        fake, loss_d, logits_real, logits_fake = self._discriminator_gradients(real, noise, points)
        self._refuse_not_finite("loss_d", loss_d, real)
        match_layouts(self.optimizer_d)
        self.optimizer_d.step()
        self.optimizer_g.zero_grad(set_to_none=True)
        with self._discriminator_frozen():
            with self._autocast():
                loss_g = self._generator_loss(self._outputs(fake))
            self._refuse_not_finite("loss_g", loss_g)
            loss_g.backward()
        match_layouts(self.optimizer_g)
        self.optimizer_g.step()
        with torch.no_grad():
            means = [torch.sigmoid(logits.detach()).mean().float() for logits in (logits_real, logits_fake)]
            return torch.stack([loss_d.float(), loss_g.detach().float(), *means])

    def _discriminator_gradients(
        self, real: Tensor, noise: Tensor | None, points: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Backward through the discriminator's loss: (fake with its graph, loss, logits of real, logits of fake)."""
        count = len(real)
        if one_batch_pays(self.discriminator, real) and self._one_batch():
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
                    penalty = wgan_gp_penalty(self._outputs, real, fake.detach(), self.penalty_weight, where=points)
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
                raise wrong_shape(real, expected) from error
            raise

    def _loss(self, logits: Tensor, target: float) -> Tensor:
        """The discriminator's loss of one half, the mean over all logits."""
        return functional.gan_loss_with_logits(logits, target, loss=self.loss)

    def _generator_loss(self, logits: Tensor) -> Tensor:
        # The generator of the hinge loss maximises the logits themselves (Lim & Ye, 2017).
        loss = "wasserstein" if self.loss == "hinge" else self.loss
        return functional.gan_loss_with_logits(logits, 1.0, loss=loss)

    def _one_batch(self) -> bool:
        state: tuple[Any, ...] = tuple(
            (id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
             len(module._backward_hooks))
            for module in self.discriminator.modules()
        )  # fmt: skip
        state += tuple(has_gradient_hook(parameter) for parameter in self.discriminator.parameters())
        if self._joined is None or self._joined[0] != state:
            reason = why_two_passes(self.discriminator)
            self._joined = (state, reason is None)
            if reason is not None and not self._said:
                self._said = True
                warnings.warn(
                    f"real and fake go through the discriminator in two passes, not as one batch: {reason}",
                    stacklevel=5,
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
            generator = self._generator_of(NOISE)
        return torch.randn(count, *self.latent_shape, generator=generator, device=self.device, dtype=self.dtype)

    def _generate(self, noise: Tensor | None, real: Tensor) -> Tensor:
        noise = self._noise(len(real)) if noise is None else noise.to(self.device, self.dtype)
        if len(noise) != len(real):
            raise ValueError(f"noise must have real's batch of {len(real)}, got {tuple(noise.shape)}")
        try:
            fake = self.generator(noise)
        except TypeError as error:
            raise one_argument("generator", "noise", error) from error
        except RuntimeError as error:
            if tuple(noise.shape[1:]) != self.latent_shape:
                raise ValueError(
                    f"noise must be of shape (N, {', '.join(map(str, self.latent_shape))}), got {tuple(noise.shape)}"
                ) from error
            if self.step == 0:
                raise RuntimeError(
                    f"the generator does not take noise of shape {tuple(noise.shape)} (latent_shape="
                    f"{self.latent_shape}): {error}"
                ) from error
            raise
        if not isinstance(fake, Tensor) or not fake.is_floating_point():
            what = str(fake.dtype) if isinstance(fake, Tensor) else type(fake).__name__
            raise TypeError(f"generator must return one floating tensor (N, ...), got {what}")
        if fake.shape != real.shape:
            raise wrong_shape(real, fake.shape[1:])
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
            draws = torch.Generator(parameter.device).manual_seed(mixed_seed(seed, SAMPLES, 0))
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
        if real.is_meta or real.layout != torch.strided:
            raise TypeError(f"real must be a dense tensor with values, got {real.layout} on {real.device}")
        if not real.is_floating_point():
            raise TypeError(f"real must be floating, scaled as the generator's pictures; got {real.dtype}")
        if real.numel() == 0:
            raise ValueError(f"real must not be empty, got shape {tuple(real.shape)}")
        real = real.to(self.device, self.dtype, non_blocking=True)
        if self.channels_last and real.dim() == 4:
            # Tensor.to, not contiguous: of one channel the latter leaves NCHW's strides, which a convolution goes by.
            real = real.to(memory_format=torch.channels_last)
        return real

    def _refuse_not_finite(self, name: str, loss: Tensor, real: Tensor | None = None) -> None:
        if self._looks_early:
            value = loss.item()
            if not math.isfinite(value) and real is not None and not bool(real.isfinite().all()):
                raise FloatingPointError(
                    f"{name} is {value} at step {self.step}: real holds values that are not finite"
                )
            self._refuse_value(name, value, self.step)

    def _refuse_values(self, step: int, values: dict[str, float]) -> None:
        for name in ("loss_d", "loss_g"):
            self._refuse_value(name, values[name], step)

    def _refuse_value(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}: training has diverged. A lower learning rate, a penalty or "
                "another seed may help"
            )

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """Both modules', both optimizers' and the step: with ``seed`` given, all that the next steps depend on.

        Raises FloatingPointError, once, where a loss of the last step on a GPU was not finite and nobody knows yet.
        """
        started, self._started = self._started, None
        if started is not None:
            started.wait()
        return {name: getattr(self, name).state_dict() for name in _PARTS} | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` gave; ValueError where that is not its form."""
        if not isinstance(state, dict) or set(state) != {*_PARTS, "step"}:
            raise ValueError(f"state must hold {', '.join(_PARTS)} and step")
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        for optimizer in (self.optimizer_g, self.optimizer_d):
            match_layouts(optimizer, states=True)
        self.step = int(state["step"])
        self._started = None

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
            data: an ``fastgan.data.ImageArray``, pictures as one tensor (N, ...), a ``torch.utils.data.Dataset`` of
                pictures, or an iterable of batches (a DataLoader); a picture or a batch may begin a tuple.
            epochs: how often to go through ``data``.
            max_steps: stop after so many steps.
            batch_size: where ``data`` is not in batches yet. The last batch of an epoch may be smaller.
            callback: called with the step's number and what it returned.

        Runs that are saved and resumed are ``fastgan.training.run_dcgan``'s.
        """
        from fastgan.training.loop import batches_of, check_positive

        if isinstance(data, str) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise TypeError(
                f"data must be pictures or an iterable of batches, got {type(data).__name__}; "
                "fastgan.data.load_images loads a folder"
            )
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


def _converted(precision: str | None) -> torch.dtype | None:
    return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}.get(precision or "")


def _to_channels_last(module: nn.Module) -> None:
    # Not Module.to(memory_format=...): that would reach user tensors of four dimensions too, such as constant inputs.
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            for parameter in layer.parameters(recurse=False):
                if parameter.dim() == 4:
                    parameter.data = parameter.data.to(memory_format=torch.channels_last)
