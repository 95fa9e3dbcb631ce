# SPDX-License-Identifier: Apache-2.0
"""What the core found by measuring: shared by the parts of an engine, and kept in a file for the next load."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.errors import ArtefactError
from featherweight.files import write_atomically
from featherweight.processor import processor_name

__all__ = ["Decisions"]


class Decisions:
    """Texts by texts, as the core gives them: which kernel and tile a layer of some shape and share of zeros got.

    The file may serve any number of models, processes and machines: it has a section for each processor and version of
    the core. It is replaced as a whole, so that no reader sees half of it; of two writers at once one may lose what it
    measured.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._found: dict[str, str] = {}
        if self._path is not None:
            self._found = _read(self._path).get(_here(), {})

    def __call__(self) -> dict[str, str]:
        """All that is known."""
        with self._lock:
            return dict(self._found)

    def keep(self, found: Mapping[str, str]) -> None:
        """Takes more in, and writes the file where something is new."""
        with self._lock:
            if found.items() <= self._found.items():
                return
            self._found |= found
            if self._path is None:
                return
            everything = _read(self._path)
            everything[_here()] = self._found = everything.get(_here(), {}) | self._found
            text = json.dumps(everything, indent=1) + "\n"
            write_atomically(self._path, lambda partial: _write(partial, text))


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ArtefactError(f"cache {path} cannot be read: {error}. Give another path, or delete it.") from error
    sections = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(each, dict) and all(isinstance(text, str) for text in each.values()) for each in sections):
        raise ArtefactError(f"cache {path} holds something else than the engine's decisions. Give another path.")
    return dict(found)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _here() -> str:
    """What decisions hold for: a processor, and a version of the core. Instruction set and threads are in the keys."""
    return f"featherweight-engine {_version()}, {processor_name()}"


def _version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("featherweight-engine")
    return "from its source"
