"""Pictures of every kind a folder holds: each one written here with Pillow, read back, and looked at."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.data import ImageArray, load_images
from fastgan.data.decode import resize_and_crop
from fastgan.data.sources import data_folder

SIZE = 16
RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTGAN_CACHE", str(folder))
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def load(source, channels=3, image_size=SIZE, **options):
    """load_images where a warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_images(source, image_size, channels, progress=False, **options)


def solid(color=RED, mode="RGB", size=(20, 24)):
    return Image.new(mode, size, color)


def noise(seed, size=(20, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def only(images: ImageArray) -> np.ndarray:
    assert len(images) == 1
    return images.pixels[0]


def assert_color(picture: np.ndarray, color, tolerance=3):
    assert np.abs(picture.astype(int) - np.array(color).reshape(-1, 1, 1)).max() <= tolerance


@pytest.mark.parametrize("layout", ["flat", "nested", "mixed"])
def test_R57_flat_nested_and_mixed_folders(cache, pictures, layout):
    places = {"flat": ["a", "b", "c"], "nested": ["x/a", "x/y/b", "z/c"], "mixed": ["a", "x/b", "x/y/c"]}[layout]
    for number, place in enumerate(places):
        path = pictures / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        solid((number * 50, 0, 0)).save(path)
    images = load(pictures)
    assert images.shape == (3, 3, SIZE, SIZE)
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 50, 100]


def _cmyk(path):
    Image.new("CMYK", (20, 24), (0, 255, 255, 0)).save(path)


def _rgba(path):
    image = solid((*RED, 255), "RGBA")
    image.paste((0, 0, 255, 0), (0, 0, 20, 12))  # blue, but fully transparent: white is seen
    image.save(path)


def _palette_transparency(path):
    image = Image.new("P", (20, 24), 1)
    image.putpalette([0, 0, 255, *RED])
    image.paste(0, (0, 0, 20, 12))
    image.save(path, transparency=0)


def _animated(path):
    solid(RED).save(path, save_all=True, append_images=[solid(GREEN), solid(WHITE)])


HALF_WHITE = {"rgba.png": _rgba, "palette.png": _palette_transparency, "palette.gif": _palette_transparency}


@pytest.mark.parametrize("name", HALF_WHITE)
@pytest.mark.parametrize("channels", [1, 3])
def test_R58_transparency_is_composited_over_white(cache, pictures, name, channels):
    HALF_WHITE[name](pictures / name)
    picture = only(load(pictures, channels))
    assert_color(picture[:, :5], [255] * channels)
    assert_color(picture[:, -5:], RED if channels == 3 else [76])


def test_R58_la_is_composited_over_white(cache, pictures):
    image = Image.new("LA", (20, 24), (0, 51))
    image.save(pictures / "la.png")
    for channels in (1, 3):
        assert_color(only(load(pictures, channels)), [204] * channels, 1)
    assert_color(only(load(pictures, 2)), [0, 51])
    assert_color(only(load(pictures, 4)), [0, 0, 0, 51])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("cmyk.jpg", _cmyk),
        ("cmyk.tif", _cmyk),
        ("animated.gif", _animated),
        ("animated.webp", lambda path: solid().save(path, save_all=True, append_images=[solid(GREEN)], lossless=True)),
        ("pages.tiff", _animated),
        ("UPPER.PNG", lambda path: solid().save(path)),
        ("Mixed.JpEg", lambda path: solid().save(path, "JPEG", quality=95)),
        ("plain.webp", lambda path: solid().save(path, lossless=True)),
        ("plain.tif", lambda path: solid().save(path)),
        ("plain.bmp", lambda path: solid().save(path)),
        ("plain.ppm", lambda path: solid().save(path)),
        ("plain.tga", lambda path: solid().save(path)),
        ("ycbcr.tif", lambda path: solid().convert("YCbCr").save(path)),
        ("palette.png", lambda path: solid().quantize(4).save(path)),
        ("png named.jpg", lambda path: solid().save(path, "PNG")),
        ("no suffix", lambda path: solid().save(path, "PNG")),
    ],
)
def test_R58_every_kind_comes_out_red(cache, pictures, name, write):
    write(pictures / name)
    assert_color(only(load(pictures)), RED)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_R58_16_bits_are_scaled_not_clipped(cache, pictures, name):
    values = np.full((24, 20), 65535, np.uint16)
    values[:, :10] = 16384
    Image.fromarray(values).save(pictures / name)
    for channels in (1, 3):
        picture = only(load(pictures, channels))
        assert_color(picture[:, :, :5], [64] * channels, 1)
        assert_color(picture[:, :, -5:], [255] * channels, 1)


