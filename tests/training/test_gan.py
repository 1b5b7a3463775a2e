"""GANTrainer, held to the plain tutorial loop."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgan.models import DCGAN
from fastgan.nn import Sequential
from fastgan.replace import replace_modules
from fastgan.training import GANTrainer, r1_penalty, wgan_gp_penalty
from fastgan.training.joining import one_batch_pays, why_two_passes

pytestmark = [
    pytest.mark.filterwarnings("ignore:real and fake go through"),
    pytest.mark.filterwarnings("ignore:real runs from"),
]


@pytest.fixture(autouse=True)
def one_batch(request, monkeypatch):
    """What sizes decide on the CPU: one batch where the layers allow it, and with ``both_ways`` two passes as well."""
    ratio = float("inf") if getattr(request, "param", True) else 0.0
    monkeypatch.setattr("fastgan.training.joining.PICTURES_PER_WEIGHT", ratio)


both_ways = pytest.mark.parametrize("one_batch", [True, False], indirect=True, ids=["one batch", "two passes"])


def tutorial_loop(generator, discriminator, batches, noises, *, lr=2e-4, betas=(0.5, 0.999)):
    """The PyTorch tutorial's training loop for networks that end in Sigmoid; returns each step's losses."""
    criterion = nn.BCELoss()
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=lr, betas=betas)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=lr, betas=betas)
    history = []
    for real, noise in zip(batches, noises, strict=True):
        discriminator.zero_grad()
        output = discriminator(real).view(-1)
        label = torch.full_like(output, 1.0)
        loss_real = criterion(output, label)
        loss_real.backward()
        d_real = output.mean().item()
        fake = generator(noise)
        output = discriminator(fake.detach()).view(-1)
        loss_fake = criterion(output, torch.zeros_like(output))
        loss_fake.backward()
        d_fake = output.mean().item()
        optimizer_d.step()
        generator.zero_grad()
        output = discriminator(fake).view(-1)
        loss_g = criterion(output, label)
        loss_g.backward()
        optimizer_g.step()
        history.append(((loss_real + loss_fake).item(), loss_g.item(), d_real, d_fake))
    return history


def pair(image_size=16, channels=3, width=4, dtype=torch.float64, sigmoid=True, seed=0):
    torch.manual_seed(seed)
    gan = DCGAN(image_size, channels, latent=6, ngf=width, ndf=width).to(dtype)
    # Larger weights than the usual first ones, so that a wrong step shows at once.
    for parameter in gan.parameters():
        if parameter.dim() == 4:
            parameter.data *= 5
    if sigmoid:
        gan.discriminator.main.append(nn.Sigmoid())
    return gan.generator, gan.discriminator


def batches(sizes, image_size=16, channels=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    real = [torch.rand(n, channels, image_size, image_size, generator=generator, dtype=dtype) * 2 - 1 for n in sizes]
    return real, [torch.randn(n, 6, 1, 1, generator=generator, dtype=dtype) for n in sizes]


def compare(change, *, dtype=torch.float64, tolerance=1e-9, sizes=(6, 6, 6, 4, 5), sigmoid=True, **settings):
    """Trains twice, plainly and by GANTrainer, and compares losses, parameters and buffers."""
    generator, discriminator = pair(dtype=dtype)
    change(discriminator)
    plain_g, plain_d = copy.deepcopy(generator), copy.deepcopy(discriminator)
    if not sigmoid:
        del discriminator.main[-1]
    real, noises = batches(sizes, dtype=dtype)
    torch.manual_seed(1)
    expected = tutorial_loop(plain_g, plain_d, real, noises)
    trainer = GANTrainer(generator, discriminator, (6, 1, 1), **settings)
    torch.manual_seed(1)
    for step, (images, noise) in enumerate(zip(real, noises, strict=True)):
        got = trainer.train_step(images, noise)
        assert list(got) == ["loss_d", "loss_g", "d_real", "d_fake"]
        assert list(got.values()) == pytest.approx(expected[step], rel=max(tolerance, 1e-6), abs=1e-6)
    for ours, theirs in ((generator, plain_g), (discriminator, plain_d)):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name].to(value.dtype), value, rtol=tolerance, atol=tolerance, msg=name)
    return trainer


def nothing(discriminator):
    pass


def old_spectral_norm(discriminator):
    for index, layer in enumerate(discriminator.main):
        if isinstance(layer, nn.Conv2d):
            discriminator.main[index] = nn.utils.spectral_norm(layer)


def new_spectral_norm(discriminator):
    for layer in discriminator.main:
        if isinstance(layer, nn.Conv2d):
            nn.utils.parametrizations.spectral_norm(layer)


def dropout(discriminator):
    discriminator.main.insert(2, nn.Dropout(0.5))


@both_ways
@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("sigmoid", [True, False])
def test_R43_parameters_are_the_plain_loops(replace, channels_last, sigmoid):
    # Running statistics of the discriminator are among what is compared: they move once a half, real first.
    compare(nothing, replace=replace, channels_last=channels_last, sigmoid=sigmoid)


def test_parameters_are_the_plain_loops_in_float32():
    # Adam divides by the gradient's own size, so parameters with tiny gradients carry float32's relative error.
    compare(nothing, dtype=torch.float32, tolerance=2e-4)


@pytest.mark.parametrize("change", [old_spectral_norm, new_spectral_norm])
def test_R48_spectral_norm_iterates_as_often_as_in_the_plain_loop(change):
    trainer = compare(change)
    assert not trainer._one_batch()


def test_dropout_draws_the_plain_loops_masks():
    # Two passes in the plain loop's order, so that torch's generator gives the same masks.
    assert not compare(dropout)._one_batch()


def test_without_replacing_batch_norm_needs_two_passes_said_once():
    generator, discriminator = pair()
    trainer = GANTrainer(generator, discriminator, replace=False)
    real, _ = batches([4])
    with pytest.warns(UserWarning, match=r"two passes.*BatchNorm2d"):
        trainer.train_step(real[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train_step(real[0])


class Functional(nn.Module):
    """A discriminator whose forward is code, not a Sequential."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.head, self.body = nn.Conv2d(3, 4, 4, 2, 1), nn.Linear(4 * 64, 1), body

    def forward(self, x):
        return self.body(self, F.leaky_relu(self.conv(x), 0.2))


