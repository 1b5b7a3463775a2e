"""Write on in the manner of a text file: a GPT-2 trained on it, or a pretrained one fine-tuned, then drawn from.

In commands: ``fastgan finetune generate --from-scratch small --train TEXT --validation HELD --out FOLDER``, then
``fastgan generate FOLDER --prompt "The "`` and ``fastgan evaluate generate --model FOLDER --data HELD``.

    python examples/generate.py TEXT HELD FOLDER [model] [steps]

Without a model, or with "small", it begins from nothing.
"""

import sys

from fastgan.training.finetune import finetune
from fastgan.training.generate import GENERATE, GenerateConfig, evaluate_generate, generate

text, held, folder = sys.argv[1:4]
model = sys.argv[4] if len(sys.argv) > 4 else "small"
steps = int(sys.argv[5]) if len(sys.argv) > 5 else 0
begin = {"from_scratch": "small", "layers": 2, "width": 128} if model == "small" else {"model": model, "lr": 5e-5}

config = GenerateConfig(train=text, validation=held, length=64, max_steps=steps, **begin)
figures = finetune(GENERATE, config, folder).figures
print(f"validation loss {figures['loss']:.3f} per token, {figures['loss_per_character']:.3f} per letter")

for temperature in (0.5, 1.0):
    for written in generate(folder, "The ", n=2, max_tokens=30, temperature=temperature, seed=0)[0]:
        print(f"{temperature}: {written!r}")
print(evaluate_generate(folder, held, n=20, length=32))
