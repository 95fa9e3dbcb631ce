# SPDX-License-Identifier: Apache-2.0
"""The demo: a small network learns real handwritten digits, is pruned to 90 % zeros while it trains on, and is proved.

The dense network is trained first, as a user's own would have been, so that "before" is a network worth comparing with.
The test split takes part in no choice: the recipe was tuned on the validation split, and nothing here selects by score.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from featherweight.artefact import PLAN, WORK
from featherweight.digits import DigitsNet, digits_task
from featherweight.doctor import need
from featherweight.errors import ArtefactError
from featherweight.progress import watch
from featherweight.prune import GradualPruning
from featherweight.recipe import Recipe, to_dict
from featherweight.run import Result, compress
from featherweight.state import load_state
from featherweight.task import Stage
from featherweight.train import Train

__all__ = ["DENSE_STEPS", "FLOOR", "FOLDER", "QUICK_FLOOR", "demo", "recipe"]

FOLDER = "featherweight-demo"
# Accuracy on the 400 test digits that the pruned network must reach, asserted in CI.
FLOOR, QUICK_FLOOR = 0.97, 0.95
# Of the dense network, before it is given to `compress`; by `quick`.
DENSE_STEPS = {False: 400, True: 120}


def recipe(quick: bool = False) -> Recipe:
    """What the demo does to the trained network: training that goes on for 600 steps (240 if quick) while it is pruned.

    >>> recipe().stages[0].hooks[0].sparsity
    0.9
    """
    steps, end, every = (240, 140, 10) if quick else (600, 440, 20)
    # The first layer has 288 of the 68,362 parameters; the output layer is kept dense unless dense says otherwise.
    pruning = GradualPruning(sparsity=0.9, end=end, every=every, dense=("first",))
    return Recipe((Train(steps=steps, lr=3e-3, hooks=[pruning], evaluate_every=every // 2),))


def demo(
    out: str | Path = FOLDER,
    *,
    quick: bool = False,
    progress: bool | None = None,
    command: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Result:
    """Trains `DigitsNet`, prunes it to 90 % while it trains on, and leaves a folder as `compress` does; on one thread.

    Takes about a minute, or a quarter of it if `quick`, without network. `tell` is given a line as each part begins.
    A folder that an earlier demo wrote is replaced.

    Raises `MissingExtra` for packages that are missing, and `ArtefactError` for a folder that holds something else.
    """
    need(("data", "onnx", "report", "train"))
    folder = Path(out)
    _check_own(folder)
    task = digits_task()
    steps = DENSE_STEPS[quick]
    with _one_thread():
        tell(f"1/2 train a small dense network, {steps} steps")
        with watch(progress, sys.stderr) as show:
            show({"kind": "stage", "name": "train the dense network", "index": 0, "of": 1})
            Train(steps=steps, lr=3e-3, weight_decay=1e-4)(task.model, task, Stage(report=show))
        tell("2/2 prune it to 90 % while it trains on; then pack, export, check, measure")
        return compress(task, recipe(quick), folder, overwrite=True, progress=progress, command=command)


def _check_own(folder: Path) -> None:
    """An earlier demo's folder, finished or not, may be replaced; another run's may not."""
    used = (folder / PLAN).exists() or (folder / WORK).exists()
    if used and not _is_finished_demo(folder) and not _is_unfinished_demo(folder):
        raise ArtefactError(f"{folder} holds a run that is not the demo's. Give another folder: --out FOLDER.")


def _is_finished_demo(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return bool(report["load"]["class_hint"] == f"{DigitsNet.__module__}:{DigitsNet.__qualname__}")
    return False


def _is_unfinished_demo(folder: Path) -> bool:
    """Told by the recipe, which is the first thing that a run puts into its folder of work."""
    with contextlib.suppress(ArtefactError, KeyError, TypeError):
        begun = load_state(folder / WORK / "run.safetensors")["run"]["recipe"]
        return begun in [[to_dict(stage) for stage in recipe(quick).stages] for quick in (False, True)]
    return False


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A network this small gains nothing from more, and one thread gives the same figures on each machine of a kind."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
