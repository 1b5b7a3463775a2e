"""The tables of ``benchmarks.device``: each times its cases on the GPU and prints a row as soon as it has one."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as T

import fastgan
from benchmarks import gan_steps
from fastgan import _cuda
from fastgan.nn import functional as F
from fastgan.ops import attention_precision
from fastgan.training import step_graph

FLUSH_BYTES = 512 * 2**20  # larger than any second-level cache
COLD_BYTES = 256 * 2**20  # of the inputs of one graph's calls: several such caches
MOST_CALLS = 64  # in one graph
# batch, channels, height: a DCGAN's layers at 64x64 pixels, and one that does not fit the cache
NORM_SHAPES = [(64, 64, 32), (128, 128, 16), (128, 256, 8), (128, 512, 4), (64, 256, 64)]
LOSS_SHAPES = [(64, 512, 4), (128, 512, 4), (1024, 512, 4), (16, 512, 31)]
# name, batch, heads, length, width, dtype, options; `forward`: that alone
Case = tuple[str, int, int, int, int, torch.dtype, dict[str, Any]]
ATTENTION: list[Case] = [
    ("forward", 8, 16, 2048, 64, torch.bfloat16, {"forward": True}),
    ("forward", 4, 8, 8192, 64, torch.bfloat16, {"forward": True}),
    ("forward", 8, 16, 2048, 128, torch.bfloat16, {"forward": True}),
    ("forward", 4, 8, 8192, 128, torch.bfloat16, {"forward": True}),
    ("forward, causal", 4, 8, 8192, 128, torch.bfloat16, {"forward": True, "causal": True}),
    ("forward", 4, 8, 2048, 256, torch.bfloat16, {"forward": True}),
    ("one query", 8, 32, 8192, 128, torch.bfloat16, {"forward": True, "rows": 1}),
    ("plain", 8, 16, 2048, 64, torch.bfloat16, {}),
    ("plain", 8, 16, 2048, 128, torch.bfloat16, {}),
    ("causal", 8, 16, 2048, 128, torch.bfloat16, {"causal": True}),
    ("BERT: padding, dropout", 32, 12, 512, 64, torch.bfloat16, {"padding": True, "dropout": 0.1}),
    ("padding", 32, 12, 512, 64, torch.bfloat16, {"padding": True}),
    ("T5: learned bias", 8, 12, 512, 64, torch.bfloat16, {"bias": True}),
    ("float32 forward", 8, 12, 1024, 64, torch.float32, {"forward": True}),
    ("float32", 8, 12, 1024, 64, torch.float32, {}),
    ("float32, causal", 8, 12, 1024, 128, torch.float32, {"causal": True}),
    ("float32, exact", 8, 12, 1024, 64, torch.float32, {"exact": True}),
    ("float32, one term", 8, 12, 1024, 64, torch.float32, {"one term": True}),
]
SECOND = [(4, 8, 1024, 64), (2, 8, 4096, 64), (1, 8, 8192, 64)]
HEADS = [(8192, 768, 50257, torch.bfloat16), (8192, 2048, 128256, torch.bfloat16), (4096, 768, 30522, torch.float32)]
Rows = list[dict[str, Any]]


def host_milliseconds(call: Callable[[], Any]) -> float:
    """Median time that the host takes for a call, the device having nothing else to do."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return median(times)


def milliseconds(call: Callable[[], Any], flush: torch.Tensor, rounds: int, ahead: bool = False) -> float:
    """Median time of a call on the device, with a cold cache.

    ``ahead``: the host has called before the device begins, so that a short call is not the host's time.
    """
    for _ in range(3):
        call()
    # An enqueued flush keeps the device for its bytes' time, written at some 4 TB/s or less.
    flushes = 1 + ahead * int(2 * host_milliseconds(call) / (flush.numel() / 4e9))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in pairs:
        for _ in range(flushes):
            flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in pairs)


