"""Checkpoints: written whole or not at all, checked when read, and nothing pickled.

A checkpoint is a folder of safetensors files and one ``trainer.json``, which holds the step, the optimizers' settings,
the size and SHA-256 of every other file, and a SHA-256 of itself. It is written under another name, forced to disk, and
then takes its own name, ``checkpoints/step-000000900``; the symbolic link ``last`` is replaced in one step, and only
then is the older checkpoint deleted. So at every moment ``last`` names a whole one, whatever kills the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.training._optimizers import match_layouts
from fastgan.training.gan import GANTrainer

FORMAT = "fastgan-checkpoint"
VERSION = 1
MODELS = ("generator", "discriminator")


class RunError(Exception):
    """A run that cannot go on as asked, in one line that names the file or folder."""


def fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file and forces it to disk; OSError names it."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file in one step: the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """One byte string for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# ---- what is saved ----


def _tensors(state: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    # clone: two names may share memory, which the format refuses
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})


def _optimizer_state(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{index}.{key}"] = value
            else:
                numbers[f"{index}.{key}"] = value
    return tensors, {"type": type(optimizer).__name__, "groups": state["param_groups"], "numbers": numbers}


def contents(trainer: GANTrainer, config_digest: str) -> dict[str, bytes]:
    """The checkpoint's files, by name; ``trainer.json`` last."""
    files = {f"{name}.safetensors": _tensors(getattr(trainer, name).state_dict()) for name in MODELS}
    tensors_g, settings_g = _optimizer_state(trainer.optimizer_g, "generator")
    tensors_d, settings_d = _optimizer_state(trainer.optimizer_d, "discriminator")
    files["optimizers.safetensors"] = _tensors({**tensors_g, **tensors_d})
    header = {
        "format": FORMAT,
        "version": VERSION,
        "step": trainer.step,
        "config_sha256": config_digest,
        "optimizers": {"generator": settings_g, "discriminator": settings_d},
        "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()},
    }
    header["sha256"] = sha256(canonical(header))
    files["trainer.json"] = (json.dumps(header, indent=1) + "\n").encode()
    return files


def save_checkpoint(trainer: GANTrainer, folder: Path, config_digest: str) -> Path:
    """Saves into ``folder/checkpoints/step-N`` and points ``folder/last`` there; OSError leaves the old one whole."""
    place = folder / "checkpoints"
    place.mkdir(exist_ok=True)
    target = place / f"step-{trainer.step:09d}"
    temporary = place / f".tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        # It can be there already: saved just before, or by a process that died before it pointed `last` here.
        if not _is_whole(target):
            shutil.rmtree(target, ignore_errors=True)
            temporary.mkdir()
            for name, data in contents(trainer, config_digest).items():
                write_file(temporary / name, data)
            fsync_folder(temporary)
            os.rename(temporary, target)
            fsync_folder(place)
        _point_last_at(folder, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            error.errno, f"{error.strerror} (the last good checkpoint is untouched)", error.filename
        ) from error
    for other in place.iterdir():
        if other != target and other.name.startswith(("step-", ".tmp-")):
            shutil.rmtree(other, ignore_errors=True)
    return target


def _is_whole(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except RunError:
        return False
    return True


def _current(folder: Path) -> Path | None:
    """The folder that holds the last whole checkpoint, or None if there is none yet."""
    last = folder / "last"
    if last.is_symlink():
        return folder / os.readlink(last)
    if last.exists():
        return last  # a copy of the run that followed the link
    return None


def _point_last_at(folder: Path, target: Path) -> None:
    last, temporary = folder / "last", folder / ".last.tmp"
    if last.exists() and not last.is_symlink():
        # A copy that followed the link: its folder moves among the checkpoints. Killed just here, the newest of those
        # counts (see find_checkpoint).
        copied = folder / "checkpoints" / "step-000000000-copied"
        shutil.rmtree(copied, ignore_errors=True)
        os.rename(last, copied)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(folder))
    os.replace(temporary, last)
    fsync_folder(folder)


def find_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint's folder, or None if none was ever finished."""
    current = _current(folder)
    if current is not None:
        if not current.is_dir():
            raise RunError(f"{folder / 'last'}: points to {current}, which is not there")
        return current
    whole = sorted((folder / "checkpoints").glob("step-*"), reverse=True)
    return whole[0] if whole else None


# ---- reading back ----


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Header and tensors of each file, after every size and hash was checked; RunError names what is wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    header = _read_header(path / "trainer.json")
    tensors = {}
    for name in ("generator.safetensors", "discriminator.safetensors", "optimizers.safetensors"):
        expected = header["files"].get(name)
        data = _read(path / name)
        if (
            not isinstance(expected, dict)
            or len(data) != expected.get("bytes")
            or sha256(data) != expected.get("sha256")
        ):
            raise RunError(f"{path / name}: damaged or changed, its content is not what trainer.json recorded")
        try:
            tensors[name.partition(".")[0]] = load(data)
        except SafetensorError as error:
            raise RunError(f"{path / name}: not a safetensors file ({error})") from error
    return header, tensors


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise RunError(f"{path}: not a checkpoint of fastgan")
    if header.get("version") != VERSION:
        raise RunError(f"{path}: checkpoint version {header.get('version')!r}; this fastgan reads {VERSION}")
    digest = header.pop("sha256", None)
    if digest != sha256(canonical(header)):
        raise RunError(f"{path}: damaged or changed, its own hash does not fit")
    step, files, optimizers = header.get("step"), header.get("files"), header.get("optimizers")
    told = isinstance(files, dict) and isinstance(optimizers, dict)
    if not told or type(step) is not int or not 0 <= step < 2**53:
        raise RunError(f"{path}: does not say its step, files and optimizers")
    return header


def load_checkpoint(trainer: GANTrainer, path: Path, config_digest: str | None = None) -> None:
    """Puts a checkpoint into a trainer; nothing of the trainer has changed where RunError is raised."""
    header, tensors = read_checkpoint(path)
    if config_digest is not None and header.get("config_sha256") != config_digest:
        raise RunError(f"{path / 'trainer.json'}: belongs to another configuration than config.json")
    apply: list[Callable[[], None]] = []
    for name in MODELS:
        model: nn.Module = getattr(trainer, name)
        check_state(model, tensors[name], path / f"{name}.safetensors")
        apply.append(lambda model=model, state=tensors[name]: model.load_state_dict(state))  # type: ignore[misc]
        optimizer = trainer.optimizer_g if name == "generator" else trainer.optimizer_d
        state = _restored(optimizer, name, tensors["optimizers"], header["optimizers"].get(name), path)
        if header["step"] and not state["state"]:
            raise RunError(f"{path / 'optimizers.safetensors'}: holds nothing of the {name}'s optimizer")
        apply.append(lambda optimizer=optimizer, state=state: _load_optimizer(optimizer, state))  # type: ignore[misc]
    for action in apply:
        action()
    trainer.step = int(header["step"])


def check_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """RunError unless names, shapes and types are the model's, and all values finite."""
    expected = model.state_dict()
    for name, tensor in expected.items():
        got = state.get(name)
        if got is None or got.shape != tensor.shape or got.dtype != tensor.dtype:
            has = "nothing" if got is None else _described(got)
            raise RunError(f"{path}: {name} should be {_described(tensor)}, the file has {has}")
        if got.is_floating_point() and not bool(got.isfinite().all()):
            raise RunError(f"{path}: {name} holds values that are not finite")
    if extra := sorted(set(state) - set(expected)):
        raise RunError(f"{path}: has {extra[0]}, which the model has not")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _restored(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor], settings: Any, path: Path
) -> dict[str, Any]:
    """A state dict for ``optimizer`` that fits it; RunError otherwise."""
    header, file = path / "trainer.json", path / "optimizers.safetensors"
    if not isinstance(settings, dict) or not isinstance(settings.get("numbers"), dict):
        raise RunError(f"{header}: does not describe the {prefix}'s optimizer")
    if settings.get("type") != type(optimizer).__name__:
        raise RunError(f"{header}: saved with the optimizer {settings.get('type')}, not {type(optimizer).__name__}")
    groups, own = settings.get("groups"), optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own) or not all(map(_same_settings, own, groups)):
        raise RunError(f"{header}: the {prefix}'s optimizer has other parameters or settings than this one")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    numbers = {f"{prefix}.{key}": number for key, number in settings["numbers"].items()}
    for name, value in {**tensors, **numbers}.items():
        owner, _, rest = name.partition(".")
        if owner not in MODELS:
            raise RunError(f"{file}: has {name}, which no optimizer has")
        if owner != prefix:
            continue
        index, _, key = rest.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters) or not key:
            raise RunError(f"{file}: has {name}, which the optimizer has not")
        parameter = parameters[int(index)]
        if isinstance(value, Tensor):
            kind = (parameter.shape, parameter.dtype) if value.dim() else (value.shape, torch.float32)
            if (value.shape, value.dtype) != kind:
                raise RunError(f"{file}: {name} is {_described(value)}, which does not fit its parameter")
            if not bool((value >= 0).all() if value.dim() == 0 else value.isfinite().all()):
                raise RunError(f"{file}: {name} holds values that cannot be")
        state.setdefault(int(index), {})[key] = value
    if len({frozenset(entries) for entries in state.values()}) > 1:
        raise RunError(f"{file}: what it holds for some parameters is missing for others")
    return {"state": state, "param_groups": groups}


def _same_settings(own: dict[str, Any], other: Any) -> bool:
    """Whether a parameter group has the same parameters, and settings of the same names and kinds."""
    if not isinstance(other, dict) or set(own) != set(other) or own["params"] != other["params"]:
        return False
    numbers = [name for name, value in own.items() if isinstance(value, (int, float))]
    return all(isinstance(other[name], (int, float)) for name in numbers)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    match_layouts(optimizer, states=True)  # files hold contiguous tensors
