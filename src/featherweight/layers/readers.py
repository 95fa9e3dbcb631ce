# SPDX-License-Identifier: Apache-2.0
"""Who reads what: one forward watched at the level of ATen operations, each with the module in whose forward it ran.

Neither hooks nor a graph alone can tell that nothing but `norm` reads what `conv` gives: hooks do not see operations
between modules, and not every model can be traced. An operation sees its tensors whatever the code looks like, so that
this works on all that runs. It knows the one path that the given inputs take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featherweight.layers.calls import quiet

__all__ = ["Op", "Passage", "Readers", "read_by"]


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One operation: its name (`convolution`, `relu`...), the modules it ran in (outermost first), its tensors.

    Tensors go by numbers, each tensor object of the forward one; what an operation changes in place is among its
    results.
    """

    name: str
    modules: tuple[str, ...]
    reads: tuple[int, ...]
    gives: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Passage:
    """One call of a module: the first tensor it took, and the one that it gave (None where it gave another thing)."""

    name: str
    took: int | None
    gave: int | None
    shape: tuple[int, ...]  # of the tensor that it gave


@dataclasses.dataclass(frozen=True, eq=False)
class Readers:
    """What was seen: operations in order, calls by module, readers of each tensor, and the tensors of the answer."""

    ops: tuple[Op, ...]
    calls: Mapping[str, tuple[Passage, ...]]
    of: Mapping[int, tuple[Op, ...]]
    answer: frozenset[int]


def read_by(model: nn.Module, forward: Callable[[], Any]) -> Readers:
    """Watches one forward of your model, in evaluation mode and without gradients, and leaves the model as it was.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> import torch
    >>> seen = read_by(model, lambda: model(torch.zeros(1, 2)))
    >>> [op.modules for op in seen.of[seen.calls["0"][0].gave]]
    [('', '1')]
    """
    watcher = _Watcher()
    handles = []
    try:
        for name, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(watcher.enter(name), with_kwargs=True, prepend=True),
                module.register_forward_hook(watcher.leave, always_call=True),
            ]
        with quiet(model), watcher:
            answer = forward()
    finally:
        for handle in handles:
            handle.remove()
    readers: dict[int, list[Op]] = {}
    for op in watcher.ops:
        for tensor in dict.fromkeys(op.reads):
            readers.setdefault(tensor, []).append(op)
    ends = frozenset(watcher.number(leaf) for leaf in tree_leaves(answer) if isinstance(leaf, Tensor))
    return Readers(
        tuple(watcher.ops),
        {name: tuple(calls) for name, calls in watcher.calls.items()},
        {tensor: tuple(ops) for tensor, ops in readers.items()},
        ends,
    )


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers tensors, and holds on to them all meanwhile, so that no number means two."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.calls: dict[str, list[Passage]] = {}
        self._stack: list[tuple[str, int | None]] = []
        self._numbers: dict[int, tuple[int, Tensor]] = {}

    def number(self, tensor: Tensor) -> int:
        return self._numbers.setdefault(id(tensor), (len(self._numbers), tensor))[0]

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
            self._stack.append((name, None if first is None else self.number(first)))

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name, took = self._stack.pop()
        gave = output if isinstance(output, Tensor) else None
        number = None if gave is None else self.number(gave)
        shape = () if gave is None else tuple(gave.shape)
        self.calls.setdefault(name, []).append(Passage(name, took, number, shape))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.ops.append(
            Op(
                func.overloadpacket.__name__,
                tuple(name for name, _ in self._stack),
                tuple(self.number(t) for t in given),
                tuple(self.number(t) for t in made),
            )
        )
        return result
