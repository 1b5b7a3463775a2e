"""Blocks of a corpus as training examples, each a pure function of (seed, number): nothing drawn has to be saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.data.batches import BatchOrder, _raw
from fastgan.data.corpus import Corpus

_MASKS, _CUT = 2, 6  # streams apart from those of fastgan.data.batches and grouped


class Blocks(torch.utils.data.Dataset):
    """Example ``i`` of training, counted from its start, as ``{"input_ids", "labels"}``, int64 (length,) each.

    Every epoch is a new shuffle of the blocks. For a causal model the labels are the ids themselves (the model shifts
    them). For a masked one the block is ``[CLS] ... [SEP]`` where the tokenizer has these, and ``mlm_probability`` of
    its tokens, at least one, are to be predicted: 80 % are masked, 10 % another token, 10 % as they were, drawn anew
    each time. For replaced words all of them are masked.

    Args:
        ids: the tokens, one after the other; what does not fill the last block is left out.
        tokenizer: of the corpus.
        length: of a block.
        objective: "mlm", "clm" or "rtd".
        seed: of the order and the masks.
        count: number of examples, or None for every block once, in order.
        most: where ``count`` is None, at most so many blocks, spread evenly.
    """

    def __init__(
        self,
        ids: np.ndarray,
        tokenizer: Any,
        length: int,
        objective: str,
        seed: int,
        count: int | None = None,
        most: int | None = None,
        mlm_probability: float = 0.15,
    ) -> None:
        self.ids, self.objective, self.seed, self.probability = ids, objective, seed, mlm_probability
        begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.frame = (begin, end) if objective != "clm" and begin is not None and end is not None else None
        self.body = length - 2 * (self.frame is not None)
        self.blocks = len(ids) // self.body
        self.special = np.array(sorted(set(tokenizer.all_special_ids)), np.int64)
        self.mask_id = tokenizer.mask_token_id
        self.words = np.setdiff1d(np.arange(len(tokenizer)), self.special)
        self.order = None if count is None or not self.blocks else BatchOrder(self.blocks, 1, seed)
        self.chosen = np.linspace(0, self.blocks, min(self.blocks, most or self.blocks), endpoint=False).astype(
            np.int64
        )
        self.count = len(self.chosen) if count is None else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if self.order is None:
            block = int(self.chosen[index])
        else:
            epoch, place = divmod(index, self.blocks)
            block = int(self.order.permutation(epoch)[place])
        tokens = np.asarray(self.ids[block * self.body : (block + 1) * self.body], np.int64)
        if self.frame is not None:
            tokens = np.concatenate([self.frame[:1], tokens, self.frame[1:]])
        inputs, labels = (tokens, tokens.copy()) if self.objective == "clm" else self._masked(tokens, index)
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}

    def _masked(self, tokens: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([_MASKS, self.seed, index])))
        chance = draws.random(len(tokens))
        chance[np.isin(tokens, self.special)] = 2.0
        wanted = chance < self.probability
        wanted[chance.argmin()] |= chance.min() < 1  # a loss over nothing has no value
        if self.objective == "rtd":
            return np.where(wanted, self.mask_id, tokens), np.where(wanted, tokens, -100)
        kind = draws.random(len(tokens))
        inputs = np.where(wanted & (kind < 0.8), self.mask_id, tokens)
        others = self.words[draws.integers(0, len(self.words), len(tokens))]
        inputs = np.where(wanted & (kind >= 0.9), others, inputs)
        return inputs, np.where(wanted, tokens, -100)


class MovedBlocks(Sequence[dict[str, Any]]):
    """A text's tokens in blocks, which begin at other places each epoch: with few tokens a model learns later to know
    the blocks by heart, and every token is predicted with much of the text before it in some of the epochs.

    As a sequence it is the blocks of epoch 0; ``of_epoch(epoch, number)`` is one of any other, a pure function of the
    seed. Each block is ``{"input_ids", "labels"}``, int64 (length,), and the same array.
    """

    def __init__(self, ids: np.ndarray, length: int, seed: int) -> None:
        self.ids, self.length, self.seed = ids, length, seed
        full = len(ids) // length
        # The last block is given up where it leaves no room to move.
        self.blocks = full - 1 if full > 1 and len(ids) % length < length - 1 else full

    def __len__(self) -> int:
        return self.blocks

    def of_epoch(self, epoch: int, number: int) -> dict[str, Any]:
        if not 0 <= number < self.blocks:
            raise IndexError(number)
        places = min(self.length, len(self.ids) - self.blocks * self.length + 1)
        start = int(_raw(1, _CUT, self.seed, epoch)[0] % np.uint64(places)) + number * self.length
        block = self.ids[start : start + self.length]
        return {"input_ids": block, "labels": block}

    def __getitem__(self, number: Any) -> Any:
        return self.of_epoch(0, number)


def make_blocks(corpus: Corpus, split: str, **options: Any) -> Blocks:
    """Of a corpus's split; ``options`` as :class:`Blocks` has them, without ``ids`` and ``tokenizer``."""
    return Blocks(corpus.ids(split), corpus.tokenizer(), **options)
