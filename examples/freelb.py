"""FreeLB in a training loop of one's own: the embeddings are attacked, the model is untouched.

A small BERT learns which of two words a sentence holds; each step trains on the batch itself and on two perturbations
of it, with the same dropout mask in all three passes. In commands: ``fastgan finetune sentiment --adversary freelb``.

    python examples/freelb.py [steps] [noise|fgm|pgd|freelb]
"""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification

import fastgan
from fastgan.adversarial import Attack, preset

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
method = sys.argv[2] if len(sys.argv) > 2 else "freelb"
PAD, CLS, WORDS, LENGTH, BATCH = 0, 1, 50, 12, 32
torch.manual_seed(0)


def draw():
    """Sentences of random words, 4 to LENGTH tokens; the label is whether word 2 or word 3 stands in them."""
    ids, labels = torch.randint(4, WORDS, (BATCH, LENGTH)), torch.randint(0, 2, (BATCH,))
    lengths = torch.randint(4, LENGTH + 1, (BATCH, 1))
    place = 1 + (torch.rand(BATCH, 1) * (lengths - 1)).long()
    ids.scatter_(1, place, 2 + labels.unsqueeze(1))
    ids[:, 0] = CLS
    mask = torch.arange(LENGTH) < lengths
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


config = BertConfig(vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                    initializer_range=0.125)  # fmt: skip
model = fastgan.replace_modules(BertForSequenceClassification(config)).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
attack = Attack(model, preset(method, radius=0.2), special_ids=[PAD, CLS])
print(f"{method}: {attack.settings.passes} passes a step")
for step in range(steps):
    batch, losses = draw(), []
    for share in attack.passes(batch, lambda batch=batch: model(**batch).loss, seed=step):
        loss = model(**batch).loss
        (share * loss).backward()
        losses.append(loss.item())
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step + 1}/{steps}  loss {losses[0]:.4f}  perturbed {losses[-1]:.4f}")
