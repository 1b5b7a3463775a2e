"""What is given in place of a folder of pictures, and what happens to folders while they are used."""

from __future__ import annotations

import io
import os
import resource
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.data import load_images
from fastgan.data.decode import decode

SIZE = 8


def png(seed: int = 0) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def load(source, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_images(source, SIZE, progress=False, **options)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train-0.parquet", "train-1.parquet"], r"2 \.parquet; Parquet tables are not read"),
        (["a.HEIC", "notes.txt"], r"1 \.heic.*convert the pictures to JPEG"),
        (["inner.zip"], "a zip within is not opened"),
        (["images.tar"], "unpack it"),
        (["x.pkl"], "unpickling runs code"),
        (["data_batch_1", "data_batch_2", "batches.meta"], "CIFAR-10's own batches.*name cifar10"),
        (["README"], "1 without suffix"),
    ],
)
def test_R57_a_folder_of_something_else_says_what_it_holds_and_what_to_do(pictures, files, words):
    for name in files:
        (pictures / name).write_bytes(b"\x80\x04 something")
    with pytest.raises(ValueError, match=words):
        load(pictures)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("", ValueError, "empty"),
        ("~nobody-of-this-name/x", FileNotFoundError, "~nobody"),
        ("a" * 300, FileNotFoundError, "no folder or zip file"),
        ("CIFAR-10", FileNotFoundError, "did you mean 'cifar10'"),
        ("/dev/null", ValueError, "neither a folder nor"),
        (b"digits", TypeError, "bytes"),
    ],
)
def test_R57_paths_that_lead_nowhere_are_refused_in_words(pictures, source, error, words):
    with pytest.raises(error, match=words):
        load(source)


@pytest.mark.parametrize(
    ("name", "words"), [("a.png", "give the folder"), ("a.tar.gz", "unpack it"), ("a.zip", "is no zip, or cut off")]
)
def test_R57_a_single_file_is_refused_with_advice(pictures, name, words):
    (pictures / name).write_bytes(png())
    with pytest.raises(ValueError, match=words):
        load(pictures / name)


def test_a_path_is_a_path_even_if_it_is_called_digits(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    Path("digits").mkdir()
    Path("digits/a.png").write_bytes(png())
    assert len(load(Path("digits"))) == 1


def test_a_zip_sniffs_files_without_suffix_as_a_folder_does(pictures):
    archive = pictures / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("one", png())
        file.writestr("notes", b"not a picture")
        file.writestr(".hidden", png())
    images = load(archive)
    assert (len(images), images.ignored) == (1, 2)


def test_R59_names_of_any_bytes_stay_on_one_line(pictures):
    (pictures / "good.png").write_bytes(png())
    (pictures / "new\nline.png").write_bytes(b"")
    with open(os.fsencode(pictures) + b"/bad\xff.png", "wb") as file:
        file.write(b"hello")
    with pytest.warns(UserWarning, match="were skipped") as caught:
        images = load_images(pictures, SIZE, progress=False)
    (said,) = [str(warning.message) for warning in caught]
    assert r"new\nline.png (the file is empty)" in said
    assert r"bad\udcff.png (not a picture" in said
    assert "\n" not in said
    assert "0x" not in said
    assert len(images) == 1


def test_R59_an_unreadable_file_is_named_without_ending_the_run(pictures, monkeypatch):
    for name in ("a.png", "b.png"):
        (pictures / name).write_bytes(png())
    read = Path.read_bytes

    def refuse(path):
        if path.name == "a.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.warns(UserWarning, match=r"a\.png \(Permission denied\)"):
        assert len(load_images(pictures, SIZE, progress=False)) == 1


def test_a_file_changed_behind_its_time_is_decoded_again(pictures):
    def write(value):
        np.save(pictures / "a.npy", np.full((SIZE, SIZE, 3), value, np.uint8))
        os.utime(pictures / "a.npy", (1, 1))

    write(1)
    assert load(pictures).pixels.max() == 1
    write(2)  # the same name, size and time of modification
    assert load(pictures).pixels.max() == 2
    (pictures / "b.png").write_bytes(png())
    assert len(load(pictures)) == 2
    (pictures / "a.npy").unlink()
    assert len(load(pictures)) == 1


def test_a_runs_own_samples_are_not_its_data(pictures):
    (pictures / "a.png").write_bytes(png())
    digest = load(pictures).digest
    (pictures / "runs" / "x" / "samples").mkdir(parents=True)
    (pictures / "runs" / "x" / "config.json").write_text('{\n  "format": "fastgan-run"}')
    (pictures / "runs" / "x" / "samples" / "step.png").write_bytes(png(1))
    assert load(pictures).digest == digest


@pytest.mark.parametrize("room", [0, 1000, 3000])
def test_a_full_disk_falls_back_to_memory(pictures, room):
    for number in range(30):
        (pictures / f"{number}.png").write_bytes(png(number))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.warns(UserWarning, match="File too large.*stay in memory"):
            images = load_images(pictures, SIZE, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert images.path is None
    assert np.array_equal(images.pixels, load(pictures).pixels)


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_R58_negative_values_are_refused_not_cut_off(pictures, suffix):
    values = np.linspace(-1, 1, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    save = np.save if suffix == "npy" else lambda path, array: Image.fromarray(array).save(path)
    save(pictures / f"a.{suffix}", values)
    with pytest.raises(ValueError, match=rf"a\.{suffix}: its values run from -1 to 1"):
        load(pictures, channels=1)
    save(pictures / f"a.{suffix}", np.clip(values, -0.01, 1))  # what sharpening leaves
    assert load(pictures, channels=1).pixels.min() == 0


def test_R58_channels_first_is_named(pictures):
    np.save(pictures / "a.npy", np.zeros((3, SIZE, SIZE), np.uint8))
    with pytest.raises(ValueError, match="channels come last"):
        load(pictures)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_R58_every_exif_orientation_is_exact(orientation):
    upright = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    # how a camera held that way stores what it sees: the inverse of what the tag says to do
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).save(data, "PNG", exif=exif)
    assert np.array_equal(decode(data.getvalue(), SIZE, 3), np.moveaxis(upright, 2, 0))
