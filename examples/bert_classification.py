"""Fine-tune a BERT on a handful of sentences, its attention through fastgan's kernels.

Apart from two places these are the usual lines: ``import fastgan.hf``, and ``attn_implementation="fastgan"``.

    python examples/bert_classification.py                       # bert-base-uncased from the hub
    python examples/bert_classification.py --model ./my-bert     # a local folder
"""

import argparse

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastgan.hf  # noqa: F401  registers attn_implementation="fastgan"

SENTENCES = [
    ("A film of rare warmth.", 1),
    ("I would gladly watch it again.", 1),
    ("The cast is wonderful from first to last.", 1),
    ("Two hours that I will not get back.", 0),
    ("The plot makes no sense at all.", 0),
    ("Dull, loud and far too long.", 0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-base-uncased", help="a name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=2, attn_implementation="fastgan"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)

    texts, labels = zip(*SENTENCES, strict=True)
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    labels = torch.tensor(labels)

    model.train()
    for step in range(1, options.steps + 1):
        outputs = model(**inputs, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}  loss {outputs.loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(-1)
    print(f"right: {(predicted == labels).sum().item()} of {len(labels)}")


if __name__ == "__main__":
    main()
