"""Summaries: a model fine-tuned on documents with their summaries, measured by ROUGE, and asked.

In commands: ``fastgan finetune summarize --model facebook/bart-base --train TRAIN --validation DEV --out FOLDER``, then
``fastgan evaluate summarize --model FOLDER --data DEV``.

    python examples/summarize.py TRAIN.jsonl DEV.jsonl FOLDER [model] [steps]

A line is an object: {"document": ..., "summary": ...}. Without a model, or with "small", it begins from nothing, which
on a few thousand documents does not reach their first sentences. A pretrained encoder (BERT, MiniLM) takes the best
sentence of each document, a pretrained encoder with a decoder (BART, T5) writes.
"""

import sys

from fastgan.data.documents import read_documents
from fastgan.training.finetune import finetune
from fastgan.training.summarize import SUMMARIZE, SummarizeConfig, evaluate_summarize, summarize

train, dev, folder = sys.argv[1:4]
model = sys.argv[4] if len(sys.argv) > 4 else "small"
steps = int(sys.argv[5]) if len(sys.argv) > 5 else 0
small = {"from_scratch": "small", "layers": 2, "width": 128, "heads": 4, "length": 256, "lr": 1e-3}
begin = small if model == "small" else {"model": model}

config = SummarizeConfig(train=train, validation=dev, max_steps=steps, **begin)
figures = finetune(SUMMARIZE, config, folder).figures
print(f"ROUGE-1 {figures['rouge1']:.1f}; the first sentence {figures['first_sentence_rouge1']:.1f}")
evaluation, lines = evaluate_summarize(folder, dev)
print(evaluation)

documents, summaries = read_documents(dev)
print(f"written: {summarize(folder, documents[:1])[0]}\ngiven:   {summaries[0][0]}")
