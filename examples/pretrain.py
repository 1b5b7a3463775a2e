"""A GPT-2 from nothing, on a text file of yours: tokens, training, and a few words of its own.

In commands: ``fastgan prepare text FILE --out FOLDER/corpus``, then ``fastgan pretrain --objective clm --data
FOLDER/corpus --out FOLDER/model``.

    python examples/pretrain.py FILE FOLDER [steps]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastgan.data.corpus import prepare_text
from fastgan.training.pretrain import PretrainConfig, pretrain

file, folder = Path(sys.argv[1]), Path(sys.argv[2])
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 1000

made = prepare_text([file], folder / "corpus", vocab_size=512)
print(f"{made.counts['train']['tokens']:,} tokens to train on, {made.counts['validation']['tokens']:,} held out")

config = PretrainConfig(
    objective="clm",
    data=folder / "corpus",
    layers=2,
    width=128,
    heads=4,
    length=64,
    max_steps=steps,
    warmup=min(100, steps // 10),
    eval_every=max(1, steps // 5),
    lr=1e-3,
)
result = pretrain(config, folder / "model")
print(f"validation loss {result.validation_loss:.3f} per token, {result.validation_loss_per_character:.3f} per letter")

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
model = AutoModelForCausalLM.from_pretrained(folder / "model")
prompt = tokenizer("The ", return_tensors="pt")
words = model.generate(**prompt, max_new_tokens=40, do_sample=True, pad_token_id=tokenizer.pad_token_id)
print(tokenizer.decode(words[0]))
