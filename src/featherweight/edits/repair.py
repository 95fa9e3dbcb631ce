# SPDX-License-Identifier: Apache-2.0
"""Sizes that a model's code keeps as numbers, found where a cut makes them wrong: `num_heads`, `view(b, n, 12, 64)`.

A trace says which sizes of which layer's operations change, and to what. A number of that layer (or of a layer around
it) that equals such a size may be that size, or equal it by chance. So it is tried: none changed, all changed, then
what the failing layer offers; layers of one class are decided together; and of a set that answers right, what is
not needed is taken back. Whether a set is right is for the caller's judge to say, since a wrong number of heads runs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from featherweight.edits.attribute import is_sizes
from featherweight.edits.find import find_module
from featherweight.edits.self_attention import SelfAttention
from featherweight.edits.swap import Attention
from featherweight.graph import Trace
from featherweight.plan import Attribute, Edit, Slice

__all__ = ["Candidate", "Finding", "candidates", "choose"]

# Of torch's own layers, what no tensor tells: the sizes of norms without weights, and of pure reshapes.
_OPEN: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.LayerNorm, ("normalized_shape",)),
    (nn.RMSNorm, ("normalized_shape",)),
    (nn.GroupNorm, ("num_channels", "num_groups")),
    (nn.Unflatten, ("unflattened_size",)),
    (nn.ChannelShuffle, ("groups",)),
    (nn.Transformer, ("d_model",)),
)


@dataclass(frozen=True)
class Candidate:
    """One number (or one entry of several) in all layers of a class, and what it may become in each: `options` in the
    order in which a layer's operations show them. `stays`: the same size also stays somewhere in that layer. `near`:
    the layer's own operations show it, and not only those of layers inside it."""

    kind: str
    name: str
    entry: int | None
    options: Mapping[str, tuple[int, ...]] = field(compare=False)
    stays: bool
    near: bool

    def __hash__(self) -> int:
        return hash((self.kind, self.name, self.entry, self.stays, self.near, tuple(self.options)))

    @property
    def count(self) -> int:
        return max(map(len, self.options.values()))


@dataclass(frozen=True)
class Finding:
    """What came of a trial: right or not, how far the forward came, and the layer in which it failed, if it did."""

    right: bool
    calls: int
    layer: str | None = None


Choice = Mapping[Candidate, int]
Judge = Callable[[Sequence[Attribute]], Finding]


def candidates(model: nn.Module, trace: Trace, kept: Mapping[str, int], edits: Iterable[Edit]) -> list[Candidate]:
    """The numbers in a model, already sliced by `edits`, that equal a size which the cut changes; the nearest first."""
    sizes: dict[str, dict[int, list[int]]] = {}

    def note(layer: str, old: int, new: int) -> None:
        known = sizes.setdefault(layer, {}).setdefault(old, [])
        if new not in known:
            known.append(new)

    for op in trace.ops:
        for size in op.output:
            note(op.layer, size.left({}, trace.sizes), size.left(kept, trace.sizes))
    for edit in edits:  # of an operation with several results, such as a split, a trace tells the first one's sizes
        if isinstance(edit, Slice) and edit.tensor in trace.shapes:
            note(edit.tensor.rpartition(".")[0], trace.shapes[edit.tensor][edit.axis], len(edit.keep))
    around: dict[str, dict[int, list[int]]] = {}
    for layer, changes in sizes.items():
        for name in _ancestors(layer):
            for old, news in changes.items():
                known = around.setdefault(name, {}).setdefault(old, [])
                known.extend(new for new in news if new not in known)
    for name, module in model.named_modules():
        if isinstance(module, tuple(kind for kind, _ in _OPEN)):  # they show in no operation that changes a shape
            inside = around.setdefault(name, {})
            for old, news in around.get(name.rpartition(".")[0] if name else "", {}).items():
                inside.setdefault(old, []).extend(news)
    found: dict[tuple[str, str, int | None, bool, bool], dict[str, tuple[int, ...]]] = {}
    for near, of in ((True, sizes), (False, around)):
        for layer, seen in of.items():
            for kind, name, entry, value in _numbers(model, layer):
                others = tuple(other for other in seen.get(value, ()) if other != value)
                if others and (near or not set(others) & set(sizes.get(layer, {}).get(value, ()))):
                    found.setdefault((kind, name, entry, value in seen[value], near), {})[layer] = others
    made = [
        Candidate(kind, name, entry, options, stays, near)
        for (kind, name, entry, stays, near), options in found.items()
    ]
    return sorted(made, key=lambda one: (not one.near, one.stays))