def graph_milliseconds(
    calls: list[Callable[[], Any]], flush: torch.Tensor, rounds: int, graph: step_graph.Graph
) -> tuple[float | None, str]:
    """Median time of one of the calls, all of them recorded as one graph and replayed with a cold cache.

    None and why, where they cannot be recorded.
    """

    def all_of_them() -> Any:
        for call in calls:
            result = call()
        return result  # the last alone: what a graph returns keeps its memory

    try:
        # A failed recording leaves its stream the current one.
        with torch.cuda.stream(torch.cuda.current_stream()):
            for _ in range(2):
                graph.warm_up(all_of_them)
            with step_graph.nothing_collected():
                graph.capture(all_of_them)
        return milliseconds(graph.replay, flush, rounds) / len(calls), ""
    except Exception as error:
        torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"


def calls_in_a_graph(input_bytes: int) -> int:
    """How many calls, on as many inputs, leave none of them in the cache until the next replay, nor a launch to see."""
    return max(1, min(MOST_CALLS, -(-COLD_BYTES // input_bytes)))


def difference(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> float:
    """The largest relative difference of a result, as norms."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def forward_and_backward(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], grad: torch.Tensor):
    def call() -> tuple[torch.Tensor, ...]:
        output = function(*tensors)
        return output.detach(), *torch.autograd.grad(output, tensors, grad)

    return call


class Table:
    """Prints a row when it comes and keeps it."""

    def __init__(self, flush: torch.Tensor, rounds: int, compiles: bool):
        self.flush, self.rounds, self.compiles = flush, rounds, compiles
        self.rows: Rows = []
        self.failed = False

    def head(self, *columns: str) -> None:
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def time(self, call: Callable[[], Any], rounds: int | None = None, ahead: bool = False) -> float:
        return milliseconds(call, self.flush, rounds or self.rounds, ahead)

    def row(self, case: str, shown: list[str], **numbers: Any) -> None:
        print(f"| {case} | {' | '.join(shown)} |", flush=True)
        self.rows.append({"case": case, **numbers})

    def judge(self, off: float, most: float) -> str:
        wrong = not off <= most
        self.failed = self.failed or wrong
        return f"{off:.1e}{' WRONG' if wrong else ''}"


# ---- bandwidth ----


def kernel_cases(dtype: torch.dtype, layout: torch.memory_format):
    """(name, ours, PyTorch's, what makes tensors and a gradient of the output, bytes of x, bytes that must move)."""

    def norm(fused: bool):
        def run(x, w, b):
            if fused:
                return F.batch_norm_act(x, None, None, w, b, True, 0.1, 1e-5, "leaky_relu", 0.2)
            return T.leaky_relu(T.batch_norm(x, None, None, w, b, True, 0.1, 1e-5), 0.2)

        return run

    def loss(fused: bool):
        def run(x, w):
            if fused:
                return F.conv_bce_with_logits(x, w, None, 1.0)[0]
            logits = T.conv2d(x, w)
            return T.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))

        return run

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype).to(memory_format=layout)

    def make_norm(*shape: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        parameters = [torch.randn(shape[1], device="cuda", requires_grad=True) for _ in range(2)]
        return [tensor(*shape).requires_grad_(), *parameters], tensor(*shape)

    def make_loss(*shape: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        w = (torch.randn(1, shape[1], 4, 4, device="cuda") / (16 * shape[1]) ** 0.5).to(dtype, memory_format=layout)
        return [tensor(*shape).requires_grad_(), w.requires_grad_()], torch.ones((), device="cuda", dtype=dtype)

    for n, c, s in NORM_SHAPES:
        size = n * c * s * s * dtype.itemsize
        # Read x, write y; read x and dy, write dx. A second reading of x for its statistics is the kernel's affair.
        name = f"batch norm + leaky ReLU {n}x{c}x{s}x{s}"
        yield name, norm(True), norm(False), lambda n=n, c=c, s=s: make_norm(n, c, s, s), size, 5 * size
    for n, c, s in LOSS_SHAPES:
        size = n * c * s * s * dtype.itemsize
        name = f"last convolution + BCE {n}x{c}x{s}x{s}"
        yield name, loss(True), loss(False), lambda n=n, c=c, s=s: make_loss(n, c, s, s), size, 3 * size


def kernels(table: Table) -> None:
    source, target = torch.empty(2, FLUSH_BYTES // 4, device="cuda").unbind()
    bandwidth = 2 * source.numel() * 4 / table.time(lambda: target.copy_(source), 20) / 1e6  # GB/s
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 * 2**20)
    print(
        f"a copy moves {bandwidth:.0f} GB/s; forward and backward, milliseconds: a call's share of a CUDA graph of as\n"
        "many calls as it takes for their inputs not to stay in the cache from replay to replay, and in brackets a\n"
        f"call made eagerly, the host's time included. What moves {cache / 2**20:.0f} MB or less is the cache's\n"
        "affair between a call's own passes, and not judged by the memory's bandwidth.\n"
    )
    table.rows.append({"copy": bandwidth, "cache": cache})
    names = ["fastgan", "PyTorch", *["compiled"] * table.compiles]
    table.head("graph (eager)", *names, "PyTorch / fastgan", "share of bandwidth", "difference")
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for name, ours, theirs, make, size, moved in kernel_cases(dtype, layout):
                where = f"{name}, {str(dtype).removeprefix('torch.')}, {str(layout).removeprefix('torch.')}"
                peers = [ours, theirs, *[torch.compile(theirs)] * table.compiles]
                made = [make() for _ in range(calls_in_a_graph(size))]
                calls = [[forward_and_backward(f, *each) for each in made] for f in peers]
                off = difference(calls[0][0](), calls[1][0]())
                eager = [table.time(call[0]) for call in calls]
                graphs, failures = [], []
                for which, call in zip(names, calls, strict=True):
                    graph = step_graph.CUDAGraph(device)
                    time, reason = graph_milliseconds(call, table.flush, max(10, table.rounds // 2), graph)
                    graphs.append(time)
                    failures += [f"{which}: not recorded, timed eagerly ({reason})"] * bool(reason)
                times = [e if g is None else g for g, e in zip(graphs, eager, strict=True)]
                share = moved / times[0] / 1e6 / bandwidth
                # torch's convolutions may use TF32
                verdict = table.judge(off, 2e-2 if dtype == torch.bfloat16 else 5e-3)
                recorded = ["eager" if g is None else f"{g:.4f}" for g in graphs]
                shown = [f"{g} ({e:.3f})" for g, e in zip(recorded, eager, strict=True)]
                of_bandwidth = "in cache" if moved <= cache else f"{share:.0%}"
                table.row(
                    where, [*shown, f"{times[1] / times[0]:.2f}x", of_bandwidth, verdict],
                    **dict(zip(names, times, strict=True)), eager=dict(zip(names, eager, strict=True)),
                    not_recorded=failures, share=share, in_cache=moved <= cache, difference=off,
                )  # fmt: skip
    for row in table.rows:
        print(*(f"\n{row['case']}: {failure}" for failure in row.get("not_recorded", ())), sep="", end="")


# ---- attention ----


def attention_calls(case: Case, compiles: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ours, PyTorch's choice, each of its backends, and FlexAttention where it can do the same."""
    _, batch, heads, length, width, dtype, options = case

    def make(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=dtype).requires_grad_(not options.get("forward"))

    fastgan.set_attention_precision("exact" if options.get("exact") else "tf32" if options.get("one term") else "auto")
    rows = options.get("rows", length)
    tensors = [make(batch, n, heads, width) for n in (rows, length, length)]  # as projections leave them
    grad = torch.randn(batch, heads, rows, width, device="cuda", dtype=dtype)
    mask = None
    if options.get("padding"):
        lengths = torch.linspace(length / 4, length, batch, device="cuda").long()
        mask = (torch.arange(length, device="cuda") < lengths[:, None]).view(batch, 1, 1, length)
    if options.get("bias"):
        mask = make(1, heads, length, length)
        tensors.append(mask)
    dropout, causal = options.get("dropout", 0.0), options.get("causal", False)

    def calling(attention: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        def run(query, key, value, *rest):
            inside = [t.transpose(1, 2) for t in (query, key, value)]
            return attention(*inside, rest[0] if rest else mask, dropout, causal)

        if options.get("forward"):
            return lambda: (run(*tensors),)
        return forward_and_backward(run, tensors, grad)

    if options.get("forward"):
        # The operator itself: the function leaves half precision without gradients to PyTorch.
        operator, plain = torch.ops.fastgan.attention, tensors
        assert attention_precision.has_kernel("attention", plain[0]), _cuda.status()
        yield "fastgan", lambda: operator(
            *(t.transpose(1, 2) for t in plain), None, None, None, 0.0, causal, width**-0.5
        )[:1]  # fmt: skip
    else:
        yield "fastgan", calling(F.scaled_dot_product_attention)
        if mask is None and not dropout and dtype != torch.float32:  # which goes to PyTorch's kernel: ours beside it

            def own(query, key, value, *_):
                return torch.ops.fastgan.attention(query, key, value, None, None, None, 0.0, causal, width**-0.5)[0]

            yield "own", calling(own)
    yield "PyTorch", calling(T.scaled_dot_product_attention)
    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):

        def forced(*args: Any, backend: str = backend) -> torch.Tensor:
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
                return T.scaled_dot_product_attention(*args)

        yield backend.removesuffix("_ATTENTION").lower(), calling(forced)
    if compiles and not dropout and dtype != torch.float32:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention)
        block_mask = None
        if causal:
            block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length)
        elif options.get("padding"):
            block_mask = create_block_mask(lambda b, h, q, k: k < lengths[b], batch, None, length, length)

        def flex(query, key, value, bias, *_):
            add = (lambda score, b, h, q, k: score + bias[0, h, q, k]) if options.get("bias") else None
            return compiled(query, key, value, score_mod=add, block_mask=block_mask)

        yield "flex", calling(flex)


def attention(table: Table) -> None:
    names = ["fastgan", "own", "PyTorch", "flash", "efficient", "cudnn", "math", *["flex"] * table.compiles]
    table.head("milliseconds", *names, "best / fastgan", "TFLOP/s", "difference", "host: fastgan, PyTorch")
    rounds = max(10, table.rounds // 3)
    for case in ATTENTION:
        name, batch, heads, length, width, dtype, options = case
        times: dict[str, float] = {}
        host: dict[str, float] = {}
        results: dict[str, Any] = {}
        for which, call in attention_calls(case, table.compiles):
            try:
                results[which] = call() if which in ("fastgan", "own", "PyTorch") else None
                times[which] = table.time(call, rounds if which != "math" else 5, ahead=True)
                host[which] = host_milliseconds(call)
            except Exception as error:  # this backend does not take the case
                if which in ("fastgan", "own") or "CUDA error" in str(error):
                    raise
        # The two draw other dropout masks; tests/cuda_emulation judges those.
        off = 0.0
        if not options.get("dropout"):
            off = max(difference(results[n], results["PyTorch"]) for n in ("fastgan", "own") if n in results)
        rows = options.get("rows", length)
        products = (2 if options.get("forward") else 7) * 2 * batch * heads * rows * length * width
        rate = products * (0.5 if options.get("causal") else 1.0) / times["fastgan"] / 1e9
        best = min(time for which, time in times.items() if which not in ("fastgan", "own"))
        most = 2e-2 if dtype == torch.bfloat16 else 5e-3 if options.get("one term") else 1e-3
        verdict = table.judge(off, most)
        shown = [f"{times[n]:.3f}" if n in times else "" for n in names]
        table.row(
            f"{name}, {batch}x{heads}x{length}x{width}",
            [*shown, f"{best / times['fastgan']:.2f}x", f"{rate:.0f}", verdict,
             f"{host['fastgan']:.2f}, {host['PyTorch']:.2f}"],
            **times, tflops=rate, difference=off, host=host,
        )  # fmt: skip


def peak(call: Callable[[], Any]) -> float:
    """Megabytes (2²⁰ bytes) that a call takes beyond what is there."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


BESIDE_PYTORCH = (
    "milliseconds; MB", "fastgan", "PyTorch", "PyTorch / fastgan", "fastgan, MB", "PyTorch, MB", "difference",
)  # fmt: skip


def row_beside_pytorch(table: Table, case: str, calls: list[Callable[[], Any]], rounds: int, most: float) -> None:
    """Time, memory and results of our call and PyTorch's; ``most`` is how far these may be apart."""
    off = difference(calls[0](), calls[1]())
    times = [table.time(call, rounds, ahead=True) for call in calls]
    memory = [peak(call) for call in calls]
    shown = [f"{times[0]:.3f}", f"{times[1]:.3f}", f"{times[1] / times[0]:.2f}x", *(f"{m:.0f}" for m in memory)]
    numbers = {"fastgan": times[0], "PyTorch": times[1], "megabytes": memory, "difference": off}
    table.row(case, [*shown, table.judge(off, most)], **numbers)


def second(table: Table) -> None:
    """The gradient of a function of the gradients, as a penalty on them asks for."""
    table.head(*BESIDE_PYTORCH)
    for batch, heads, length, width in SECOND:
        for dtype in (torch.bfloat16, torch.float32):
            tensors = [torch.randn(batch, heads, length, width, device="cuda", dtype=dtype) for _ in range(3)]
            tensors = [t.requires_grad_() for t in tensors]

            def calling(function: Callable[..., torch.Tensor], tensors=tensors) -> Callable[[], Any]:
                def call() -> Any:
                    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                        output = function(*tensors)
                        gradients = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
                        return torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)

                return call

            calls = [calling(F.scaled_dot_product_attention), calling(T.scaled_dot_product_attention)]
            case = f"{batch}x{heads}x{length}x{width}, {str(dtype).removeprefix('torch.')}"
            most = 5e-2 if dtype == torch.bfloat16 else 1e-3
            row_beside_pytorch(table, case, calls, max(5, table.rounds // 6), most)


# ---- the head of a language model ----


def head(table: Table) -> None:
    table.head(*BESIDE_PYTORCH)
    for tokens, features, classes, dtype in HEADS:
        x = torch.randn(tokens, features, device="cuda", dtype=dtype).requires_grad_()
        w = (torch.randn(classes, features, device="cuda") / features**0.5).to(dtype).requires_grad_()
        target = torch.randint(0, classes, (tokens,), device="cuda")
        one = torch.ones((), device="cuda", dtype=dtype)
        calls = [
            forward_and_backward(lambda x, w, t=target: F.linear_cross_entropy(x, w, t), [x, w], one),
            forward_and_backward(lambda x, w, t=target: T.cross_entropy(T.linear(x, w), t), [x, w], one),
        ]
        case = f"{tokens} tokens, {features} wide, {classes} words, {str(dtype).removeprefix('torch.')}"
        most = 2e-2 if dtype == torch.bfloat16 else 1e-3
        row_beside_pytorch(table, case, calls, max(10, table.rounds // 3), most)


# ---- training steps ----


def gan(table: Table) -> None:
    """DCGANs at 64x64 pixels, width 64."""
    chosen = {n: b for n, b in gan_steps.DEVICE_STEPS.items() if table.compiles or n != "compiled"}
    table.head("DCGAN step, milliseconds", *chosen, "eager / fastgan", "graph / fastgan")
    for batch in (16, 64, 128):
        networks, real = gan_steps.networks(batch=batch)
        times = {}
        for name, build in chosen.items():
            step = build(copy.deepcopy(networks).cuda(), real.cuda())
            times[name] = table.time(step, max(10, table.rounds // 2))
        ratios = [times[name] / times["fastgan"] for name in ("eager", "CUDA graph")]
        table.row(f"batch {batch}", [*(f"{t:.3f}" for t in times.values()), *(f"{r:.2f}x" for r in ratios)], **times)


def language(table: Table) -> None:
    """Steps with AdamW in bfloat16 autocast, batches as in pretraining."""
    import transformers

    import fastgan.hf  # noqa: F401, which registers what replace_modules sets
    from fastgan.replace import replace_modules

    gpt2 = transformers.GPT2Config(n_layer=4)
    bert = transformers.BertConfig(num_hidden_layers=4)
    cases = {
        "GPT-2, 4 layers, 8x1024": (transformers.GPT2LMHeadModel, gpt2, 8, 1024),
        "BERT, 4 layers, 32x512, padding, dropout": (transformers.BertForSequenceClassification, bert, 32, 512),
    }
    table.head("milliseconds; MB", "fastgan", "SDPA", "SDPA / fastgan", "fastgan, MB", "SDPA, MB", "loss differs by")
    for name, (kind, config, batch, length) in cases.items():
        ids = torch.randint(0, 30000, (batch, length), device="cuda")
        inputs: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
        if kind is not transformers.GPT2LMHeadModel:
            lengths = torch.linspace(length / 4, length, batch, device="cuda").long()
            mask = (torch.arange(length, device="cuda") < lengths[:, None]).long()
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(batch, device="cuda") % 2}
        times, memory, losses = [], [], []
        for fused in (True, False):
            torch.manual_seed(0)
            model = kind._from_config(config, attn_implementation="sdpa").cuda().train()
            if fused:
                replace_modules(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

            def step(model=model, optimizer=optimizer, inputs=inputs) -> torch.Tensor:
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(**inputs).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return loss.detach()

            losses.append(step().item())
            times.append(table.time(step, max(10, table.rounds // 3)))
            memory.append(peak(step))
        off = abs(losses[0] / losses[1] - 1)  # dropout draws differ
        shown = [f"{times[0]:.3f}", f"{times[1]:.3f}", f"{times[1] / times[0]:.2f}x", *(f"{m:.0f}" for m in memory)]
        table.row(name, [*shown, table.judge(off, 5e-2)], fastgan=times[0], SDPA=times[1], megabytes=memory)


# ---- what a recorded step consists of ----


def by_kernel(events: Iterable[Any], calls: int, longest: int = 90) -> list[tuple[str, float, float]]:
    """(name, count, microseconds) a call of what a profiler saw on the device, the largest sum first."""
    found: dict[str, list[float]] = {}
    for event in events:
        of_kernel = found.setdefault(event.name, [0, 0.0])
        of_kernel[0] += 1
        of_kernel[1] += event.time_range.elapsed_us()
    rows = [(name[:longest], count / calls, total / calls) for name, (count, total) in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def print_kernels(table: Table, name: str, call: Callable[[], Any], replays: int = 3, most: int = 25) -> None:
    """What the device does in a call, kernel by kernel."""
    from torch.autograd import DeviceType

    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(replays):
            call()
        torch.cuda.synchronize()
    events = [
        event
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if not events:
        print(f"{name}: the profiler saw no kernel")
        table.failed = True
        return
    rows = by_kernel(events, replays)
    total, count = sum(row[2] for row in rows), sum(row[1] for row in rows)
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    print(f"\n{name}: {count:.0f} kernels and copies, {total:.0f} us in all, of {span / replays:.0f} us\n")
    table.head(name, "count", "us")
    for kernel, times, microseconds in rows[:most]:
        shown = [f"{times:.1f}", f"{microseconds:.1f}"]
        table.row(f"`{kernel}`", shown, of=name, count=times, microseconds=microseconds)


def profile(table: Table) -> None:
    """The kernels of a recorded DCGAN step, batch 64, ours and PyTorch's, and those of each case of attention."""
    networks, real = gan_steps.networks(batch=64)
    for name in ("fastgan", "CUDA graph"):
        step = gan_steps.DEVICE_STEPS[name](copy.deepcopy(networks).cuda(), real.cuda())
        for _ in range(step_graph.WARM_UP + 3):  # the recording, and replays
            step()
        print_kernels(table, f"DCGAN, {name}", step)
    for case in ATTENTION:
        for which, call in attention_calls(case, False):
            if which in ("fastgan", "own", "PyTorch"):
                for _ in range(3):
                    call()
                title = "{}, {}x{}x{}x{}".format(*case[:5])
                print_kernels(table, f"{title}, {which}", call, most=8)


def main(section: str, out: str, rounds: str, *flags: str) -> int:
    torch.manual_seed(0)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    table = Table(flush, int(rounds), "--no-compile" not in flags)
    sections = (kernels, attention, second, head, gan, language, profile)
    try:
        {each.__name__: each for each in sections}[section](table)
    finally:
        Path(out).write_text(json.dumps(table.rows))
    return int(table.failed)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
