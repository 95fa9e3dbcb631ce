# SPDX-License-Identifier: Apache-2.0
"""Answers on disk, one file a step, so that a walk that was killed goes on from the last layer that was solved."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.solvers import together
from featherweight.state import load_state, save_state

__all__ = ["Shelf"]


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Where a walk keeps its answers. Without a folder nothing is kept; `resume` says whether old ones count.

    `restore` makes what is known of an answer from its facts. The first process of several writes, all read.
    """

    folder: Path | None
    restore: Callable[[Mapping[str, Any]], Any]
    ready: frozenset[int] = frozenset()

    @staticmethod
    def at(folder: Path | None, name: str, resume: bool, restore: Callable[[Mapping[str, Any]], Any]) -> Shelf:
        """The shelf of the stage `name` in a run's folder, emptied unless the run is resumed."""
        if folder is None:
            return Shelf(None, restore)
        own = folder / f"{name.replace(' ', '-')}-layers"
        if together.rank() == 0:
            if not resume:
                shutil.rmtree(own, ignore_errors=True)
            own.mkdir(parents=True, exist_ok=True)
        together.meet()
        # What lies here now is what counts: all processes must take the same steps from it.
        ready = frozenset(int(file.stem) for file in own.glob("[0-9]*.safetensors"))
        together.meet()
        return Shelf(own, restore, ready)

    def take(self, step: int, names: Sequence[str]) -> dict[str, tuple[Tensor, Any]] | None:
        """The answers to a step by problem, or None. A damaged file is no answer: the step is solved again."""
        if self.folder is None or step not in self.ready:
            return None
        try:
            state = load_state(self.folder / f"{step:04d}.safetensors")
        except ArtefactError:
            return None
        if state["names"] != list(names):
            return None
        return {name: (weights, self.restore(facts)) for name, (weights, facts) in state["answers"].items()}

    def put(self, step: int, names: Sequence[str], answers: Mapping[str, tuple[Tensor, Any]]) -> None:
        """Keeps a step's answers, written to a temporary name and renamed."""
        if self.folder is not None and together.rank() == 0:
            facts = {name: (weights, dataclasses.asdict(known)) for name, (weights, known) in answers.items()}
            save_state(self.folder / f"{step:04d}.safetensors", {"names": list(names), "answers": facts})

    def clear(self) -> None:
        """Removes the shelf once the walk is over."""
        if self.folder is not None and together.rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
