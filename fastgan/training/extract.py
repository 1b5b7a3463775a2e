"""Summaries of a document's own sentences: an encoder reads the document once and says which to take.

It is transformers' token classification as it is: every token of a sentence that belongs into the summary has class 1,
and a sentence's score is the mean of its tokens' log-odds, so that it is judged in its document. The sentences to
learn are found greedily: the one that raises ROUGE most, as long as one does (Nallapati et al., "SummaRuNNer", 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastgan.data.documents import sentences_of
from fastgan.data.grouped import batches_of_like_length, longest_first
from fastgan.training.finetune import Prepared
from fastgan.training.hub import load_model, load_tokenizer, locate, most_tokens
from fastgan.training.language import _quiet

_SENTENCES = "summary_sentences"  # in config.json
_APART = -100  # transformers' label of a token that has none

Summaries = Sequence[Sequence[str]]
Spans = list[tuple[int, int]]


def extracts(model: Any) -> bool:
    """Whether a model, or the one of that name, is an encoder, which can take sentences and write none."""
    if isinstance(model, tuple):
        config = model[0].config
    else:
        from transformers import AutoConfig

        place, local = locate(str(model))
        with _quiet():
            config = AutoConfig.from_pretrained(place, local_files_only=local)
    return not config.is_encoder_decoder


def prepare_extraction(
    config: Any,
    train: tuple[Sequence[str], Summaries],
    validation: tuple[Sequence[str], Summaries],
    figures: Callable[[list[str], Summaries], dict[str, float]],
    say: Callable[[str], None],
) -> Prepared:
    """Model and examples; ``config`` is a SummarizeConfig, ``figures(lines, summaries)`` their ROUGE in percent."""
    from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

    from fastgan.training.language_trainer import Goal

    tokenizer = load_tokenizer(config.model)
    model = load_model(
        AutoModelForTokenClassification, config.model, tokenizer, config.attention, "sentences",
        dropout=config.dropout, settings={"num_labels": 2}, ignore_mismatched_sizes=True,
    )  # fmt: skip
    setattr(model.config, _SENTENCES, config.sentences)
    length = most_tokens(model, tokenizer, config.length)
    rows, _, cut = _examples(tokenizer, *train, length, config.sentences)
    held, spans, held_cut = _examples(tokenizer, *validation, length, config.sentences)
    if cut or held_cut:
        say(f"{cut} training and {held_cut} validation documents are cut to {length} tokens")
    order = longest_first([len(row["input_ids"]) for row in held])
    held, spans = [held[index] for index in order], [spans[index] for index in order]
    texts = [validation[0][index] for index in order]
    own = [validation[1][index] for index in order]

    def measure(predicted: Any) -> dict[str, float]:
        logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        scores = [_scores(logits[number], places) for number, places in enumerate(spans)]
        return figures(_lines(texts, scores, config.sentences), own)

    return Prepared(
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        lengths=[len(row["input_ids"]) for row in rows],
        held_out=held,
        collator=DataCollatorForTokenClassification(tokenizer),
        goal=Goal("rouge1", greater=True),
        length=length,
        label="loss per token",
        measure=measure,
        counts={"train": len(rows), "validation": len(held), "train_cut": cut, "validation_cut": held_cut,
                "in_both": len(set(validation[0]) & set(train[0]))},
        arguments={"prediction_loss_only": False, "per_device_eval_batch_size": max(32, config.batch_size)},
    )  # fmt: skip


def best_sentences(sentences: Sequence[str], summaries: Sequence[str], count: int) -> list[int]:
    """At most ``count`` sentences whose ROUGE (the mean F1 of 1, 2 and L) against the best of the summaries is highest.

    Found greedily, the earliest of equals; fewer where a further one would make it worse.
    """
    from fastgan.metrics.summaries import TYPES, _rouge_score

    scorer = _rouge_score()[0].RougeScorer(list(TYPES))

    def gain(chosen: list[int]) -> float:
        text = " ".join(sentences[number] for number in sorted(chosen))
        scores = [scorer.score(summary, text) for summary in summaries]
        return max(sum(each.fmeasure for each in score.values()) for score in scores)

    chosen: list[int] = []
    best = -1.0
    while len(chosen) < min(count, len(sentences)):
        rest = [number for number in range(len(sentences)) if number not in chosen]
        gains = [gain([*chosen, number]) for number in rest]
        if max(gains) <= best:
            break
        best = max(gains)
        chosen.append(rest[gains.index(best)])
    return sorted(chosen)


def _examples(
    tokenizer: Any, documents: Sequence[str], summaries: Summaries, length: int, count: int
) -> tuple[list[dict[str, Any]], list[Spans], int]:
    """Rows with labels, the tokens of each one's sentences, and how many documents were cut."""
    rows, spans, cut = _rows(tokenizer, documents, length)
    for row, places, document, own in zip(rows, spans, documents, summaries, strict=True):
        chosen = set(best_sentences(sentences_of(document), own, count))
        row["labels"] = [_APART] * len(row["input_ids"])
        for number, (start, stop) in enumerate(places):
            row["labels"][start:stop] = [int(number in chosen)] * (stop - start)
    return rows, spans, cut


