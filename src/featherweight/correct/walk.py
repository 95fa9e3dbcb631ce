# SPDX-License-Identifier: Apache-2.0
"""Layer by layer in call order: what a layer gives in the compressed model and in the reference, and what follows.

The reference is measured in one pass. Then each layer of the compressed model is measured with all earlier ones already
corrected, and corrected itself: one pass a layer, broken off once the layer has run, so half a forward on average. Layers
that read the very same input (queries, keys and values) share a pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.correct.outputs import Forward, attention_mask, check_batches, valid
from featherweight.correct.surroundings import evaluation
from featherweight.errors import NumericalError
from featherweight.layers import unwrap
from featherweight.layers.inputs import Call

__all__ = ["Measured", "Moments", "Site", "tokens", "walk"]

_CHUNK = 1 << 22  # values that are held in float64 at a time


class Moments:
    """Mean and variance by channel of all values seen, in float64 (Chan, Golub and LeVeque's update)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Values as (any number, channels)."""
        for chunk in torch.split(values, max(1, _CHUNK // max(1, values.shape[1]))):
            wide = chunk.to(torch.float64)
            count, mean = len(wide), wide.mean(0)
            squares = (wide - mean).square().sum(0)
            if self.count:
                gap, total = mean - self.mean, self.count + count
                squares += self._squares + gap.square() * (self.count * count / total)
                mean = self.mean + gap * (count / total)
            self.count, self.mean, self._squares = self.count + count, mean, squares

    @property
    def variance(self) -> Tensor:
        """Biased, as a norm in training mode divides by it."""
        return self._squares / self.count

    @property
    def unbiased(self) -> Tensor:
        """As BatchNorm keeps it; needs two values."""
        return self._squares / (self.count - 1)

    @property
    def power(self) -> Tensor:
        """The mean square."""
        return self.variance + self.mean.square()

    def finite(self) -> bool:
        return bool(self.mean.isfinite().all() and self._squares.isfinite().all())


Measured = Mapping[str, Moments]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """Where one correction happens: `name` for reports, the layer whose calls are read, and what is done about them.

    `read` gives what counts by part, each (tokens, channels), or says why it cannot. `fold` is called with the layer of
    the compressed model, the reference's, and the moments of both by part; it returns the names of what it set, or why
    it set nothing.
    """

    name: str
    layer: str
    read: Callable[[Call], Mapping[str, Tensor] | str]
    fold: Callable[[nn.Module, nn.Module, Measured, Measured], Sequence[str] | str]


def tokens(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """(..., channels) as (tokens, channels), without those that a mask (items, positions) marks as padding."""
    return (valid(values, mask) if values.ndim > 2 else values).reshape(-1, values.shape[-1])


class _Enough(BaseException):
    """Breaks a forward off; not an Exception, so that no model takes it for a failure of its own."""


def walk(
    model: nn.Module,
    reference: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    forward: Forward,
    progress: Callable[[int, int], None] = lambda step, total: None,
) -> tuple[list[str], dict[str, str]]:
    """Corrects your model in place, site by site. Returns the names of what was set, and what was left and why.

    The caller sees to it that changes are undone where this raises. Raises `DataError` for no batch and `NumericalError`
    that names the layer and the model where a layer's values are not finite.
    """
    batches = check_batches(batches)
    layers = dict(unwrap(model).named_modules())
    dense = dict(unwrap(reference).named_modules())
    left = {
        site.name: "the reference has no such layer"
        for site in sites
        if type(dense.get(site.layer)) is not type(layers[site.layer])
    }
    sites = [site for site in sites if site.name not in left]
    done: list[str] = []
    with evaluation(model, reference), torch.no_grad():
        order = _Order()
        target = _measure(reference, dense, sites, batches, forward, "the dense reference", order)
        left |= {
            site.name: order.unread.get(site.name, "the calibration samples never reach it")
            for site in sites
            if not target[site.name]
        }
        steps = order.steps([site for site in sites if target[site.name]])
        for i, step in enumerate(steps):
            progress(i, len(steps))
            mine = _measure(model, layers, step, batches, forward, "the compressed model", stop=order.calls)
            for site in step:
                outcome = _fold(site, layers[site.layer], dense[site.layer], mine[site.name], target[site.name])
                if isinstance(outcome, str):
                    left[site.name] = outcome
                else:
                    done += outcome
        progress(len(steps), len(steps))
    return done, left


def _fold(site: Site, layer: nn.Module, dense: nn.Module, mine: Measured, target: Measured) -> Sequence[str] | str:
    if mine.keys() != target.keys():
        return "the compressed model never reaches it as the reference does"
    if any(mine[part].mean.shape != target[part].mean.shape for part in mine):
        return "it has other channels than the reference's"
    return site.fold(layer, dense, mine, target)


class _Order:
    """What the reference's pass tells: the order in which layers are called, over all batches; how often in one batch;
    which read the very input of the one before; what could not be read, and why."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.calls: dict[str, set[int]] = {}
        self.unread: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._last = ""
        self._input: Any = None
        self._beside: dict[str, str] = {}

    def note(self, name: str, call: Call) -> None:
        if name not in self.names:
            # A layer that an earlier batch did not reach (an expert) goes behind the one it was called after.
            self.names.insert(self.names.index(self._last) + 1 if self._last else 0, name)
        self._counts[name] = self._counts.get(name, 0) + 1
        alone = call.args[0] if len(call.args) == 1 and not call.kwargs else None
        if isinstance(alone, Tensor) and alone is self._input and self._counts[name] == 1:
            self._beside[name] = self._last
        else:
            self._beside.pop(name, None)
        self._last, self._input = name, alone

    def end_batch(self) -> None:
        for name, count in self._counts.items():
            self.calls.setdefault(name, set()).add(count)
        self._counts, self._last, self._input = {}, "", None

    def steps(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Sites in call order; those whose layers read the very same input, one after the other, are one step."""
        steps: list[list[Site]] = []
        for i, name in enumerate(self.names):
            own = [[site] for site in sites if site.layer == name]
            together = i > 0 and self._beside.get(name) == self.names[i - 1] and self.calls[name] == {1}
            if together and len(own) == 1 and steps and steps[-1][-1].layer == self.names[i - 1]:
                steps[-1] += own[0]
            else:
                steps += own
        return steps


def _measure(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    sites: Sequence[Site],
    batches: Iterable[Any],
    forward: Forward,
    whose: str,
    order: _Order | None = None,
    stop: Mapping[str, set[int]] | None = None,
) -> dict[str, dict[str, Moments]]:
    """Moments of what the sites read, by site and part. With `stop` a forward ends once all layers had their calls."""
    found: dict[str, dict[str, Moments]] = {site.name: {} for site in sites}
    by_layer: dict[str, list[Site]] = {}
    for site in sites:
        by_layer.setdefault(site.layer, []).append(site)
    # How many calls end a batch; None where it differs from batch to batch.
    calls = None if stop is None or any(len(stop[n]) != 1 for n in by_layer) else sum(min(stop[n]) for n in by_layer)
    seen, mask = 0, None

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal seen
            call = Call(module, args, kwargs, output, mask)
            for site in by_layer[name]:
                parts = site.read(call)
                if isinstance(parts, str):
                    if order is not None:
                        order.unread[site.name] = parts
                    continue
                for part, values in parts.items():
                    if len(values):
                        found[site.name].setdefault(part, Moments()).add(values)
            if order is not None:
                order.note(name, call)
            seen += 1
            if seen == calls:
                raise _Enough

        return look

    hooks = [layers[name].register_forward_hook(hook(name), with_kwargs=True) for name in by_layer]
    try:
        for batch in batches:
            seen, mask = 0, attention_mask(batch)
            with contextlib.suppress(_Enough):
                forward(model, batch)
            if order is not None:
                order.end_batch()
    finally:
        for one in hooks:
            one.remove()
    for name, parts in found.items():
        if not all(moments.finite() for moments in parts.values()):
            raise NumericalError(f"{name}: in {whose} its values on the calibration samples hold NaN or infinity.")
    return found
