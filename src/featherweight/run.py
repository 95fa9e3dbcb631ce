# SPDX-License-Identifier: Apache-2.0
"""`compress`: runs a recipe on a copy of the model, measures before and after each stage, and leaves one folder.

Each stage ends in a checkpoint; a killed run goes on with `resume=True` to the same weights. What an earlier stage made
(zeros, ties, grids) is checked after each later one, whatever that stage claims.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight import artefact
from featherweight.edits import FakeQuantize, replay
from featherweight.errors import ArtefactError, EditError, NumericalError, OptionError, StageError
from featherweight.evidence import Evidence, StageFacts, score, show
from featherweight.grids import Grid, read_grid
from featherweight.layers import existing_grids, existing_zeros, fill, tensors_and_ties, to_matrix, weights
from featherweight.measure import Scorecard
from featherweight.plan import Edit, Plan, edit_from_dict
from featherweight.progress import watch
from featherweight.recipe import Recipe, load_recipe, to_dict
from featherweight.state import load_state, save_state
from featherweight.task import Method, Stage, Task

__all__ = ["Apply", "Result", "compress"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What `compress` gives: the model, the plan of what was done, and what was measured.

    `scorecards` has the keys `before`, each stage (`1 train`, ...) and `after`. `report` is what `report.json` holds.
    `unmet` says which budgets were asked for and not met; the model is then the best one found.
    """

    model: nn.Module
    plan: Plan
    scorecards: Mapping[str, Scorecard]
    report: Mapping[str, Any]
    folder: Path | None
    unmet: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Apply:
    """Applies edits given by hand: the structural changes that no method has decided for you.

    Saves what the edits remove. Raises `EditError`, with the model left as it was, where an edit does not fit or the
    model no longer runs on `example_inputs` after the last one.

    >>> from featherweight.plan import Slice
    >>> task = Task(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.zeros(1, 3),))
    >>> cut = [Slice(tensor, axis, keep=(1, 2)) for tensor, axis in (("0.weight", 0), ("0.bias", 0), ("1.weight", 1))]
    >>> plan = Apply(cut)(task.model, task, Stage())
    >>> task.model[0].out_features
    2
    """

    edits: Sequence[Edit | Mapping[str, Any]]

    def __post_init__(self) -> None:
        edits = tuple(edit_from_dict(e, "apply") if isinstance(e, Mapping) else e for e in self.edits)
        object.__setattr__(self, "edits", edits)

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        plan = Plan(tuple(edit for edit in self.edits if not isinstance(edit, Mapping)))
        trial = copy.deepcopy(model).eval()
        replay(trial, plan.edits)
        try:
            with torch.no_grad():
                trial(*task.example_inputs)
        except (RuntimeError, ValueError) as error:
            raise EditError(f"apply: after these edits the model does not run on example_inputs: {error}") from error
        replay(model, plan.edits)
        return plan


def compress(
    task: Task,
    recipe: Recipe | Sequence[Method] | str | Path,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    seed: int | None = None,
    progress: bool | None = None,
    command: str | None = None,
) -> Result:
    """Runs the recipe's methods in order on a copy of `task.model` and proves what came of it.

    With `out`, leaves a folder: `model.safetensors` and `plan.json` for `featherweight.load`, `model.onnx` checked
    against PyTorch, `report.json`, `report.html`, and a model card. What cannot be made (an export that fails, a report
    without jinja2) is said in the report, and everything else is delivered. Without `out` nothing is written.

    `recipe` is a list of methods, or the path of a TOML recipe. `resume` goes on with a run that was killed;
    `overwrite` allows a folder that holds another. `progress` shows a bar; by default, on a terminal. Under torchrun
    all processes train together and return the same model, and the first one measures and writes.

    Raises `ArtefactError` for a folder that is in use, finished or not writable, before anything is run; `StageError`
    when a stage breaks what an earlier one made; and whatever its methods raise. Finished stages are kept.

    >>> from featherweight.factorize import Factorize
    >>> task = Task(nn.Sequential(nn.Linear(20, 30)), (torch.zeros(1, 20),))
    >>> result = compress(task, [Factorize(rank=2)])
    >>> result.scorecards["before"].parameters, result.scorecards["after"].parameters
    (630, 130)
    """
    recipe = _recipe(recipe, seed)
    folder = None if out is None else Path(out)
    main = _is_main()
    with contextlib.ExitStack() as stack:
        if folder is not None and main:
            stack.enter_context(artefact.claim(folder, overwrite=overwrite, resume=resume))
        tell = stack.enter_context(watch(progress if main else False, sys.stderr))
        run = _Run(task, recipe, folder, resume, main, tell)
        run.stages()
        return run.finish(command) if main else run.stand_by()


def _is_main() -> bool:
    """Whether this is the process that writes: under torchrun the first of several, which all train together."""
    return int(os.environ.get("RANK", "0")) == 0