def _rows(tokenizer: Any, documents: Sequence[str], length: int) -> tuple[list[dict[str, Any]], list[Spans], int]:
    """As ``_examples``, without labels; of a document that is cut, the sentences that are left."""
    if not tokenizer.is_fast:
        raise ValueError("model must have a tokenizer.json: where a sentence's tokens are is known by it alone")
    rows, spans, cut = [], [], 0
    for document in documents:
        encoded = tokenizer(document, return_offsets_mapping=True, verbose=False)
        if len(encoded["input_ids"]) > length:
            encoded = tokenizer(document, return_offsets_mapping=True, truncation=True, max_length=length)
            cut += 1
        offsets = encoded["offset_mapping"]
        inside = [place for place, (start, stop) in enumerate(offsets) if stop > start]
        begins = np.array([offsets[place][0] for place in inside])
        places: Spans = []
        at = 0
        for sentence in sentences_of(document):
            at = document.index(sentence, at)
            own = [inside[each] for each in np.flatnonzero((begins >= at) & (begins < at + len(sentence)))]
            at += len(sentence)
            if own:
                places.append((own[0], own[-1] + 1))
            elif begins.size and at > begins[-1]:
                break  # what is cut; a sentence of no tokens in between keeps its number
            else:
                places.append((0, 0))
        rows.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
        spans.append(places or [(0, 0)])
    return rows, spans, cut


def _scores(logits: np.ndarray, places: Spans) -> np.ndarray:
    """Each sentence's, of a document's logits (tokens, 2)."""
    odds = logits[:, 1] - logits[:, 0]
    return np.array([odds[start:stop].mean() if stop > start else -np.inf for start, stop in places])


def _lines(documents: Sequence[str], scores: Sequence[np.ndarray], count: int) -> list[str]:
    """The best sentences of each document, in its own order; those that the model has not read are not among them."""
    lines = []
    for document, own in zip(documents, scores, strict=True):
        sentences = sentences_of(document)
        best = np.argsort(-own, kind="stable")[:count]
        lines.append(" ".join(sentences[number] for number in sorted(best)))
    return lines


@torch.no_grad()
def extract(network: Any, tokenizer: Any, documents: Sequence[str], batch_size: int = 32) -> list[str]:
    """The best sentences of each document, as many as the model was trained to take, in its own order."""
    device = next(network.parameters()).device
    rows, spans, _ = _rows(tokenizer, documents, most_tokens(network, tokenizer, 1 << 30))
    scores: list[Any] = [None] * len(rows)
    for chosen in batches_of_like_length([len(row["input_ids"]) for row in rows], batch_size):
        with _quiet():
            batch = tokenizer.pad([rows[index] for index in chosen], return_tensors="pt").to(device)
        logits = network(**batch).logits.float().cpu().numpy()
        for place, index in enumerate(chosen):
            scores[index] = _scores(logits[place], spans[index])
    return _lines(documents, scores, getattr(network.config, _SENTENCES, 1))
