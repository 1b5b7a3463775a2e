"""Answers from many texts: a model fine-tuned on questions, then asked about files that it has not seen.

In commands: ``fastgan finetune qa --model NAME --train TRAIN --validation DEV --out FOLDER``, then ``fastgan answer
FOLDER --corpus TEXTS --question "Who wrote Frankenstein?"`` and ``fastgan evaluate retrieval --model FOLDER --data
DEV``.

    python examples/answer.py TRAIN.json DEV.json FOLDER TEXTS QUESTION [model] [steps]

TRAIN and DEV are SQuAD's JSON, TEXTS is a file or a folder. Without a model, or with "small", it begins from nothing,
and the search goes by words alone.
"""

import sys

from fastgan.training.answer import answer_from
from fastgan.training.finetune import finetune
from fastgan.training.qa import QA, QAConfig
from fastgan.training.retrieval import evaluate_retrieval

train, dev, folder, texts, question = sys.argv[1:6]
model = sys.argv[6] if len(sys.argv) > 6 else "small"
steps = int(sys.argv[7]) if len(sys.argv) > 7 else 0
begin = {"from_scratch": "small", "lr": 5e-4} if model == "small" else {"model": model}
retrieval = "bm25" if model == "small" else "both"

figures = finetune(QA, QAConfig(train=train, validation=dev, max_steps=steps, **begin), folder).figures
print(f"F1 {figures['f1']:.1f}, exact match {figures['exact_match']:.1f}")
print(evaluate_retrieval([dev], folder, retrieval=retrieval))

reply = answer_from(folder, [texts], question, retrieval=retrieval, top=3)[0]
for answer in reply.answers:
    print(f"{answer.text!r}, score {answer.score:.1f}: {answer.file}, line {answer.line}")
if not reply.answers:
    print("no answer in these texts")