def test_R58_big_endian_32_bit_and_float_tiffs(cache, pictures):
    Image.fromarray(np.full((20, 20), 32768, ">u2")).save(pictures / "a.tif")
    Image.fromarray(np.full((20, 20), 128, np.int32)).save(pictures / "b.tif")
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(pictures / "c.tif")
    assert np.abs(load(pictures, 1).pixels.astype(int) - 128).max() <= 1


def test_R58_one_bit(cache, pictures):
    image = Image.new("1", (20, 20), 0)
    image.paste(1, (0, 0, 10, 20))
    image.save(pictures / "bits.png")
    picture = only(load(pictures, 1))
    assert_color(picture[:, :, :6], [255])
    assert_color(picture[:, :, -6:], [0])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_R58_exif_rotation_is_carried_out(cache, pictures, suffix):
    image = solid((0, 0, 0), size=(24, 24))
    image.paste(WHITE, (0, 0, 24, 12))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: white at the right
    image.save(pictures / f"turned.{suffix}", exif=exif)
    picture = only(load(pictures))
    assert_color(picture[:, :, -6:], WHITE, 8)
    assert_color(picture[:, :, :6], (0, 0, 0), 8)


def test_rgba_keeps_alpha_when_asked(cache, pictures):
    _rgba(pictures / "rgba.png")
    picture = only(load(pictures, 4))
    assert_color(picture[:, -5:], (*RED, 255))
    assert_color(picture[3:, :5], [0])


def _broken(pictures: Path) -> list[str]:
    """One truncated or broken file of each kind; their names."""
    for suffix in ("jpg", "png", "gif", "bmp", "tif", "webp"):
        data = io.BytesIO()
        noise(1).save(data, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        (pictures / f"cut.{suffix}").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "page.png").write_text("<html>404</html>")
    (pictures / "dangling.png").symlink_to(pictures / "nowhere.png")
    return sorted(path.name for path in pictures.iterdir())


def test_R59_broken_files_are_named_counted_and_left_alone(cache, pictures):
    names = _broken(pictures)
    noise(0).save(pictures / "good.png")
    before = {path.name: path.read_bytes() for path in pictures.iterdir() if path.exists()}
    for _ in range(2):  # decoded, then from the cache: the warning comes both times
        with pytest.warns(UserWarning, match=rf"{len(names)} of {len(names) + 1} pictures .*were skipped") as caught:
            images = load_images(pictures, SIZE, progress=False)
        assert len(caught) == 1
        assert all(name in str(caught[0].message) for name in names)
        assert sorted(name for name, _ in images.skipped) == names
        assert all(reason for _, reason in images.skipped)
        assert np.array_equal(only(images), np.moveaxis(np.asarray(resize_and_crop(noise(0), SIZE)), 2, 0))
    assert before == {path.name: path.read_bytes() for path in pictures.iterdir() if path.exists()}


def test_R59_nothing_usable_is_an_error_that_says_what_was_tried(cache, pictures):
    names = _broken(pictures)
    (pictures / "notes.txt").write_text("not a picture")
    with pytest.raises(
        ValueError, match=rf"no usable picture in '.*pictures': .*{len(names)} could not be used, 1 other"
    ):
        load_images(pictures, SIZE, progress=False)
    assert not list(cache.rglob("*.json"))
    assert not list(cache.rglob(".writing-*"))


def test_empty_folder_missing_path_and_other_files_are_refused(cache, pictures):
    with pytest.raises(ValueError, match="0 picture files tried"):
        load(pictures)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(pictures / "nowhere")
    (pictures / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="neither a folder nor a whole zip"):
        load(pictures / "broken.zip")
    with pytest.raises(TypeError, match="source"):
        load(7)


@pytest.mark.parametrize(
    ("size", "channels", "kind"),
    [
        (7, 3, ValueError),
        (0, 3, ValueError),
        (-8, 3, ValueError),
        (16.0, 3, TypeError),
        (True, 3, TypeError),
        (16, 0, ValueError),
        (16, None, TypeError),
    ],
)
def test_R63_impossible_sizes_are_refused_by_name(cache, pictures, size, channels, kind):
    solid().save(pictures / "a.png")
    with pytest.raises(kind, match=r"image_size|channels"):
        load(pictures, channels, size)


def test_five_channels_are_for_arrays_only(cache, pictures):
    solid().save(pictures / "a.png")
    with pytest.raises(ValueError, match=r"channels=5 needs \.npy"):
        load_images(pictures, SIZE, 5, progress=False)
    (pictures / "a.png").unlink()
    values = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 5), dtype=np.uint8)
    np.save(pictures / "a.npy", values)
    assert np.array_equal(only(load(pictures, 5)), np.moveaxis(values, 2, 0))


