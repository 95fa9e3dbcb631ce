# SPDX-License-Identifier: Apache-2.0
"""Whether an exported file answers as the PyTorch model does, on the example and on random inputs like it.

An exporter that ends without an error has proved nothing: files that load, run and are wrong have been shipped. So each
export is followed by this check, and what fails it is not delivered.

A model with grids on its activations is judged in steps. Two runtimes add in different orders, the last bit of a sum
decides to which of two neighbours it is rounded, and the next layers carry that on; so no tolerance of float32 fits.
The unit is one step of an 8-bit grid over the output's own range. In a network so sensitive that its grids change the
answer by more than that, the file may differ by twice what they do: it rounds in about twice as many places, between
layers too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from featherweight.deploy.markers import has_grids, without_grids
from featherweight.deploy.sessions import Session, session
from featherweight.errors import FeatherweightError, ParityError
from featherweight.measure import eval_copy, run_once

__all__ = ["TOLERANCE", "Parity", "check_parity", "parity", "sample_inputs"]

# float32 kernels of two runtimes add in different orders; whole networks have been seen to differ by some 1e-6.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far a file's answers are from the model's on `n` inputs (batches).

    `max_rel_diff` is the largest difference over the largest value of the same output. `argmax_agreement` is the share
    of predictions that agree (over classes: axis 1 of maps and of (n, classes), the last axis of sequences), None where
    the first output has no classes; values that tie within the tolerance agree. NaN anywhere is a failure.

    For a model with grids on its activations a step is a 255th of an output's range (zero included) over all inputs:
    `steps` is the root mean square of the differences in steps, of the worst output, and must be no more than 1, or
    twice what the model's answer changes by, so measured, when its grids are taken away;
    `largest_steps` the largest difference, `within_one_step` the share of values that differ by one step or less. None
    for other models.
    """

    max_abs_diff: float
    max_rel_diff: float
    argmax_agreement: float | None
    n: int
    tolerance: float
    passed: bool
    words: str
    steps: float | None = None
    largest_steps: float | None = None
    within_one_step: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: a difference that is not a number is None."""
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in dataclasses.asdict(self).items()
        }


def parity(
    model: nn.Module,
    path: str | Path,
    inputs: Sequence[tuple[Any, ...]],
    *,
    tolerance: float = TOLERANCE,
    runtime: str = "onnxruntime",
) -> Parity:
    """Runs model and file on each tuple of inputs and compares all outputs. A failure is an answer, not an error.

    Integer and boolean outputs must be equal. `tolerance` is relative to each output's largest value and meant for
    float32; half precision needs about 1e-2.

    Raises `MissingExtra` if the runtime is not installed, and nothing else.
    """
    try:
        twin, deployed = eval_copy(model), session(path, runtime, exact=True)
    except ImportError:
        raise
    except FeatherweightError as error:
        return _failed(str(error), 0, tolerance)
    worst = _Worst()
    steps = _Steps() if has_grids(model) else None
    bare = without_grids(twin) if steps is not None else twin
    agreements: list[Tensor] = []
    for number, example in enumerate(inputs):
        try:
            expected = _tensors(run_once(twin, example))
            got = _tensors(deployed(*example))
        except FeatherweightError as error:
            return _failed(f"input {number}: {error}", number, tolerance)
        if len(expected) != len(got):
            return _failed(f"the model has {len(expected)} outputs, the file {len(got)}", number, tolerance)
        for name, want, have in zip(deployed.output_names, expected, got, strict=True):
            reason = worst.add(name, want, have)
            if reason:
                return _failed(f"input {number}: {reason}", number, tolerance)
        if steps is not None:
            steps.add(deployed.output_names, expected, got, _tensors(run_once(bare, example)))
        agreements += [_agreement(expected[0], got[0], tolerance)] if expected and _has_classes(expected[0]) else []
    agreement = float(torch.cat(agreements).double().mean()) if agreements else None
    if steps is not None:
        return _judge_steps(worst, steps, agreement, len(inputs), deployed)
    return _judge(worst, agreement, len(inputs), tolerance, deployed)


def check_parity(
    model: nn.Module,
    path: str | Path,
    inputs: Sequence[tuple[Any, ...]],
    *,
    tolerance: float = TOLERANCE,
    runtime: str = "onnxruntime",
) -> Parity:
    """As `parity`, but a failure raises `ParityError` that names the output and the numbers."""
    result = parity(model, path, inputs, tolerance=tolerance, runtime=runtime)
    if not result.passed:
        raise ParityError(
            f"{path} does not answer as the model does: {result.words}. Do not deploy it. If the model draws random "
            "numbers in eval mode, no two runs agree; if it is in half precision, give a tolerance of 1e-2."
        )
    return result


def sample_inputs(
    model: nn.Module, example_inputs: tuple[Any, ...], count: int = 4, seed: int = 0
) -> list[tuple[Any, ...]]:
    """The example inputs, and up to `count` random ones like them that the model takes and answers with finite numbers.

    Values are drawn from the example's own, so that indices stay in range and probabilities probabilities; an example
    of nothing but zeros becomes normal noise. Shapes stay.

    >>> [tuple(x.shape) for (x,) in sample_inputs(nn.Linear(3, 1), (torch.zeros(2, 3),), count=2)]
    [(2, 3), (2, 3), (2, 3)]
    """
    chance = torch.Generator().manual_seed(seed)
    twin = eval_copy(model)

    def another(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not tensor.any():
            return torch.randn(tensor.shape, generator=chance).to(tensor)
        if tensor.numel() == 0:
            return tensor
        choice = torch.randint(tensor.numel(), tensor.shape, generator=chance)
        return tensor.reshape(-1)[choice.to(tensor.device)]

    samples = [example_inputs]
    for _ in range(count):
        candidate = tree_map_only(Tensor, another, example_inputs)
        try:
            outputs = _tensors(run_once(twin, candidate))
        except FeatherweightError:
            continue
        if all(bool(torch.isfinite(output).all()) for output in outputs):
            samples.append(candidate)
    return samples


class _Worst:
    """The largest differences so far, and at which output."""

    def __init__(self) -> None:
        self.absolute = self.relative = 0.0
        self.output = ""
        self.unequal = ""

    def add(self, name: str, want: Tensor, have: Tensor) -> str:
        """Takes one output into account; the answer is why it cannot be compared at all, if it cannot."""
        have = have.to(want.device)
        if want.shape != have.shape:
            return f"output {name} has shape {list(have.shape)} in the file, {list(want.shape)} in the model"
        if not want.is_floating_point():
            differ = int((want != have).sum())
            if differ:
                self.unequal = f"output {name}: {differ} of {want.numel()} values ({want.dtype}) differ"
            return ""
        want, have = want.double(), have.double()
        for side, values in (("model", want), ("file", have)):
            if values.isnan().any():
                return f"output {name} has NaN in the {side} ({int(values.isnan().sum())} of {values.numel()} values)"
        if want.numel() == 0:
            return ""
        difference = float(torch.where(want == have, 0.0, (want - have).abs()).max())  # inf - inf is no difference
        finite = want[want.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        relative = difference / scale if scale else difference
        if relative >= self.relative:
            self.relative, self.output = relative, name
        self.absolute = max(self.absolute, difference)
        return ""


class _Steps:
    """Differences of each output, of the file and of the model without grids, kept until its range is known."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, names: Sequence[str], want: list[Tensor], have: list[Tensor], bare: list[Tensor]) -> None:
        for name, *three in zip(names, want, have, bare, strict=True):
            if three[0].is_floating_point() and three[0].numel():
                wanted, got, lifted = (t.double().cpu().reshape(-1) for t in three)
                self.seen.setdefault(name, []).append((wanted, (wanted - got).abs(), (wanted - lifted).abs()))

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Both differences in steps."""
        want, differences, effect = (torch.cat(column) for column in zip(*self.seen[name], strict=True))
        finite = want[want.isfinite()]
        range_ = float(finite.amax().clamp_min(0) - finite.amin().clamp_max(0)) if finite.numel() else 0.0
        per_step = 255 / range_ if range_ > 0 else 1.0
        return differences * per_step, effect * per_step


def _judge_steps(worst: _Worst, steps: _Steps, agreement: float | None, n: int, deployed: Session) -> Parity:
    """By the root mean square of the worst output: single values may be rounded the other way in several layers."""
    mean, allowed, largest, within, output = 0.0, 1.0, 0.0, 1.0, ""
    for name in steps.seen:
        differences, effect = steps.of(name)
        rms, limit = _rms(differences), max(1.0, 2 * _rms(effect))
        if rms / limit >= mean / allowed:
            mean, allowed, output = rms, limit, name
        largest = max(largest, float(differences.max()))
        within = min(within, float((differences <= 1).double().mean()))
    at = f" at output {output}" if output and len(deployed.output_names) > 1 else ""
    words = worst.unequal or (
        f"differences of {mean:.2g} steps of an 8-bit grid (root mean square{at}; up to {allowed:.2g} pass), {largest:.2g} "
        f"at most, {100 * within:.4g} % of values within one step, on {n} inputs in {deployed.name}"
    )
    if agreement is not None:
        words += f"; argmax agrees on {100 * agreement:.4g} %"
    passed = mean <= allowed and not worst.unequal
    return Parity(worst.absolute, worst.relative, agreement, n, allowed / 255, passed, words, mean, largest, within)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _judge(worst: _Worst, agreement: float | None, n: int, tolerance: float, deployed: Session) -> Parity:
    passed = worst.relative <= tolerance and not worst.unequal
    at = f" at output {worst.output}" if worst.output and len(deployed.output_names) > 1 else ""
    words = worst.unequal or (
        f"largest difference {worst.absolute:.2g}, {worst.relative:.2g} of the largest value{at}, on {n} inputs in "
        f"{deployed.name} (tolerance {tolerance:.0e})"
    )
    if agreement is not None:
        words += f"; argmax agrees on {100 * agreement:.4g} %"
    return Parity(worst.absolute, worst.relative, agreement, n, tolerance, passed, words)


def _failed(words: str, n: int, tolerance: float) -> Parity:
    return Parity(math.inf, math.inf, None, n, tolerance, False, words)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _has_classes(output: Tensor) -> bool:
    return (
        output.is_floating_point() and output.ndim > 1 and output.shape[_class_axis(output)] > 1 and output.numel() > 0
    )


def _class_axis(output: Tensor) -> int:
    return 1 if output.ndim != 3 else 2


def _agreement(want: Tensor, have: Tensor, tolerance: float) -> Tensor:
    """For each prediction: is the file's choice one that the model scores as high as its own, within the tolerance?"""
    axis = _class_axis(want)
    want = want.double()
    best = want.amax(axis)
    chosen = want.gather(axis, have.to(want.device).argmax(axis, keepdim=True)).squeeze(axis)
    slack = tolerance * float(want[want.isfinite()].abs().max()) if want.isfinite().any() else 0.0
    return (chosen >= best - slack).reshape(-1)
