"""Work on language models beside transformers with SDPA, one row each: steps, generation, preparing text.

Time is taken interleaved in one process; peak memory of three GPT-2 steps in a process for each, whole: weights,
optimizer and libraries included. Two rows need data: ``FASTGAN_MINILM`` names the folder of a MiniLM and its
tokenizer, ``FASTGAN_DATA`` that of SST-2 and Shakespeare. ``python -m benchmarks.bench_language_model ROW ...`` shows
by operator what each side of a row spends (gpt2, bert, each also with -bfloat16, minilm, generate-1, generate-8,
prepare).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.peers import compare
from fastgan.ops.product import tiles_are_used

transformers = pytest.importorskip("transformers")

PEAK = """
import sys
from benchmarks.bench_language_model import gpt2_step
step = gpt2_step(sys.argv[1] == "fastgan")
for _ in range(3):
    step()
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
OURS, THEIRS = "fastgan", "transformers, SDPA"


def gpt2(fused, length=512, layers=4, width=768, vocabulary=50257):
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=width // 64, n_positions=length
    )
    return _model(transformers.GPT2LMHeadModel, config, fused)


def gpt2_step(fused, batch=4, length=512, autocast=False):
    model = gpt2(fused, length).train()
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    return training(model, [{"input_ids": ids, "labels": ids, "use_cache": False}], autocast)


def bert_step(fused, batch=8, length=128, autocast=False):
    config = transformers.BertConfig(num_hidden_layers=4)  # 768 wide, dropout 0.1, 30,522 words
    model = _model(transformers.BertForSequenceClassification, config, fused).train()
    ids = torch.randint(0, config.vocab_size, (batch, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch) % 2}
    return training(model, [inputs], autocast)


def minilm_steps(fused, by_length, steps=8, batch=16):
    """Steps of an epoch as ``fastgan finetune sentiment`` makes them, or of one in transformers' default order."""
    from fastgan.data.grouped import GroupedByLength
    from fastgan.data.labelled import read_labelled

    read = read_labelled(_folder("FASTGAN_DATA") / "sst2" / "train.tsv")
    tokenizer = transformers.AutoTokenizer.from_pretrained(_folder("FASTGAN_MINILM"), local_files_only=True)
    rows = [
        {"input_ids": ids, "labels": int(label)}
        for ids, label in zip(tokenizer(read.texts)["input_ids"], read.labels, strict=True)
    ]
    if by_length:
        grouped = GroupedByLength(rows, [len(row["input_ids"]) for row in rows], batch, 0, 2 * steps)
        chosen = [grouped[i] for i in range(steps * batch)]
    else:
        chosen = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    collate = transformers.DataCollatorWithPadding(tokenizer)
    batches = [dict(collate(chosen[i : i + batch])) for i in range(0, steps * batch, batch)]
    config = transformers.AutoConfig.from_pretrained(_folder("FASTGAN_MINILM"), local_files_only=True)
    return training(_model(transformers.BertForSequenceClassification, config, fused).train(), batches)


def generation(fused, batch, tokens=256):
    model = gpt2(fused, length=8 + tokens).eval()
    prompt = torch.randint(0, model.config.vocab_size, (batch, 8))
    told = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 50256}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **told)


def preparing(fused, copies=20):
    """Text to packed ids with a tokenizer that is there; the peer encodes the same lines, all at once, and no more."""
    from fastgan.data.corpus import prepare_text, train_bpe

    text = (_folder("FASTGAN_DATA") / "tinyshakespeare.txt").read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line] * copies
    kept = tempfile.TemporaryDirectory()
    folder = Path(kept.name)
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = train_bpe(lines[: len(lines) // copies], 8192)
    tokenizer.save_pretrained(folder / "tokenizer")

    def ours():
        with tempfile.TemporaryDirectory(dir=kept.name) as out:
            prepare_text([folder / "text.txt"], Path(out) / "corpus", tokenizer=folder / "tokenizer", unit="line")

    return ours if fused else lambda: tokenizer.backend_tokenizer.encode_batch_fast(lines, add_special_tokens=False)


def _model(kind, config, fused):
    import fastgan.hf

    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="sdpa")
    return fastgan.replace_modules(model) if fused else model


def training(model, batches, autocast=False):
    """AdamW steps over the batches, one after another; with ``autocast`` to bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def steps():
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def _folder(variable):
    named = os.environ.get(variable)
    if not named or not Path(named).is_dir():
        pytest.skip(f"{variable} names no folder")
    return Path(named)


def both(make, **options):
    return {OURS: make(True, **options), THEIRS: make(False, **options)}


ROWS = {
    "gpt2": lambda: both(gpt2_step),
    "bert": lambda: both(bert_step),
    "gpt2-bfloat16": lambda: both(gpt2_step, autocast=True),
    "bert-bfloat16": lambda: both(bert_step, autocast=True),
    "minilm": lambda: {
        OURS: minilm_steps(True, True),
        "transformers, random order": minilm_steps(False, False),
        "transformers, the same batches": minilm_steps(False, True),
    },
    "generate-1": lambda: both(generation, batch=1),
    "generate-8": lambda: both(generation, batch=8),
    "prepare": lambda: {OURS: preparing(True), "tokenizers alone": preparing(False)},
}


def test_gpt2_step(benchmark):
    compare(benchmark, ROWS["gpt2"](), case="GPT-2 4×768, 4×512 tokens, AdamW step", rounds=5, must=1.5, goal=1.8)


def test_bert_step(benchmark):
    case = "BERT 4×768, classification, 8×128 tokens, dropout 0.1, AdamW step"
    compare(benchmark, ROWS["bert"](), case=case, rounds=9, seconds=20, must=1.2, goal=1.25)


@pytest.mark.skipif(not tiles_are_used(), reason="without AMX products of bfloat16 are slower than float32's")
@pytest.mark.parametrize("row", ["gpt2-bfloat16", "bert-bfloat16"])
def test_steps_under_autocast(benchmark, row):
    compare(benchmark, ROWS[row](), case=f"{row}, autocast, AdamW step", rounds=9, seconds=40, must=1.0, goal=2.0)


def test_minilm_steps(benchmark):
    case = "MiniLM, 16 sentences of SST-2, AdamW, eight steps"
    compare(benchmark, ROWS["minilm"](), case=case, rounds=9, seconds=20, must=1.3, goal=2.0)


@pytest.mark.parametrize("batch", [1, 8])
def test_generation(benchmark, batch):
    case = f"generation, GPT-2 4×768, 256 tokens, batch {batch}"
    compare(benchmark, ROWS[f"generate-{batch}"](), case=case, rounds=5, must=1.1, goal=1.5)


def test_preparing_text(benchmark):
    case = "tokenising and packing, 22 MB of Shakespeare's lines"
    compare(benchmark, ROWS["prepare"](), case=case, rounds=5, must=0.9, goal=1.0)


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


def profile(row):
    for name, call in ROWS[row]().items():
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            call()
        print(f"\n{row}, {name}")
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))


if __name__ == "__main__":
    for each in sys.argv[1:]:
        profile(each)
