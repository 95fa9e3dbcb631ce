# SPDX-License-Identifier: Apache-2.0
"""One folder that holds a compressed model and loads without pickle: `save` and `load`.

`model.safetensors` has every tensor through its codec, `plan.json` the edits and the checksum of that file. Loading is
always the same: a fresh model, the same `apply` for every edit that the live run called, decoded tensors, ties, and a
strict match of names and shapes. `plan.json` is written last: a folder without it is not an artefact.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from featherweight import pack
from featherweight.edits import apply, replay
from featherweight.errors import ArtefactError
from featherweight.files import write_atomically
from featherweight.layers import fill, tensors_and_ties
from featherweight.plan import Plan, Tie

__all__ = [
    "MODEL",
    "PLAN",
    "WORK",
    "claim",
    "fill",
    "load",
    "read_plan",
    "save",
    "tensors_and_ties",
    "write_model",
    "write_text",
]

MODEL, PLAN = "model.safetensors", "plan.json"
WORK = ".work"  # checkpoints of a run that is not finished


def save(model: nn.Module, plan: Plan, folder: str | Path, *, overwrite: bool = False) -> dict[str, pack.Coded]:
    """Writes the model and its plan into a folder, every tensor in its smallest exact form; returns those forms.

    Saves bytes on disk where tensors have zeros, N:M groups or values that a narrower float holds exactly; the loaded
    model is as large in memory as it was. Raises `ArtefactError` where the folder holds an artefact and `overwrite` is
    False, or cannot be written; each file is whole or absent.

    >>> import tempfile
    >>> model = nn.Linear(64, 64)
    >>> model.weight.data[model.weight.abs() < 0.1] = 0.0
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     forms = save(model, Plan(), folder)
    ...     again = load(nn.Linear(64, 64), folder)
    >>> torch.equal(model.weight, again.weight), forms["weight"].coded_bytes < 64 * 64 * 4
    (True, True)
    """
    folder = Path(folder)
    with claim(folder, overwrite=overwrite):
        coded = write_model(model, plan, folder)
        write_plan(model, plan, folder)
        return coded


def write_model(model: nn.Module, plan: Plan, folder: Path) -> dict[str, pack.Coded]:
    """Writes `model.safetensors` into a folder that the caller claimed; without `write_plan` it is no artefact yet."""
    (folder / PLAN).unlink(missing_ok=True)
    tensors, ties = tensors_and_ties(model)
    return pack.save_file(folder / MODEL, tensors, hints=plan.formats, ties=ties)


def write_plan(model: nn.Module, plan: Plan, folder: Path) -> None:
    """Writes `plan.json`, which makes the folder an artefact: the edits, and which file they belong to."""
    kind = type(model)
    entry = {
        **plan.to_dict(),
        "model_class": f"{kind.__module__}:{kind.__qualname__}",
        "sha256": _sha256(folder / MODEL),
    }
    write_text(folder / PLAN, json.dumps(entry, indent=1))


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Makes your fresh `model`, in place, the one that was saved: the same edits, the same tensors to the last bit.

    `model` comes from the same constructor as the one that was compressed; its values do not matter. Nothing is
    unpickled. Tensors take the saved dtype and stay on the model's device. Returns the model.

    Raises `ArtefactError`, before the model is touched, for a folder that is missing, unfinished, damaged or altered,
    and for tensors that the model does not have; `EditError` for a plan that does not fit the model.
    """
    folder = Path(folder)
    plan = read_plan(folder)
    coded, ties = pack.read_header(folder / MODEL)
    replay(model, plan.edits)
    _rebuild_ties(model, ties)
    tensors, live_ties = tensors_and_ties(model)
    if live_ties != ties:
        alien = sorted(set(live_ties.items()) ^ set(ties.items()))[0]
        raise ArtefactError(
            f"{folder}: {alien[0]} and {alien[1]} are one tensor on one side only; is it the same model class?"
        )
    _check_names(folder, set(tensors), set(coded))
    # The dtype is the file's to say (a half-precision model loads into a fresh float one); the shape is the model's.
    expect = {name: (tuple(tensor.shape), getattr(torch, coded[name].dtype)) for name, tensor in tensors.items()}
    decoded, _ = pack.load_file(folder / MODEL, expect=expect)
    fill(model, decoded)
    return model


def read_plan(folder: Path) -> Plan:
    """The plan of a finished artefact whose model file is the one that it was written with."""
    if not (folder / PLAN).is_file() or not (folder / MODEL).is_file():
        if not folder.is_dir():
            raise ArtefactError(f"{folder} is not a folder.")
        unfinished = (folder / WORK).is_dir()
        hint = (
            "The run that wrote it did not finish; go on with resume=True (--resume)."
            if unfinished
            else "Is it the right folder?"
        )
        raise ArtefactError(f"{folder} holds no finished artefact ({MODEL} and {PLAN}). {hint}")
    try:
        entry = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{folder / PLAN} could not be read: {error}.") from error
    plan = Plan.from_dict(entry, str(folder / PLAN))
    if entry.get("sha256") != _sha256(folder / MODEL):
        raise ArtefactError(
            f"{folder / MODEL} is not the file that {PLAN} was written with: altered, damaged or of another run."
        )
    return plan


def _rebuild_ties(model: nn.Module, ties: Mapping[str, str]) -> None:
    groups: dict[str, list[str]] = {}
    for alias, canonical in ties.items():
        groups.setdefault(canonical, [canonical]).append(alias)
    state = model.state_dict(keep_vars=True)
    for names in groups.values():
        found = [state[name] for name in names if name in state]
        if len(found) == len(names) and any(tensor is not found[0] for tensor in found):
            apply(model, Tie(tuple(names)))


def _check_names(folder: Path, model: set[str], file: set[str]) -> None:
    if model != file:
        missing, unknown = sorted(model - file), sorted(file - model)
        parts = [
            f"the model needs {', '.join(missing[:3])}" if missing else "",
            f"the file has {', '.join(unknown[:3])}" if unknown else "",
        ]
        raise ArtefactError(
            f"{folder} is of another model: {' but '.join(p for p in parts if p)}. Build it by the same constructor."
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


@contextlib.contextmanager
def claim(folder: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[None]:
    """Makes the folder and holds it against a second run, for the length of the block; checks that it can be written.

    The lock is the kernel's: it goes with the process, however that ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ArtefactError(
            f"{folder} cannot be written: {error.strerror or error}. Nothing was run; give another folder."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtefactError(f"{folder} is in use by another run. Wait for it, or give another folder.") from None
        try:
            _check_free(folder, overwrite, resume)
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


def _check_free(folder: Path, overwrite: bool, resume: bool) -> None:
    finished, unfinished = (folder / PLAN).exists(), (folder / WORK).exists()
    if overwrite:
        return
    if finished and resume:
        raise ArtefactError(
            f"The run in {folder} has finished: there is nothing to resume. Load it, or give overwrite=True (--overwrite)."
        )
    if finished:
        raise ArtefactError(
            f"{folder} holds a finished artefact. Give another folder, or overwrite=True (--overwrite)."
        )
    if unfinished and not resume:
        raise ArtefactError(
            f"{folder} holds an unfinished run. Go on with it by resume=True (--resume), or begin anew by overwrite=True (--overwrite)."
        )