def test_pickled_arrays_are_not_unpickled(cache, pictures):
    np.save(pictures / "evil.npy", np.array([{"code": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no usable picture"):
        load_images(pictures, SIZE, progress=False)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (20, 24), (100, 33), (33, 100), (17, 16), (64, 61)])
@pytest.mark.parametrize("image_size", [8, 16, 31])
def test_resize_and_crop_is_the_usual_recipe(size, image_size):
    image = noise(3, size)
    result = np.asarray(resize_and_crop(image, image_size))
    assert result.shape == (image_size, image_size, 3)
    short = min(size)
    whole = image.resize(
        tuple(image_size if side == short else int(image_size * side / short) for side in size),
        Image.Resampling.BILINEAR,
    )
    left, top = (round((side - image_size) / 2) for side in whole.size)
    expected = np.asarray(whole.crop((left, top, left + image_size, top + image_size)))
    assert np.array_equal(result, expected)


def test_strips_keep_their_centre():
    ramp = np.tile(np.linspace(0, 255, 4000, dtype=np.uint8), (10, 1))
    result = np.asarray(resize_and_crop(Image.fromarray(ramp), 16))
    assert result.shape == (16, 16)
    assert np.abs(result.astype(int) - 127).max() <= 2


def test_system_files_and_other_files_are_ignored_and_counted(cache, pictures):
    solid().save(pictures / "a.png")
    (pictures / ".DS_Store").write_bytes(b"x")
    (pictures / "._a.png").write_bytes(b"x")
    (pictures / "labels.csv").write_text("a,1")
    (pictures / "README").write_text("read me")
    (pictures / "__MACOSX").mkdir()
    (pictures / "__MACOSX" / "b.png").write_bytes(b"x")
    os.mkfifo(pictures / "pipe.png")
    images = load(pictures)
    assert len(images) == 1
    assert images.ignored == 5  # the folder __MACOSX is not entered
    assert images.skipped == []


def test_links_to_a_parent_end(cache, pictures):
    (pictures / "a").mkdir()
    solid().save(pictures / "a" / "a.png")
    (pictures / "a" / "up").symlink_to(pictures)
    assert len(load(pictures)) == 1


def test_zip_is_read_in_place_and_equals_the_folder(cache, pictures, tmp_path):
    for number in range(4):
        path = pictures / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        noise(number).save(path)
    archive = tmp_path / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(pictures.rglob("*.png"), reverse=True):
            file.write(path, path.relative_to(pictures))
        file.writestr("__MACOSX/a/._0.png", b"x")
        file.writestr("notes.txt", b"x")
        file.write(pictures / "a" / "0.png", "../../outside.png")
    from_zip = load(archive)
    assert len(from_zip) == 5
    assert from_zip.ignored == 2
    assert np.array_equal(from_zip.pixels[1:], load(pictures).pixels)
    assert not list(tmp_path.parent.rglob("outside.png"))


def test_R59_damaged_zip_entry_is_skipped(cache, tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(2):
            data = io.BytesIO()
            noise(number).save(data, "PNG")
            file.writestr(f"{number}.png", data.getvalue())
    content = bytearray(archive.read_bytes())
    content[200:220] = bytes(20)
    archive.write_bytes(content)
    with pytest.warns(UserWarning, match=r"0\.png"):
        images = load_images(archive, SIZE, progress=False)
    assert len(images) == 1


def test_cache_is_used_and_a_changed_source_is_decoded_again(cache, pictures, monkeypatch):
    noise(0).save(pictures / "a.png")
    first = load(pictures)
    assert isinstance(first.pixels, np.memmap)
    assert first.path.is_relative_to(cache)
    monkeypatch.setattr("fastgan.data.images.decode", lambda *_: pytest.fail("decoded twice"))
    again = load(pictures)
    assert again.digest == first.digest
    assert np.array_equal(again.pixels, first.pixels)
    monkeypatch.undo()
    monkeypatch.setenv("FASTGAN_CACHE", str(cache))
    noise(1).save(pictures / "a.png")
    os.utime(pictures / "a.png", (1, 1))
    assert load(pictures).digest != first.digest
    assert load(pictures, image_size=8).shape[-1] == 8


def test_digest_is_of_the_pixels_not_of_the_place(cache, pictures, tmp_path):
    noise(0).save(pictures / "a.png")
    shutil.copytree(pictures, tmp_path / "elsewhere")
    assert load(pictures).digest == load(tmp_path / "elsewhere").digest


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "json", "other json", "gone"])
def test_damaged_cache_is_made_again(cache, pictures, damage):
    noise(0).save(pictures / "a.png")
    first = load(pictures)
    good, path, about = first.pixels.tobytes(), first.path, first.path.with_suffix(".json")
    del first
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[5] ^= 1
        path.write_bytes(content)
    elif damage in ("cut", "grow"):
        path.write_bytes(content[:-1] if damage == "cut" else content + b"x")
    elif damage == "gone":
        path.unlink()
    else:
        about.write_text("{" if damage == "json" else '{"count": "many"}')
    again = load(pictures)
    assert again.pixels.tobytes() == good
    assert load(pictures).path.read_bytes() == good


def test_unwritable_cache_falls_back_to_memory_with_one_warning(pictures, tmp_path, monkeypatch):
    noise(0).save(pictures / "a.png")
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="stay in memory") as caught:
        images = load_images(pictures, SIZE, cache_dir=tmp_path / "file" / "cache", progress=False)
    assert len(caught) == 1
    assert images.path is None
    assert images.digest == load(pictures, cache_dir=tmp_path / "cache").digest


