"""Tell classes of texts apart: an encoder fine-tuned on labelled lines, measured, and asked.

In commands: ``fastgan finetune sentiment --model NAME --train TRAIN --validation DEV --out FOLDER``, then ``fastgan
evaluate sentiment --model FOLDER --data DEV``.

    python examples/sentiment.py TRAIN.tsv DEV.tsv FOLDER [model] [steps]

Files: a text, a tab and a label a line (or .csv, .jsonl). Without a model, or with "small", it begins from nothing.
"""

import sys

from fastgan.training.finetune import finetune
from fastgan.training.sentiment import SENTIMENT, SentimentConfig, classify, evaluate_sentiment

train, dev, folder = sys.argv[1:4]
model = sys.argv[4] if len(sys.argv) > 4 else "small"
steps = int(sys.argv[5]) if len(sys.argv) > 5 else 0
begin = {"from_scratch": "small", "lr": 5e-4} if model == "small" else {"model": model}

config = SentimentConfig(train=train, validation=dev, epochs=2, max_steps=steps, **begin)
result = finetune(SENTIMENT, config, folder)
figures = result.figures
print(f"{result.step} steps: accuracy {figures['accuracy']:.1%}, majority {figures['majority']:.1%}")
print(evaluate_sentiment(folder, dev))

for text in ("A film of rare warmth.", "Two hours that I will not get back."):
    labels, probabilities = classify(folder, [text])
    print(f"{labels[0]} ({probabilities.max():.0%}): {text}")
