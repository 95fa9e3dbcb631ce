# SPDX-License-Identifier: Apache-2.0
"""One forward in which every floating-point operation runs in float64, whatever the model's code casts to.

Seen at the level of ATen operations, so that hand-written code and torch's own modules are treated alike. The same
watch records statistics over an axis (the mean and deviation of a LayerNorm, the mean of squares in a hand-written
RMSNorm) in the order of calls, and in a later run puts the average of the recorded ones in the place of its own: what
a norm over channels does to a channel is then the same whether others were set to zero or cut off.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from featherweight.errors import EditError

__all__ = ["Exact", "Statistic", "double", "run"]

_ATEN = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent)
_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


@dataclass(frozen=True, eq=False)
class Statistic:
    """What one operation made of the axes that it reduced: their sizes, and the average of each of its results."""

    sizes: tuple[int, ...]
    values: tuple[float, ...]


def _dims(x: Tensor, dims: Any) -> tuple[int, ...]:
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return tuple(x.shape)
    return tuple(x.shape[d] for d in ([dims] if isinstance(dims, int) else dims))


def _over(position: int) -> Callable[[Sequence[Any]], tuple[int, ...]]:
    """The sizes of the axes that an operation reduces, named by its argument at that position (without it, all)."""
    return lambda args: _dims(args[0], args[position] if len(args) > position else None)


def _but_channels(args: Sequence[Any]) -> tuple[int, ...]:
    """A batch norm's statistics, where it takes its own: instance norms are made of it, and standardised weights."""
    return (*args[0].shape[:1], *args[0].shape[2:])


