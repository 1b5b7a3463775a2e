"""How float32 is multiplied on CUDA: three terms of TF32 have float32's own error, one has TF32's, and the choice."""

from __future__ import annotations

import pytest
import torch

import fastgan
from fastgan.ops import attention as reference
from fastgan.ops import attention_precision
from fastgan.ops.attention_precision import EXACT, ONE_TERM, THREE_TERMS
from tests.cuda_emulation.build import needs_compiler
from tests.cuda_emulation.test_attention import _error, _inputs, _wide

kernels = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]


@pytest.fixture
def products(cuda_kernels):
    """Sets Float32Products of the kernels under test; three terms again afterwards."""

    def choose(which: int) -> None:
        cuda_kernels.attention_products(torch.empty(0), which)

    yield choose
    choose(THREE_TERMS)


def _errors(cuda_kernels, tensors):
    """Of output, grad_query, grad_key and grad_value."""
    query, key, value, grad = tensors
    scale = query.shape[-1] ** -0.5
    arguments, rest = (query, key, value, None, None, None), (0.0, False, scale)
    got = cuda_kernels.attention(*arguments, *rest)
    exact = reference.attention_reference(*map(_wide, arguments), *rest)
    gradients = cuda_kernels.attention_backward(grad, *arguments, *got, *rest, False)
    judges = reference.attention_backward_reference(_wide(grad), *map(_wide, arguments), *exact, *rest, False)
    return [_error(a, b) for a, b in zip((got[0], *gradients[:3]), (exact[0], *judges[:3]), strict=True)]


@pytest.mark.usefixtures("products")
class TestErrors:
    pytestmark = kernels

    @pytest.mark.parametrize("case", ["normal", "positive", "large scores", "mixed magnitudes"])
    def test_three_terms_have_float32s_own_error(self, cuda_kernels, products, case):
        """Emulated tensor cores cut off their sums, as real ones do: positive sums would drift towards 0."""
        query, key, value, grad = _inputs(torch.float32, batch=2, heads=1, rows=40, columns=150, width=64)
        if case == "positive":
            value, grad = value + 3, grad + 1
        if case == "large scores":
            query, key = 6 * query, 6 * key
        if case == "mixed magnitudes":  # exponents are float32's: neither overflow nor underflow of half precision
            value = value * torch.logspace(-6, 6, 64)
            grad = grad * torch.logspace(6, -6, 64)
        errors = {}
        for which in (EXACT, THREE_TERMS):
            products(which)
            errors[which] = _errors(cuda_kernels, (query, key, value, grad))
        if case == "normal":
            assert max(errors[EXACT]) < 1e-6
        for exact, three in zip(errors[EXACT], errors[THREE_TERMS], strict=True):
            assert three < 1.5 * exact + 2e-7, errors

    def test_one_term_has_tf32s(self, cuda_kernels, products):
        products(ONE_TERM)
        for error in _errors(cuda_kernels, _inputs(torch.float32, rows=40, columns=90, width=64)):
            assert 1e-5 < error < 4e-3  # of a product, cut off twice, 2⁻⁹

    @pytest.mark.parametrize("which", [EXACT, ONE_TERM, THREE_TERMS])
    def test_a_nan_stays_one(self, cuda_kernels, products, which):
        """CUDA's is of all ones: rounded as a number is it would be 0."""
        products(which)
        query, key, value, _ = _inputs(torch.float32, heads=1, rows=20, columns=45, width=16)
        nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
        hurt = query.clone()
        hurt[0, 0, 3, 5] = nan
        got = cuda_kernels.attention(hurt, key, value, None, None, None, 0.0, False, 0.25)[0][0, 0].isnan()
        assert got[3].all()
        assert not got[4:].any()
        hurt = value.clone()
        hurt[0, 0, 3, 5] = nan
        got = cuda_kernels.attention(query, key, hurt, None, None, None, 0.0, False, 0.25)[0][0, 0].isnan()
        assert got[:, 5].all()
        assert not got[:, 6:].any()

    def test_wide_heads_are_exact_whatever_is_asked_for(self, cuda_kernels, products):
        tensors = _inputs(torch.float32, heads=1, rows=20, columns=40, width=136)
        products(EXACT)
        exact = cuda_kernels.attention(*tensors[:3], None, None, None, 0.0, False, 0.1)
        products(ONE_TERM)
        assert torch.equal(exact[0], cuda_kernels.attention(*tensors[:3], None, None, None, 0.0, False, 0.1)[0])

    def test_what_is_no_choice_is_refused(self, products):
        with pytest.raises(RuntimeError, match="products must be 0 to 2, got 3"):
            products(3)


def test_the_choice_and_torchs_own_flag_say_what_is_wanted(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert fastgan.get_attention_precision() == "auto"
        assert attention_precision._wanted() == THREE_TERMS
        matmul.fp32_precision = "tf32"
        assert attention_precision._wanted() == ONE_TERM
        fastgan.set_attention_precision("exact")
        assert attention_precision._wanted() == EXACT
        fastgan.set_attention_precision("tf32")
        matmul.fp32_precision = "ieee"
        assert attention_precision._wanted() == ONE_TERM
    finally:
        matmul.fp32_precision = before
        fastgan.set_attention_precision("auto")
    with pytest.raises(ValueError, match="'auto', 'exact' or 'tf32', got 'ieee'"):
        fastgan.set_attention_precision("ieee")


def test_the_library_is_told_once_and_before_the_kernel_runs(monkeypatch):
    told = []
    monkeypatch.setattr(attention_precision._cuda, "has_kernel", lambda operator: True)
    monkeypatch.setattr(attention_precision, "_told", THREE_TERMS)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: "beside")
    monkeypatch.setattr(torch.ops.fastgan, "attention_products", lambda beside, products: told.append(products))
    query = torch.zeros(1)
    try:
        assert attention_precision.has_kernel("attention", query)
        assert told == []
        fastgan.set_attention_precision("exact")
        assert attention_precision.has_kernel("attention", query.half())
        assert told == []
        for _ in range(2):
            assert attention_precision.has_kernel("attention", query)
        assert told == [EXACT]
        fastgan.set_attention_precision("auto")
        assert attention_precision.has_kernel("varlen_attention", query)
        assert told == [EXACT, THREE_TERMS]
    finally:
        fastgan.set_attention_precision("auto")
