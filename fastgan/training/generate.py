"""Generation: a causal model trained or fine-tuned on a text file, text drawn from it, and what that is worth.

    from fastgan.training.finetune import finetune
    from fastgan.training.generate import GENERATE, GenerateConfig, generate

    finetune(GENERATE, GenerateConfig(train="a.txt", validation="b.txt", from_scratch="small"), "runs/mine")
    generate("runs/mine", "Once upon", n=3, seed=0)

The text is cut into blocks of ``length`` tokens, each epoch in a new order. Models, and ``generate`` itself, are
transformers'. For text that is too big to be held in memory, see ``fastgan prepare text`` and ``fastgan pretrain``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fastgan import metrics
from fastgan.data.blocks import MovedBlocks
from fastgan.data.corpus import _pieces, train_bpe
from fastgan.data.labelled import read_text
from fastgan.metrics.results import SAMPLES, SEED, Evaluation, Result, interval
from fastgan.metrics.translation import _sacrebleu
from fastgan.training.finetune import FinetuneConfig, Prepared, Task
from fastgan.training.hub import from_scratch, gpt2_shape, load_model, load_tokenizer, most_tokens
from fastgan.training.language import _own_generators, _quiet
from fastgan.training.language_run import check_integers
from fastgan.training.streams import TEXTS, mixed_seed

_PROMPT = 8  # tokens of the file that a measured sample goes on from


@dataclass(frozen=True)
class GenerateConfig(FinetuneConfig):
    """What ``fastgan finetune generate`` is told."""

    train: str = ""  # text, UTF-8, plain or .gz
    validation: str = ""
    layers: int = 4
    width: int = 256
    heads: int = 4
    vocab_size: int = 2000  # of the byte-level BPE that is learnt; 261 are the bytes themselves
    epochs: int = 3
    lr: float = 5e-4
    early_stopping: int = 2

    FILES: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"layers": 1, "width": 1, "heads": 1, "vocab_size": 1})
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width = {self.width} and heads = {self.heads}")


def _prepare(config: GenerateConfig, say: Callable[[str], None]) -> Prepared:
    from transformers import AutoModelForCausalLM, default_data_collator

    from fastgan.training.language_trainer import LOSS

    train, validation = read_text(config.train), read_text(config.validation)
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
        model = load_model(
            AutoModelForCausalLM, config.model, tokenizer, config.attention, "generation", dropout=config.dropout
        )
    else:
        tokenizer = train_bpe(train.splitlines(keepends=True), config.vocab_size)
        model = _small(config, tokenizer)
    length = most_tokens(model, tokenizer, config.length)
    ids, held_ids = _ids(tokenizer, train), _ids(tokenizer, validation)
    if tokenizer.eos_token_id is not None:
        ids = np.array([tokenizer.eos_token_id, *ids, tokenizer.eos_token_id])  # begins and ends a text
    blocks, held = MovedBlocks(ids, length, config.seed), _blocks(held_ids, length)
    for path, found, tokens in ((config.train, blocks, ids), (config.validation, held, held_ids)):
        if not len(found):
            raise ValueError(f"{path}: its {len(tokens):,} tokens do not fill one block of length {length}")
    per_character = len(held_ids) / len(validation)
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        rows=blocks,
        lengths=[length] * len(blocks),
        held_out=held,
        collator=default_data_collator,
        goal=LOSS,
        length=length,
        label="next-word loss",
        counts={"train": len(blocks), "validation": len(held), "tokens": len(ids), "validation_tokens": len(held_ids)},
        finish=lambda network, figures: {
            "loss_per_character": figures["loss"] * per_character,
            "perplexity": math.exp(min(figures["loss"], 700.0)),
        },
    )


GENERATE = Task("generate", GenerateConfig, _prepare)


def _small(config: GenerateConfig, tokenizer: Any) -> Any:
    from transformers import GPT2LMHeadModel

    dropout = 0.1 if config.dropout is None else config.dropout
    shape = gpt2_shape(config, len(tokenizer), dropout, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return from_scratch(GPT2LMHeadModel, shape, config.attention)


def _ids(tokenizer: Any, text: str) -> np.ndarray:
    """The tokens of a text, encoded in pieces: the library's memory is a hundred times that of what it is given."""
    ids: list[int] = []
    for piece in _pieces(text):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array(ids, np.int64)


