"""A few seconds that tell whether an installed fastgan computes: every operator and its derivatives against PyTorch.

A plain script, so that it runs in an environment without pytest: `python tests/smoke.py`. CI runs it on the wheel, and
tests/test_compatibility.py under another torch than the one that the extension was built with.
"""

import torch
import torch.nn.functional as T

import fastgan
from fastgan.nn import functional as F

torch.manual_seed(0)


def same(ours, theirs, *inputs):
    """Values, first and second derivatives of two functions of ``inputs`` agree."""
    results = []
    for function in (ours, theirs):
        tensors = [each.clone().requires_grad_() for each in inputs]
        value = function(*tensors)
        first = torch.autograd.grad(value.square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        results.append([value, *first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def main() -> None:
    info = fastgan.info()
    assert info["extension"] == "loaded", info["extension"]
    assert info["operators"]["attention"] == "kernel"
    assert info["operators"]["norm_act"] == "kernel"
    assert info["operators"]["conv_gan_loss"] == "kernel"

    q, k, v = torch.randn(3, 2, 4, 17, 16)
    with torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.MATH
    ):  # torch's fused one has no second derivative
        same(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            lambda q, k, v: T.scaled_dot_product_attention(q, k, v, is_causal=True),
            q, k, v,
        )  # fmt: skip
    x, w, b = torch.randn(4, 6, 5, 5), torch.rand(6) + 0.5, torch.randn(6)
    same(
        lambda x, w, b: F.batch_norm_act(x, None, None, w, b, True, 0.1, 1e-5, "leaky_relu", 0.2),
        lambda x, w, b: T.leaky_relu(T.batch_norm(x, None, None, w, b, True, 0.1, 1e-5), 0.2),
        x, w, b,
    )  # fmt: skip
    kernel = torch.randn(1, 6, 4, 4) * 0.1
    same(
        lambda x, w: F.conv_bce_with_logits(x, w, None, 1.0)[0],
        lambda x, w: T.binary_cross_entropy_with_logits(T.conv2d(x, w), torch.ones(4, 1, 2, 2)),
        x, kernel,
    )  # fmt: skip
    tokens, vocabulary, target = torch.randn(9, 8), torch.randn(31, 8), torch.randint(31, (9,))
    same(
        lambda x, w: F.linear_cross_entropy(x, w, target),
        lambda x, w: T.cross_entropy(x @ w.T, target),
        tokens, vocabulary,
    )  # fmt: skip
    compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, k, v), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), T.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
    print(f"fastgan {fastgan.__version__} computes under torch {torch.__version__}, capability {info['capability']}")


if __name__ == "__main__":
    main()