@pytest.mark.parametrize(
    ("body", "joined"),
    [
        (lambda self, x: self.head(x.view(x.size(0), -1)), True),
        (lambda self, x: self.head(torch.flatten(x, 1)).view(-1, 1).squeeze(1), True),
        (lambda self, x: x.mean([2, 3]), True),
        (lambda self, x: x.mean(0, keepdim=True) * x, False),
        (lambda self, x: torch.cat([x, x.std(0, keepdim=True).expand_as(x)], 1), False),
        (lambda self, x: self.head(x.view(x.size(0), -1)) / x.size(0), False),
        (lambda self, x: F.dropout(x, 0.5), False),
        (lambda self, x: x if x.sum() > 0 else -x, False),
    ],
)
def test_which_forwards_may_see_real_and_fake_as_one_batch(body, joined):
    assert (why_two_passes(Functional(body)) is None) == joined


def test_a_replaced_discriminator_sees_real_and_fake_as_one_batch():
    discriminator = DCGAN(64, 3, ngf=16, ndf=16).discriminator
    assert "main.3 (BatchNorm2d) looks at the whole batch" in why_two_passes(discriminator)
    replace_modules(discriminator)
    assert type(discriminator.main) is Sequential
    assert why_two_passes(discriminator) is None


def test_a_large_batch_of_pictures_takes_two_passes_on_the_cpu(monkeypatch):
    monkeypatch.undo()  # the sizes of the article: 64 pictures are a third as many numbers as the weights
    discriminator = DCGAN(64, 3, ndf=64).discriminator
    assert not one_batch_pays(discriminator, torch.empty(64, 3, 64, 64))
    assert one_batch_pays(discriminator, torch.empty(16, 3, 64, 64))
    assert one_batch_pays(discriminator, torch.empty(64, 3, 64, 64, device="meta"))


def test_hooks_and_users_layers_mean_two_passes():
    class Mine(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) - x.mean()

    plain = nn.Sequential(nn.Conv2d(3, 4, 4), nn.ReLU(), nn.Conv2d(4, 1, 4))
    assert why_two_passes(plain) is None
    assert why_two_passes(nn.Sequential(Mine(3, 4, 4))) is not None
    plain[0].register_forward_hook(lambda *_: None)
    assert "hook" in why_two_passes(plain)


@both_ways
@pytest.mark.parametrize("replace", [True, False])
def test_R52_batches_of_four_one_and_three(replace):
    generator, discriminator = pair(dtype=torch.float32)
    trainer = GANTrainer(generator, discriminator, replace=replace)
    for size in (4, 1, 3):
        result = trainer.train_step(torch.rand(size, 3, 16, 16) * 2 - 1)
        assert all(math.isfinite(value) for value in result.values())
    with pytest.raises(ValueError, match="real must not be empty"):
        trainer.train_step(torch.rand(0, 3, 16, 16))
    assert trainer.step == 3


