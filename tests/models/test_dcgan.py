"""fastgan.models: the tutorial's layout, any size that halves down to 4."""

import pytest
import torch
from torch import nn

from fastgan.models import DCGAN, Discriminator, Generator
from tests import networks as tutorial


def test_the_tutorials_state_dicts_fit_and_mean_the_same():
    theirs_g, theirs_d = tutorial.Generator(ngf=4), tutorial.Discriminator(ndf=4)
    gan = DCGAN(64, 3, ngf=4, ndf=4)
    gan.generator.load_state_dict(theirs_g.state_dict())
    gan.discriminator.load_state_dict(theirs_d.state_dict())
    noise = torch.randn(3, 100, 1, 1)
    pictures = theirs_g(noise)
    assert torch.equal(gan(noise), pictures)
    torch.testing.assert_close(torch.sigmoid(gan.discriminator(pictures)), theirs_d(pictures))


@pytest.mark.parametrize("image_size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_shapes(image_size, channels):
    gan = DCGAN(image_size, channels, latent=7, ngf=2, ndf=2)
    pictures = gan.generator(torch.randn(2, 7, 1, 1))
    assert pictures.shape == (2, channels, image_size, image_size)
    assert pictures.abs().max() <= 1
    assert gan.discriminator(pictures).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("image_size", [0, -64, 1, 4, 9, 12, 48, 63, 100])
def test_R63_sizes_that_do_not_halve_to_four_are_refused(image_size):
    for make in (DCGAN, Generator, Discriminator):
        with pytest.raises(ValueError, match="image_size"):
            make(image_size=image_size)


def test_the_nearest_sizes_are_named():
    with pytest.raises(ValueError, match="32 and 64"):
        DCGAN(48)


@pytest.mark.parametrize("name", ["channels", "latent", "ngf", "ndf"])
@pytest.mark.parametrize("value", [0, -1])
def test_R63_other_numbers_below_one_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        DCGAN(32, **{name: value})


@torch.no_grad()
def test_first_values():
    torch.manual_seed(0)
    gan = DCGAN(32, ngf=32, ndf=32)
    for module in gan.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight.numel() > 5000:
            assert abs(module.weight.mean()) < 0.002
            assert module.weight.std() == pytest.approx(0.02, rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean() == pytest.approx(1, abs=0.02)
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
