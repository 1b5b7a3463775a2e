"""``fastgan.nn.Sequential``: a layer and the activation after it as one, unless somebody looks between them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize

import fastgan
from fastgan import explain, replace_modules
from fastgan.models import DCGAN
from fastgan.nn import BatchNormAct2d, Conv2d, Sequential

ACTIVATIONS = {
    "relu": nn.ReLU,
    "in place": lambda: nn.LeakyReLU(0.3, inplace=True),
    "identity": lambda: nn.LeakyReLU(1.0),
}


def _model(act=nn.ReLU):
    return nn.Sequential(
        nn.Conv2d(16, 32, 4, 2, 1), act(), nn.Conv2d(32, 18, 3), act(), nn.ConvTranspose2d(18, 16, 4, 2, 1), act(),
        nn.BatchNorm2d(16), act(), nn.Conv2d(16, 4, 1), act(),
    )  # fmt: skip


@pytest.fixture
def fused(monkeypatch):
    """The slopes of the layers that were computed with their activation."""
    slopes = []

    def watched(compute):
        return lambda self, input, slope: slopes.append(slope) or compute(self, input, slope)

    for kind in (Conv2d, BatchNormAct2d):
        monkeypatch.setattr(kind, "activated", watched(kind.activated))
    return slopes


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_trains_as_torchs(act, fused):
    plain = _model(ACTIVATIONS[act]).double()
    model = replace_modules(copy.deepcopy(plain))
    assert type(model) is Sequential
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 16, 24, 24, dtype=torch.float64)
    found = []
    for module in (plain, model):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        (slope,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        (slope.square().mean() + out.mean()).backward()
        found.append([out, leaf.grad, *(p.grad for p in module.parameters())])
    for a, expected in zip(*found, strict=True):
        torch.testing.assert_close(a, expected)
    assert len(fused) == 4


@pytest.mark.kernel
def test_a_discriminator_by_the_kernels_in_float32():
    plain = DCGAN(64, 3, ngf=32, ndf=32).discriminator
    model = replace_modules(copy.deepcopy(plain))
    x = torch.rand(8, 3, 64, 64) * 2 - 1
    found = []
    for module in (plain.double(), model):
        leaf = x.to(next(module.parameters()).dtype).requires_grad_()
        module(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in module.parameters())])
    for exact, got in zip(*found, strict=True):
        assert (got - exact).norm() < 2e-5 * exact.norm()


def test_who_looks_between_sees_what_was_there(fused):
    x = torch.randn(2, 16, 24, 24)
    model = replace_modules(_model())
    whole = model(x)
    assert fused == [0.0] * 4
    fused.clear()

    def walked():
        out, between = x, []
        for layer in model:
            out = layer(out)
            between.append(out)
        return between

    between = walked()
    assert between[0].min() < 0  # before the activation
    torch.testing.assert_close(between[-1], whole)
    assert type(model[:3]) is Sequential
    torch.testing.assert_close(model[:3](x), between[2])
    assert fused == [0.0]
    fused.clear()

    seen = []
    for module in (model[0], model[1], model[6], model[7]):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda module, args, *out: seen.append((module, *(out or args))))
            torch.testing.assert_close(model(x), whole)
            handle.remove()
            assert len(fused) == 3  # the others
            fused.clear()
    assert [module for module, _ in seen] == [model[i] for i in (0, 0, 1, 1, 6, 6, 7, 7)]
    for i, at in ((0, 0), (3, 0), (4, 6), (7, 6)):
        torch.testing.assert_close(seen[i][1], between[at])
    handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
    model(x)
    handle.remove()
    assert model[0] in seen
    assert not fused


def test_backward_hooks_fire(fused):
    model = replace_modules(_model())
    seen = []
    for module in (model[0], model[1]):
        module.register_full_backward_hook(lambda module, to_input, to_output: seen.append(module))
    model(torch.randn(2, 16, 24, 24)).sum().backward()
    assert seen == [model[1], model[0]]


def test_what_is_not_taken_as_one(fused):
    class Other(nn.ReLU):
        def forward(self, x):
            return x * 2

    conv = replace_modules(nn.Conv2d(16, 16, 3))
    x = torch.randn(2, 16, 9, 9)
    for act in (Other(), nn.LeakyReLU(-0.1), nn.ReLU6(), nn.Tanh()):
        torch.testing.assert_close(Sequential(conv, act)(x), act(conv(x)))
    act = nn.ReLU()
    act.forward = lambda x: x * 3
    torch.testing.assert_close(Sequential(conv, act)(x), conv(x) * 3)
    other = copy.deepcopy(conv)
    other.forward = lambda x: x - 1
    torch.testing.assert_close(Sequential(other, nn.ReLU())(x), (x - 1).relu())
    other = copy.deepcopy(conv)
    other._conv_forward = lambda x, w, b: F.conv2d(x, w, b) - 1
    torch.testing.assert_close(Sequential(other, nn.ReLU())(x), (conv(x) - 1).relu())
    assert not fused

    class Doubled(Conv2d):
        def forward(self, input):
            return super().forward(input) * 2

    class Shifted(BatchNormAct2d):
        def forward(self, input):
            return super().forward(input) + 1

    for layer in (Doubled(16, 16, 3), Shifted(16), BatchNormAct2d(16, act="relu"), BatchNormAct2d(16).double()):
        given = x.to(next(layer.parameters()).dtype)
        torch.testing.assert_close(Sequential(layer, nn.LeakyReLU(0.5))(given), F.leaky_relu(layer(given), 0.5))
    assert fused == [0.5]  # the last
    fused.clear()
    act = nn.ReLU()  # in use twice, and once more than it is passed over
    torch.testing.assert_close(Sequential(conv, act, act, conv, act)(x), conv(conv(x).relu()).relu())
    assert fused == [0.0, 0.0]
    assert Sequential()(x) is x


def test_parametrized_weights():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(16, 20, 3)), nn.LeakyReLU(0.2))
    plain = copy.deepcopy(model)
    replace_modules(model)
    assert parametrize.is_parametrized(model[0])
    x = torch.randn(2, 16, 9, 9)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x))


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return not isinstance(module, nn.Sequential)


def test_fx_is_shown_every_layer(fused):
    model = replace_modules(_model())
    graph = Leaves().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == [str(i) for i in range(len(model))]
    assert not fused
    x = torch.randn(2, 16, 24, 24)
    torch.testing.assert_close(torch.fx.GraphModule(model, graph)(x), model(x))


@pytest.mark.kernel
def test_compiles_whole(fused):
    model = replace_modules(_model(ACTIVATIONS["in place"]))
    x = torch.randn(4, 16, 24, 24, requires_grad=True)
    found = []
    for module in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = module(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])])
    for a, expected in zip(*found, strict=True):
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-4)


def test_explained_and_made_of_torchs():
    rows = explain(DCGAN(64, 3, ngf=16, ndf=16).discriminator)
    assert (rows[0].name, rows[0].becomes, rows[0].state) == ("main", "Sequential", "will be swapped")
    assert rows[0].reason == "layer and activation as one: 4"
    assert (rows[2].state, rows[2].reason) == ("left", "as one with the Conv2d before it")
    model = DCGAN(64, 3, ngf=16, ndf=16).discriminator
    replace_modules(model)
    assert explain(model)[0].state == "swapped"
    few = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU())  # of so few channels torch's own is taken
    assert type(replace_modules(few)) is nn.Sequential
    own = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
    assert Sequential.from_torch(own) is own
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Sequential, got Conv2d"):
        Sequential.from_torch(nn.Conv2d(1, 1, 1))
    assert fastgan.fold_norms(replace_modules(own))[0].slope == 0.0
