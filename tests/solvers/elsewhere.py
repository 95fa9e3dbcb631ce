# SPDX-License-Identifier: Apache-2.0
"""A second device, pretended: tensors that say they are elsewhere, with their values in the CPU's memory behind them.

Within `Pretending` an operation on a tensor from here and one from elsewhere is refused, as it is between a CPU and a
GPU (an index or a scalar may come from here), and `device=` and `.to` move tensors back and forth. It finds tensors that
were made on the wrong device on machines that have one device only; it says nothing of another device's arithmetic.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_ANSWERS = {"_local_scalar_dense", "equal"}


class Elsewhere(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Elsewhere":
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=torch.device("meta"), **place)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    here = any(not isinstance(tensor, Elsewhere) and tensor.dim() > 0 for tensor in tensors)
    if there and here and name not in _INDEXING | {"copy_", "_to_copy"}:
        raise RuntimeError(f"{name}: tensors on two devices")
    if name == "copy_":
        there = isinstance(args[0], Elsewhere)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "meta"
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name in _ANSWERS or not there:
        return result
    written = kwargs.get("out", args[0] if args and function._schema.is_mutable else None)
    if isinstance(written, Elsewhere) and result is written.inner:
        return written
    return tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Elsewhere) else leaf