def choose(
    model: nn.Module, offered: Sequence[Candidate], judge: Judge, trials: int = 200, seconds: float = 300.0
) -> tuple[Attribute, ...] | Finding:
    """The attributes of the smallest set found that the judge calls right, or what came of changing none.

    Gives up after that many trials, or that long.
    """
    spent, end = itertools.count(1), time.monotonic() + seconds

    def right(choice: Choice) -> Finding:
        if next(spent) > trials or time.monotonic() > end:
            return Finding(False, 0)
        return judge(_edits(model, choice))

    first = right({})
    if first.right:
        return ()
    for choice in _wholes(offered):
        if right(choice).right:
            return _edits(model, _smallest(choice, right))
    grown = _grow(offered, first, right)
    if grown is None:
        for size in (1, 2, 3):
            for some in itertools.combinations(offered, size):
                for options in itertools.product(*(range(one.count) for one in some)):
                    if grown is None and right(dict(zip(some, options, strict=True))).right:
                        grown = dict(zip(some, options, strict=True))
    return first if grown is None else _edits(model, _smallest(grown, right))


def _wholes(offered: Sequence[Candidate]) -> Iterator[Choice]:
    """All at once, the surest alone first: near and unambiguous, near, all."""
    sets = [
        [one for one in offered if one.near and not one.stays],
        [one for one in offered if one.near],
        [one for one in offered if not one.stays],
        list(offered),
    ]
    tried: list[list[Candidate]] = [[]]
    for some in sets:
        if some not in tried:
            tried.append(some)
            yield dict.fromkeys(some, 0)


def _grow(offered: Sequence[Candidate], start: Finding, right: Callable[[Choice], Finding]) -> Choice | None:
    """From the layer that fails: one or two of the numbers there, or around it, that let the forward come further."""
    choice: dict[Candidate, int] = {}
    state = start
    while state.layer is not None:
        places = {state.layer, *_ancestors(state.layer)}
        here = [one for one in offered if one not in choice and places & set(one.options)]
        better = None
        for size in (1, 2):
            for some in itertools.combinations(here, size):
                for options in itertools.product(*(range(one.count) for one in some)):
                    trial = choice | dict(zip(some, options, strict=True))
                    finding = right(trial)
                    if finding.right:
                        return trial
                    if finding.calls > state.calls and (better is None or finding.calls > better[1].calls):
                        better = (trial, finding)
            if better is not None:
                break
        if better is None:
            return None
        choice, state = better
    return None


def _smallest(choice: Choice, right: Callable[[Choice], Finding]) -> Choice:
    for one in list(choice):
        less = {other: option for other, option in choice.items() if other is not one}
        if right(less).right:
            choice = less
    return choice


def _edits(model: nn.Module, choice: Choice) -> tuple[Attribute, ...]:
    """One edit for each attribute of each layer, with all of its entries that change."""
    values: dict[tuple[str, str], int | tuple[int, ...]] = {}
    for one, option in choice.items():
        for layer, news in one.options.items():
            new = news[min(option, len(news) - 1)]
            key = (layer, one.name)
            if one.entry is None:
                values[key] = new
            else:
                old = values.get(key, getattr(find_module(model, layer), one.name))
                values[key] = (*old[: one.entry], new, *old[one.entry + 1 :])
    return tuple(Attribute(layer, name, value) for (layer, name), value in values.items())


def _numbers(model: nn.Module, layer: str) -> Iterator[tuple[str, str, int | None, int]]:
    """The class, name, entry and value of every number of a layer that no slice sets."""
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        return
    kind = type(module).__qualname__
    open_names = next((names for base, names in _OPEN if isinstance(module, base)), None)
    standard = type(module).__module__.startswith("torch.nn")
    if isinstance(module, Attention | SelfAttention) or (standard and open_names is None):
        return
    for name, value in vars(module).items():
        if not is_sizes(value) or name in _sliced(module) or (standard and name not in (open_names or ())):
            continue
        if type(value) is int:
            yield kind, name, None, value
        else:
            for entry, item in enumerate(value):
                yield kind, name, entry, item


def _sliced(module: nn.Module) -> set[str]:
    """Names that a slice of the module's own tensors sets, or that are no sizes of channels."""
    own = {name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None}
    names: set[str] = {"kernel_size", "stride", "padding", "dilation", "output_padding", "num_layers"}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        return {"normalized_shape", "num_channels", "num_groups"} if "weight" in own else set()
    for base in type(module).__mro__:
        if base.__module__.startswith("torch.nn") and base is not nn.Module:
            names |= set(getattr(base, "__constants__", ()))
    return names if len(type(module).__mro__) > 3 else set()


def _ancestors(layer: str) -> list[str]:
    parts = layer.split(".") if layer else []
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]
