# SPDX-License-Identifier: Apache-2.0
"""The last way to carry out a cut: on the exported program. For models whose code fixes sizes that no attribute holds.

What comes of it is terminal: a module of this one input shape that answers as the cut model would. It can be called and
exported to ONNX; it is not your class any more, and no plan replays it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import nn

from featherweight.edits.effective import computed_in, is_computed, value_of
from featherweight.edits.exact import double
from featherweight.edits.verify import Inputs, Oracle, Verified
from featherweight.edits.zeroed import make_plain
from featherweight.errors import EditError
from featherweight.graph import Coupling, Program, Trace, rewrite
from featherweight.graph import trace as comb
from featherweight.plan import Slice

__all__ = ["ExportedCut", "cut_exported"]


@dataclass(frozen=True)
class ExportedCut:
    """A program with couplings cut out, how many of each group are left, and the proof."""

    program: Program
    kept: dict[str, int]
    verified: Verified


def cut_exported(
    model: nn.Module,
    couplings: Iterable[Coupling],
    inputs: Inputs,
    *,
    trace: Trace | None = None,
    seconds: float = 300.0,
) -> ExportedCut:
    """Cuts couplings out of the model's exported program, and proves it. Your model stays as it is.

    For what `cut` refuses because the model's code carries sizes as numbers: here each is a node of the graph, and is
    rewritten. Saves what the couplings cost, in ONNX Runtime, OpenVINO and wherever the program runs. It does not give
    back your class: the result is an `nn.Module` in eval mode for inputs of this shape; save it by `export_onnx`.

    Raises `EditError` for couplings that are unknown or empty a group, `GraphError` for a model that cannot be exported
    or an operation whose sizes cannot be told, `VerifyError` where the program does not answer as the masked model.

    >>> import torch
    >>> class Fixed(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b = nn.Linear(3, 12), nn.Linear(12, 2)
    ...     def forward(self, x):
    ...         return self.b(self.a(x).view(-1, 4, 3).relu().view(-1, 12))
    >>> model, x = Fixed(), (torch.randn(5, 3),)
    >>> done = cut_exported(model, comb(model, x)["a"][:2], x)
    >>> done.program(*x).shape, done.program.a.weight.shape, done.verified.error < 1e-9
    (torch.Size([5, 2]), torch.Size([6, 3]), True)
    """
    if trace is None:
        trace = comb(model, inputs, seconds=seconds)
    removed: dict[str, np.ndarray] = {}
    for coupling in couplings:
        size = trace[coupling.group].size
        if not 0 <= coupling.index < size:
            raise EditError(f"group {coupling.group} has {size} couplings; there is no number {coupling.index}.")
        removed[coupling.group] = np.union1d(removed.get(coupling.group, np.empty(0, dtype=int)), [coupling.index])
    for name, indices in removed.items():
        if len(indices) == trace[name].size:
            raise EditError(
                f"all {len(indices)} couplings of {name} would be cut, which leaves nothing of it; keep one."
            )
    program = rewrite(model, inputs, removed, grain=trace.grain, seconds=seconds)
    kept = {group.name: group.size - len(removed.get(group.name, ())) for group in trace.groups}
    return ExportedCut(program.eval(), kept, _proved(model, program, trace, removed, inputs))


def _proved(
    model: nn.Module, program: Program, trace: Trace, removed: dict[str, np.ndarray], inputs: Inputs
) -> Verified:
    """The program against the model with the cut positions set to zero, on the model's own weights."""
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    read = set()
    for name, indices in removed.items():
        for member in trace[name].members:
            gone.setdefault((member.tensor, member.axis), []).append(member.positions[indices].ravel())
            if member.role == "input":
                read.add((member.tensor, member.axis))
    slices = [
        Slice(
            tensor, axis, tuple(np.setdiff1d(np.arange(trace.shapes[tensor][axis]), np.concatenate(positions)).tolist())
        )
        for (tensor, axis), positions in gone.items()
    ]
    proof = Oracle(_as_held(model), slices, inputs, 0, read).prove(double(program), 1e-9)
    return Verified(
        proof.error, proof.output, 1e-9, proof.held, (), (proof.part,), ("proved on the model's own weights",)
    )


def _as_held(model: nn.Module) -> nn.Module:
    """In float64, with the values that the program has: what a module computes from other tensors is rounded there."""
    twin = double(model)
    for own, other in list(zip(model.modules(), twin.modules(), strict=True)):
        for leaf, value in {leaf: value_of(own, leaf) for leaf in computed_in(own)}.items():
            if is_computed(other, leaf):
                make_plain(other, leaf)
            tensor = getattr(other, leaf)
            tensor.data = value.to(tensor.dtype)
    return twin
