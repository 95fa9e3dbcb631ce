# SPDX-License-Identifier: Apache-2.0
"""Whole blocks removed: a residual block whose output has its input's shape can be skipped.

How little a block does is told by its output: 1 - the mean cosine between what goes in and what comes out (Block
Influence, ShortGPT, arXiv 2403.03853), or by the error of the model's answers without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.correct import output_error
from featherweight.edits import apply
from featherweight.errors import EditError, NothingToCompress, NumericalError, check_strings, check_whole, check_word
from featherweight.layers import Selected, matches, select, unwrap
from featherweight.layers.calls import quiet
from featherweight.measure import eval_copy
from featherweight.plan import Plan, Swap
from featherweight.task import Stage, Task, batches

__all__ = ["DropBlocks", "block_influence", "blocks"]


@dataclasses.dataclass(frozen=True)
class DropBlocks:
    """Removes `count` whole blocks of the model it is called with: those that change what passes through them least.

    Saves all that the blocks cost, in every runtime: parameters, memory, MACs and time; depth that is gone costs
    accuracy, which training wins back. Blocks are the modules of a ModuleList or Sequential, and those that a glob of
    `layers` other than `*` names, that have layers of their own and give a tensor of their first input's shape; `keep`
    are globs on those that stay. By `influence` all are ranked at once; by `error` one goes after the other, each time
    the one whose absence moves the model's answers least on `batches` batches of the task's calibration data (or else
    its training data, or else `example_inputs`).

    Raises `OptionError` for an option out of range, `NothingToCompress` where there are too few such blocks.

    >>> class Block(nn.Module):
    ...     def __init__(self, size):
    ...         super().__init__()
    ...         self.fc = nn.Linear(4, 4)
    ...         self.size = size
    ...     def forward(self, x):
    ...         return x + self.size * self.fc(x)
    >>> model = nn.Sequential(Block(1.0), Block(0.01), Block(1.0))
    >>> DropBlocks(1)(model, Task(model, (torch.randn(8, 4),)), Stage()).edits
    (Swap(layer='1', to='skip'),)
    """

    count: int = 1
    importance: str = "influence"
    layers: Sequence[str] = ("*",)
    keep: Sequence[str] = ()
    batches: int = 8

    def __post_init__(self) -> None:
        me = type(self).__name__
        check_whole(me, "count", self.count, least=1)
        check_whole(me, "batches", self.batches, least=1)
        check_word(me, "importance", self.importance, ("influence", "error"))
        for name in ("layers", "keep"):
            object.__setattr__(self, name, check_strings(me, name, getattr(self, name)))

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        model = unwrap(model)
        data, forward = _data(task, self.batches)
        named = [glob for glob in self.layers if glob.strip("*")]
        for option, globs in (("layers", named), ("keep", self.keep)):
            select([name for name, _ in model.named_modules() if name], globs, option=option)
        found, reasons = blocks(model, data[0], forward, named)
        for name in list(found):
            if not matches(name, self.layers) or matches(name, self.keep):
                reasons[name] = "keep names it" if matches(name, self.keep) else "no glob of layers names it"
                del found[name]
        if len(found) < self.count:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
            raise NothingToCompress(
                f"{type(self).__name__}: {self.count} blocks are to go and {len(found)} can. {why or 'There are no others'}."
            )
        scores: dict[str, float] = {}
        if self.importance == "influence":
            scores = block_influence(model, list(found), data, forward)
            gone = _apart(sorted(scores, key=lambda name: scores[name]), self.count)
        else:
            gone = self._one_by_one(model, found, data, forward, scores)
        edits = tuple(Swap(name, to=found[name]) for name in gone)
        for edit in edits:
            apply(model, edit)
        for line in _lines(found, reasons, scores, gone, self.importance):
            stage.report({"kind": "selection", "weight": dataclasses.asdict(line)})
        stage.report({"kind": "message", "text": f"{len(gone)} of {len(found)} blocks dropped: {', '.join(gone)}"})
        return Plan(edits)

    def _one_by_one(
        self, model: nn.Module, found: Mapping[str, str], data: Sequence[Any], forward: Any, scores: dict[str, float]
    ) -> list[str]:
        gone: list[str] = []
        for _ in range(self.count):
            errors = {
                name: output_error(_skipping(model, [*gone, name], found), model, data, forward)
                for name in found
                if all(not _nested(name, other) for other in gone)
            }
            if not errors:
                break
            scores |= errors
            gone.append(min(errors, key=lambda name: errors[name]))
        return gone


def _apart(names: Sequence[str], count: int) -> list[str]:
    """The first `count` names of which none lies within another."""
    gone: list[str] = []
    for name in names:
        if len(gone) < count and all(not _nested(name, other) for other in gone):
            gone.append(name)
    return gone


def _nested(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def blocks(
    model: nn.Module, batch: Any, forward: Any, named: Sequence[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """Blocks that can be skipped, each with the swap that does it (`skip`, or `skip_tuple` where it answers with a
    tuple), and other modules of lists, or `named` by globs, with the reason. Seen in one forward; the model is left as
    it was."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    names = {child: f"{name}.{leaf}".lstrip(".") for name, held in lists for leaf, child in held.named_children()}
    names |= {m: name for name, m in model.named_modules() if any(fnmatchcase(name, glob) for glob in named)}
    found: dict[str, str] = {}
    reasons: dict[str, str] = {}
    calls: dict[str, int] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = names[module]
        calls[name] = calls.get(name, 0) + 1
        first = _first(args, kwargs)
        answer = output[0] if isinstance(output, tuple) and len(output) == 1 else output
        if not isinstance(first, Tensor) or not isinstance(answer, Tensor):
            reasons[name] = "it does not take and give one tensor"
        elif first.shape != answer.shape:
            reasons[name] = f"it takes {list(first.shape)} and gives {list(answer.shape)}"
        elif not any(module.children()):
            reasons[name] = "it is a single layer, not a block"
        else:
            found[name] = "skip" if answer is output else "skip_tuple"

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in names]
    try:
        with quiet(model):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name in list(found):
        reason = reasons.get(name) or _wrong(model, name, found, batch, forward)
        if reason:
            reasons[name] = reason
            del found[name]
    return found, reasons


