"""Questions about a text: an encoder fine-tuned to point at the answer, measured as SQuAD does, and asked.

In commands: ``fastgan finetune qa --model NAME --train TRAIN --validation DEV --out FOLDER``, then ``fastgan evaluate
qa --model FOLDER --data DEV``.

    python examples/qa.py TRAIN.json DEV.json FOLDER [model] [steps]

Files are SQuAD's JSON, 1.1 or 2.0. Without a model, or with "small", it begins from nothing.
"""

import sys

from fastgan.data.squad import read_questions
from fastgan.training.finetune import finetune
from fastgan.training.qa import QA, QAConfig, answer, evaluate_qa

train, dev, folder = sys.argv[1:4]
model = sys.argv[4] if len(sys.argv) > 4 else "small"
steps = int(sys.argv[5]) if len(sys.argv) > 5 else 0
begin = {"from_scratch": "small", "lr": 5e-4} if model == "small" else {"model": model}

figures = finetune(QA, QAConfig(train=train, validation=dev, max_steps=steps, **begin), folder).figures
print(f"F1 {figures['f1']:.1f}, exact match {figures['exact_match']:.1f}")
evaluation, predictions = evaluate_qa(folder, dev)
print(evaluation)

for each in read_questions(dev)[:3]:
    found = answer(folder, each.question, [each.context])[0]
    print(f"{each.question} {found.text or 'no answer'!r}, score {found.score:.1f}; right: {each.answers[:1]}")
