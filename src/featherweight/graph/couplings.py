# SPDX-License-Identifier: Apache-2.0
"""What a trace finds, as plain facts: couplings, what is frozen and why, and sizes that follow from what is kept.

A coupling is the smallest thing that can be cut: the positions, on all axes of all tensors, that must go together.
Couplings that are alike (the same axes, the same number of positions on each) form a group, such as the channels of one
stage of a ResNet. Sizes, MACs, parameters and memory are products of axes, and an axis is linear in how many couplings
of each group are kept; so they are counted here without running anything.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Literal, overload

import numpy as np

from featherweight.errors import GraphError, nearest

__all__ = ["Coupling", "Frozen", "Group", "Member", "Op", "Role", "Size", "Trace"]

Role = Literal["output", "input", "scale"]


@dataclasses.dataclass(frozen=True, order=True)
class Coupling:
    """The smallest thing that can be cut: number `index` of the group named `group`.

    >>> import torch
    >>> from torch import nn
    >>> from featherweight import trace
    >>> found = trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.zeros(1, 3),))
    >>> found["0"][2]
    Coupling(group='0', index=2)
    """

    group: str
    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis of one tensor that loses positions when couplings of its group are cut.

    `tensor` is named as in `state_dict` (of tied tensors the first name). `role` says what the axis is to its layer:
    `output` (made by it: a weight's rows, its bias), `input` (contracted by it) or `scale` (multiplied or added channel
    by channel: norms, layer scales, position embeddings). `positions` is (group size, k): row i holds the k positions
    of coupling i.
    """

    tensor: str
    axis: int
    role: Role
    positions: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Couplings that are alike; a sequence of them.

    `kind` is `heads` where a coupling is a whole attention head, else `channels`. `statistics` lists the norms and
    means over these channels, whose results change when one is cut; where it is empty, a cut is exact.

    >>> import numpy as np
    >>> group = Group("fc", 3, (Member("fc.weight", 0, "output", np.arange(3)[:, None]),))
    >>> len(group), group[1:]
    (3, (Coupling(group='fc', index=1), Coupling(group='fc', index=2)))
    """

    name: str
    size: int
    members: tuple[Member, ...]
    kind: Literal["channels", "heads"] = "channels"
    statistics: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Coupling]:
        return (Coupling(self.name, i) for i in range(self.size))

    @overload
    def __getitem__(self, index: int) -> Coupling: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Coupling, ...]: ...
    def __getitem__(self, index: int | slice) -> Coupling | tuple[Coupling, ...]:
        if isinstance(index, slice):
            return tuple(Coupling(self.name, i) for i in range(self.size)[index])
        return Coupling(self.name, range(self.size)[index])


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Positions of a tensor's axis that cannot be cut: how many, which op froze them, where it stands, and why."""

    tensor: str
    axis: int
    positions: int
    op: str
    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Size:
    """How many positions an axis has: `fixed`, and for each group a number for each coupling that is kept.

    >>> Size(1, {"fc": 2}).left({"fc": 3}, {"fc": 5})
    7
    """

    fixed: int
    groups: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def left(self, kept: Mapping[str, int], sizes: Mapping[str, int]) -> int:
        """Positions left with so many couplings `kept` by group; a group that is absent keeps all of its `sizes`."""
        return self.fixed + sum(each * kept.get(name, sizes[name]) for name, each in self.groups.items())


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation of the graph, with sizes that follow from what is kept.

    `layer` is the module in whose forward it stands ("" is the model). `output` are its output's axes (of several
    tensors the first one's). `macs` is a coefficient and the sizes that it is multiplied by; (0, ()) where there are
    none.
    """

    layer: str
    op: str
    source: str
    weight: str | None
    output: tuple[Size, ...]
    macs: tuple[int, tuple[Size, ...]] = (0, ())


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Which channels and heads of a model can be cut, which cannot and why, and what is left after a cut.

    `coverage` is the share of the parameters in weights of layers (conv, linear, embedding, recurrent) that some
    coupling would take along. `front` says how the graph was had: `export`, or `recorded` from one forward where export
    failed (`notes` say why). `shapes` are those of all tensors when traced; after a cut the trace is stale. `macs`,
    `parameters` and `memory` take how many couplings are kept by group, and count what would be left without running.

    >>> import torch
    >>> from torch import nn
    >>> from featherweight import trace
    >>> found = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (torch.zeros(1, 3, 8, 8),))
    >>> found.coverage, found.macs(), found.macs({"0": 4})
    (1.0, 12384, 6192)
    >>> [(frozen.tensor, frozen.axis, frozen.reason) for frozen in found.frozen][-1]
    ('2.bias', 0, 'it is an output of the model')
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    ops: tuple[Op, ...]
    coverage: float
    front: Literal["export", "recorded"]
    notes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    sizes_of: Mapping[str, tuple[Size, ...]]
    grain: Literal["heads", "dims"] = "heads"

    def __getitem__(self, name: str) -> Group:
        if name not in self._by_name:
            close = ", ".join(nearest(name, self._by_name)) or "none"
            raise GraphError(f"no group is named {name!r}; nearest: {close}. `featherweight inspect` lists them.")
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Couplings in each group."""
        return {group.name: group.size for group in self.groups}

    def macs(self, kept: Mapping[str, int] | None = None) -> int:
        """Multiply-adds of one forward on the traced inputs, with so many couplings kept by group."""
        kept = self._checked(kept)
        return sum(
            op.macs[0] * math.prod(size.left(kept, self.sizes) for size in op.macs[1]) for op in self.ops if op.macs[0]
        )

    def parameters(self, kept: Mapping[str, int] | None = None) -> int:
        """Parameters with so many couplings kept by group; tied ones count once."""
        kept = self._checked(kept)
        return sum(math.prod(size.left(kept, self.sizes) for size in axes) for axes in self.sizes_of.values())

    def memory(self, kept: Mapping[str, int] | None = None) -> int:
        """Elements of the outputs of all layers that multiply: the sum of batch x height x width x channels that
        Comb, Prune, Distill (arXiv 2408.03046) takes for latency."""
        kept = self._checked(kept)
        return sum(
            math.prod(size.left(kept, self.sizes) for size in op.output)
            for op in self.ops
            if op.macs[0] and op.weight is not None
        )

    def _checked(self, kept: Mapping[str, int] | None) -> Mapping[str, int]:
        for name, count in (kept or {}).items():
            if not 0 <= count <= self[name].size:
                raise GraphError(f"group {name} has {self[name].size} couplings, of which {count} cannot be kept.")
        return kept or {}
