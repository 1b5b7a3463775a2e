"""The trainer of a perturbation: several passes a step, each a pass of transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch

from fastgan._lm_heads import is_fused
from fastgan.adversarial import step_seed
from fastgan.adversarial.attack import Attack, Rows
from fastgan.adversarial.unlabelled import batch_beside
from fastgan.training.language_trainer import LanguageTrainer
from fastgan.training.streams import PERTURBATION


class PerturbingTrainer(LanguageTrainer):
    """Trains on the passes that ``attack`` wants. Accumulation, clipping and precision stay the Trainer's."""

    attack: Attack
    unlabelled: Any = None  # the divergence is then that of these texts, and the labelled batch has a pass of its own
    _share: float = 1.0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        step = super().training_step
        if self.attack.settings.adds != "loss":
            return step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        plain = self.accelerator.unwrap_model(model)

        def searched() -> Any:
            with self.compute_loss_context_manager():
                return self.compute_loss(plain, dict(inputs), num_items_in_batch=num_items_in_batch)

        total: Any = 0.0
        try:
            for share in self.attack.passes(inputs, searched, step_seed(self, PERTURBATION)):
                self._share = share
                total = total + step(model, dict(inputs), num_items_in_batch)
        finally:
            self._share = 1.0
        return total

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        compute = super().compute_loss
        if not model.training:
            return compute(model, inputs, return_outputs, num_items_in_batch)
        if self.attack.settings.adds == "loss":
            loss = compute(model, inputs, return_outputs, num_items_in_batch)
            return (loss[0] * self._share, loss[1]) if return_outputs else loss * self._share
        plain = self.accelerator.unwrap_model(model)
        if self.unlabelled is not None:
            seed = step_seed(self, PERTURBATION)
            loss, output = compute(model, inputs, True, num_items_in_batch)
            # Batches are of one size, so each counts alike among a step's.
            share: Any = 1.0 if num_items_in_batch is None else 1.0 / self.current_gradient_accumulation_steps
            loss = loss + self._of_unlabelled(model, plain, seed, share)
            return (loss, output) if return_outputs else loss
        labels = inputs.get("labels")
        shifted = labels is not None and _shifts(self, plain)
        counted = labels[..., 1:] if shifted else labels
        if is_fused(plain):
            inputs = {**inputs, "return_logits": True}

        def forward(searching: bool) -> tuple[torch.Tensor, Any]:
            # A search has no gradient to the weights, which a model that is spread over processes waits for.
            return compute(plain if searching else model, dict(inputs), True, num_items_in_batch)

        def rows(output: Any) -> Rows:
            return distributions(output, counted, shifted)

        share = 1.0
        if num_items_in_batch is not None and counted is not None:
            share = counted.ne(-100).sum() / num_items_in_batch * self.accelerator.num_processes
        loss, output = self.attack.regularized(inputs, forward, rows, step_seed(self, PERTURBATION), share)
        return (loss, output) if return_outputs else loss

    def _of_unlabelled(self, model: Any, plain: Any, seed: int, share: float) -> torch.Tensor:
        """The weighted divergence on the texts without labels that stand beside the batch."""
        texts = batch_beside(self)

        def forward(searching: bool) -> tuple[torch.Tensor, Any]:
            output = (plain if searching else model)(**texts)
            return output["logits"].new_zeros(()), output

        return self.attack.regularized(texts, forward, lambda each: distributions(each, None, False), seed, share)[0]


def distributions(output: Any, counted: torch.Tensor | None, shifted: bool) -> Rows:
    """What a model's output says, as logits (rows, classes): of classes, of starts and ends, or of each token that has
    a label. ``counted``: the labels, -100 where there is none; ``shifted``: position n's logits are label n + 1's."""
    if "start_logits" in output:
        return [output["start_logits"], output["end_logits"]]
    logits = output["logits"]
    if logits.dim() == 2 or counted is None:
        return [logits.reshape(-1, logits.shape[-1])]
    if shifted:
        logits = logits[:, :-1]
    return [logits[counted != -100]]


def _shifts(trainer: Any, model: Any) -> bool:
    return bool(trainer._loss_shifts_labels) or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
