"""Attention by warpgroups, which only an sm_90a has, emulated; the checks are test_attention's.

On a GPU that has them, the other files of this folder run these kernels.
"""

from __future__ import annotations

import pytest
import torch

from tests.cuda_emulation import test_attention_varlen as packed
from tests.cuda_emulation.build import needs_compiler
from tests.cuda_emulation.test_attention import _check, _error, _inputs, _padding

pytestmark = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]
HALVES = [torch.bfloat16, torch.float16]
# The queries' kernel of the backward has blocks of 64 rows, the forward's of 128; tiles of 64 and 128 keys.


@pytest.fixture
def warpgroups(emulated, monkeypatch):
    """The emulated operators, on a GPU of compute capability 9.0."""
    monkeypatch.setenv("FASTGAN_EMULATED_GPU", "90")
    return emulated


def test_another_kernel_runs(emulated, monkeypatch):
    """Which rounds another way, as the log-sum-exp shows in double: the tests below are not of the other kernels."""
    query, key, value, _ = _inputs(torch.bfloat16, rows=70, columns=140, width=64)
    results = []
    for gpu in ("80", "90"):
        monkeypatch.setenv("FASTGAN_EMULATED_GPU", gpu)
        results.append(emulated.attention(query, key, value, None, None, None, 0.0, False, 0.125))
    (output, logsumexp), (other_output, other_logsumexp) = results
    assert not torch.equal(logsumexp, other_logsumexp)
    torch.testing.assert_close(output, other_output, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("width", "value_width", "rows", "columns"),
    [(64, 64, 130, 140), (17, 64, 3, 65), (128, 100, 70, 131), (8, 72, 66, 9)],
)
def test_plain(warpgroups, dtype, width, value_width, rows, columns):
    """Each panel and tile size, odd and whole vectors, more rows and keys than a block has."""
    _check(
        warpgroups,
        _inputs(dtype, heads=1, rows=rows, columns=columns, width=width, value_width=value_width),
    )


@pytest.mark.parametrize("width", [40, 128])
def test_causal(warpgroups, width):
    """Warpgroups whose rows end before the diagonal leave tiles out."""
    _check(warpgroups, _inputs(torch.bfloat16, heads=1, rows=140, columns=150, width=width), is_causal=True)
    _check(warpgroups, _inputs(torch.bfloat16, heads=1, rows=20, columns=150, width=width), is_causal=True)


@pytest.mark.parametrize("width", [32, 80])
def test_masks_bias_dropout_and_grouped_heads(warpgroups, width):
    tensors = _inputs(torch.bfloat16, batch=2, heads=2, kv_heads=1, rows=67, columns=130, width=width)
    _check(warpgroups, tensors, mask=_padding(2, 130, 66, 0), dropout_p=0.2)
    _check(warpgroups, tensors, bias=torch.randn(1, 2, 67, 130).bfloat16(), is_causal=True)
    _check(warpgroups, tensors, mask=torch.rand(2, 1, 67, 130) < 0.6)


def test_large_scores_keep_their_digits(warpgroups):
    query, key, value, grad = _inputs(torch.bfloat16, rows=20, columns=50, width=32)
    _check(warpgroups, (query * 20, key * 5, value, grad))
    _check(warpgroups, (query * -20, key * 5, value, grad))


@pytest.mark.parametrize("width", [16, 96])
def test_packed(warpgroups, width):
    packed.test_first_order(warpgroups, torch.bfloat16, True, 0.2)
    (query, key, value, _), where, most = packed._packed(
        torch.float16, ((70, 140), (3, 2)), width=width, value_width=width
    )
    inputs, numbers = (query, key, value, *where, None), (0.0, True, 0.3)
    got = warpgroups.varlen_attention(*inputs, *most, *numbers)[0]
    exact = packed.reference.varlen_attention_reference(*map(packed._wide, inputs), *most, *numbers)[0]
    assert _error(got, exact) < 1e-3