def test_full_disk_while_writing_falls_back_to_memory(cache, pictures, monkeypatch):
    noise(0).save(pictures / "a.png")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        images = load_images(pictures, SIZE, progress=False)
    assert images.path is None
    assert len(images) == 1
    assert not list(cache.rglob("*.*"))


def test_concurrent_builds_agree(cache, pictures):
    for number in range(20):
        noise(number).save(pictures / f"{number:02}.png")
    digests = []
    threads = [
        threading.Thread(target=lambda: digests.append(load_images(pictures, SIZE, progress=False).digest))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 4
    assert len(set(digests)) == 1
    assert not list(cache.rglob(".writing-*"))


def test_decompression_bomb_is_skipped(cache, pictures, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    solid(size=(30, 50)).save(pictures / "large.png")  # beyond the limit: Pillow warns, it is still loaded
    solid(size=(100, 100)).save(pictures / "bomb.png")  # beyond twice the limit: refused
    with pytest.warns(UserWarning, match=r"bomb\.png .*decompression bomb"):
        assert len(load_images(pictures, SIZE, progress=False)) == 1


def test_digits_and_plain_line(cache, capsys):
    pytest.importorskip("sklearn")
    images = load_images("digits", 8, 1)
    assert images.shape == (1797, 1, 8, 8)
    assert images.pixels.max() == 255
    assert images.pixels.min() == 0
    assert "decoded 1,797 pictures" in capsys.readouterr().err
    from sklearn.datasets import load_digits

    assert np.abs(images.pixels[:, 0] / 255 * 16 - load_digits().images).max() < 0.05


def test_cifar10_of_the_data_folder(cache):
    folder = data_folder()
    if folder is None or not (folder / "cifar10-train-10k.zip").is_file():
        pytest.skip("no cifar10-train-10k.zip in FASTGAN_DATA or ../shared/data")
    images = load("cifar10", image_size=32)
    assert images.shape == (10_000, 3, 32, 32)
    assert 100 < images.pixels.mean() < 140


def test_cifar10_without_internet_says_what_to_do(cache, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setenv("FASTGAN_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(RuntimeError, match=r"no route to host.*FASTGAN_DATA"):
        load_images("cifar10", progress=False)


def test_batch_scales_exactly_and_flips(cache, pictures):
    values = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    for number in range(3):
        np.save(pictures / f"{number}.npy", np.roll(values, number))
    images = load(pictures, 1)
    batch = images.batch([2, 0])
    assert batch.dtype == torch.float32
    assert batch.shape == (2, 1, SIZE, SIZE)
    assert batch.min() == -1
    assert batch.max() == 1
    expected = torch.from_numpy(values.astype(np.float32)) / 127.5 - 1
    assert torch.equal(batch[1, 0], expected)
    flipped = images.batch(torch.tensor([2, 0]), [False, True])
    assert torch.equal(flipped[0], batch[0])
    assert torch.equal(flipped[1], batch[1].flip(-1))
    assert torch.equal(images.batch(slice(0, 3), True), images.batch(range(3)).flip(-1))
    generator = torch.Generator().manual_seed(0)
    drawn = images.batch([0] * 64, generator)
    mirrored = sum(torch.equal(picture, expected[None].flip(-1)) for picture in drawn)
    assert 16 < mirrored < 48
    assert images.batch([]).shape == (0, 1, SIZE, SIZE)
    assert torch.equal(images[-1], images[2])
    with pytest.raises(IndexError):
        images.batch([3])
    with pytest.raises(TypeError, match="integers"):
        images.batch([0.5])
    with pytest.raises(ValueError, match="flip"):
        images.batch([0, 1], [True])


def test_images_are_a_dataset_and_pickle_by_path(cache, pictures):
    noise(0).save(pictures / "a.png")
    noise(1).save(pictures / "b.png")
    images = load(pictures)
    data = pickle.dumps(images)
    assert len(data) < images.pixels.nbytes
    again = pickle.loads(data)
    assert np.array_equal(again.pixels, images.pixels)
    (batch,) = torch.utils.data.DataLoader(images, batch_size=2)
    assert torch.equal(batch, images.batch([0, 1]))
