"""Models and tokenizers by folder or by name on the hub; what is missing is said at once, in one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_PATIENCE = 5.0  # seconds that the hub has to answer
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "dropout_rate",
    "embd_pdrop", "resid_pdrop", "attn_pdrop", "hidden_dropout", "embedding_dropout",
)  # fmt: skip


def locate(name: str) -> tuple[str, bool]:
    """(what ``from_pretrained`` is to be given, whether it may load only what is on this machine).

    A folder, or a name whose files were downloaded before, needs no hub. Otherwise the hub is asked once, and has five
    seconds to answer: transformers itself would try for minutes. Raises FileNotFoundError.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise FileNotFoundError(2, "holds no model of transformers (no config.json)", name)
        return name, True
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(2, "no such folder", name)
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return name, True
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise FileNotFoundError(2, "is neither a folder nor downloaded, and HF_HUB_OFFLINE is set", name)
    try:
        HfApi().model_info(name, timeout=_PATIENCE)
    except Exception as error:  # of many kinds, of several libraries
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(2, f"no such folder, and the hub does not have it or was not reached ({what})", name)\
            from error  # fmt: skip
    return name, False


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    place, local = locate(name)
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=local)
    except Exception as error:  # of many kinds, one for each way in which a folder is not a tokenizer's
        raise ValueError(f"{name}: holds no tokenizer ({_first(error)})") from error


def load_model(
    kind: Any,
    name: str,
    tokenizer: Any,
    attention: str,
    what: str,
    *,
    whole: bool = False,
    dropout: float | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """``kind.from_pretrained(name)`` in float32, checked against its tokenizer, modules replaced.

    ``whole`` refuses a model that lacks weights, such as an encoder without the head of the task. ``dropout`` takes the
    place of all that the configuration has, ``settings`` are the configuration's, ``options`` ``from_pretrained``'s.
    """
    import torch
    from transformers import AutoConfig

    from fastgan.replace import replace_modules

    place, local = locate(name)
    if attention == "fastgan":
        import fastgan.hf  # noqa: F401  registers the implementation
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=local, **(settings or {}))
        for each in _DROPOUTS if dropout is not None else ():
            if hasattr(config, each):
                setattr(config, each, dropout)
        model, found = kind.from_pretrained(
            place,
            config=config,
            attn_implementation=attention,
            local_files_only=local,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{name}: holds no model for {what} ({_first(error)})") from error
    if whole and found["missing_keys"]:
        raise ValueError(f"{name}: is not fine-tuned for {what}: it has no {min(found['missing_keys'])}")
    words = getattr(model.config.get_text_config(), "vocab_size", None)
    if words is not None and len(tokenizer) > words:
        raise ValueError(
            f"{name}: its tokenizer has {len(tokenizer):,} tokens, the model {words:,}: they do not belong together"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:  # GPT-2's kind, which needs one in a batch
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return replace_modules(model) if attention == "fastgan" else model


def gpt2_shape(config: Any, vocabulary: int, dropout: float, end: int | None, padding: int | None) -> Any:
    """transformers' configuration of a GPT-2 of ``config``'s layers, width, heads and length."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=vocabulary,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        n_positions=config.length,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=padding,
    )


def from_scratch(kind: Any, shape: Any, attention: str) -> Any:
    """The model of a configuration, its weights from torch's generator, modules replaced."""
    from fastgan.replace import replace_modules

    model = kind._from_config(shape, attn_implementation=attention)
    return replace_modules(model) if attention == "fastgan" else model


@contextlib.contextmanager
def evaluating(
    model: str | os.PathLike[str] | tuple[Any, Any], kind: str, attention: str, what: str, *, whole: bool = True
) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer) in evaluation mode, of a pair, which is left as it was, or by name.

    ``kind``: the class of transformers that loads it. ``whole``: as :func:`load_model` has it.
    """
    import torch
    import transformers

    from fastgan.training.language import _own_generators, _quiet

    if isinstance(model, tuple):
        network, tokenizer = model
    else:
        name = os.fspath(model)
        with _quiet(), _own_generators(0):
            tokenizer = load_tokenizer(name)
            network = load_model(getattr(transformers, kind), name, tokenizer, attention, what, whole=whole)
        network.to("cuda" if torch.cuda.is_available() else "cpu")
    training = network.training
    network.eval()
    try:
        yield network, tokenizer
    finally:
        network.train(training)


def encode(tokenizer: Any, texts: Sequence[str], length: int, side: str = "text") -> tuple[list[list[int]], set[int]]:
    """The ids of each text, at most ``length``, and which texts were cut. ``side``: "text", or "text_target"."""
    found = tokenizer(**{side: list(texts)}, verbose=False)["input_ids"]
    cut = {number for number, ids in enumerate(found) if len(ids) > length}
    for number in cut:
        found[number] = tokenizer(**{side: texts[number]}, truncation=True, max_length=length)["input_ids"]
    return found, cut


def most_tokens(model: Any, tokenizer: Any, wanted: int) -> int:
    """The length to cut texts to: what was asked for, or less where the model has fewer positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or wanted
    if getattr(model.config, "position_embedding_type", "absolute") == "absolute" and model.config.model_type in (
        "roberta", "xlm-roberta", "camembert",
    ):  # fmt: skip
        positions -= 2  # they count from the padding's number on
    return min(wanted, positions, tokenizer.model_max_length)


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
