# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: nested state (dicts, lists, tuples, numbers, strings, tensors) as one safetensors file, without pickle.

Tensors go into the file as they are, everything else into one JSON string of its header. Written to a temporary name
and renamed, so that a checkpoint is either the old one or the new one, whenever the process dies.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.files import write_atomically

__all__ = ["load_state", "random_state", "save_state", "set_random_state"]

_KEY = "featherweight.state"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes nested state to one file, atomically. A tensor that occurs twice is stored once.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(Path(folder) / "state", {"step": 3, "moments": {0: torch.ones(2)}, "range": (1, None)})
    ...     load_state(Path(folder) / "state")
    {'step': 3, 'moments': {0: tensor([1., 1.])}, 'range': (1, None)}
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(state, tensors, {}))
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={_KEY: structure}))


def load_state(path: Path) -> dict[str, Any]:
    """Reads what `save_state` wrote. Raises `ArtefactError` for a file that is missing, damaged or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            structure = (file.metadata() or {}).get(_KEY)
            if structure is None:
                raise ArtefactError(f"{path} is not a featherweight checkpoint.")
            state = _decode(json.loads(structure), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{path} could not be read: {error}. Delete it to start this stage anew.") from error
    return dict(state)


def _encode(value: Any, tensors: dict[str, Tensor], seen: dict[int, tuple[str, Tensor]]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in seen:
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            seen[id(value)] = (name, value)  # the reference keeps the id from being reused
        return {"tensor": seen[id(value)][0]}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(k, tensors, seen), _encode(v, tensors, seen)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors, seen) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors, seen) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds numbers, strings, tensors and containers of them, not {type(value).__name__}")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict):
        [(kind, content)] = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
        return tuple(_decode(item, tensors) for item in content)
    return value


def random_state() -> dict[str, Any]:
    """The state of every random generator that a training loop may draw from: Python's, NumPy's, torch's, CUDA's."""
    numpy = dict(np.random.get_state(legacy=False))
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets what `random_state` gave."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
