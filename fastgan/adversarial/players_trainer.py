"""The trainer of a game of two: the model, and players beside it that are saved and resumed with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastgan.adversarial import step_seed
from fastgan.adversarial.gan_bert import (
    _FILE,
    COLLAPSED,
    NOISE,
    Head,
    Players,
    discriminator_loss,
    diversity,
    generator_loss,
    made_from,
)
from fastgan.adversarial.unlabelled import batch_beside
from fastgan.training.language_trainer import LanguageTrainer
from fastgan.training.streams import EVALUATION, PLAYERS, mixed_seed

_JUDGED = 256  # generated vectors, in an evaluation


class PlayersTrainer(LanguageTrainer):
    """GAN-BERT's: each step one backward for the discriminator, and one that reaches the generator alone."""

    head: Head
    players: Players
    player_lr: float
    unlabelled: torch.utils.data.Dataset
    say: Callable[[str], None]
    # sums since they were last logged, and of how many batches: the discriminator's part in the game, the generator's
    _sums: tuple[int, Any] = (0, 0.0)
    # the features of an evaluation's texts
    _seen: list[torch.Tensor] | None = None
    # of the batch at hand: unlabelled texts, generated vectors, and what the generator's loss needs
    _unlabelled: Any = None
    _generated: Any = None
    _game: Any = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:  # the same Adam, which treats each weight by itself, and one schedule
            self.players.to(self.args.device)
            rates = (self.players.fake, self.args.learning_rate), (self.players.generator, self.player_lr)
            for module, lr in rates:
                optimizer.add_param_group({"params": list(module.parameters()), "lr": lr, "weight_decay": 0.0})
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        for module in (self.players.fake, self.players.generator):  # not with the model's: each by its own norm
            torch.nn.utils.clip_grad_norm_(module.parameters(), self.args.max_grad_norm)
        return norm

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        seed = step_seed(self, PLAYERS)
        if self._batch_of_step[1] == 0:  # type: ignore[attr-defined]
            self.players.zero_grad(set_to_none=True)  # the Trainer clears the model's gradients alone
        self.players.train()
        self._unlabelled = batch_beside(self)
        count = self.args.per_device_train_batch_size
        drawn = torch.randn(count, NOISE, generator=torch.Generator().manual_seed(seed)).to(self.args.device)
        with self.accelerator.autocast():
            self._generated = self.players.generator(drawn)
        loss = super().training_step(model, inputs, num_items_in_batch)
        share, features, played = self._game
        with self.accelerator.autocast():
            seen, logits = self.head(self._generated)
            against = generator_loss(logits, self.players.fake_logits(seen), features, seen)
        self.accelerator.backward(against * share, inputs=list(self.players.generator.parameters()))
        batches, sums = self._sums
        self._sums = batches + 1, sums + torch.stack([played, against.detach().float()])
        self._game = self._generated = self._unlabelled = None
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Batches are of one size, so each counts alike among a step's.
        share = 1.0 if num_items_in_batch is None else 1.0 / self.current_gradient_accumulation_steps
        with self.head.watched() as features:
            if bool((inputs["labels"] != -100).any()):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            else:
                outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
                loss = outputs.logits.new_zeros(())
            raw = model(**self._unlabelled)
        with self.accelerator.autocast():
            seen, generated = self.head(self._generated.detach())
            texts = torch.cat(features)
            played = discriminator_loss(
                torch.cat([outputs.logits, raw.logits]),
                self.players.fake_logits(texts),
                generated,
                self.players.fake_logits(seen),
            )
        self._game = share, texts.detach(), played.detach().float()
        loss = loss + share * played
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        with self.head.watched() as self._seen:
            try:
                return super().evaluate(*arguments, **options)
            finally:
                self._seen = None

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        batches, sums = self._sums
        if "loss" in logs and batches:
            discriminator, generator = (sums / batches).tolist()
            logs |= {"discriminator_loss": discriminator, "generator_loss": generator}
            self._sums = (0, 0.0)
        elif "eval_loss" in logs and self._seen:
            step, texts = self.state.global_step, torch.cat(self._seen)
            made, _ = made_from(self.head, self.players, _JUDGED, mixed_seed(self.args.seed, EVALUATION, step))
            found = diversity(texts, made)
            if found is not None:
                logs["eval_diversity"] = found
                if found < COLLAPSED:
                    self.say(f"step {step}: the generator has collapsed: its vectors are spread over {found:.2g} of "
                             "what texts are")  # fmt: skip
        super().log(logs, *arguments, **options)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_file({name: each.contiguous() for name, each in self.players.state_dict().items()},
                      os.path.join(output_dir, _FILE))  # fmt: skip

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.players.load_state_dict(load_file(os.path.join(checkpoint, _FILE)))