# What a norm or a mean computes over channels depends on how many there are: its statistics change with a cut.
_NORMS: dict[Any, Callable[[Sequence[Any]], tuple[int, ...]]] = {
    _ATEN.native_layer_norm.default: lambda args: tuple(args[1]),
    _ATEN.native_group_norm.default: lambda args: (args[4] // args[6], args[5]),
    _ATEN._fused_rms_norm.default: lambda args: tuple(args[1]),
    _ATEN.native_batch_norm.default: _but_channels,
    _ATEN._native_batch_norm_legit.no_stats: _but_channels,
}
_MEANS: dict[Any, Callable[[Sequence[Any]], tuple[int, ...]]] = _NORMS | {
    _ATEN.mean.default: lambda args: tuple(args[0].shape),
    _ATEN.mean.dim: _over(1),
    _ATEN.var.correction: _over(1),
    _ATEN.std.correction: _over(1),
    _ATEN.var_mean.correction: _over(1),
    _ATEN.std_mean.correction: _over(1),
}
# These are the same over zeros as over fewer channels, but not where a channel that is cut has other values than zero.
_SUMS: dict[Any, Callable[[Sequence[Any]], tuple[int, ...]]] = {
    _ATEN.sum.default: lambda args: tuple(args[0].shape),
    _ATEN.sum.dim_IntList: _over(1),
    _ATEN.linalg_vector_norm.default: _over(2),
    _ATEN.norm.ScalarOpt_dim: _over(2),
    _ATEN.amax.default: _over(1),
    _ATEN.amin.default: _over(1),
    _ATEN.max.dim: _over(1),
    _ATEN.min.dim: _over(1),
    _ATEN.logsumexp.default: _over(1),
}
_STATISTICS = _MEANS | _SUMS


class Exact(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Promotes what runs inside it to float64, and records statistics; given others' records, holds to them.

    `hold` are the calls whose recorded values are used; `None` means: those whose axes have another size here than in
    the record, sums among them only where `sums` says so. `held` are the calls where that came about, with operation
    and layer.
    """

    def __init__(
        self, record: Sequence[Statistic] | None = None, hold: Collection[int] | None = None, sums: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record
        self.hold = hold
        self.sums = sums
        self.statistics: list[Statistic] = []
        self.held: dict[int, str] = {}
        self.names: Mapping[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if func is not _ATEN.view.dtype:
            writes = any(
                argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
            )
            args, kwargs = tree_map(_wide if not writes else _wide_dtype, (args, kwargs))
        out = func(*args, **kwargs)
        if func in _STATISTICS and not (func is _ATEN.native_batch_norm.default and not args[5]):
            out = self._statistic(func, args, out)
        return tree_map_only(Tensor, _wide, out)

    def _statistic(self, func: Any, args: Sequence[Any], out: Any) -> Any:
        sizes = _STATISTICS[func](args)
        results = out if isinstance(out, tuple) else (out,)
        results = results[1:] if func in _NORMS else results
        k = len(self.statistics)
        self.statistics.append(Statistic(sizes, tuple(_average(result) for result in results)))
        if self.record is None or k >= len(self.record):
            return out
        changed = self.record[k].sizes != sizes and (self.sums or func in _MEANS)
        if not (changed if self.hold is None else k in self.hold):
            return out
        self.held[k] = f"{func._schema.name.removeprefix('aten::')} in {_place(self.names)}"
        values = [
            torch.full_like(result, value) if result.is_floating_point() else result
            for result, value in zip(results, self.record[k].values, strict=True)
        ]
        if func in _NORMS:
            return _normalised(func, args, values), *values
        return type(out)(values) if isinstance(out, tuple) else values[0]


class _Experts(TorchFunctionMode):
    """grouped_mm as products of single matrices, forward and backward: torch has no float64 for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_of_experts if func is torch._grouped_mm else func)(*args, **(kwargs or {}))


def _of_experts(
    rows: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """A block of rows for each expert; `offs` are the blocks' ends. Rows beyond the last one are zeros."""
    if rows.ndim != 2 or weight.ndim != 3 or offs is None:
        raise NotImplementedError("grouped_mm is known for rows of shape (n, k) and weights of shape (experts, k, m).")
    ends = offs.tolist()
    parts = [rows[a:b] @ weight[i] for i, (a, b) in enumerate(zip([0, *ends], ends, strict=False))]
    out = torch.cat([*parts, rows.new_zeros(rows.shape[0] - ends[-1], weight.shape[-1])])
    return out if bias is None else out + bias


def _average(result: Tensor) -> float:
    return float(result.mean()) if result.is_floating_point() and result.numel() else 0.0


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_WIDE[value.dtype]) if value.dtype in _WIDE else value
    return _wide_dtype(value)


def _wide_dtype(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _normalised(func: Any, args: Sequence[Any], statistics: Sequence[Tensor]) -> Tensor:
    """A norm with other statistics than its own: (mean, reciprocal deviation), or only the latter."""
    x: Tensor = args[0]
    mean: Tensor | None = statistics[0] if len(statistics) == 2 else None
    scale: Any = statistics[-1]
    if func is _ATEN.native_group_norm.default:
        n, groups, weight, bias = args[3], args[6], args[1], args[2]
        x, shape = x.reshape(n, groups, -1), x.shape
        mean, scale = (None if t is None else t[..., None] for t in (mean, scale))
    elif func in (_ATEN.native_batch_norm.default, _ATEN._native_batch_norm_legit.no_stats):
        shape, weight, bias = x.shape, args[1], args[2]
        mean, scale = (_by_channel(t, x.ndim) for t in (mean, scale))
    else:
        shape, weight, bias = x.shape, args[2], args[3] if func is _ATEN.native_layer_norm.default else None
    out: Tensor = ((x if mean is None else x - mean) * scale).reshape(shape)
    if func not in (_ATEN.native_layer_norm.default, _ATEN._fused_rms_norm.default):
        weight, bias = (_by_channel(t, out.ndim) for t in (weight, bias))
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _by_channel(values: Tensor | None, ndim: int) -> Tensor | None:
    return None if values is None else values.reshape(-1, *[1] * (ndim - 2))


def _place(names: Mapping[int, str]) -> str:
    """The layer that is running, and the line, where it is not torch's own."""
    frame = sys._getframe(1)
    while frame is not None and id(frame.f_locals.get("self")) not in names:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "the model"
    layer, code = names[id(frame.f_locals["self"])] or "the model", frame.f_code
    own = not code.co_filename.startswith(_TORCH)
    return f"{layer}, {Path(code.co_filename).name}:{frame.f_lineno}" if own else layer


def double(model: nn.Module) -> nn.Module:
    """A copy of the model in float64 and eval mode that shares nothing with it. Raises `EditError` if none can be made.

    >>> double(nn.Linear(2, 1).half()).weight.dtype
    torch.float64
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            # What weight_norm leaves in `weight` has a history, which deepcopy refuses; it is computed anew at each
            # call.
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise EditError(
            f"the model ({type(model).__name__}) cannot be copied, so that a cut cannot be proved: "
            f"{type(error).__name__}: {error}. Keep what cannot be copied (files, locks, generators) out of its "
            "attributes, or pass verify=False."
        ) from error
    twin = twin.cpu() if any(p.device.type == "mps" for p in model.parameters()) else twin
    for parameter in twin.parameters():
        parameter.grad = None
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.data = _wide(tensor.data)
    return twin.eval()


def run(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any], exact: Exact, seed: int = 0) -> Any:
    """The model's answer to copies of the inputs inside `exact`, from that seed, with torch's random state put back."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    inputs = tree_map_only(Tensor, lambda t: _wide(t.detach().clone().to(device)), inputs)
    devices = [device] if device.type == "cuda" else []
    exact.names = {id(module): name for name, module in model.named_modules()}
    with torch.random.fork_rng(devices=devices), _plain_kernels(), _double_by_default(), _Experts(), exact:
        torch.manual_seed(seed)
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


@contextlib.contextmanager
def _double_by_default() -> Iterator[None]:
    """What the model's code makes without a dtype (`torch.full((), limit)`) has to hold float64's limits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Without torch's fused path of transformer layers, whose norms nobody sees; cuDNN has no backward in eval mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
