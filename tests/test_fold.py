"""fastgan.fold_norms: the same results as evaluation, in fewer modules; and the activation within the convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgan
from fastgan.fold import FoldedConv2d, FoldedConvTranspose2d
from fastgan.models import DCGAN
from fastgan.ops import conv_layer as ops


def random_norms(model: nn.Module) -> nn.Module:
    """Statistics and weights that change something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


LAYERS = {
    "kernel 4": lambda: [nn.Conv2d(16, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2)],
    "kernel 3": lambda: [nn.Conv2d(16, 17, 3, padding=1, bias=False), nn.BatchNorm2d(17), nn.ReLU()],
    "transposed": lambda: [nn.ConvTranspose2d(16, 24, 4, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()],
    "transposed, output padding": lambda: [nn.ConvTranspose2d(16, 16, 4, 2, 1, 1), nn.BatchNorm2d(16), nn.ReLU()],
    "groups": lambda: [nn.Conv2d(16, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False), nn.ReLU()],
    "transposed, groups": lambda: [nn.ConvTranspose2d(16, 12, 3, groups=4), nn.BatchNorm2d(12), nn.LeakyReLU(0.1)],
    "reflecting": lambda: [nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(16)],
    "no norm": lambda: [nn.Conv2d(16, 16, 4, 2, 1), nn.LeakyReLU(0.2)],
    "no activation": lambda: [nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16, eps=0.1), nn.Tanh()],
}


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_evaluation(name, channels_last, replaced):
    torch.manual_seed(0)
    model = random_norms(nn.Sequential(*LAYERS[name]()))
    input = torch.randn(3, 16, 12, 10)
    if channels_last:
        model, input = model.to(memory_format=torch.channels_last), input.to(memory_format=torch.channels_last)
    expected = copy.deepcopy(model).double().eval()(input.double())
    if replaced:
        fastgan.replace_modules(model)
    before = copy.deepcopy(model.state_dict())
    folded = fastgan.fold_norms(model)
    kinds = [type(module) for module in folded]
    assert kinds[0] in (FoldedConv2d, FoldedConvTranspose2d)
    assert kinds[1] is nn.Identity
    with torch.no_grad():
        torch.testing.assert_close(folded(input).double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(folded(input).double(), expected, atol=2e-5, rtol=2e-5)  # composed, differentiable
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("replaced", [False, True])
def test_a_whole_dcgan(replaced):
    torch.manual_seed(0)
    gan = random_norms(DCGAN(32, 3, 20, ngf=16, ndf=16))
    if replaced:
        fastgan.replace_modules(gan)
    folded = fastgan.fold_norms(gan)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    gan.eval()
    noise = torch.randn(5, 20, 1, 1)
    with torch.no_grad():
        pictures = gan.generator(noise)
        torch.testing.assert_close(folded.generator(noise), pictures, atol=2e-5, rtol=2e-5)
        logits = gan.discriminator(pictures)
        torch.testing.assert_close(folded.discriminator(pictures), logits, atol=1e-4, rtol=1e-4)


def test_gradients_of_the_input_and_a_compiled_copy():
    torch.manual_seed(0)
    model = random_norms(nn.Sequential(*LAYERS["kernel 4"](), *[nn.Conv2d(32, 16, 3), nn.ReLU()]))
    folded = fastgan.fold_norms(fastgan.replace_modules(model))
    input = torch.randn(2, 16, 16, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(model.eval()(input).square().sum(), input)
    (got,) = torch.autograd.grad(folded(input).square().sum(), input)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input), folded(input))


def test_spectral_norm_is_computed_once():
    torch.manual_seed(0)
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 16, 3))
    model = random_norms(nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU()))
    fastgan.replace_modules(model)
    folded = fastgan.fold_norms(model)
    assert "0.weight" in dict(folded.named_parameters())
    input = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(folded(input), model.eval()(input), atol=1e-5, rtol=1e-5)
    assert nn.utils.parametrize.is_parametrized(model[0])


class _Subclass(nn.Conv2d):
    pass


class _Backwards(nn.Sequential):
    def forward(self, input):
        for module in reversed(self):
            input = module(input)
        return input


class _OwnOrder(nn.Sequential):
    def __iter__(self):
        return reversed(list(super().__iter__()))


