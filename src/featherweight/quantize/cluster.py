# SPDX-License-Identifier: Apache-2.0
"""`Cluster`: each weight becomes one of a few numbers that its layer shares (Deep Compression's second stage).

Against a grid of as many bits the numbers lie where the weights are, which matters from 4 bits down; against it, no
runtime computes with them: this is for bytes. The weights stay plain floats. Packing finds the few numbers by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from featherweight.errors import OptionError, check_strings, check_whole, check_word, is_number
from featherweight.layers import (
    RULES,
    Selected,
    Weight,
    check_globs,
    is_named,
    keep_by_name,
    keep_by_rule,
    last_match,
    matches,
    problems,
    refuse_nothing,
    unwrap,
    weights,
)
from featherweight.plan import Plan
from featherweight.quantize.codebooks import How, Want, fit, refuse_not_finite
from featherweight.quantize.diagonals import hessian_diagonals
from featherweight.solvers.kmeans import STARTS
from featherweight.task import Stage, Task, batches

__all__ = ["Cluster"]

_SHARES = ("layer", "model", "rows")
_MOST = 1 << 16
_FLOOR = 1e-4  # of the mean importance, for weights whose inputs were silent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Leaves each layer of the model it is called with at most `clusters` different weights, without training.

    Saves bytes on disk: an index of log2(clusters) bits a weight, or less where a codec counts how often each occurs.
    Saves no memory and no time. `TuneCentroids` then trains the numbers themselves (arXiv 1510.00149, section 3).

    - clusters, bits: how many numbers, 16 if neither is given, zero among them; bits=4 is clusters=16. `{glob: number}`
      gives layers their own (a later glob overrides an earlier one).
    - start: how k-means begins: `linear`, `density` or `random`, or `exact` for its global optimum (`solvers.kmeans`).
    - share: who has numbers in common: a `layer`, the whole `model`, or each `rows` consecutive outputs of a layer.
      Files store one codebook a tensor, so that numbers shared by fewer rows make longer indices.
    - keep_zeros: zeros that are there stay, as a number of their own that others may join where it is nearest. False
      treats them as any value and fills them.
    - importance: `hessian` weighs errors by the diagonal of the layer's Hessian on `samples` calibration samples
      (arXiv 1612.01543, equation 6), so that weights of strong inputs move least.
    - rate: what a bit must save, as a share of the weights' own square: 0.01, say. An entropy coder makes frequent
      numbers cheap, and then fewer bytes for the same error come of clusters that know it (`solvers.kmeans`); some
      become empty, and some small weights zero. 0 is for codes of fixed width.
    - coder: `adaptive` asks packing to try its adaptive entropy coder on every tensor, which learns its statistics on
      the way: the smallest files, at seconds a million weights to write and to load. None leaves it to small tensors.
    - biases: how many numbers biases and other vectors get; None leaves them as they are.
    - layers, keep: globs on qualified names. dense: rules for what stays as it is: `first` (if a convolution),
      `depthwise`, `output`. None by default.

    A layer that has no more different values than that is left exactly as it is, and reported.
    Raises `OptionError`, `NothingToCompress`, `NumericalError` for weights that are not finite, and `DataError` where
    importance needs data that is missing; the model is then as it was.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> Cluster(4)(model, Task(model, (torch.zeros(1, 8),)), Stage())
    Plan(edits=(), formats={'0.weight': 'codebook:4', '2.weight': 'codebook:4'})
    >>> len(model[0].weight.unique())
    4
    """

    clusters: int | Mapping[str, int] | None = dataclasses.field(default=None, kw_only=False)
    bits: int | Mapping[str, int] | None = None
    start: str = "linear"
    share: str = "layer"
    rows: int = 1
    keep_zeros: bool = True
    importance: str | None = None
    rate: float = 0.0
    coder: str | None = None
    biases: int | None = None
    layers: Sequence[str] = ("*",)
    keep: Sequence[str] = ()
    dense: Sequence[str] = ()
    samples: int = 512

    def __post_init__(self) -> None:
        me = type(self).__name__
        for name in ("layers", "keep", "dense"):
            object.__setattr__(self, name, check_strings(me, name, getattr(self, name)))
        for rule in self.dense:
            check_word(me, "dense", rule, RULES)
        check_word(me, "start", self.start, STARTS)
        check_word(me, "share", self.share, _SHARES)
        if self.importance is not None:
            check_word(me, "importance", self.importance, ("hessian",))
        if self.coder is not None:
            check_word(me, "coder", self.coder, ("adaptive",))
        check_whole(me, "rows", self.rows, least=1)
        check_whole(me, "samples", self.samples, least=1)
        self._check_numbers(me)
        if self.share != "rows" and self.rows != 1:
            raise OptionError(f"{me}: rows={self.rows} says how many outputs share numbers; give share='rows' too.")
        if not is_number(self.rate) or not 0 <= self.rate < math.inf:
            raise OptionError(f"{me}: rate must be 0 or more, 0.01 say; got {self.rate!r}.")

    def _check_numbers(self, me: str) -> None:
        if self.clusters is not None and self.bits is not None:
            raise OptionError(f"{me}: clusters and bits say the same thing; give one. bits=4 is clusters=16.")
        for option, value, least, most in (
            ("clusters", self.clusters, 2, _MOST),
            ("bits", self.bits, 1, 16),
            ("biases", self.biases, 2, _MOST),
        ):
            if isinstance(value, Mapping) and (not value or self.share == "model"):
                raise OptionError(
                    f"{me}: {option} is {dict(value)!r}; give one number for share='model', and otherwise "
                    f"{{glob: number}} with at least one glob, {{'conv*': {most.bit_length()}}} say."
                )
            for where, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                if number is not None and (type(number) is not int or not least <= number <= most):
                    name = f"{option} of {where!r}" if where else option
                    raise OptionError(f"{me}: {name} must be a whole number from {least} to {most}; got {number!r}.")

    def select(self, model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> tuple[Selected, ...]:
        """What would be clustered and what kept, and why, for every weight. Changes nothing."""
        found, kept = self._choose(model, example_inputs)
        return tuple(
            _line(weight, *(("kept", kept[weight.name]) if weight.name in kept else ("clustered", self._named(weight))))
            for weight in found
        )

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        found, kept = self._choose(model, task.example_inputs)
        refuse_nothing(self.select(model, task.example_inputs), "cluster")
        chosen = [weight for weight in found if weight.name not in kept]
        vectors = self._vectors(model)
        refuse_not_finite({w.name: w.parameter for w in chosen} | vectors)
        importance = self._importance(model, task, stage, chosen)
        wants = [
            Want(weight.name, weight.parameter, self._number(weight), weight, importance.get(weight.name))
            for weight in chosen
        ]
        group = self.rows if self.share == "rows" else None
        how = How(self.start, self.keep_zeros, self.rate, stage.seed)
        together = [wants] if self.share == "model" else [[want] for want in wants]
        done = [one for wanted in together for one in fit(wanted, how, group)]
        if self.biases is not None:
            bare = [Want(name, vector, self.biases) for name, vector in vectors.items()]
            done += [one for want in bare for one in fit([want], how)]
        for one in done:  # nothing is written before all of it is known
            one.write()
        facts = {one.name: one for one in done}
        for weight in found:
            if weight.name in kept:
                line = _line(weight, "kept", kept[weight.name])
            else:
                line = _line(weight, facts[weight.name].action, facts[weight.name].words)
            stage.report({"kind": "selection", "weight": dataclasses.asdict(line)})
        if alike := [one.name for one in done if not one.changed]:
            shown = ", ".join(alike[:5]) + (f" and {len(alike) - 5} more" if len(alike) > 5 else "")
            text = f"Left exactly as they are, with no more different values than asked for: {shown}."
            stage.report({"kind": "message", "text": text})
        hint = "codebook:{}" if self.coder is None else f"entropy:codebook:{{}}:{self.coder}"
        return Plan(formats={one.name: hint.format(one.entries) for one in done})

    def _choose(self, model: nn.Module, example_inputs: tuple[Any, ...] | None) -> tuple[list[Weight], dict[str, str]]:
        """Every weight of the model, and the reasons of those that are kept."""
        model = unwrap(model)
        found, kept = weights(model)
        targets = {
            option: list(value)
            for option, value in (("clusters", self.clusters), ("bits", self.bits))
            if isinstance(value, Mapping)
        }
        others = () if self.biases is None else self._all_vectors(model)
        check_globs(found, kept, {"layers": self.layers, "keep": self.keep, **targets}, others)
        if left := [name for name in kept if name not in {weight.name for weight in found}]:
            kept = {name: kept[name] for name in left}
        for weight in found:
            if weight.parameter.numel() == 0:
                kept[weight.name] = "it is empty"
        free = [weight for weight in found if weight.name not in kept]
        keep_by_name(free, self.layers, self.keep, targets, kept)
        if self.dense:
            keep_by_rule(model, free, self.dense, example_inputs, kept)
        return found, kept

    def _number(self, weight: Weight) -> int:
        """How many values a weight may take; the last glob that names it decides."""
        value: int | None = last_match(weight, self.bits if self.clusters is None else self.clusters)
        return 16 if value is None else value if self.bits is None else 1 << value

    def _named(self, weight: Weight) -> str:
        return next(f"layers={glob!r} names it" for glob in self.layers if is_named(weight, [glob]))

    def _all_vectors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        vectors = {name: p for name, p in model.named_parameters() if p.ndim < 2 and p.is_floating_point()}
        return {name: p for name, p in vectors.items() if not isinstance(p, nn.parameter.UninitializedParameter)}

    def _vectors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if self.biases is None:
            return {}
        found = self._all_vectors(unwrap(model)).items()
        return {
            name: p for name, p in found if p.numel() and matches(name, self.layers) and not matches(name, self.keep)
        }

    def _importance(self, model: nn.Module, task: Task, stage: Stage, chosen: Sequence[Weight]) -> dict[str, Tensor]:
        """By a weight's name, what broadcasts to its matrix; a weight without is one whose inputs nobody could see."""
        if self.importance is None:
            return {}
        names = {weight.name for weight in chosen}
        posed = [problem for problem in problems(model)[0] if problem.weight.name in names]
        found = hessian_diagonals(model, posed, _drawn(task, self.samples), task.forward)
        parts: dict[str, list[Tensor]] = {}
        for problem in posed:
            if problem.name in found:
                diagonal = found[problem.name]
                # An input that was silent here may speak elsewhere.
                diagonal = diagonal + _FLOOR * diagonal.mean()
                rows = diagonal if problem.weight.kind == "embedding" else diagonal.expand(problem.height, -1)
                parts.setdefault(problem.weight.name, []).append(rows)
        whole = {name: torch.cat(rows) for name, rows in parts.items()}
        if missed := [weight.name for weight in chosen if weight.name not in whole]:
            shown = ", ".join(missed[:5]) + (f" and {len(missed) - 5} more" if len(missed) > 5 else "")
            text = f"All weights count alike, since no hook saw what they read: {shown}."
            stage.report({"kind": "message", "text": text})
        return whole


def _drawn(task: Task, samples: int) -> Iterable[Any]:
    """Whole batches of the calibration data, or else of the training data, of about so many samples."""
    name = "train" if task.calibration is None else "calibration"
    seen = 0
    for batch in batches(getattr(task, name), name):
        yield batch
        first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
        seen += 1 if first is None else len(first)
        if seen >= samples:
            return


def _line(weight: Weight, action: str, reason: str) -> Selected:
    values = weight.parameter.detach()
    zeros = 1 - int(values.count_nonzero()) / max(1, values.numel())
    return Selected(weight.name, weight.kind, tuple(values.shape), values.numel(), action, zeros, reason)
