# SPDX-License-Identifier: Apache-2.0
"""Structural change as pure data: edits, and the plan that lists them. Shapes and indices, never learned values.

`plan.json` is this module written down. It knows nothing of data, of training or of who decided.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from featherweight.errors import ArtefactError, nearest

__all__ = [
    "EDITS",
    "VERSION",
    "Attribute",
    "Edit",
    "Factor",
    "FakeQuant",
    "Fold",
    "Plan",
    "Slice",
    "Swap",
    "Tie",
    "edit_from_dict",
]

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Slice:
    """Keeps the positions `keep` (ascending) along `axis` of one parameter or buffer, named as in `state_dict`.

    Saves what the other positions cost, everywhere. A channel that is cut is one slice of each tensor that has it. A
    tensor that a parametrization computes (`weight_norm`, say) goes by its own name: "conv.weight".

    >>> import torch
    >>> from featherweight import apply
    >>> layer = torch.nn.Conv2d(3, 8, 1, bias=False)
    >>> apply(layer, Slice("weight", axis=0, keep=(0, 3, 7)))
    >>> layer
    Conv2d(3, 3, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """

    kind: ClassVar[str] = "slice"
    tensor: str
    axis: int
    keep: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Factor:
    """Splits the linear layer `layer` (out x in) at `rank` into in -> rank (no bias) and rank -> out.

    Saves bytes, memory and MACs where rank < out * in / (out + in). The new weights are zero until someone fills them.

    >>> import torch
    >>> from featherweight import apply
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> apply(model, Factor("0", rank=8))
    >>> [tuple(parameter.shape) for parameter in model.parameters()]
    [(8, 64), (64, 8), (64,)]
    """

    kind: ClassVar[str] = "factor"
    layer: str
    rank: int


@dataclasses.dataclass(frozen=True)
class Swap:
    """Puts one of our modules, named `to`, in the place of `layer`, with values carried over exactly.

    Saves nothing by itself: it opens a layer to other edits. There is `attention`, for torch's MultiheadAttention, and
    `self_attention`, for a hand-written one whose one linear layer makes queries, keys and values.

    >>> import torch
    >>> from featherweight import apply
    >>> model = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2)})
    >>> apply(model, Swap("attention", to="attention"))
    >>> model["attention"].q
    Linear(in_features=8, out_features=8, bias=True)
    """

    kind: ClassVar[str] = "swap"
    layer: str
    to: str


@dataclasses.dataclass(frozen=True)
class Tie:
    """Makes all `names` (as in `state_dict`) one parameter; the first one's values stay.

    Saves the bytes and memory of all but one, and no time.

    >>> import torch
    >>> from featherweight import apply
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    >>> apply(model, Tie(("0.weight", "1.weight")))
    >>> model[0].weight is model[1].weight
    True
    """

    kind: ClassVar[str] = "tie"
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FakeQuant:
    """Rounds the first input of `layer` to a per-tensor grid of `bits` bits; its scale and zero point are buffers.

    Saves nothing by itself: it lets training and evaluation see what an integer runtime would compute. A symmetric grid
    has its zero point at 0. With `dynamic` each call takes the grid of its own range, and the buffers are not read.

    >>> import torch
    >>> from featherweight import apply
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> apply(model, FakeQuant("0", bits=8, symmetric=True))
    >>> list(model.state_dict())
    ['0.weight', '0.bias', '0.input_grid.scale', '0.input_grid.zero_point']
    """

    kind: ClassVar[str] = "fake_quant"
    layer: str
    bits: int
    symmetric: bool
    dynamic: bool = False


@dataclasses.dataclass(frozen=True)
class Fold:
    """Takes the BatchNorm `norm` into the conv, transposed conv or linear layer before it; an Identity takes its place.

    Saves the norm's parameters and its time, and lets integer runtimes requantize once. The layer gets a bias if it has
    none. In evaluation the model answers as before; it is for the caller to know that `norm` reads `layer` and nothing
    else does, as `featherweight.edits.foldable` finds out.

    >>> import torch
    >>> from featherweight import apply
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8))
    >>> apply(model, Fold("0", "1"))
    >>> list(model.state_dict()), model[1]
    (['0.weight', '0.bias'], Identity())
    """

    kind: ClassVar[str] = "fold"
    layer: str
    norm: str


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Sets the attribute `name` of `layer`, a whole number or several of them, to `value`; its type stays.

    Saves nothing by itself: it is for sizes that a module's code carries besides its tensors, such as `num_heads`.

    >>> import torch
    >>> from featherweight import apply
    >>> model = torch.nn.Sequential(torch.nn.Unflatten(1, (4, 3)))
    >>> apply(model, Attribute("0", "unflattened_size", (2, 3)))
    >>> model[0](torch.ones(1, 6)).shape
    torch.Size([1, 2, 3])
    """

    kind: ClassVar[str] = "attribute"
    layer: str
    name: str
    value: int | tuple[int, ...]