def test_wrong_channels_are_named():
    folded = fastgan.fold_norms(nn.Sequential(*LAYERS["kernel 4"]()))
    with torch.no_grad(), pytest.raises(RuntimeError, match="channels"):
        folded(torch.randn(2, 15, 12, 12))


def test_what_is_left():
    overridden = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    overridden[1].forward = lambda input: input + 1
    shared = nn.Conv2d(4, 4, 1)
    hooked = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    hooked[1].register_forward_hook(lambda *_: None)
    for model in (
        nn.Sequential(_Subclass(4, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(shared, nn.BatchNorm2d(4), shared, nn.BatchNorm2d(4)),
        hooked,
        overridden,
        _OwnOrder(nn.Conv2d(4, 4, 1), nn.ReLU()),
        _Backwards(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
    ):
        assert not any(isinstance(m, nn.Identity) for m in fastgan.fold_norms(model).modules())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        fastgan.fold_norms([])


def test_sixteen_bits():
    model = random_norms(nn.Sequential(*LAYERS["transposed"]())).bfloat16()
    input = torch.randn(2, 16, 6, 6, dtype=torch.bfloat16)
    folded = fastgan.fold_norms(model)
    assert folded(input).dtype == torch.bfloat16
    torch.testing.assert_close(folded(input), model.eval()(input), atol=0.1, rtol=0.05)


@pytest.mark.kernel
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize(
    ("transposed", "channels", "outputs", "kernel", "stride"),
    [
        (False, 20, 36, 4, 2), (False, 20, 36, 3, 1), (False, 3, 40, 4, 2), (False, 40, 3, 3, 1), (False, 3, 40, 3, 1),
        (True, 20, 36, 4, 2), (True, 36, 3, 4, 2), (True, 20, 36, 3, 1),
    ],
)  # fmt: skip
def test_the_activation_within_the_kernels(transposed, channels, outputs, kernel, stride, slope, channels_last):
    torch.manual_seed(0)
    input = torch.randn(4, channels, 17, 34)
    weight = torch.randn(*((channels, outputs) if transposed else (outputs, channels)), kernel, kernel)
    bias = torch.randn(outputs)
    if channels_last:
        input, weight = (t.to(memory_format=torch.channels_last) for t in (input, weight))
    one = (1, 1)
    if transposed:
        arguments = (input, weight, bias, (stride,) * 2, one, (0, 0), 1, one)
        convolve = ops.transposed_convolution
    else:
        arguments = (input, weight, bias, (stride,) * 2, one, one, 1)
        convolve = ops.convolution
    plain = convolve(*arguments)
    expected = F.leaky_relu(plain, slope)
    with torch.no_grad():
        assert torch.equal(convolve(*arguments, slope), expected)
        assert convolve(*arguments, slope).stride() == plain.stride()
        for bad in (torch.inf, -torch.inf, torch.nan):
            spoiled = input.clone()
            spoiled[1, 1, 4, 5] = bad
            got = convolve(spoiled, *arguments[1:], slope)
            after = convolve(spoiled, *arguments[1:])
            torch.testing.assert_close(got, after.relu() if slope == 0 else F.leaky_relu(after, slope), equal_nan=True)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_norm_after_an_activation_stays(replaced):
    torch.manual_seed(0)
    layers = nn.Conv2d(16, 20, 4, 2, 1), nn.LeakyReLU(0.2), nn.BatchNorm2d(20), nn.LeakyReLU(0.3), nn.Conv2d(20, 16, 3)
    model = random_norms(nn.Sequential(*layers, nn.ReLU(), nn.ReLU()))
    input = torch.randn(3, 16, 24, 24)
    expected = copy.deepcopy(model).eval().double()(input.double())
    if replaced:
        fastgan.replace_modules(model)
    folded = fastgan.fold_norms(model)
    assert any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert folded[0].slope == 0.2
    torch.testing.assert_close(folded(input).double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_negative_slope_and_its_gradient(transposed):
    conv = nn.ConvTranspose2d(16, 16, 4, 2, 1) if transposed else nn.Conv2d(16, 16, 4, 2, 1)
    model = nn.Sequential(conv, nn.LeakyReLU(-0.3))
    input = torch.randn(3, 16, 24, 24)
    found = []
    for module in (model, fastgan.fold_norms(model)):
        leaf = input.clone().requires_grad_()
        out = module(leaf)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