def block_influence(model: nn.Module, names: Sequence[str], data: Sequence[Any], forward: Any) -> dict[str, float]:
    """1 - the mean cosine of a block's input and output, over all positions of the first axes, by block.

    Channels lie along axis 1 of tensors of four axes, else along the last.
    """
    modules = dict(model.named_modules())
    sums: dict[str, tuple[float, int]] = {}

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x, y = _first(args, kwargs), output[0] if isinstance(output, tuple) else output
            axis = 1 if x.ndim == 4 else -1
            cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=axis)
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + float(cosine.sum()), count + cosine.numel())

        return look

    handles = [modules[name].register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        with quiet(model):
            for batch in data:
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    influence = {name: 1 - total / count for name, (total, count) in sums.items()}
    if wrong := next((name for name, value in influence.items() if value != value), None):
        raise NumericalError(
            f"{wrong}: what goes through it is NaN on the calibration data, so that it cannot be ranked."
        )
    return influence


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _skipping(model: nn.Module, names: Sequence[str], how: Mapping[str, str]) -> nn.Module:
    twin = eval_copy(model)
    for name in names:
        apply(twin, Swap(name, to=how[name]))
    return twin


def _wrong(model: nn.Module, name: str, how: Mapping[str, str], batch: Any, forward: Any) -> str | None:
    """Why the model does not run without a block (its parent reads an attribute of it, say); None where it does."""
    try:
        with quiet(model), torch.no_grad():
            forward(_skipping(model, [name], how), batch)
    except EditError as error:
        return str(error)
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        return f"the model does not run without it: {type(error).__name__}: {error}"
    return None


def _data(task: Task, count: int) -> tuple[list[Any], Any]:
    """Batches and how the model is called on one; the example inputs where the task has no data."""
    name = "train" if task.calibration is None else "calibration"
    if getattr(task, name) is None:
        return [task.example_inputs], lambda model, inputs: model(*inputs)
    found = []
    for batch in batches(getattr(task, name), name):
        found.append(batch)
        if len(found) == count:
            break
    return found, task.forward


def _lines(
    found: Mapping[str, str], reasons: Mapping[str, str], scores: Mapping[str, float], gone: Sequence[str], by: str
) -> list[Selected]:
    lines = []
    for name in found:
        reason = f"{by} {scores[name]:.3g}" if name in scores else ""
        lines.append(Selected(name, "block", (), 0, "pruned" if name in gone else "kept", float(name in gone), reason))
    return lines + [Selected(name, "block", (), 0, "kept", 0.0, reason) for name, reason in reasons.items()]
