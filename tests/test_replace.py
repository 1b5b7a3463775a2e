"""replace_modules and explain: the same numbers, objects and habits after the one changed line."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastgan
from fastgan import explain, replace_modules
from fastgan.nn import BatchNormAct2d, Conv2d, ConvTranspose2d, MultiheadAttention, Sequential
from tests.networks import Discriminator, Generator, conv_bn_relu, mobile, weights_init


def small_generator():
    return Generator(nz=8, ngf=4)


def small_discriminator():
    return Discriminator(ndf=4)


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_close(theirs, ours, **options):
    for (name, a), (other, b) in zip(theirs, ours, strict=True):
        assert name == other
        torch.testing.assert_close(b, a, msg=lambda text, name=name: f"{name}: {text}", **options)


def assert_same_training(model, draw, steps=2, change=None, **options):
    """Replaced and unreplaced, in float64: outputs, all gradients, parameters and buffers over several steps."""
    model = model.double()
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = []
    for module in (plain, ours):
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizers.append(torch.optim.SGD(trained, lr=0.05, momentum=0.9))  # before replacing: stays valid
    replace_modules(ours)
    assert list(plain.state_dict()) == list(ours.state_dict())
    for step in range(steps):
        x = draw()
        torch.manual_seed(step)
        upstream = None
        for module, optimizer in zip((plain, ours), optimizers, strict=True):
            given = x.clone().requires_grad_()
            out = module(given)
            upstream = torch.randn_like(out) if upstream is None else upstream
            optimizer.zero_grad()
            (out * upstream).sum().backward()
            module.last = (("output", out), ("input's gradient", given.grad))
            optimizer.step()
        assert_close(plain.last, ours.last, **options)
        grads = [[(n, p.grad) for n, p in module.named_parameters() if p.grad is not None] for module in (plain, ours)]
        assert grads[0]
        assert_close(*grads, **options)
        assert_close(plain.state_dict().items(), ours.state_dict().items(), **options)
        del plain.last, ours.last
    plain.eval(), ours.eval()
    x = draw()
    for no_grad in (True, False):
        with torch.set_grad_enabled(not no_grad):
            torch.testing.assert_close(ours(x), plain(x), **options)
    # state dicts go both ways
    fresh = copy.deepcopy(model).eval()
    fresh.load_state_dict(ours.state_dict())
    torch.testing.assert_close(fresh(x), plain(x), **options)
    fresh = replace_modules(copy.deepcopy(model)).eval()
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh(x), plain(x), **options)
    return plain, ours


def classes(model):
    return [type(m) for m in model.modules()]


MODELS = {
    "generator": (small_generator, lambda: noise(3, 8, 1, 1)),
    "discriminator": (small_discriminator, lambda: noise(3, 3, 64, 64)),
    "mobile": (mobile, lambda: noise(2, 3, 16, 16)),
    "linear network": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), lambda: noise(2, 2, 5, 5)),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lambda: noise(2, 5, 8),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=False), 2
        ),
        lambda: noise(2, 5, 8),
    ),
    "padded convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect", dilation=2),
            nn.Conv2d(4, 4, (3, 1), stride=(1, 2), groups=2),
            nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1, groups=2),
        ),
        lambda: noise(2, 2, 8, 8),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_trains_as_before(name):
    make, draw = MODELS[name]
    assert_same_training(make(), draw)


@pytest.mark.parametrize("kind", [nn.ReLU, lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.3), nn.GELU])
def test_norm_and_activation(kind):
    model = nn.Sequential(*conv_bn_relu(2, 3, kind), nn.Dropout2d(0.0, inplace=True), *conv_bn_relu(3, 2, kind))
    _, ours = assert_same_training(model, lambda: noise(3, 2, 6, 6))
    activations = type(model[2]) in (nn.ReLU, nn.LeakyReLU)
    assert type(ours) is (Sequential if activations else nn.Sequential)
    assert classes(ours)[1:4] == [Conv2d, BatchNormAct2d, type(model[2])]
    assert ours[1].act == "none"


def test_the_tutorial_becomes_all_ours():
    generator, discriminator = replace_modules(small_generator()), replace_modules(small_discriminator())
    block = [ConvTranspose2d, BatchNormAct2d, nn.ReLU]
    assert classes(generator.main) == [Sequential, *block * 4, ConvTranspose2d, nn.Tanh]
    conv, block = [Conv2d], [Conv2d, BatchNormAct2d, nn.LeakyReLU]
    assert classes(discriminator.main) == [Sequential, *conv, nn.LeakyReLU, *block * 3, *conv, nn.Sigmoid]


def test_in_place_and_only_once():
    model = small_discriminator()
    before = dict(model.named_modules()), dict(model.named_parameters()), dict(model.named_buffers())
    assert replace_modules(model) is model
    found = dict(model.named_modules()), dict(model.named_parameters()), dict(model.named_buffers())
    for old, new in zip(before, found, strict=True):
        assert list(old) == list(new)
        assert all(old[name] is new[name] for name in old)
    kinds = classes(model)
    assert replace_modules(model) is model
    assert kinds == classes(model)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (nn.Conv2d(1, 2, 3), Conv2d),
        (nn.ConvTranspose2d(1, 2, 3), ConvTranspose2d),
        (nn.BatchNorm2d(2), BatchNormAct2d),
        (nn.MultiheadAttention(4, 2), MultiheadAttention),
    ],
)
def test_the_model_itself_is_such_a_module(model, kind):
    assert replace_modules(model) is model
    assert type(model) is kind


def test_what_is_no_module_is_refused():
    for function in (replace_modules, explain):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
            function([nn.Conv2d(1, 1, 1)])


def test_R46_norms_keep_every_flag():
    norms = nn.ModuleList(
        [
            nn.BatchNorm2d(2).eval(),
            nn.BatchNorm2d(2, momentum=None),
            nn.BatchNorm2d(2, track_running_stats=False),
            nn.BatchNorm2d(2, affine=False, eps=0.1, momentum=0.3),
        ]
    ).double()
    for _ in range(2):
        norms[1](noise(3, 2, 4, 4))
    norms[3].num_batches_tracked.fill_(7)
    norms[0].weight.requires_grad_(False)
    plain = copy.deepcopy(norms)
    replace_modules(norms)
    for old, new in zip(plain, norms, strict=True):
        assert type(new) is BatchNormAct2d
        for name in ("training", "momentum", "track_running_stats", "affine", "eps", "num_features"):
            assert getattr(old, name) == getattr(new, name)
        assert [p.requires_grad for p in old.parameters()] == [p.requires_grad for p in new.parameters()]
        x = noise(3, 2, 4, 4) + 1
        for _ in range(2):
            torch.testing.assert_close(new(x), old(x))
        assert_close(old.state_dict().items(), new.state_dict().items())


def test_frozen_norm_stays_bit_for_bit_while_the_rest_trains():
    model = replace_modules(small_discriminator())
    frozen = model.main[3].eval().requires_grad_(False)
    before = {name: t.clone() for name, t in frozen.state_dict().items()}
    for m in model.main[:3]:
        m.requires_grad_(False)
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    for name, tensor in frozen.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert frozen.training is False
    assert [p.grad is not None for p in model.parameters()] == [p.requires_grad for p in model.parameters()]


class Doubling(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Blurred(nn.BatchNorm2d):
    pass


def test_R47_subclasses_are_left_alone():
    model = nn.Sequential(Doubling(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), Blurred(3), nn.ReLU())
    _, ours = assert_same_training(model, lambda: noise(2, 2, 5, 5))
    assert classes(ours) == [Sequential, Doubling, BatchNormAct2d, nn.ReLU, Blurred, nn.ReLU]
    row = explain(ours)[1]
    assert (row.name, row.type, row.state) == ("0", "Doubling", "left")
    assert "subclass of nn.Conv2d" in row.reason


def test_R47_forward_overridden_on_the_instance_is_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU())
    forward = model[0].forward
    model[0].forward = lambda x: forward(x) + 1
    model[2].forward = lambda x: x * 3
    replace_modules(model)
    assert classes(model) == [nn.Sequential, nn.Conv2d, BatchNormAct2d, nn.ReLU]
    assert "overridden on the instance" in explain(model)[0].reason


class OwnOrder(nn.Sequential):
    """A Sequential with a forward of its own, which does not run one child after the other."""

    def forward(self, x):
        return self[2](x) + self[1](self[0](x))


def test_R47_a_sequential_with_its_own_forward_fuses_nothing():
    model = OwnOrder(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    _, ours = assert_same_training(model, lambda: noise(2, 2, 4, 4))
    assert classes(ours) == [OwnOrder, Conv2d, BatchNormAct2d, nn.ReLU]


def old_spectral_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(module)


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


def pruned(module):
    return prune.l1_unstructured(module, "weight", 0.5)


WRAPPERS = {
    "spectral norm, old": old_spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm, old": old_weight_norm,
    "weight norm": parametrizations.weight_norm,
    "pruning": pruned,
    "orthogonal": parametrizations.orthogonal,
}


def wrapped_critic(wrap):
    return nn.Sequential(
        wrap(nn.Conv2d(2, 4, 3, 2, 1)),
        nn.LeakyReLU(0.1),
        wrap(nn.ConvTranspose2d(4, 3, 4, 2, 1)),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        wrap(nn.Conv2d(3, 1, 4)),
    ).double()


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_R48_norms_of_weights_two_passes_and_one_backward(wrap):
    model = wrapped_critic(WRAPPERS[wrap])
    torch.manual_seed(0)
    same = wrapped_critic(WRAPPERS[wrap])  # the old kinds refuse deepcopy after a forward
    same.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2, betas=(0.5, 0.9)) for m in (model, same)]
    keys = list(model.state_dict())
    replace_modules(model)
    assert [isinstance(m, (Conv2d, ConvTranspose2d)) for m in model] == [True, False, True, False, False, True]
    assert list(model.state_dict()) == keys
    for _ in range(3):
        real, fake = noise(2, 2, 8, 8), noise(2, 2, 8, 8)
        for module, optimizer in zip((same, model), optimizers[::-1], strict=True):
            optimizer.zero_grad()
            (module(real).relu().mean() - module(fake).mean()).backward()
            optimizer.step()
        grads = [[(n, p.grad) for n, p in m.named_parameters()] for m in (same, model)]
        assert_close(*grads)
        assert_close(same.state_dict().items(), model.state_dict().items())
    model.eval(), same.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(real), same(real))
        torch.testing.assert_close(model(real), model(real), rtol=0, atol=0)


def test_parametrizations_come_off_and_leave_our_class():
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)), parametrizations.weight_norm(nn.Conv2d(3, 2, 1))
    )
    other = copy.deepcopy(model)  # shares the class that register_parametrization made
    shared = type(other[0])
    replace_modules(model)
    assert type(other[0]) is shared
    assert not isinstance(other[0], Conv2d)
    copied = copy.deepcopy(model)
    x = torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(copied.eval()(x), model.eval()(x))
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(model)
    expected = model(x)
    for module in model:
        parametrize.remove_parametrizations(module, "weight")
        assert type(module) is Conv2d
    torch.testing.assert_close(model(x), expected)
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert isinstance(model[0], Conv2d)


def test_R50_weights_init_reaches_the_same_tensors():
    for make in (small_generator, small_discriminator, lambda: nn.Sequential(conv_bn_relu(2, 3), conv_bn_relu(3, 4))):
        plain, ours = make(), make()
        ours.load_state_dict(plain.state_dict())
        replace_modules(ours)
        for module in (plain, ours):
            torch.manual_seed(5)
            module.apply(weights_init)
        assert_close(plain.state_dict().items(), ours.state_dict().items(), rtol=0, atol=0)


def test_shared_modules_are_swapped_once_and_stay_shared():
    conv, norm, act = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()
    model = nn.Sequential(conv, nn.BatchNorm2d(2), act, conv, norm, act, norm, nn.ReLU())
    model[1].weight = norm.weight  # a shared parameter
    _, ours = assert_same_training(model, lambda: noise(2, 2, 5, 5))
    assert ours[0] is ours[3]
    assert ours[4] is ours[6]
    assert ours[1].weight is ours[4].weight
    assert type(ours[0]) is Conv2d
    assert [row.name for row in explain(ours)].count("0") == 1


def test_a_block_used_twice():
    block = conv_bn_relu(2, 2)
    model = nn.Sequential(block, block)
    _, ours = assert_same_training(model, lambda: noise(2, 2, 5, 5))
    assert ours[0] is ours[1]
    assert type(ours[0]) is Sequential


def test_hooks_keep_firing():
    model = small_discriminator()
    conv, norm, act = model.main[2], model.main[3], model.main[4]
    fired = []

    def hook(name):
        return lambda *_: fired.append(name)

    conv.register_forward_hook(hook("conv"))
    conv.register_forward_pre_hook(hook("conv pre"))
    conv.register_full_backward_hook(hook("conv backward"))
    norm.register_forward_pre_hook(hook("norm pre"))
    seen = []
    act.register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    conv.register_state_dict_pre_hook(hook("state dict"))
    conv.register_load_state_dict_post_hook(hook("load"))
    for p in conv.parameters():
        p.register_hook(lambda g: fired.append("parameter"))
    x = torch.randn(2, 3, 64, 64)
    plain = copy.deepcopy(model)
    plain(x)
    expected = seen.pop()
    replace_modules(model)
    fired.clear()
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    wanted = ["conv pre", "conv", "norm pre", "conv backward", "parameter", "state dict", "load"]
    assert sorted(set(fired)) == sorted(wanted)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("replaced_first", [False, True])
@pytest.mark.parametrize("where", ["norm", "norm backward", "act pre", "act backward"])
def test_hooks_between_norm_and_activation_see_what_they_saw(where, replaced_first):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    seen = []
    register = {
        "norm": lambda m: m[1].register_forward_hook(lambda _, args, out: seen.append(out.detach().clone())),
        "norm backward": lambda m: m[1].register_full_backward_hook(lambda _, gi, go: seen.append(go[0].clone())),
        "act pre": lambda m: m[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone())),
        "act backward": lambda m: m[2].register_full_backward_hook(lambda _, gi, go: seen.append(gi[0].clone())),
    }[where]
    plain = copy.deepcopy(model)
    register(plain)
    if replaced_first:
        replace_modules(model)
    register(model)
    assert explain(model)[3].reason.endswith("before it, but for hooks that are there now")
    replace_modules(model)
    x = torch.randn(2, 2, 4, 4)
    for module in (plain, model):
        module(x).square().sum().backward()
    torch.testing.assert_close(seen[1], seen[0])


def test_optimizer_of_before_moves_the_weights():
    model = small_discriminator()
    optimizer = torch.optim.Adam(model.parameters())
    replace_modules(model)
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_copies_pickles_and_saves():
    model = replace_modules(nn.Sequential(conv_bn_relu(2, 3), nn.MultiheadAttention(4, 2)))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert classes(other) == classes(model)
        x = torch.randn(2, 2, 4, 4)
        assert torch.equal(other[0](x), model[0](x))


class Pair(nn.Sequential):
    """A subclass that remembers something."""

    def __init__(self, channels):
        super().__init__(nn.BatchNorm2d(channels), nn.LeakyReLU(0.2))
        self.channels = channels


def test_a_subclass_of_sequential_stays_one():
    plain = Pair(3)
    model = replace_modules(copy.deepcopy(plain))
    assert isinstance(model, Pair)
    assert (type(model).__name__, type(model).__module__) == ("Pair", __name__)
    assert repr(model) == repr(plain).replace("BatchNorm2d", "BatchNormAct2d")
    x = torch.randn(2, 3, 4, 4)
    expected = plain(x)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        other = pickle.loads(pickle.dumps(model, protocol))
        assert type(other) is type(model)
        assert other.channels == 3
        torch.testing.assert_close(other(x), expected)
    other = copy.deepcopy(model)
    assert type(other) is type(model) is type(replace_modules(Pair(4)))
    torch.testing.assert_close(other(x), expected)
    assert explain(model)[0].state == "swapped"
    kind = type(model)
    assert type(replace_modules(model)) is kind


def test_norms_become_others_after_replacing():
    model = replace_modules(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(0.2))).eval()
    x = torch.randn(2, 2, 4, 4)
    expected = model(x)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(synchronized[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(synchronized(x), expected)
    folded = copy.deepcopy(model)
    folded[0] = nn.utils.fuse_conv_bn_eval(model[0], model[1])
    folded[1] = nn.Identity()
    torch.testing.assert_close(folded(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_moves_as_before(dtype):
    model = small_discriminator()
    plain = copy.deepcopy(model)
    replace_modules(model)
    plain.to(dtype), model.to(dtype)
    assert [p.dtype for p in plain.parameters()] == [p.dtype for p in model.parameters()]
    x = torch.randn(4, 3, 64, 64).to(dtype)
    out = model(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, plain(x), rtol=0.05, atol=0.05)


def test_half_and_meta_and_channels_last():
    model = replace_modules(mobile().half())
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model(torch.randn(2, 3, 8, 8).half()).dtype == torch.float16
    model = replace_modules(mobile()).to("meta")
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 2)
    model = mobile().double().to(memory_format=torch.channels_last)
    assert_same_training(model, lambda: noise(2, 3, 8, 8).to(memory_format=torch.channels_last))


def test_compiles_before_and_after_replacing():
    model = nn.Sequential(conv_bn_relu(2, 3, lambda: nn.LeakyReLU(0.2)), conv_bn_relu(3, 2)).double()
    x = noise(2, 2, 5, 5)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    replace_modules(compiled)
    assert type(model[0]) is Sequential
    compiled(x).sum().backward()
    plain(x).sum().backward()
    assert_close([(n, p.grad) for n, p in plain.named_parameters()], [(n, p.grad) for n, p in model.named_parameters()])
    assert_close(plain.state_dict().items(), model.state_dict().items())


def test_wrapped_in_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small_discriminator().double()
        plain = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(replace_modules(model))
        x = noise(2, 3, 64, 64)
        for module in (plain, wrapped):
            module(x).sum().backward()
        assert_close(
            [(n, p.grad) for n, p in plain.named_parameters()], [(n, p.grad) for n, p in model.named_parameters()]
        )
        inside = nn.parallel.DistributedDataParallel(plain)  # and the other way round
        replace_modules(inside)
        assert type(plain.main[0]) is Conv2d
        torch.testing.assert_close(inside(x), wrapped(x))
    finally:
        torch.distributed.destroy_process_group()


def test_lazy_scripted_and_quantized_modules_are_left():
    lazy = nn.LazyConv2d(2, 3)
    scripted = torch.jit.script(nn.Conv2d(2, 2, 1))
    quantized = torch.ao.nn.qat.Conv2d(2, 2, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm"))
    model = nn.Sequential(lazy, scripted, quantized)
    kinds = classes(model)
    replace_modules(model)
    assert classes(model) == kinds
    reasons = {row.name: row.reason for row in explain(model)}
    assert "lazy" in reasons["0"]
    assert "TorchScript" in reasons["1"]
    assert "quantized" in reasons["2"]
    model(torch.randn(1, 1, 8, 8))
    replace_modules(model)
    assert type(model[0]) is Conv2d


def test_functional_call_and_per_sample_gradients():
    model = replace_modules(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 3)))
    model = model.double().eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, {**state, **parameters}, (x[None],)).square().sum()

    x = noise(3, 1, 7, 7)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        expected = torch.func.grad(loss)(parameters, x[i])
        assert_close(expected.items(), {name: g[i] for name, g in found.items()}.items())


@pytest.mark.parametrize("make", [small_discriminator, mobile])
def test_gradient_penalty_equals_the_unreplaced(make):
    model = make().double()
    plain = copy.deepcopy(model)
    replace_modules(model)
    x = noise(3, 3, 64, 64).requires_grad_()
    found = []
    for module in (plain, model):
        (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        grads = torch.autograd.grad(penalty, list(module.parameters()), materialize_grads=True, allow_unused=True)
        found.append(list(enumerate(grads)))
    assert_close(*found)


def test_explain_before_and_after():
    model = small_discriminator()
    kinds = classes(model)
    before = explain(model)
    assert classes(model) == kinds
    assert [row.state for row in before].count("will be swapped") == 9
    rows = {row.name: row for row in before}
    assert (rows["main"].becomes, rows["main"].reason) == ("Sequential", "layer and activation as one: 3")
    assert rows["main.3"].becomes == "BatchNormAct2d"
    assert rows["main.4"].reason == "as one with the BatchNorm2d before it"
    assert (rows["main.1"].state, rows["main.12"].state) == ("left", "left")
    assert "nothing directly before it" in rows["main.1"].reason
    assert rows["main.12"].reason == "fastgan has nothing for Sigmoid"
    replace_modules(model)
    after = explain(model)
    assert [(row.name, row.becomes) for row in after] == [(row.name, row.becomes) for row in before]
    assert not any(row.state == "will be swapped" for row in after)
    text = str(after)
    assert len(text.splitlines()) == len(after) + 3
    assert text.splitlines()[-1] == "9 swapped, 5 left"
    assert "main.3" in text
    assert repr(explain(nn.ReLU())).splitlines()[2].startswith("(the model)")
    assert str(explain(nn.Identity())).endswith("no modules")


def test_a_large_table_is_folded():
    text = str(explain(nn.Sequential(nn.Conv2d(1, 1, 1), *(nn.Tanh() for _ in range(70)))))
    assert len(text.splitlines()) == 5
    assert "fastgan has nothing for 70 Tanh" in text


def test_names_are_exported():
    assert {"replace_modules", "explain"} <= set(fastgan.__all__)
    assert fastgan.replace_modules is replace_modules