@pytest.mark.kernel
def test_the_tutorials_loop_with_one_line_more_has_the_same_losses():
    from tests import networks

    torch.manual_seed(3)
    plain = networks.Generator(ngf=32).apply(networks.weights_init), networks.Discriminator(ndf=32)
    plain[1].apply(networks.weights_init)
    real = [torch.rand(16, 3, 64, 64) * 2 - 1 for _ in range(20)]
    noises = [torch.randn(16, 100, 1, 1) for _ in range(20)]

    def losses(change):
        return torch.tensor(tutorial_loop(*(change(copy.deepcopy(module)) for module in plain), real, noises))

    expected, got = losses(nn.Module.train), losses(replace_modules)
    # Adam's first steps have the size of lr whatever the gradient's, so that rounding grows from step to step; torch's
    # own other order of summing, in the other memory format, shows by how much: 1e-3 in the fourth step, 5e-2 in 20.
    other = losses(lambda module: module.to(memory_format=torch.channels_last))
    assert not torch.equal(got, expected)
    assert (got[:2] - expected[:2]).abs().max() < 1e-3
    assert (got - expected).abs().max() < max(1e-3, 3 * (other - expected).abs().max().item())


def test_the_tutorials_networks_alone_are_enough():
    torch.manual_seed(0)
    gan = DCGAN(64, ngf=2, ndf=2)
    trainer = GANTrainer(gan.generator, gan.discriminator)
    assert trainer.latent_shape == (100, 1, 1)
    assert trainer.train_step(torch.rand(2, 3, 64, 64)).keys() == {"loss_d", "loss_g", "d_real", "d_fake"}


@both_ways
def test_R54_flags_stay_and_frozen_layers_do_not_move():
    generator, discriminator = pair(dtype=torch.float32)
    discriminator.main[0].weight.requires_grad_(False)
    discriminator.main[3].eval()
    generator.main[0].weight.requires_grad_(False)
    trainer = GANTrainer(generator, discriminator)

    def state():
        models = (generator, discriminator)
        flags = [m.training for model in models for m in model.modules()]
        return flags, [p.requires_grad for model in models for p in model.parameters()]

    before, parameters = state(), [p.clone() for p in (*generator.parameters(), *discriminator.parameters())]
    for _ in range(2):
        trainer.train_step(torch.rand(4, 3, 16, 16))
    trainer.sample(2)
    assert state() == before
    for parameter, old in zip((*generator.parameters(), *discriminator.parameters()), parameters, strict=True):
        assert torch.equal(parameter, old) != parameter.requires_grad


def test_flags_are_restored_when_a_step_fails():
    generator, discriminator = pair(dtype=torch.float32)
    trainer = GANTrainer(generator, discriminator)
    discriminator.main[0].weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss_d is nan at step 0"):
        trainer.train_step(torch.rand(4, 3, 16, 16))
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


@both_ways
def test_a_loss_that_is_not_finite_changes_no_weight_of_its_player():
    generator, discriminator = pair(dtype=torch.float32)
    trainer = GANTrainer(generator, discriminator)
    real = torch.rand(4, 3, 16, 16)
    trainer.train_step(real)
    before = copy.deepcopy((generator.state_dict(), list(discriminator.parameters())))
    real[0, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="loss_d"):
        trainer.train_step(real)
    for name in ("main.0.weight", "main.3.weight"):
        assert torch.equal(generator.state_dict()[name], before[0][name])
    for parameter, old in zip(discriminator.parameters(), before[1], strict=True):
        assert torch.equal(parameter, old)


def test_the_generators_step_computes_no_discriminator_weight_gradient(monkeypatch):
    generator, discriminator = pair(dtype=torch.float32)
    trainer = GANTrainer(generator, discriminator)
    real = torch.rand(4, 3, 16, 16)
    seen = []
    step = trainer.optimizer_g.step
    monkeypatch.setattr(trainer.optimizer_d, "step", lambda: seen.append([p.grad.clone() for p in weights]))
    monkeypatch.setattr(trainer.optimizer_g, "step", lambda: (seen.append([p.grad.clone() for p in weights]), step()))
    weights = list(discriminator.parameters())
    trainer.train_step(real)
    for after_d, after_g in zip(*seen, strict=True):
        assert torch.equal(after_d, after_g)


