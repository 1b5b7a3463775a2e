"""Sentiment, or any other classes of texts: fine-tuning an encoder on labelled lines, and telling how well it does.

    from fastgan.training.finetune import finetune
    from fastgan.training.sentiment import SENTIMENT, SentimentConfig, classify

    config = SentimentConfig(train="train.tsv", validation="dev.tsv", model="bert-base-uncased")
    finetune(SENTIMENT, config, "runs/mine")
    classify("runs/mine", ["A film of rare warmth."])

Tokenizer, model and head are transformers'; the class with the most probability is the answer.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fastgan.data.grouped import batches_of_like_length, sorted_by_length
from fastgan.data.labelled import label_names, read_labelled
from fastgan.metrics.classes import classification
from fastgan.metrics.results import SAMPLES, SEED, Evaluation
from fastgan.training.finetune import FinetuneConfig, Prepared, Task
from fastgan.training.hub import encode, evaluating, from_scratch, load_model, load_tokenizer, locate, most_tokens

_VOCABULARY = 8000  # words of a tokenizer that is learnt
_SMALL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}


@dataclass(frozen=True)
class SentimentConfig(FinetuneConfig):
    """What ``fastgan finetune sentiment`` is told. The defaults suit a pretrained encoder."""

    train: str = ""  # .tsv, .csv or .jsonl, with a text and a label a line
    validation: str = ""
    text_column: str | None = None
    label_column: str | None = None
    unlabelled: str | None = None  # texts without labels, for gan-bert, vat, smart and r3f

    FILES: ClassVar[tuple[str, ...]] = ("train", "validation")
    OPTIONAL_FILES: ClassVar[tuple[str, ...]] = ("unlabelled",)


def _prepare(config: SentimentConfig, say: Callable[[str], None]) -> Prepared:
    from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, DataCollatorWithPadding

    from fastgan.training.language_trainer import Goal

    columns: dict[str, Any] = {"text_column": config.text_column, "label_column": config.label_column}
    train = read_labelled(config.train, **columns)
    names = label_names(train, config.train)
    validation = read_labelled(config.validation, **columns, allowed=names)
    both = len(set(validation.texts) & set(train.texts))
    if both:
        say(f"{both} of {len(validation.texts)} validation texts are in {config.train} as well: figures flatter")

    labels: dict[str, Any] = {"num_labels": len(names), "id2label": dict(enumerate(names)),
              "label2id": {name: number for number, name in enumerate(names)}}  # fmt: skip
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
        model = load_model(
            AutoModelForSequenceClassification, config.model, tokenizer, config.attention, "classes",
            dropout=config.dropout, settings=labels, ignore_mismatched_sizes=True,
        )  # fmt: skip
    else:
        tokenizer, model = small_bert(BertForSequenceClassification, config, train.texts, labels)
    length = most_tokens(model, tokenizer, config.length)

    numbers = labels["label2id"]
    rows, lengths, cut = _rows(tokenizer, train.texts, [numbers[each] for each in train.labels], length)
    held, held_lengths, held_cut = _rows(
        tokenizer, validation.texts, [numbers[each] for each in validation.labels], length
    )
    if cut or held_cut:
        say(f"{cut} training and {held_cut} validation texts are cut to {length} tokens")
    commonest = Counter(train.labels).most_common(1)[0][0]
    counts = {
        "train": len(rows),
        "validation": len(held),
        "train_cut": cut,
        "validation_cut": held_cut,
        "in_both": both,
    }
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        lengths=lengths,
        held_out=sorted_by_length(held, held_lengths),
        collator=DataCollatorWithPadding(tokenizer),
        goal=Goal("accuracy", greater=True),
        length=length,
        label="loss",
        measure=_accuracy,
        counts=counts,
        levels={"majority": validation.labels.count(commonest) / len(validation.labels)},
        arguments={"prediction_loss_only": False, "per_device_eval_batch_size": max(32, config.batch_size)},
    )


SENTIMENT = Task("sentiment", SentimentConfig, _prepare)


def small_bert(kind: Any, config: FinetuneConfig, texts: list[str], settings: dict[str, Any]) -> tuple[Any, Any]:
    """A tokenizer learnt from the texts (the same texts, the same tokenizer), and a BERT of this kind at step 0."""
    from transformers import BertConfig

    from fastgan.data.text import train_tokenizer

    tokenizer = train_tokenizer(texts, _VOCABULARY, max_length=config.length)
    shape = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=config.length,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=float(_SMALL["hidden_size"] ** -0.5),
        **_SMALL,
        **settings,
    )
    if config.dropout is not None:
        shape.hidden_dropout_prob = shape.attention_probs_dropout_prob = config.dropout
    return tokenizer, from_scratch(kind, shape, config.attention)


def _rows(
    tokenizer: Any, texts: Sequence[str], labels: Sequence[int], length: int
) -> tuple[list[dict[str, Any]], list[int], int]:
    """Examples, their lengths, and how many texts were cut."""
    whole, cut = encode(tokenizer, texts, length)
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(whole, labels, strict=True)]
    return rows, [len(ids) for ids in whole], len(cut)


def _accuracy(predicted: Any) -> dict[str, float]:
    logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    return {"accuracy": float((np.asarray(logits).argmax(-1) == predicted.label_ids).mean())}


@torch.no_grad()
def classify(
    model: str | os.PathLike[str] | tuple[Any, Any],
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    attention: str = "fastgan",
) -> tuple[list[str], np.ndarray]:
    """The label of each text, and the probabilities of all labels, float32 (texts, labels).

    ``model``: a folder that :func:`finetune` or transformers wrote, a name on the hub, or a (model, tokenizer) pair.
    Texts longer than the model are cut at its end. Raises ValueError or FileNotFoundError, naming the folder.
    """
    with evaluating(model, "AutoModelForSequenceClassification", attention, "classes") as (network, tokenizer):
        device, length = next(network.parameters()).device, most_tokens(network, tokenizer, 1 << 30)
        names = [network.config.id2label[number] for number in range(network.config.num_labels)]
        found = np.zeros((len(texts), len(names)), np.float32)
        for chosen in batches_of_like_length([len(text) for text in texts], batch_size):
            batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=length,
                              return_tensors="pt").to(device)  # fmt: skip
            found[chosen] = network(**batch).logits.float().softmax(-1).cpu().numpy()
    return [names[number] for number in found.argmax(-1)], found


def evaluate_sentiment(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Evaluation:
    """:func:`fastgan.metrics.classification` of a model's answers on a labelled file.

    Raises ValueError (TextError for what the file holds) or FileNotFoundError, naming the file or folder.
    """
    from transformers import AutoConfig

    place, local = locate(os.fspath(model))
    labels = AutoConfig.from_pretrained(place, local_files_only=local).id2label
    names = [str(labels[number]) for number in sorted(labels)]
    read = read_labelled(data, text_column=text_column, label_column=label_column, allowed=names)
    guesses, _ = classify(model, read.texts)
    return classification(guesses, read.labels, names=names, samples=samples, seed=seed)