def _recipe(recipe: Recipe | Sequence[Method] | str | Path, seed: int | None) -> Recipe:
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = Recipe(tuple(recipe))
    if not recipe.stages:
        raise OptionError("The recipe is empty: give at least one method, such as Train(...).")
    for method in recipe.stages:
        if not callable(method) or isinstance(method, type):
            hint = " It is a hook: put it into Train(hooks=[...])." if hasattr(method, "attach") else ""
            raise OptionError(f"{method!r} is not a method, called as method(model, task, stage).{hint}")
    return recipe if seed is None else dataclasses.replace(recipe, seed=seed)


class _Run:
    """One run of a recipe: the working copy, the plan so far, and what each stage did."""

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        folder: Path | None,
        resume: bool,
        main: bool,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self.task, self.recipe, self.folder, self.resume, self.tell = task, recipe, folder, resume, tell
        self.work = None if folder is None else folder / artefact.WORK
        self.main = main
        if self.work is not None and main and not resume:
            shutil.rmtree(self.work, ignore_errors=True)
        self.model = copy.deepcopy(task.model)
        self.plan = Plan()
        self.done: list[StageFacts] = []
        _check_finite(self.model, "the model as it was given")
        self.given = frozenset(weight.name for weight, _ in existing_grids(self.model))
        self.before = self._before()

    def _before(self) -> Scorecard:
        """The dense model's scorecard; the work folder starts with the recipe, so that a resumed run is the same."""
        entry = {"recipe": [to_dict(method) for method in self.recipe.stages], "seed": self.recipe.seed}
        if self.work is not None and self.main:
            self.work.mkdir(exist_ok=True)
            start = self.work / "run.safetensors"
            if start.exists():
                saved = load_state(start)["run"]
                if saved != entry:
                    raise ArtefactError(
                        f"{self.folder} holds an unfinished run of another recipe or seed. Resume with the same recipe, or "
                        "begin anew by overwrite=True (--overwrite)."
                    )
            else:
                save_state(start, {"run": entry})
        self.tell({"kind": "stage", "name": "measure the model as it is", "index": 0, "of": len(self.recipe.stages)})
        return score(self.model, self.task, gzip=True)

    def stages(self) -> None:
        for index, method in enumerate(self.recipe.stages, start=1):
            name = f"{index} {to_dict(method)['method']}"
            file = None if self.work is None else self.work / f"stage-{index}.safetensors"
            self.tell({"kind": "stage", "name": name, "index": index, "of": len(self.recipe.stages)})
            if self.resume and file is not None and file.exists():
                self._restore(file)
                self.tell({"kind": "message", "text": f"{name}: done in the earlier run"})
                continue
            try:
                self._one(name, method)
            except Exception as error:
                if self.work is not None:
                    kept = (
                        f"{index - 1} finished stages and the last checkpoint" if index > 1 else "The last checkpoint"
                    )
                    error.add_note(
                        f"{kept} of this one stay in {self.folder}; resume=True (--resume) goes on from there."
                    )
                raise
            if file is not None and self.main:
                self._checkpoint(file)

    def _one(self, name: str, method: Method) -> None:
        history: list[dict[str, Any]] = []
        messages: list[str] = []
        unmet: list[str] = []
        selection: list[dict[str, Any]] = []
        solved: list[dict[str, Any]] = []

        def report(event: dict[str, Any]) -> None:
            facts = {key: value for key, value in event.items() if key != "kind"}
            if event["kind"] == "record":
                history.append(facts)
            elif event["kind"] == "selection":
                selection.append(facts["weight"])
            elif event["kind"] == "layer":
                solved.append(facts["layer"])
            elif event["kind"] in ("message", "unmet"):
                (unmet if event["kind"] == "unmet" else messages).append(facts["text"])
            self.tell(event)

        stage = Stage(name, self.work, self.resume, self.recipe.seed, report)
        kept = _invariants(self.model, self.plan.formats, self.given)
        began = time.perf_counter()
        plan = method(self.model, self.task, stage)
        seconds = time.perf_counter() - began
        _check_finite(self.model, name)
        _check_kept(self.model, kept, name)
        self.plan += plan
        options = {key: value for key, value in to_dict(method).items() if key != "method"}
        card = score(self.model, self.task, hints=self.plan.formats)
        self.done.append(
            StageFacts(
                name=name,
                method=to_dict(method)["method"],
                options=options,
                seconds=seconds,
                scorecard=card,
                messages=tuple(messages),
                unmet=tuple(unmet),
                history=tuple(history),
                selection=tuple(selection),
                solved=tuple(solved),
            )
        )
        if self.work is not None and self.main:
            (self.work / "training.safetensors").unlink(missing_ok=True)

    def _checkpoint(self, file: Path) -> None:
        tensors, ties = tensors_and_ties(self.model)
        save_state(
            file, {"tensors": tensors, "ties": ties, "plan": self.plan.to_dict(), "facts": self.done[-1].to_dict()}
        )

    def _restore(self, file: Path) -> None:
        state = load_state(file)
        plan = Plan.from_dict(state["plan"], str(file))
        model = copy.deepcopy(self.task.model)
        replay(model, plan.edits)
        fill(model, state["tensors"])
        self.model, self.plan = model, plan
        self.done.append(StageFacts.from_dict(state["facts"]))

    def finish(self, command: str | None) -> Result:
        """Measures, writes the folder, loads it back to see that it is what it says, and only then removes the work."""
        self.tell(
            {"kind": "stage", "name": "measure, export, write", "index": len(self.done) + 1, "of": len(self.done)}
        )
        evidence = Evidence(self.task, self.recipe, self.model, self.plan, self.before, tuple(self.done), command)
        report, (before, after) = show(evidence, self.folder, self.tell)
        unmet = tuple(text for facts in self.done for text in facts.unmet)
        cards = {"before": before, **{facts.name: facts.scorecard for facts in self.done}, "after": after}
        result = Result(self.model, self.plan, cards, report, self.folder, unmet)
        if self.folder is not None:
            self._prove_reload()
            if self.work is not None:
                shutil.rmtree(self.work, ignore_errors=True)
        return result

    def stand_by(self) -> Result:
        """What the other processes of a torchrun give: the same model and plan; the first one measures and writes."""
        last = self.done[-1].scorecard
        cards = {"before": self.before, **{facts.name: facts.scorecard for facts in self.done}, "after": last}
        return Result(self.model, self.plan, cards, {}, self.folder, tuple(t for f in self.done for t in f.unmet))

    def _prove_reload(self) -> None:
        if self.folder is None:
            return
        again = artefact.load(copy.deepcopy(self.task.model), self.folder).state_dict()
        for name, value in self.model.state_dict().items():
            if not torch.equal(_bits(again[name].cpu()), _bits(value.cpu())):
                raise ArtefactError(
                    f"{self.folder}: {name} does not load as it was saved. This is a bug of featherweight; please report it."
                )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