Edit = Slice | Factor | Swap | Tie | FakeQuant | Fold | Attribute
EDITS: dict[str, type[Edit]] = {edit.kind: edit for edit in typing.get_args(Edit)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was done: edits in order, and for each tensor a hint to its codec (`{"fc.weight": "nm:2:4"}`).

    Plans add up: `plan + other` is first one, then the other.

    >>> plan = Plan((Factor("fc", rank=8),)) + Plan(formats={"fc.0.weight": "bitmask"})
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    edits: tuple[Edit, ...] = ()
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.edits + other.edits, {**self.formats, **other.formats})

    def to_dict(self) -> dict[str, Any]:
        return {"version": VERSION, "edits": [_entry(edit) for edit in self.edits], "formats": dict(self.formats)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @staticmethod
    def from_dict(data: Any, where: str = "plan") -> Plan:
        """Reads what `to_dict` wrote. Raises `ArtefactError` that names the entry that is not as it should be."""
        version = data.get("version") if isinstance(data, dict) else None
        if type(version) is not int or version != VERSION:
            raise ArtefactError(
                f"{where}: version {version!r} is not {VERSION}, the one that this featherweight reads."
            )
        edits, formats = data.get("edits"), data.get("formats")
        if not isinstance(edits, list) or not isinstance(formats, dict):
            raise ArtefactError(f"{where}: needs a list 'edits' and a dict 'formats'.")
        if not all(isinstance(key, str) and isinstance(value, str) for key, value in formats.items()):
            raise ArtefactError(f"{where}: 'formats' maps tensor names to codec hints, both strings.")
        return Plan(tuple(edit_from_dict(entry, f"{where}, edit {i}") for i, entry in enumerate(edits)), formats)

    @staticmethod
    def from_json(text: str, where: str = "plan") -> Plan:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and endless nesting
            raise ArtefactError(f"{where}: not JSON: {error}.") from None
        return Plan.from_dict(data, where)


def _entry(edit: Edit) -> dict[str, Any]:
    """Later fields have defaults and are written only where they differ: earlier versions read what they know."""
    said = {field.name for field in dataclasses.fields(edit) if getattr(edit, field.name) != field.default}
    return {"kind": edit.kind, **{name: value for name, value in dataclasses.asdict(edit).items() if name in said}}


def edit_from_dict(entry: Any, where: str) -> Edit:
    """One edit as `plan.json` has it: its `kind` and the fields of that kind, those with a default if they are there.

    Raises `ArtefactError`.

    >>> edit_from_dict({"kind": "factor", "layer": "fc", "rank": 8}, "here")
    Factor(layer='fc', rank=8)
    """
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in EDITS:
        close = ", ".join(nearest(str(kind), EDITS)) or ", ".join(EDITS)
        raise ArtefactError(f"{where}: unknown kind {kind!r}; known: {close}.")
    hints = typing.get_type_hints(EDITS[kind])
    fields = dataclasses.fields(EDITS[kind])
    names = [field.name for field in fields if field.default is dataclasses.MISSING or field.name in entry]
    if set(entry) - {"kind"} != set(names):
        raise ArtefactError(
            f"{where}: {kind!r} has the keys {', '.join(names)}; got {', '.join(sorted(map(str, set(entry) - {'kind'}))) or 'none'}."
        )
    return EDITS[kind](**{name: _value(entry[name], hints[name], f"{where}, {name}") for name in names})


def _value(value: Any, hint: Any, where: str) -> Any:
    """JSON's value as the field's type; JSON has no tuples, and bool passes for int in Python but not here."""
    if isinstance(hint, types.UnionType):  # one number, or a list of them
        scalar, several = typing.get_args(hint)
        return _value(value, several if isinstance(value, list) else scalar, where)
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            raise ArtefactError(f"{where}: expected a list, got {value!r}.")
        return tuple(_value(item, typing.get_args(hint)[0], where) for item in value)
    if type(value) is not hint:
        raise ArtefactError(f"{where}: expected {hint.__name__}, got {value!r}.")
    return value
