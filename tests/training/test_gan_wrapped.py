"""GANTrainer with networks that something else holds on to, and with what it cannot train."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgan.training import GANTrainer
from fastgan.training.joining import why_two_passes


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    # No bias before a batch norm: its gradient is rounding alone, which Adam makes steps of.
    generator = nn.Sequential(
        nn.ConvTranspose2d(6, 8, 4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, 2, 1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 1, 4),
    )
    return generator.to(dtype), discriminator.to(dtype)


def batches(count=3, dtype=torch.float32):
    draws = torch.Generator().manual_seed(1)
    pictures = torch.rand(count, 4, 3, 8, 8, generator=draws, dtype=dtype) * 2 - 1
    return list(zip(pictures, torch.randn(count, 4, 6, 1, 1, generator=draws, dtype=dtype), strict=True))


def plain_loop(generator, discriminator, data):
    optimizers = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in (generator, discriminator)]
    loss = lambda logits, label: F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
    for real, noise in data:
        optimizers[1].zero_grad()
        loss(discriminator(real), 1.0).backward()
        fake = generator(noise)
        loss(discriminator(fake.detach()), 0.0).backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        loss(discriminator(fake), 1.0).backward()
        optimizers[0].step()


def parameters(*modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


@pytest.fixture
def group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:real and fake go through")
def test_distributed_data_parallel_equals_the_plain_loop(group):
    generator, discriminator = pair()
    expected = copy.deepcopy((generator, discriminator))
    plain_loop(*expected, batches())
    wrapped = [nn.parallel.DistributedDataParallel(module) for module in (generator, discriminator)]
    trainer = GANTrainer(*wrapped)
    for real, noise in batches():
        trainer.train_step(real, noise)
    torch.testing.assert_close(parameters(generator, discriminator), parameters(*expected), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="channels_last"):
        GANTrainer(*wrapped, channels_last=True)


@pytest.mark.filterwarnings("ignore:real and fake go through")
@pytest.mark.parametrize("how", ["compile", "Module.compile", "DataParallel"])
def test_other_wrappers_equal_the_plain_loop(how):
    generator, discriminator = pair()
    expected = copy.deepcopy((generator, discriminator))
    plain_loop(*expected, batches(1))
    if how == "Module.compile":
        generator.compile(backend="eager")
        discriminator.compile(backend="eager")
        wrapped = generator, discriminator
    else:
        wrap = nn.DataParallel if how == "DataParallel" else lambda module: torch.compile(module, backend="eager")
        wrapped = wrap(generator), wrap(discriminator)
    trainer = GANTrainer(*wrapped)
    assert trainer.latent_shape == (6, 1, 1)
    for real, noise in batches(1):
        trainer.train_step(real, noise)
    torch.testing.assert_close(parameters(generator, discriminator), parameters(*expected), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:real and fake go through", "ignore:grad and param do not obey")
def test_gradients_of_another_layout_reach_their_own_weights():
    # A fused step would pair each weight with another one's gradient, without a word.
    generator, discriminator = pair()
    expected = copy.deepcopy((generator, discriminator))
    plain_loop(*expected, batches())
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        parameter.register_post_accumulate_grad_hook(
            lambda p: setattr(p, "grad", p.grad.contiguous(memory_format=torch.contiguous_format))
        )
    trainer = GANTrainer(generator, discriminator)
    for real, noise in batches():
        trainer.train_step(real, noise)
    torch.testing.assert_close(parameters(generator, discriminator), parameters(*expected), atol=1e-6, rtol=1e-5)


def test_optimizers_with_a_past_keep_their_moments_in_place():
    generator, discriminator = pair()
    expected = copy.deepcopy((generator, discriminator))
    states = []
    for modules in ((generator, discriminator), expected):
        optimizers = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999), fused=True) for m in modules]
        for optimizer in optimizers:
            draws = torch.Generator().manual_seed(2)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn(parameter.shape, generator=draws)
            optimizer.step()
        states.append(optimizers)
    trainer = GANTrainer(generator, discriminator, optimizers=tuple(states[0]))
    same = GANTrainer(*expected, optimizers=tuple(states[1]), channels_last=False)
    for real, noise in batches():
        trainer.train_step(real, noise)
        same.train_step(real, noise)
    torch.testing.assert_close(parameters(generator, discriminator), parameters(*expected), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:real and fake go through")
def test_gradient_hooks_see_each_backward_alone():
    generator, discriminator = pair(torch.float64)
    expected = copy.deepcopy((generator, discriminator))
    for module in (discriminator, expected[1]):
        for parameter in module.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    assert "gradient hook" in why_two_passes(discriminator)
    plain_loop(*expected, batches(dtype=torch.float64))
    trainer = GANTrainer(generator, discriminator)
    for real, noise in batches(dtype=torch.float64):
        trainer.train_step(real, noise)
    torch.testing.assert_close(parameters(generator, discriminator), parameters(*expected))


def test_a_trainers_state_goes_on_elsewhere_with_the_same_bits():
    data = [real for real, _ in batches(4)]
    trainer = GANTrainer(*pair(), seed=3)
    for real in data[:2]:
        trainer.train_step(real)
    state = copy.deepcopy(trainer.state_dict())
    torch.manual_seed(9)
    other = GANTrainer(*copy.deepcopy(pair()), seed=3)
    other.load_state_dict(state)
    assert other.step == 2
    for real in data[2:]:
        assert trainer.train_step(real) == other.train_step(real)
    with pytest.raises(ValueError, match="state must hold"):
        other.load_state_dict({"step": 1})


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_is_refused_in_words(context):
    trainer = GANTrainer(*pair())
    with context(), pytest.raises(RuntimeError, match="needs gradients"):
        trainer.train_step(batches(1)[0][0])


class Conditional(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, label):
        return self.body(x)


class Then(nn.Module):
    def __init__(self, body, end):
        super().__init__()
        self.body, self.end = body, end

    def forward(self, x):
        return self.end(self.body(x))


@pytest.mark.filterwarnings("ignore:real and fake go through")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda g, d: (Conditional(g), d), TypeError, "generator must take noise alone"),
        (lambda g, d: (g, Conditional(d)), TypeError, "discriminator must take pictures alone"),
        (lambda g, d: (Then(g, lambda x: x.to(torch.complex64)), d), TypeError, "generator must return one floating"),
        (lambda g, d: (g, Then(d, lambda x: (x, x))), TypeError, "discriminator must return one.*tuple"),
        (lambda g, d: (g, Then(d, torch.Tensor.detach)), ValueError, "output has no gradient"),
        (lambda g, d: (g, d.to("meta")), ValueError, "discriminator is on the meta device"),
        (lambda g, d: (g, g), ValueError, "one module"),
    ],
)
def test_networks_that_cannot_be_trained_are_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        GANTrainer(*change(*pair()), latent_shape=(6, 1, 1)).train_step(batches(1)[0][0])


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"lr": "1e-4"}, TypeError, "lr must be a number"),
        ({"lr": (1e-4, 1e-4, 1e-4)}, ValueError, "lr must be one number, or"),
        ({"betas": 0.5}, TypeError, "betas must be two numbers"),
        ({"seed": "a"}, TypeError, "seed"),
        ({"latent_shape": "100"}, TypeError, "latent_shape"),
        ({"penalty": "r1", "penalty_weight": -1}, ValueError, "penalty_weight"),
        ({"device": "meta"}, ValueError, "device"),
        ({"optimizers": 3}, TypeError, "optimizers"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(settings, error, words):
    with pytest.raises(error, match=words):
        GANTrainer(*pair(), **settings)


def test_optimizers_in_the_wrong_order_are_refused():
    generator, discriminator = pair()
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (discriminator, generator)]
    with pytest.raises(ValueError, match="generator's has none of its parameters"):
        GANTrainer(generator, discriminator, optimizers=tuple(optimizers))


@pytest.mark.parametrize(("scale", "shift", "words"), [(0.5, 0.5, r"2 \* real - 1"), (127.5, 127.5, "scale it")])
def test_pictures_of_another_range_than_tanhs_are_said_once(scale, shift, words):
    trainer = GANTrainer(*pair())
    real = batches(1)[0][0]
    with pytest.warns(UserWarning, match=words):
        trainer.train_step(real * scale + shift)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train_step(real * scale + shift)
        GANTrainer(*pair()).train_step(real)


def test_real_that_is_not_finite_is_said_to_be():
    with pytest.raises(FloatingPointError, match="real holds values that are not finite"):
        GANTrainer(*pair()).train_step(torch.full((4, 3, 8, 8), float("nan")))


@pytest.mark.parametrize("data", [None, 3, "my_pictures"])
def test_fit_refuses_what_is_no_data(data):
    with pytest.raises(TypeError, match="data must be pictures"):
        GANTrainer(*pair()).fit(data)
