"""Products of bfloat16 by AMX, where this CPU has it (elsewhere tests/kernel_harness runs the kernel's own source)."""

from __future__ import annotations

import pytest
import torch

import fastgan
from fastgan.ops.product import product_into, tiles_are_used, tiles_multiply

pytestmark = pytest.mark.kernel
needs_tiles = pytest.mark.skipif(not tiles_are_used(), reason="this CPU has no AMX")

SIZES = [(1, 1, 1), (33, 45, 70), (32, 64, 32), (129, 600, 257), (600, 64, 2500), (5, 0, 7), (0, 3, 4), (3, 4, 0)]


def factor(rows, columns, layout):
    if layout == "rows":
        return torch.randn(rows, columns).bfloat16()
    if layout == "columns":
        return torch.randn(columns, rows).bfloat16().t()
    return torch.randn(2 * rows, 3 * columns).bfloat16()[::2, ::3]


@needs_tiles
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layouts", [("rows", "rows"), ("rows", "columns"), ("columns", "rows"), ("gaps", "gaps")])
def test_error_is_that_of_float32_sums(size, layouts):
    rows, depth, columns = size
    a, b = factor(rows, depth, layouts[0]), factor(depth, columns, layouts[1])
    right = a.double() @ b.double()
    bound = 2e-7 * depth**0.5 * (a.double().abs() @ b.double().abs()) + 1e-30
    out = torch.full((rows, columns + 3), float("nan"))[:, :columns]
    product_into(out, a, b, False)
    assert ((out.double() - right).abs() <= bound).all()
    product_into(out, a, b, True)
    assert ((out.double() - 2 * right).abs() <= 3 * bound).all()
    narrow = torch.empty(rows, columns, dtype=torch.bfloat16)
    product_into(narrow, a, b, False)
    atol = float(bound.max()) if bound.numel() else 0
    torch.testing.assert_close(narrow.double(), right, rtol=0.51 * 2**-7, atol=atol)


@needs_tiles
def test_same_bits_for_every_number_of_threads():
    a, b = torch.randn(700, 1500).bfloat16(), torch.randn(1500, 333).bfloat16()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.empty(700, 333))
            product_into(results[-1], a, b, False)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, results[0]) for each in results)


@needs_tiles
def test_infinity_and_nan_stay_in_their_rows_and_columns():
    a, b = torch.randn(40, 50).bfloat16(), torch.randn(50, 40).bfloat16()
    a[3, 7], b[9, 5] = float("inf"), float("nan")
    out = torch.empty(40, 40)
    product_into(out, a, b, False)
    torch.testing.assert_close(out, a.float() @ b.float(), equal_nan=True, rtol=1e-5, atol=1e-4)


@needs_tiles
def test_what_guards_memory():
    a, b, out = torch.zeros(3, 4).bfloat16(), torch.zeros(4, 5).bfloat16(), torch.zeros(3, 5)
    for args in ((out, a.float(), b), (out, a, b[:3]), (out[:2], a, b), (out.t(), a, b), (out.double(), a, b)):
        with pytest.raises(RuntimeError, match="must"):
            product_into(*args, False)


def test_reference_and_other_types_do_not_take_it():
    a = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert tiles_multiply(a) == tiles_are_used()
    assert not tiles_multiply(a, a.float())
    with fastgan.use("reference"):
        assert not tiles_are_used()


@needs_tiles
def test_torchs_own_use_of_the_tiles_beside():
    """Both configure the unit for themselves, in the same threads."""
    a, b = torch.randn(64, 200).bfloat16(), torch.randn(200, 96).bfloat16()
    theirs, out = a @ b, torch.empty(64, 96)
    query = torch.randn(2, 2, 100, 32).bfloat16()
    attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    for _ in range(5):
        product_into(out, a, b, False)
        assert torch.equal(a @ b, theirs)
        ours = fastgan.nn.functional.scaled_dot_product_attention(query, query, query)
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, query, query), attended)
        torch.testing.assert_close(ours, attended, rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(out, theirs.float(), rtol=1e-2, atol=1e-2)
