"""GAN-BERT: a classifier of k classes that also tells texts from a generator's vectors, learning from unlabelled texts.

The discriminator is the whole classifier, encoder included, and one row more for "fake" beside its k logits; the
generator makes vectors that stand for the first token's last hidden state, and the classifier's own head reads both.
With l the k logits of a text, f its (k+1)-th, L = log Σ exp l, and features h (what the last linear layer takes):

    discriminator:  cross-entropy of the labels over l alone
                    + mean softplus(f − L) over texts, labelled or not       that is −log(1 − p(fake))
                    + mean softplus(L − f) over generated vectors            that is −log p(fake)
    generator:      mean softplus(f − L) over generated vectors + ‖mean h of texts − mean h of generated‖² / width

Each player's gradient is its own: the discriminator sees generated vectors detached, the generator's backward reaches
its own weights alone, and the features of texts are constants to it. Both are of the same weights; then both move. The
row for "fake" and the generator are no part of the model, so what is evaluated and saved is a plain classifier of k
classes. "Unlabelled" is no class.

A step sees as many unlabelled texts as labelled ones, so labelled texts are seen as often as in plain training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

NOISE = 100  # numbers that the generator starts from
COLLAPSED = 0.1  # a diversity under it is said
_FILE = "players.safetensors"


@dataclass(frozen=True)
class GANBert:
    """The adversary ``gan-bert``; ``lr`` is the generator's learning rate, which falls as the run's own."""

    lr: float

    def join(self, prepared: Any, config: Any, say: Callable[[str], None]) -> Any:
        import dataclasses

        from fastgan.adversarial import with_trainer
        from fastgan.adversarial.players_trainer import PlayersTrainer
        from fastgan.adversarial.unlabelled import unlabelled_texts
        from fastgan.training.language_run import processes

        if processes() > 1:
            raise ValueError("adversary gan-bert trains in one process, and there are several")
        texts, counts = unlabelled_texts(prepared, config, say)
        head = Head(prepared.model)
        return with_trainer(
            dataclasses.replace(prepared, counts=prepared.counts | counts),
            PlayersTrainer,
            head=head,
            players=Players(head.hidden, head.features, _head_dropout(prepared.model)),
            player_lr=self.lr,
            say=staticmethod(say),  # as a plain function it would be a method
            unlabelled=texts,
        )


class Head:
    """From the first token's last hidden state (N, hidden) to features (N, features) and k logits, by the model's own
    modules: a pooler, dropout and a linear layer (BERT), or a head of its own (RoBERTa, ELECTRA).

    Raises ValueError for a model that classifies in another way.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        classifier: Any = getattr(model, "classifier", None)
        pooler = getattr(model.base_model, "pooler", None)
        if isinstance(classifier, nn.Linear) and pooler is not None and hasattr(model, "dropout"):
            self.last, self._through = classifier, self._by_pooler
        elif isinstance(getattr(classifier, "out_proj", None), nn.Linear):
            self.last, self._through = classifier.out_proj, self._by_head
        else:
            raise ValueError(
                f"adversary gan-bert needs a model whose head reads the first token (BERT, RoBERTa, ELECTRA), got "
                f"{type(model).__name__}"
            )
        self.hidden, self.features = int(model.config.hidden_size), self.last.in_features

    def _by_pooler(self, hidden: Tensor) -> Tensor:
        return self.model.classifier(self.model.dropout(self.model.base_model.pooler(hidden)))

    def _by_head(self, hidden: Tensor) -> Tensor:
        return self.model.classifier(hidden)

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of vectors in the place of the first token's state."""
        with self.watched() as seen:
            logits = self._through(hidden.unsqueeze(1))
        return seen[0], logits

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """A list to which each forward pass appends its features."""
        seen: list[Tensor] = []
        handle = self.last.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        try:
            yield seen
        finally:
            handle.remove()


class Players(nn.Module):
    """What the game needs beside the classifier: the generator, and the discriminator's row for "fake"."""

    def __init__(self, hidden: int, features: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, hidden), nn.LeakyReLU(0.2), nn.Dropout(dropout), nn.Linear(hidden, hidden)
        )
        self.fake = nn.Linear(features, 1)
        nn.init.normal_(self.fake.weight, std=0.02)
        nn.init.zeros_(self.fake.bias)

    def fake_logits(self, features: Tensor) -> Tensor:
        """The (k+1)-th logit, (N,)."""
        return self.fake(features).squeeze(-1)


@torch.no_grad()
def made_from(head: Head, players: Players, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (count, features) and chances of being fake (count,) of generated vectors, without dropout.

    ``seed`` alone decides the generator's noise. The modules come back in the modes that they were in.
    """
    modes = [(module, module.training) for module in (*head.model.modules(), *players.modules())]
    device = next(players.parameters()).device
    drawn = torch.randn(count, NOISE, generator=torch.Generator().manual_seed(seed)).to(device)
    try:
        head.model.eval()
        players.eval()
        seen, logits = head(players.generator(drawn))
        return seen, torch.cat([logits, players.fake_logits(seen).unsqueeze(1)], 1).softmax(1)[:, -1]
    finally:
        for module, mode in modes:
            module.training = mode


def diversity(texts: Tensor, generated: Tensor) -> float | None:
    """How far generated features lie from their mean, over how far those of texts, (N, width), do: root mean squares.

    About 1 for a generator that is as various as texts, 0 for one that makes a single vector; None where all texts
    are one.
    """
    spread, own = ((each.float() - each.float().mean(0)).square().sum(1).mean().sqrt() for each in (texts, generated))
    return float(own / spread) if float(spread) > 0 else None


def discriminator_loss(texts: Tensor, texts_fake: Tensor, generated: Tensor, generated_fake: Tensor) -> Tensor:
    """What the discriminator adds to the cross-entropy of the labels.

    Args:
        texts, generated: the k logits of texts (labelled and not) and of generated vectors, (N, k) and (M, k).
        texts_fake, generated_fake: their (k+1)-th, (N,) and (M,).
    """
    on_texts = softplus(texts_fake - texts.logsumexp(-1)).mean()
    return on_texts + softplus(generated.logsumexp(-1) - generated_fake).mean()


def generator_loss(generated: Tensor, generated_fake: Tensor, features: Tensor, generated_features: Tensor) -> Tensor:
    """Of the generator: to be taken for texts, and to have their mean features (``features``, (N, width), of texts)."""
    matched = (features.detach().mean(0) - generated_features.mean(0)).square().mean()
    return softplus(generated_fake - generated.logsumexp(-1)).mean() + matched


def _head_dropout(model: Any) -> float:
    return float(getattr(model.config, "hidden_dropout_prob", 0.1) or 0.0)
