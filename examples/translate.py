"""A translator from nothing, on two parallel files: one vocabulary for both languages, training, beam search, BLEU.

In commands: ``fastgan finetune translate --from-scratch small --train A.de A.en --validation B.de B.en --out FOLDER``,
then ``fastgan evaluate translate --model FOLDER --data C.de C.en``.

    python examples/translate.py A.de A.en B.de B.en FOLDER [steps]

Files may be gzipped. On Multi30k's 29,000 pairs an epoch takes some minutes on two cores.
"""

import sys

from fastgan.training.finetune import finetune
from fastgan.training.translate import TRANSLATE, TranslateConfig, evaluate_translate

source, target, held_source, held_target, folder = sys.argv[1:6]
steps = int(sys.argv[6]) if len(sys.argv) > 6 else 0

config = TranslateConfig(
    train=(source, target),
    validation=(held_source, held_target),
    from_scratch="small",
    layers=2,
    width=128,
    heads=4,
    max_steps=steps,
)
result = finetune(TRANSLATE, config, folder)
print(
    f"{result.step} steps, {result.parameters / 1e6:.1f} million parameters; BLEU {result.figures['bleu']:.1f} greedily"
)

evaluation, lines = evaluate_translate(folder, held_source, held_target)
print(evaluation)
for line in lines[:3]:
    print(f"  {line}")