def _blocks(ids: np.ndarray, length: int) -> list[dict[str, Any]]:
    cut = ids[: len(ids) // length * length].reshape(-1, length)
    return [{"input_ids": block, "labels": block} for block in cut]


# ---- drawing ----


@torch.no_grad()
def generate(
    model: str | os.PathLike[str] | tuple[Any, Any],
    prompts: str | Sequence[str],
    *,
    n: int = 1,
    max_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    beams: int = 1,
    seed: int = 0,
    first: int = 0,
    attention: str = "fastgan",
) -> list[list[str]]:
    """``n`` texts for each prompt: continuations by a causal model, prompt included, or an encoder-decoder's output.

    Args:
        model: a folder that :func:`finetune` or transformers wrote, a name on the hub, or a (model, tokenizer) pair.
        prompts: one or several; "" begins with nothing. What is longer than the model loses its beginning, said in a
            warning.
        n: texts for each.
        max_tokens: new ones at most; fewer where the model has no more positions.
        temperature: 1 draws from the model's own distribution, less is less varied, 0 takes the best word each time.
        top_k: draw from the k best words; 0 from all.
        top_p: draw from the best words that make up this share.
        beams: more than 1 searches instead of drawing; the n best are returned.
        seed: the same texts for the same seed, prompt and place among the prompts. Generators are left as they were.
        first: the place of the first prompt, where they are given one after the other.

    Raises:
        ValueError: a setting that cannot be. FileNotFoundError: no model there.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for name, value in (("n", n), ("max_tokens", max_tokens), ("beams", beams)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be more than 0 and at most 1, got {top_p}")
    if beams > 1 and (temperature not in (0, 1) or top_k or top_p < 1):
        raise ValueError(f"beams must be 1 where temperature, top_k or top_p are to draw at random, got {beams}")
    searches = beams > 1 or temperature == 0
    if searches and n > beams:
        raise ValueError(f"n must be at most the {beams} beams where nothing is drawn at random, got {n}")
    network, tokenizer = model if isinstance(model, tuple) else load(os.fspath(model), attention)
    training, device = network.training, next(network.parameters()).device
    network.eval()
    settings: dict[str, Any] = {"num_beams": beams, "num_return_sequences": n, "do_sample": not searches}
    if not searches:
        settings |= {"temperature": float(temperature), "top_k": top_k, "top_p": float(top_p)}
    if network.generation_config.pad_token_id is None:
        settings["pad_token_id"] = _padding(tokenizer)
    texts = []
    for number, prompt in enumerate(prompts, first):
        ids, room = _encoded(network, tokenizer, prompt, max_tokens)
        with _own_generators(mixed_seed(seed, TEXTS, number)), _quiet():
            found = network.generate(
                input_ids=ids.to(device), attention_mask=torch.ones_like(ids, device=device), max_new_tokens=room,
                **settings,
            )  # fmt: skip
        texts.append(tokenizer.batch_decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    network.train(training)
    return texts


def load(name: str, attention: str = "fastgan") -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or a name on the hub, causal or encoder-decoder, as its configuration says."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from fastgan.training.hub import locate

    with _quiet(), _own_generators(0):
        place, local = locate(name)
        pair = AutoConfig.from_pretrained(place, local_files_only=local).is_encoder_decoder
        tokenizer = load_tokenizer(name)
        kind = AutoModelForSeq2SeqLM if pair else AutoModelForCausalLM
        network = load_model(kind, name, tokenizer, attention, "generation", whole=True)
    return network.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _padding(tokenizer: Any) -> Any:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _encoded(network: Any, tokenizer: Any, prompt: str, max_tokens: int) -> tuple[torch.Tensor, int]:
    """The prompt's tokens (1, length), and how many new ones there is room for."""
    pair = network.config.is_encoder_decoder
    ids = tokenizer(prompt, add_special_tokens=pair, verbose=False)["input_ids"]
    if not ids:
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise ValueError("prompt must not be empty: the model has no token to begin with")
        ids = [begin]
    most = most_tokens(network, tokenizer, 1 << 30)
    room = most if pair else most - 1  # a causal model continues in the same positions
    if len(ids) > room:
        warnings.warn(f"a prompt of {len(ids)} tokens loses its first {len(ids) - room}: the model has {most}",
                      stacklevel=3)  # fmt: skip
        ids = ids[-room:]
    return torch.tensor([ids]), min(max_tokens, most - 1 if pair else most - len(ids))


# ---- measuring ----


@torch.no_grad()
def evaluate_generate(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    n: int = 50,
    length: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    samples: int = SAMPLES,
) -> Evaluation:
    """Loss and perplexity on a text file, and how varied ``n`` texts drawn from the model are, beside the file's own.

    ``loss`` is nats per token over blocks of the model's length, its interval over the blocks; ``loss per character``
    compares models of different vocabularies. distinct-n and self-BLEU are of ``n`` texts of ``length`` tokens, each
    going on from the first eight of a stretch of the file, and (named "data ...") of these stretches themselves: a
    model that repeats itself is far from them, whatever its loss.

    Raises ValueError (TextError for what the file holds) or FileNotFoundError, naming the file or folder.
    """
    _sacrebleu()  # that it is missing is said before the work, not after it
    network, tokenizer = load(os.fspath(model))
    if network.config.is_encoder_decoder:
        raise ValueError(f"{model}: is an encoder and decoder; a causal model is measured here")
    network.eval()
    text = read_text(data)
    ids = _ids(tokenizer, text)
    if len(ids) < 2:
        raise ValueError(f"{data}: {len(ids)} tokens are too few")
    losses, counts = _losses(network, ids, most_tokens(network, tokenizer, 1024))
    loss = float(losses.sum() / counts.sum())
    low, high = interval(losses / counts.mean(), samples) if samples and len(losses) > 1 else (None, None)
    signature = f"tokens:{len(ids)}|predicted:{counts.sum()}|bs:{samples}|seed:{SEED}"
    results = []
    per_character = len(ids) / len(text)
    for name, change in (("loss", lambda each: each), ("perplexity", lambda each: math.exp(min(each, 700.0))),
                         ("loss per character", lambda each: each * per_character)):  # fmt: skip
        score, bounds = change(loss), [None if each is None else change(each) for each in (low, high)]
        shown = "" if low is None else f" (95 %: {bounds[0]:.4f} to {bounds[1]:.4f})"
        results.append(Result(name, score, bounds[0], bounds[1], signature, f"{name}|{signature} = {score:.4f}{shown}"))
    length = min(length, len(ids), most_tokens(network, tokenizer, 1024))
    starts = np.linspace(0, len(ids) - length, min(n, max(1, len(ids) // length))).astype(int)
    own = np.stack([ids[start : start + length] for start in starts])
    prompts = torch.from_numpy(own[:, : min(_PROMPT, length - 1)]).to(next(network.parameters()).device)
    with _own_generators(mixed_seed(seed, TEXTS, 0)), _quiet():
        drawn = network.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=length - prompts.shape[1],  # the same amount of text: all three measures change with it
            max_new_tokens=length - prompts.shape[1],
            do_sample=temperature > 0,
            pad_token_id=_padding(tokenizer),
            **({"temperature": float(temperature), "top_k": 0} if temperature > 0 else {}),
        ).tolist()
    for prefix, tokens in (("", drawn), ("data ", own.tolist())):
        lines = [" ".join(each.split()) for each in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        found = metrics.distinct(lines).results + (
            metrics.self_bleu(lines, samples=samples).results if len(lines) > 1 else []
        )
        results += [_renamed(result, prefix + result.name) for result in found]
    return Evaluation(results)


def repeats_itself(found: Evaluation) -> str:
    """What is to be said of a model whose texts have a quarter fewer different pairs of words than the file; else "".

    No stricter, since each text begins with words of the file.
    """
    own, data = found["distinct-2"], found["data distinct-2"]
    if own >= 0.75 * data:
        return ""
    return (
        f"the model repeats itself: {own:.1%} of its pairs of words are different, and {data:.1%} of the file's; a "
        "higher --temperature may help, and shows whether the loss or the drawing is to blame"
    )


def _losses(network: Any, ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """For each block the sum of its tokens' losses, and how many were predicted (all but its first)."""
    device = next(network.parameters()).device
    blocks = [ids[at : at + length] for at in range(0, len(ids), length)]
    blocks = [block for block in blocks if len(block) > 1]
    losses = []
    for block in blocks:
        tokens = torch.from_numpy(block)[None].to(device)
        logits = network(input_ids=tokens).logits[0, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")))
    return np.array(losses), np.array([len(block) - 1 for block in blocks])


def _renamed(result: Result, name: str) -> Result:
    return dataclasses.replace(result, name=name, text=result.text.replace(result.name, name, 1))