@dataclasses.dataclass(frozen=True)
class _Invariants:
    zeros: Mapping[str, Tensor]
    ties: Mapping[str, str]
    grids: frozenset[str]
    on_grids: Mapping[str, Grid]


def _invariants(model: nn.Module, formats: Mapping[str, str] | None = None, given: Collection[str] = ()) -> _Invariants:
    """What stands, read from the model itself; only how many columns share a scale is told by the plan's hints.

    Weights in `given` were on a grid before the first stage, a fixed filter's say: no stage made it, and none has to
    keep it.
    """
    grids = frozenset(name for name, module in model.named_modules() if isinstance(module, FakeQuantize))
    zeros = {weight.name: pruned for weight, pruned in existing_zeros(model)}
    on_grids = {weight.name: grid for weight, grid in existing_grids(model, formats) if weight.name not in given}
    return _Invariants(zeros, tensors_and_ties(model)[1], grids, on_grids)


def _check_grids(model: nn.Module, kept: _Invariants, stage: str) -> None:
    """Weights that lay on a grid lie on one of no more bits; a zero, which 1 bit has not, may make it 2."""
    for weight in weights(model)[0]:
        before = kept.on_grids.get(weight.name)
        matrix = to_matrix(weight, weight.parameter.detach())
        # What was cut to another shape has fewer rows or columns of the same grid; whoever cut it chose which.
        if before is None or before.scale.shape != (len(matrix), -(-matrix.shape[1] // before.chunk)):
            continue
        if read_grid(matrix, most_bits=max(before.bits, 2), chunk=before.chunk) is None:
            raise StageError(
                f"stage {stage!r} moved {weight.name} off the {before.bits}-bit grid that an earlier stage put it on. To "
                "train on the grid, give Train(hooks=[QAT(...)]); else run this stage before the one that quantizes."
            )


def _check_kept(model: nn.Module, kept: _Invariants, stage: str) -> None:
    """Zeros, ties and grids that stood before the stage still stand, but for tensors that it cut or replaced."""
    state = model.state_dict()
    for name, pruned in kept.zeros.items():
        if name in state and state[name].shape == pruned.shape:
            lost = int((state[name].to(pruned.device)[pruned] != 0).sum())
            if lost:
                raise StageError(
                    f"stage {stage!r} filled {lost} zeros of {name} that an earlier stage made. Run it before pruning."
                )
    ties = tensors_and_ties(model)[1]
    for alias, name in kept.ties.items():
        if alias in state and name in state and ties.get(alias) != name:
            raise StageError(f"stage {stage!r} separated {alias} from {name}, which were one tensor.")
    grids = {name for name, module in model.named_modules() if isinstance(module, FakeQuantize)}
    for name in kept.grids - grids:
        if name.rpartition(".")[0] in dict(model.named_modules()):
            raise StageError(f"stage {stage!r} removed the grid {name} that an earlier stage placed.")
    _check_grids(model, kept, stage)


def _check_finite(model: nn.Module, stage: str) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise NumericalError(f"{name} has NaN or infinite values after {stage}.")
