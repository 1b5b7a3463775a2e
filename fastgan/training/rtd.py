"""ELECTRA's pretraining: a small generator fills masked words, and the discriminator tells which were replaced.

Both learn at once, each from its own loss: the generator's is the cross-entropy of the masked words, that of the
discriminator the binary one of every token, weighted by 50. What is sampled from the generator passes no
gradient back to it; this is no GAN, whatever its players are called. (Clark et al., 2020, "ELECTRA".)

Word vectors are shared without the tug-of-war of two losses: the discriminator reads the generator's, which its
gradient does not reach, plus a correction of its own that begins at zero. (He et al., 2021, "DeBERTaV3".) In the end
they are added up, so that plain transformers reads both models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from fastgan.training.hub import from_scratch
from fastgan.training.language_trainer import LanguageTrainer
from fastgan.training.pretrain import PretrainConfig
from fastgan.training.streams import EVALUATION, mixed_seed

GENERATOR = "generator"  # the folder beside the discriminator's files
_FIGURES = ("generator_loss", "discriminator_loss", "accuracy")


class Players(nn.Module):
    """Generator and discriminator as one module, whose forward gives the losses of both.

    Args:
        generator: transformers' ``ElectraForMaskedLM``.
        discriminator: transformers' ``ElectraForPreTraining`` of the same vocabulary and embedding size. Its word
            vectors become their difference to the generator's; ``whole()`` puts them back.
        weight: of the discriminator's loss.
        seed: of the words that are sampled in evaluation; in training they come from torch's generator.
    """

    accepts_loss_kwargs = True  # the Trainer then leaves the scaling of a step's batches to compute_loss

    def __init__(self, generator: Any, discriminator: Any, weight: float = 50.0, seed: int = 0) -> None:
        super().__init__()
        self.generator, self.discriminator, self.weight, self.seed = generator, discriminator, weight, seed
        with torch.no_grad():
            self._own_words().sub_(self._words())

    def _words(self) -> Tensor:
        return self.generator.electra.embeddings.word_embeddings.weight

    def _own_words(self) -> Tensor:
        return self.discriminator.electra.embeddings.word_embeddings.weight

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        """``input_ids`` with masks and ``labels`` with what stood there, -100 elsewhere: int64 (B, S) both.

        Returns ``loss`` (the sum), ``generator_loss`` and ``discriminator_loss`` (nats, means over the masked words
        and over all tokens) and ``accuracy`` (the share of the tokens that the discriminator gets right).
        """
        masked = labels.ne(-100)
        hidden = self.generator.electra(input_ids=input_ids)[0]  # (B, S, width)
        # Only masked places need logits: (M, V), not (B, S, V).
        logits = self.generator.generator_lm_head(self.generator.generator_predictions(hidden[masked])).float()
        generator_loss = F.cross_entropy(logits, labels[masked])
        originals = torch.where(masked, labels, input_ids)
        filled = originals.masked_scatter(masked, self._sample(logits.detach(), originals))
        replaced = filled.ne(originals)  # a word that was guessed right is an original
        words = self.discriminator.electra.embeddings.word_embeddings(filled)
        words = words + F.embedding(filled, self._words().detach())
        scores = self.discriminator(inputs_embeds=words).logits.float()  # (B, S)
        discriminator_loss = F.binary_cross_entropy_with_logits(scores, replaced.float())
        return {
            "loss": generator_loss + self.weight * discriminator_loss,
            "generator_loss": generator_loss,
            "discriminator_loss": discriminator_loss,
            "accuracy": (scores.detach() > 0).eq(replaced).float().mean(),
        }

    def _sample(self, logits: Tensor, originals: Tensor) -> Tensor:
        draws = None
        if not self.training:  # the same words for the same text, so that evaluations can be compared
            draws = torch.Generator(logits.device)
            draws.manual_seed(mixed_seed(self.seed, EVALUATION, int(originals.sum())))
        return torch.multinomial(logits.softmax(-1), 1, generator=draws).squeeze(-1)

    def tie_weights(self) -> None:
        self.generator.tie_weights()

    @torch.no_grad()
    def save_pretrained(self, folder: Path) -> None:
        """The discriminator as transformers reads it, and the generator in a folder of its own within."""
        self.generator.save_pretrained(folder / GENERATOR)
        kept = self._own_words().clone()
        self._own_words().add_(self._words())
        try:
            self.discriminator.save_pretrained(folder)
        finally:
            self._own_words().copy_(kept)


class RtdTrainer(LanguageTrainer):
    """The trainer of :class:`Players`: both losses are scaled, logged and saved."""

    # examples and sums of ``_FIGURES`` over them since they were last logged; in training those of this process
    _sums: tuple[int, Any] = (0, 0.0)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
        size = len(inputs["labels"])  # the last batch of an evaluation may be smaller
        figures = torch.stack([outputs[name].detach().float() for name in _FIGURES]).repeat(size, 1)
        if not model.training:
            # Of every process, as the Trainer does with the loss.
            figures = self.accelerator.gather_for_metrics(figures)
        count, sums = self._sums
        self._sums = count + len(figures), sums + figures.sum(0)
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            # Masked words count alike in whatever batch of a step they are, and batches have equally many tokens.
            share = inputs["labels"].ne(-100).sum() / num_items_in_batch * self.accelerator.num_processes
            weight = self.accelerator.unwrap_model(model).weight / self.args.gradient_accumulation_steps
            loss = outputs["generator_loss"] * share + outputs["discriminator_loss"] * weight
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        training, self._sums = self._sums, (0, 0.0)
        try:
            return super().evaluate(*arguments, **options)
        finally:
            self._sums = training

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        prefix = "eval_" if "eval_loss" in logs else ""
        if (prefix or "loss" in logs) and self._sums[0]:
            count, sums = self._sums
            means: Any = sums / count
            if not prefix:  # equally many examples in every process
                means = self.accelerator.reduce(means, "mean")
            logs |= {prefix + name: float(value) for name, value in zip(_FIGURES, means, strict=True)}
            self._sums = (0, 0.0)
        super().log(logs, *arguments, **options)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.accelerator.unwrap_model(self.model), str(folder / "model.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def load_weights(self, folder: Path) -> None:
        load_tensors(self.accelerator.unwrap_model(self.model), str(folder / "model.safetensors"))

    def export(self, folder: Path) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)


def make_players(config: PretrainConfig, vocabulary: int, padding: int | None) -> Players:
    """Both players at step 0, from torch's generator."""
    share = max(1, round(config.heads * config.generator_share))
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "embedding_size": config.width,
        "num_hidden_layers": config.layers,
        "max_position_embeddings": config.length,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "pad_token_id": padding,
    }

    def shape(heads: int) -> ElectraConfig:
        width = heads * (config.width // config.heads)
        # ELECTRA's 0.02 is made for a width of 768; as small a number starves the attention of a narrow model.
        return ElectraConfig(
            hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, initializer_range=width**-0.5,
            **common,
        )  # fmt: skip

    generator = from_scratch(ElectraForMaskedLM, shape(share), config.attention)
    discriminator = from_scratch(ElectraForPreTraining, shape(config.heads), config.attention)
    with torch.no_grad():
        discriminator.get_input_embeddings().weight.copy_(generator.get_input_embeddings().weight)
    return Players(generator, discriminator, config.rtd_weight, config.seed)
