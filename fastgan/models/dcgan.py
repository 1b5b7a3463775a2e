"""DCGAN (Radford et al., 2015) in the layout of PyTorch's tutorial, for any image size that is 4·2ⁿ.

Layers, their names (``main.0.weight``, ...) and their first values are the tutorial's, so its state dicts fit. One
thing differs: the discriminator returns logits, without the closing Sigmoid (which has no entry in a state dict).

Widths at 64 pixels, ngf = ndf = 64::

    generator      (N, 100, 1, 1) -> 512×4×4 -> 256×8×8 -> 128×16×16 -> 64×32×32 -> channels×64×64
    discriminator  channels×64×64 -> 64×32×32 -> 128×16×16 -> 256×8×8 -> 512×4×4 -> (N, 1, 1, 1)
"""

from __future__ import annotations

from torch import Tensor, nn


def init_weights(module: nn.Module) -> None:
    """The tutorial's first values, for ``model.apply``: convolutions N(0, 0.02), batch norm N(1, 0.02) and bias 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d) and module.weight is not None:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def check_image_size(image_size: int) -> int:
    """How often the size halves down to 4; ValueError where it does not."""
    _check_positive(image_size=image_size)
    halvings = (image_size // 4).bit_length() - 1
    if image_size < 8 or image_size != 4 << halvings:
        sizes = [4 << n for n in range(1, 10)]
        near = sorted(sorted(sizes, key=lambda size: abs(size - image_size))[:2])
        raise ValueError(
            f"image_size must be 4·2ⁿ and at least 8, because each layer halves or doubles it down to 4×4; got "
            f"{image_size}. The nearest that work: {near[0]} and {near[1]}"
        )
    return halvings


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


class Generator(nn.Module):
    """Noise (N, latent, 1, 1) to pictures (N, channels, image_size, image_size) in [-1, 1].

    Args:
        image_size: 4·2ⁿ, at least 8.
        channels: of the picture.
        latent: length of the noise vector.
        ngf: channels before the last layer.

    Raises ValueError, naming the argument, for other sizes.
    """

    def __init__(self, image_size: int = 64, channels: int = 3, latent: int = 100, ngf: int = 64) -> None:
        super().__init__()
        halvings = check_image_size(image_size)
        _check_positive(channels=channels, latent=latent, ngf=ngf)
        width = ngf << (halvings - 1)
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, width, 4, 1, 0, bias=False)]
        for _ in range(halvings - 1):
            layers += [nn.BatchNorm2d(width), nn.ReLU(True)]
            layers += [nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False)]
            width //= 2
        layers += [nn.BatchNorm2d(width), nn.ReLU(True)]
        layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, input: Tensor) -> Tensor:
        return self.main(input)


class Discriminator(nn.Module):
    """Pictures (N, channels, image_size, image_size) to logits (N, 1, 1, 1): above zero, real.

    Args:
        image_size: 4·2ⁿ, at least 8.
        channels: of the picture.
        ndf: channels after the first layer.

    Raises ValueError, naming the argument, for other sizes.
    """

    def __init__(self, image_size: int = 64, channels: int = 3, ndf: int = 64) -> None:
        super().__init__()
        halvings = check_image_size(image_size)
        _check_positive(channels=channels, ndf=ndf)
        layers: list[nn.Module] = [nn.Conv2d(channels, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        width = ndf
        for _ in range(halvings - 1):
            layers += [nn.Conv2d(width, width * 2, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(width * 2), nn.LeakyReLU(0.2, inplace=True)]
            width *= 2
        layers += [nn.Conv2d(width, 1, 4, 1, 0, bias=False)]
        self.main = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, input: Tensor) -> Tensor:
        return self.main(input)


class DCGAN(nn.Module):
    """The pair: ``.generator`` and ``.discriminator``, initialised as in the tutorial.

    >>> gan = DCGAN(image_size=32, channels=1)
    >>> trainer = fastgan.training.GANTrainer(gan.generator, gan.discriminator)

    Args:
        image_size: 4·2ⁿ, at least 8. Default 64.
        channels: of the pictures. Default 3.
        latent: length of the noise vector. Default 100.
        ngf, ndf: width of generator and discriminator. Default 64.

    Raises ValueError, naming the argument, for other sizes.
    """

    def __init__(
        self, image_size: int = 64, channels: int = 3, latent: int = 100, ngf: int = 64, ndf: int = 64
    ) -> None:
        super().__init__()
        self.generator = Generator(image_size, channels, latent, ngf)
        self.discriminator = Discriminator(image_size, channels, ndf)

    def forward(self, noise: Tensor) -> Tensor:
        """Pictures for noise (N, latent, 1, 1)."""
        return self.generator(noise)
