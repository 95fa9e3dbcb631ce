# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one forward: the weights, plus the most bytes of inputs and activations that were alive at once.

On a CPU the tensors' own storages are watched as ops make and drop them. That is the memory that the model's graph asks
for, the same on every machine; it is not the process's resident size, and what a kernel takes for itself inside one op
(an im2col buffer, a fused LSTM's steps) is not seen. On CUDA the caching allocator's own peak is taken.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featherweight.measure.copies import higher_order, run_once

__all__ = ["peak_memory"]


def peak_memory(model: nn.Module, example_inputs: tuple[Any, ...]) -> int | None:
    """Bytes, or None if a tensor has no storage to watch (sparse, nested). Give a copy in eval mode (`eval_copy`)."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    weights = {s._cdata: s.nbytes() for t in (*model.parameters(), *model.buffers()) if (s := _storage(t)) is not None}
    if device.type == "cuda":
        return sum(weights.values()) + _cuda_peak(model, example_inputs, device)
    watch = _Watch(set(weights))
    with watch:
        outputs = run_once(model, example_inputs)
    del outputs
    return None if watch.blind else sum(weights.values()) + watch.peak


def _cuda_peak(model: nn.Module, example_inputs: tuple[Any, ...], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_once(model, example_inputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self, weights: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.now = 0
        self.blind = False
        self._weights = weights
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            out = higher_order(self, func, args, kwargs or {})
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage is None:
            self.blind = True
            return
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights or key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