@both_ways
@pytest.mark.parametrize("loss", ["bce", "hinge", "lsgan", "wasserstein"])
def test_losses(loss):
    generator, discriminator = pair(sigmoid=False)
    real, noise = (values[0] for values in batches([4]))
    plain_g, plain_d = copy.deepcopy(generator), copy.deepcopy(discriminator)
    got = GANTrainer(generator, discriminator, loss=loss).train_step(real, noise)
    x, y = plain_d(real), plain_d(plain_g(noise))
    expected = {
        "bce": lambda: -F.logsigmoid(x).mean() - F.logsigmoid(-y).mean(),
        "hinge": lambda: F.relu(1 - x).mean() + F.relu(1 + y).mean(),
        "lsgan": lambda: ((x - 1) ** 2).mean() + (y**2).mean(),
        "wasserstein": lambda: y.mean() - x.mean(),
    }[loss]()
    assert got["loss_d"] == pytest.approx(expected.item(), rel=1e-6)
    assert (got["d_real"], got["d_fake"]) == pytest.approx((x.sigmoid().mean().item(), y.sigmoid().mean().item()))
    after = discriminator.train()(generator(noise))  # generator and discriminator have moved: only the sign is told
    assert math.isfinite(got["loss_g"])
    assert after.isfinite().all()


def test_several_logits_an_image_are_averaged():
    generator, _ = pair(sigmoid=False)
    discriminator = nn.Sequential(nn.Conv2d(3, 1, 4, 4)).double()
    real, noise = (values[0] for values in batches([4]))
    x, y = discriminator(real), discriminator(copy.deepcopy(generator)(noise))
    assert x.shape == (4, 1, 4, 4)
    got = GANTrainer(generator, discriminator).train_step(real, noise)
    assert got["loss_d"] == pytest.approx((F.softplus(-x).mean() + F.softplus(y).mean()).item(), rel=1e-6)


