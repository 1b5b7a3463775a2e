"""Large results in memory that is kept from call to call: used again, never shared, given back on request."""

import copy
import gc
import io
import os
import threading

import pytest
import torch

import fastgan
from fastgan.ops._output import new_output

pytestmark = pytest.mark.kernel
SHAPE = (8, 16, 64, 64)  # 2 MB


def state():
    return fastgan._C.pool_state()


@pytest.fixture(autouse=True)
def empty():
    gc.collect()
    fastgan.empty_cache()
    before = state()[0]
    yield
    gc.collect()
    assert state()[0] == before, "a block is still in use"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, (8, 16, 1, 4096), (1, 2**19), (2, 4, 8, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_strides_are_those_of_torch_empty(shape, dtype, channels_last):
    if channels_last and len(shape) == 2:
        pytest.skip("channels_last has four or five dimensions")
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    format = formats[len(shape)] if channels_last else torch.contiguous_format
    expected = torch.empty(shape, dtype=dtype, memory_format=format)
    # The operator itself: new_output gives small ones to torch.
    got = torch.ops.fastgan.new_output(torch.empty(0), list(shape), dtype=dtype, channels_last=channels_last)
    assert (got.dtype, got.shape, got.stride()) == (dtype, expected.shape, expected.stride())


def test_memory_is_used_again_and_never_by_two():
    first, second = (new_output(torch.empty(0), SHAPE).fill_(value) for value in (1.0, 2.0))
    where = first.data_ptr()
    view = first[2:3]
    del first
    third = new_output(torch.empty(0), SHAPE).fill_(3.0)
    assert third.data_ptr() != where, "a view still holds it"
    assert view.eq(1).all()
    assert second.eq(2).all()
    del view
    assert new_output(torch.empty(0), SHAPE).data_ptr() == where


def test_empty_cache_gives_back_what_nobody_uses():
    held, freed = new_output(torch.empty(0), SHAPE).fill_(5.0), new_output(torch.empty(0), SHAPE)
    del freed
    kept = state()[1]
    assert kept >= 2**21
    fastgan.empty_cache()
    assert state()[1] <= kept - 2**21  # but for the rest of the pages that `held` lies in
    assert held.eq(5).all()
    del held
    fastgan.empty_cache()
    assert state()[1] == 0


def test_results_are_ordinary_tensors():
    x = new_output(torch.empty(0), SHAPE).fill_(1.5)
    assert copy.deepcopy(x).equal(x)
    assert x.numpy().sum() == 1.5 * x.numel()
    torch.save(x, file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True).equal(x)
    assert x.share_memory_().is_shared()
    assert x.eq(1.5).all()
    assert x.resize_(3).eq(1.5).all()
    y = x.requires_grad_()
    y.square().sum().backward()
    assert y.grad.eq(3.0).all()


def test_a_gradient_that_is_kept_is_nobody_elses():
    torch.manual_seed(0)
    conv = fastgan.nn.Conv2d(128, 256, 4, 2, 1)  # weights of 2 MB
    x = torch.randn(4, 128, 8, 8)
    conv(x).sum().backward()
    kept, expected = conv.weight.grad, conv.weight.grad.clone()
    conv.weight.grad = None
    for _ in range(3):
        conv(torch.randn(4, 128, 8, 8)).square().sum().backward()
        conv.weight.grad = None
    assert kept.equal(expected)


def test_threads_take_and_give_at_once():
    wrong = []

    def work(number):
        for _ in range(50):
            x = new_output(torch.empty(0), SHAPE).fill_(float(number))
            if not x.eq(number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_takes_does_not_hang():
    stop = threading.Event()

    def work():
        while not stop.is_set():
            torch.ops.fastgan.new_output(torch.empty(0), [2**19])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                torch.ops.fastgan.new_output(torch.empty(0), [2**19])
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()
