# SPDX-License-Identifier: Apache-2.0
"""The oracle of a cut: the uncut model, run with what is cut marked as absent. It knows no map of who reads what.

Absent is NaN. What makes a coupling is set to NaN where it is made, and the model runs as it is, every operation of it
with the meaning that a removed channel gives it: a sum runs over what is there, and is absent if nothing is; a mean, a
norm's statistics, a maximum, a softmax are of what is there; whatever is done to single entries leaves absent absent.
A model with the coupling cut out must then give the same numbers, norms over channels included. Who consumes the
coupling is found by the NaNs themselves, so that a wrong map of consumers shows as a difference.

The trade-off: an operation that has no rule here must not mix channels, and a model may use NaN for nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize, remove_weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from tests.graph.pattern import leaves

aten = torch.ops.aten
Inputs = tuple[Any, ...] | dict[str, Any]


def without(model: nn.Module, inputs: Inputs, makers: list[tuple[str, int, list[int]]]) -> list[Tensor]:
    """The outputs of `model` with the positions of `makers` (tensor, axis, positions) absent. Changes `model`."""
    bake(model)
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, axis, positions in makers:
            if tensors[name].is_floating_point():
                tensors[name].index_fill_(axis, torch.tensor(positions), float("nan"))
    with plainly(Absent()):
        return leaves(answer(model, inputs))


def answer(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def bake(model: nn.Module) -> None:
    """Parametrized weights become plain ones of the same value, under their own name."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            kind = type(module)  # torch takes the weight off the class, which copies of a module share
            module.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
        for hook in list(module._forward_pre_hooks.values()):
            if type(hook).__name__ == "WeightNorm":
                remove_weight_norm(module, hook.name)


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The model's tensors, casts to float32 inside it left out."""
    with plainly(Promoted()):
        return leaves(answer(model, inputs))


@contextlib.contextmanager
def plainly(mode: TorchDispatchMode) -> Iterator[None]:
    """Attention as matrix products and a softmax, encoder layers as their parts."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), mode:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Promoted(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._to_copy.default and kwargs.get("dtype") == torch.float32 and args[0].dtype == torch.float64:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class Absent(Promoted):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        rule = RULES.get(func.overloadpacket)
        if rule is None or not args[0].is_floating_point():
            return super().__torch_dispatch__(func, types, args, kwargs)
        return rule(func, *args, **(kwargs or {}))


def _summed(product: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """A sum of products over the terms that are there; absent where all terms are."""
    value = product(*(x.nan_to_num(0.0) for x in factors))
    there = product(*((~x.isnan()).to(value.dtype) for x in factors)).round()
    could = product(*(torch.ones_like(x) for x in factors)).round()
    return value.masked_fill((there == 0) & (could > 0), float("nan"))


def _product(func: Any, a: Tensor, b: Tensor) -> Tensor:
    return _summed(func, a, b)


def _addmm(func: Any, bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * _summed(torch.matmul, a, b)


def _convolution(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    y = _summed(lambda a, b: func(a, b, None, *options), x, weight)
    return y if bias is None else y + bias.view(-1, *[1] * (y.ndim - 2))


def _sum(func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
    return _summed(lambda a: a.sum(dim, keepdim), x)


def _count(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    return (~x.isnan()).to(x.dtype).sum(dim, keepdim)


def _mean(func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
    return _sum(func, x, dim, keepdim) / _count(x, dim, keepdim)


def _var(func: Any, x: Tensor, dim: Any = None, correction: float = 1, keepdim: bool = False) -> Tensor:
    square = _sum(func, (x - _mean(func, x, dim, True)) ** 2, dim, keepdim)
    return square / (_count(x, dim, keepdim) - (1 if correction is None else correction))


def _std(func: Any, x: Tensor, dim: Any = None, correction: float = 1, keepdim: bool = False) -> Tensor:
    return _var(func, x, dim, correction, keepdim).sqrt()


def _length(func: Any, x: Tensor, p: float = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
    return _sum(func, x.abs() ** p, dim, keepdim) ** (1 / p)


def _pooled(func: Any, x: Tensor, *options: Any) -> Tensor:
    """Windows over channels (local response norm) count what is absent as zero; of nothing else they are absent."""
    there = func((~x.isnan()).to(x.dtype), *options)
    return func(x.nan_to_num(0.0), *options).masked_fill(there == 0, float("nan"))


def _largest(func: Any, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    dim = list(range(x.ndim)) if dim == () or dim == [] else dim
    last = float("-inf" if func.overloadpacket is aten.amax else "inf")
    return func(x.masked_fill(x.isnan(), last), dim, keepdim).masked_fill(_count(x, dim, keepdim) == 0, float("nan"))


def _softmax(func: Any, x: Tensor, dim: int, *options: Any) -> Tensor:
    y = func(x.masked_fill(x.isnan(), float("-inf")), dim, *options)
    return y.masked_fill(x.isnan(), float("nan"))


def _running(func: Any, x: Tensor, dim: int, **options: Any) -> Tensor:
    return func(x.nan_to_num(0.0), dim).masked_fill(x.isnan(), float("nan"))


def _standardised(func: Any, x: Tensor, dims: list[int], eps: float) -> Tensor:
    return (x - _mean(func, x, dims, True)) / (_var(func, x, dims, 0, True) + eps).sqrt()


def _layer_norm(func: Any, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    y = _standardised(func, x, list(range(x.ndim - len(shape), x.ndim)), eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), x.new_zeros(0), x.new_zeros(0)


def _group_norm(
    func: Any, x: Tensor, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float
) -> tuple[Tensor, ...]:
    y = _standardised(func, x.reshape(n, groups, -1), [-1], eps).reshape(x.shape)
    shape = (-1, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)), x.new_zeros(0), x.new_zeros(0)


def _rms_norm(func: Any, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * (_mean(func, x * x, list(range(x.ndim - len(shape), x.ndim)), True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y, x.new_zeros(0)) if func.overloadpacket is aten._fused_rms_norm else y


RULES: dict[Any, Callable[..., Any]] = {
    aten.mm: _product,
    aten.bmm: _product,
    aten.mv: _product,
    aten.dot: _product,
    aten.addmm: _addmm,
    aten.baddbmm: _addmm,
    aten.convolution: _convolution,
    aten.sum: _sum,
    aten.mean: _mean,
    aten.var: _var,
    aten.std: _std,
    aten.linalg_vector_norm: _length,
    aten.norm: _length,
    aten.amax: _largest,
    aten.amin: _largest,
    aten.avg_pool2d: _pooled,
    aten.avg_pool3d: _pooled,
    aten._softmax: _softmax,
    aten._log_softmax: _softmax,
    aten._safe_softmax: _softmax,
    aten.cumsum: _running,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
    aten.rms_norm: _rms_norm,
    aten._fused_rms_norm: _rms_norm,
}
