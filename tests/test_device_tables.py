"""The parts of the GPU's tables that need no GPU: what is counted, and what a failed recording leads to."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import device_counters as counters
from benchmarks import device_tables as tables


def _event(name, start, end):
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start))


def test_kernels_are_summed_by_name_the_largest_first():
    long = "x" * 200
    events = [_event("small", 0, 1), _event(long, 1, 11), _event("small", 11, 13), _event(long, 13, 23)]
    assert tables.by_kernel(events, 2) == [("x" * 90, 1.0, 10.0), ("small", 1.0, 1.5)]


@pytest.mark.parametrize(("input_bytes", "calls"), [(1, 64), (8 * 2**20, 32), (268 * 2**20, 1), (256 * 2**20 - 1, 2)])
def test_inputs_of_a_graph_are_several_caches(input_bytes, calls):
    assert tables.calls_in_a_graph(input_bytes) == calls


class _Graph:
    """Replays by calling; fails at ``fails``."""

    def __init__(self, fails=""):
        self.fails, self.collects = fails, []

    def warm_up(self, call):
        if self.fails == "warm_up":
            raise RuntimeError("no memory\nand more")
        call()

    def capture(self, call):
        self.collects.append(gc.isenabled())
        if self.fails == "capture":
            raise RuntimeError("operation not permitted\nand more")
        self.call, self.result = call, call()

    def replay(self):
        assert self.result is not None  # as CUDAGraph's
        self.call()


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def seconds(call, flush, rounds):
        call()
        return 12.0

    monkeypatch.setattr(tables, "milliseconds", seconds)


def test_a_graph_of_several_calls_is_timed_by_the_call(no_device):
    made, graph = [], _Graph()
    calls = [lambda i=i: made.append(i) or made for i in range(3)]
    assert tables.graph_milliseconds(calls, None, 5, graph) == (4.0, "")
    assert made == [0, 1, 2] * 4  # two warm-ups, the recording and a replay
    assert graph.collects == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("fails", ["warm_up", "capture"])
def test_what_cannot_be_recorded_says_why(no_device, fails):
    time, reason = tables.graph_milliseconds([lambda: None], None, 5, _Graph(fails))
    assert time is None
    assert reason in ("RuntimeError: no memory", "RuntimeError: operation not permitted")
    assert gc.isenabled()


def test_kernel_cases_count_their_bytes(monkeypatch):
    randn, ones = torch.randn, torch.ones
    monkeypatch.setattr(torch, "randn", lambda *size, device=None, **rest: randn(*size, **rest))
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **rest: ones(*size, **rest))
    monkeypatch.setattr(tables, "NORM_SHAPES", [(2, 3, 4)])
    monkeypatch.setattr(tables, "LOSS_SHAPES", [(2, 3, 5)])
    for dtype in (torch.float32, torch.bfloat16):
        for name, ours, theirs, make, size, moved in tables.kernel_cases(dtype, torch.channels_last):
            tensors, grad = make()
            assert tensors[0].nbytes == size
            assert moved == size * (5 if "norm" in name else 3)
            calls = [tables.forward_and_backward(f, tensors, grad) for f in (ours, theirs)]
            assert tables.difference(calls[0](), calls[1]()) < 2e-2


def test_counters_are_read_by_case_and_kernel():
    said = [
        "==PROF== Connected to process 1",
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Description"',
        '"0","void at::native::erfinv_kernel()","","","","","",""',
        '"1","void fastgan::(anonymous namespace)::rows_kernel<fastgan::bfloat16, 64>(fastgan::AttentionArgs, int)",'
        '"GPU Speed Of Light Throughput","Duration","us","12.5","",""',
        '"2","void at::native::erfinv_kernel()","","","","","",""',
        '"3","void fastgan::(anonymous namespace)::keys_kernel<float, 64>(fastgan::AttentionArgs)",'
        '"GPU Speed Of Light Throughput","Duration","ns","1,250","",""',
        '"3","void fastgan::(anonymous namespace)::keys_kernel<float, 64>(fastgan::AttentionArgs)","Compute","","","",'
        '"HighPipeUtilization","FMA is the highest-utilized pipeline (61.9%) based on active cycles."',
        '"3","void fastgan::(anonymous namespace)::keys_kernel<float, 64>(fastgan::AttentionArgs)","Warps","","","",'
        '"CPIStall","On average, each warp of this kernel spends 3.8 cycles being stalled waiting for a barrier."',
    ]
    assert counters.read(said, ["first", "second"]) == [
        {"case": "first", "kernel": "rows_kernel<bfloat16, 64>", "us": 12.5},
        {
            "case": "second",
            "kernel": "keys_kernel<float, 64>",
            "us": 1.25,
            "pipe": "FMA 62 %",
            "waits": "3.8 cycles a barrier",
        },
    ]
