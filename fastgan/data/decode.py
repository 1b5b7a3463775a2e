"""One picture as a file holds it, to one uint8 array of the size and channels asked for.

The rules, in the order they apply:

- a picture of several frames or pages gives its first one;
- the rotation that a camera noted in EXIF is carried out;
- 16-bit grey is scaled to 8 bits (65535 becomes 255); 12-bit likewise; 32-bit integers and floats, which have no
  agreed white, by the smallest of the usual ranges that holds them (1, 255, 65535, else their own); with negative
  values they are refused, since cutting them off would ruin a picture that runs from -1 to 1;
- transparency is composited over white, unless an alpha channel was asked for (2 or 4 channels);
- CMYK, palette, 1-bit, YCbCr, LAB become RGB or grey by Pillow's own conversions, without colour profiles;
- the shorter side is resized to ``image_size`` with Pillow's antialiased bilinear filter, and the centre is cropped:
  the usual recipe of image GANs, equal to torchvision's Resize and CenterCrop.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

#: part of the cache's key: raise it when the same file would give other pixels
DECODER_VERSION = 2

#: what Pillow calls the mode for so many channels
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

#: the only formats tried: no format that starts another program (EPS) or that is not a picture
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "PCX", "QOI")
SUFFIXES = frozenset(
    f".{suffix}"
    for line in (
        "png apng jpg jpeg jpe jfif mpo gif bmp dib webp tif tiff",
        "ppm pgm pbm pnm tga jp2 j2k avif pcx qoi npy",
    )
    for suffix in line.split()
)
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*", b"BM")


def looks_like_image(header: bytes) -> bool:
    """True if a file without a suffix starts as a picture does (``header``: its first 16 bytes)."""
    return header.startswith(_SIGNATURES) or (header[:4] == b"RIFF" and header[8:12] == b"WEBP")


def decode(data: bytes | np.ndarray | Image.Image, image_size: int, channels: int) -> np.ndarray:
    """Decode one picture to uint8 (channels, image_size, image_size), C-contiguous.

    ``data``: the bytes of a picture file or of an ``.npy`` file, an array (H, W) or (H, W, channels), or a Pillow
    image. Raises whatever Pillow or numpy raise for a file that is broken, and ValueError for channels that the
    picture does not have.
    """
    if isinstance(data, bytes) and data.startswith(b"\x93NUMPY"):
        data = np.load(io.BytesIO(data), allow_pickle=False)
    if isinstance(data, np.ndarray):
        return _decode_array(data, image_size, channels)
    if channels not in MODES:
        raise ValueError(f"a picture file gives 1 to 4 channels, not {channels}; .npy files hold any number")
    Image.init()  # with formats= given, open() knows none but those already loaded; costs nothing a second time
    formats = [name for name in FORMATS if name in Image.OPEN]  # not every build of Pillow has all of them
    with warnings.catch_warnings():
        # Pillow warns from 89 million pixels on and refuses from twice as many; a large photograph is no attack.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        image = _open(data, formats) if isinstance(data, bytes) else data
        image.load()
        bits = _bits(image)  # noted before: a turned copy has no tags
        image = to_mode(_upright(image), MODES[channels], bits)
    return to_array(resize_and_crop(image, image_size))


def _open(data: bytes, formats: list[str]) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:  # names the address of the buffer
        raise ValueError("the file is empty" if not data else "not a picture, or cut off in its first bytes") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block is no reason to lose the picture
        return image


def _bits(image: Image.Image) -> int:
    bits = getattr(image, "tag_v2", {}).get(258, 16)
    return int(bits[0] if isinstance(bits, tuple) else bits)


def to_mode(image: Image.Image, mode: str, bits: int = 16) -> Image.Image:
    """Convert to "L", "LA", "RGB" or "RGBA" without clipping 16-bit values or showing what transparency hides."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image, bits)
    if mode in ("LA", "RGBA"):
        # by way of RGBA, since a palette's transparency is known to that conversion only
        return _to_rgba(image).convert(mode)
    if image.has_transparency_data:
        rgba = _to_rgba(image)
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    if image.mode == mode:
        return image
    if mode == "L" and image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image.convert(mode)


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA")


def _to_8_bits(image: Image.Image, bits: int) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    hidden = None
    if image.mode == "F" or bits > 16:
        white = _white(values)
    else:
        white = float(2**bits - 1)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            hidden = values == transparent
    result = Image.fromarray(_scale(values, white), "L")
    if hidden is not None:
        result.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8), "L"))
    return result


def _white(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    largest, least = (float(finite.max()), float(finite.min())) if finite.size else (1.0, 0.0)
    # A little below zero is what sharpening and resampling leave, and is cut off.
    if least < -0.05 * max(largest, 1.0):
        raise ValueError(
            f"its values run from {least:.4g} to {largest:.4g}, and below zero there is no agreed black: save it as "
            "uint8, or from 0 to 1"
        )
    return next((white for white in (1.0, 255.0, 65535.0) if largest <= white), largest)


def _scale(values: np.ndarray, white: float) -> np.ndarray:
    values = np.nan_to_num(values, nan=0.0, posinf=white, neginf=0.0)
    return np.rint(np.clip(values / white, 0.0, 1.0) * 255.0).astype(np.uint8)


def _decode_array(values: np.ndarray, image_size: int, channels: int) -> np.ndarray:
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.size == 0 or values.dtype.kind not in "buif":
        raise ValueError(
            f"an array picture is numbers of shape (height, width) or (height, width, channels), "
            f"got {values.dtype} {tuple(values.shape)}"
        )
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif values.dtype == np.uint16:
        values = _scale(values.astype(np.float64), 65535.0)
    elif values.dtype != np.uint8:
        values = values.astype(np.float64)
        values = _scale(values, _white(values))
    if values.shape[2] == channels and channels not in MODES:
        planes = [
            resize_and_crop(Image.fromarray(np.ascontiguousarray(plane)), image_size)
            for plane in np.moveaxis(values, 2, 0)
        ]
        return np.stack([np.asarray(plane) for plane in planes])
    if values.shape[2] not in MODES or channels not in MODES:
        hint = "; channels come last: (height, width, channels)" if values.shape[0] == channels else ""
        raise ValueError(f"the array has {values.shape[2]} channels, {channels} were asked for{hint}")
    picture = np.ascontiguousarray(values if values.shape[2] > 1 else values[:, :, 0])
    return to_array(resize_and_crop(to_mode(Image.fromarray(picture), MODES[channels]), image_size))


def resize_and_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Resize the shorter side to ``image_size``, antialiased bilinear, and crop the centre square."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) > 8 * short:
        # A strip: most of it would be enlarged and then cut away. Keep a centred part, even margins on both sides.
        cut = [max(0, (side - 4 * short) // 2) for side in (width, height)]
        image = image.crop((cut[0], cut[1], width - cut[0], height - cut[1]))
        width, height = image.size
    if short != image_size:
        size = (max(image_size, int(image_size * width / short)), max(image_size, int(image_size * height / short)))
        image = image.resize(size, Image.Resampling.BILINEAR)
        width, height = size
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return image.crop((left, top, left + image_size, top + image_size))


def to_array(image: Image.Image) -> np.ndarray:
    """(C, H, W) uint8 of an 8-bit image."""
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0))
