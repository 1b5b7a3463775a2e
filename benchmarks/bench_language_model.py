"""An AdamW step of a GPT-2 (4 layers × 768, vocabulary 50,257) on 4×512 tokens, beside transformers with SDPA.

Time is taken interleaved in one process; peak memory of three steps in a process for each, whole: weights, optimizer
and libraries included.
"""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.peers import compare

transformers = pytest.importorskip("transformers")

PEAK = """
import sys
from benchmarks.bench_language_model import step_of
step = step_of(sys.argv[1] == "fastgan")
for _ in range(3):
    step()
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def step_of(fused, layers=4, width=768, batch=4, length=512, vocabulary=50257):
    import fastgan.hf

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=width // 64, n_positions=length
    )
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").train()
    if fused:
        fastgan.replace_modules(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, vocabulary, (batch, length))

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_gpt2_step(benchmark):
    peers = {"fastgan": step_of(True), "transformers, SDPA": step_of(False)}
    compare(benchmark, peers, case="GPT-2 4×768, 4×512 tokens, AdamW step", rounds=5)


def test_gpt2_peak_memory(capsys):
    peak = {}
    for name in ("fastgan", "transformers"):
        ran = subprocess.run(
            [sys.executable, "-c", PEAK, name], capture_output=True, text=True, check=True, env={**os.environ}
        )
        peak[name] = int(ran.stdout.split()[-1]) / 1024
    with capsys.disabled():
        ours, theirs = peak.values()
        print(
            f"\npeak memory of the process: fastgan {ours:.0f} MB, transformers {theirs:.0f} MB ({ours / theirs:.0%})"
        )
    assert peak["fastgan"] < peak["transformers"]