class SigmoidInForward(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return torch.sigmoid(self.body(x)).view(-1)


def test_probabilities_without_a_sigmoid_module_are_refused_by_the_arguments_name():
    generator, discriminator = pair(sigmoid=False)
    real, noise = (values[0] for values in batches([4]))
    trainer = GANTrainer(generator, SigmoidInForward(discriminator))
    with pytest.raises(ValueError, match="discriminator_output"):
        trainer.train_step(real, noise)
    generator, discriminator = pair(sigmoid=False)
    with_logits = GANTrainer(*copy.deepcopy((generator, discriminator))).train_step(real, noise)
    told = GANTrainer(generator, SigmoidInForward(discriminator), discriminator_output="probabilities")
    assert told.train_step(real, noise) == pytest.approx(with_logits)


def test_logits_that_happen_to_lie_between_zero_and_one_are_accepted():
    generator, discriminator = pair(sigmoid=False)
    discriminator.main[-1].weight.data.zero_()
    discriminator.main[-1] = nn.Sequential(discriminator.main[-1], nn.Flatten())
    trainer = GANTrainer(generator, discriminator)
    assert trainer.train_step(batches([4])[0][0])["loss_d"] == pytest.approx(2 * math.log(2))


def test_a_confident_discriminator_with_sigmoid_still_learns():
    generator, discriminator = pair(dtype=torch.float32)
    discriminator.main[-2] = nn.Conv2d(8, 1, 4, bias=True)
    with torch.no_grad():
        discriminator.main[-2].bias.fill_(60.0)
    trainer = GANTrainer(generator, discriminator)
    assert trainer.train_step(torch.rand(4, 3, 16, 16))["loss_d"] == pytest.approx(60, rel=0.1)


@pytest.mark.parametrize("penalty", ["r1", "wgan-gp"])
def test_penalties_are_the_papers(penalty):
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    real, fake = torch.rand(4, 3, 2, 2).double(), torch.rand(4, 3, 2, 2).double()
    if penalty == "r1":
        got, at = r1_penalty(discriminator, real, 3.0), real.clone().requires_grad_()
    else:
        got = wgan_gp_penalty(discriminator, real, fake, 3.0, torch.Generator().manual_seed(7))
        where = torch.rand(4, 1, 1, 1, generator=torch.Generator().manual_seed(7))
        at = (real + where.double() * (fake - real)).requires_grad_()
    norms = torch.autograd.grad(discriminator(at).sum(), at)[0].flatten(1).norm(dim=1)
    expected = 1.5 * (norms**2).mean() if penalty == "r1" else 3.0 * ((norms - 1) ** 2).mean()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("penalty", ["r1", "wgan-gp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_R55_a_flat_discriminator_has_a_zero_not_nan_gradient(penalty, dtype):
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    discriminator[3].weight.data.zero_()
    real, fake = torch.rand(4, 3, 2, 2).to(dtype), torch.rand(4, 3, 2, 2).to(dtype)
    value = r1_penalty(discriminator, real) if penalty == "r1" else wgan_gp_penalty(discriminator, real, fake)
    gradients = torch.autograd.grad(value, discriminator.parameters(), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)  # NaN is true
    assert value.item() == (0 if penalty == "r1" else 10)


@pytest.mark.parametrize("penalty", ["r1", "wgan-gp"])
def test_training_with_a_penalty(penalty):
    generator, discriminator = pair(dtype=torch.float32, sigmoid=False)
    trainer = GANTrainer(generator, discriminator, penalty=penalty, loss="wasserstein", seed=3)
    results = [trainer.train_step(torch.rand(4, 3, 16, 16)) for _ in range(3)]
    assert all(math.isfinite(value) for result in results for value in result.values())


def test_R66_same_seed_same_bits_another_seed_other_weights():
    def trained(seed):
        generator, discriminator = pair(dtype=torch.float32)
        trainer = GANTrainer(generator, discriminator, seed=seed)
        trainer.fit(batches([8], dtype=torch.float32)[0][0], epochs=2, batch_size=4)
        return torch.cat([parameter.flatten() for parameter in (*generator.parameters(), *discriminator.parameters())])

    first = trained(1)
    torch.randn(10)
    assert torch.equal(first, trained(1))
    assert not torch.equal(first, trained(2))


def test_bfloat16_precision_trains_float32_weights():
    generator, discriminator = pair(dtype=torch.float32)
    trainer = GANTrainer(generator, discriminator, precision="bfloat16")
    result = trainer.train_step(torch.rand(4, 3, 16, 16))
    assert all(math.isfinite(value) for value in result.values())
    assert all(parameter.dtype == torch.float32 for parameter in generator.parameters())


@pytest.mark.parametrize(
    ("real", "error", "message"),
    [
        (torch.rand(4, 3, 32, 32), ValueError, r"real must be shaped as the generator's pictures, \(N, 3, 16, 16\)"),
        (torch.rand(4, 1, 16, 16), ValueError, "real must be shaped"),
        (torch.zeros(4, 3, 16, 16, dtype=torch.uint8), TypeError, "real must be floating.*uint8"),
        (torch.rand(3), ValueError, "real must be a batch"),
        ([1.0], TypeError, "real must be a tensor.*list"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_by_name(real, error, message):
    trainer = GANTrainer(*pair(dtype=torch.float32, sigmoid=False))
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("ignore")
        trainer.train_step(real)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, "loss must be one of"),
        ({"penalty": "r2"}, "penalty"),
        ({"precision": "int8"}, "precision"),
        ({"discriminator_output": "odds"}, "discriminator_output"),
        ({"lr": 0.0}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.5, 1.0)}, "betas"),
        ({"latent_shape": (0, 1, 1)}, "latent_shape"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
    ],
)
def test_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        GANTrainer(*pair(), **settings)


def test_noise_and_latent_shape_are_refused_by_name():
    with pytest.raises(TypeError, match=r"latent_shape must be integers, got \(3.5, 1, 1\)"):
        GANTrainer(*pair(), latent_shape=(3.5, 1, 1))
    trainer = GANTrainer(*pair(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"noise must be of shape \(N, 6, 1, 1\), got \(4, 5, 1, 1\)"):
        trainer.train_step(torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 5, 1, 1))


@pytest.mark.parametrize("sigmoid", [True, False])
def test_R52_a_batch_of_one_whose_output_is_squeezed(sigmoid):
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 8))
            self.last = nn.Sigmoid() if sigmoid else nn.Identity()

        def forward(self, x):
            return self.last(self.main(x)).squeeze()

    trainer = GANTrainer(pair(dtype=torch.float32)[0], Squeezed())
    for size in (4, 1, 3):
        result = trainer.train_step(torch.rand(size, 3, 16, 16) * 2 - 1)
        assert all(math.isfinite(value) for value in result.values())


def test_R62_fit_takes_fewer_pictures_than_a_batch_and_an_uneven_last_one():
    trainer = GANTrainer(*pair(dtype=torch.float32))
    pictures = batches([9], dtype=torch.float32)[0][0]
    assert len(trainer.fit(pictures[:3], epochs=2, batch_size=64)) == 2
    assert len(trainer.fit(pictures, epochs=2, batch_size=4)) == 6
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pictures, torch.zeros(9)), batch_size=4)
    assert len(trainer.fit(loader, epochs=2, max_steps=4)) == 4
    assert len(trainer.fit(loader.dataset, epochs=2, batch_size=4)) == 6
    with pytest.raises(ValueError, match="no batch"):
        trainer.fit([])
