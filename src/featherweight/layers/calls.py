# SPDX-License-Identifier: Apache-2.0
"""Watching a model's layers at work: hooks for as long as it runs, and the model left as it was. No tracing.

The model runs in evaluation mode without gradients. Matrix products are not rounded to TF32 or bfloat16 meanwhile, and
attention does not take the fast path that skips hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import NumericalError
from featherweight.layers import inputs, recurrent
from featherweight.layers.inputs import Call, Input
from featherweight.layers.weights import CONV, TRANSPOSED, is_conv1d

__all__ = ["Identities", "Take", "Use", "mask_of", "quiet", "uses", "watch"]

Take = Callable[["Use", int, list[Input]], None]  # a use, the number of its call in this forward, what was read


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A parameter at work: `module` (hooked by its name in the model) reads it under the name `leaf`.

    `form` says along which axes the parameter is read: uses of one tied parameter agree in it, or cannot be one
    problem.
    """

    name: str
    module: nn.Module
    leaf: str
    kind: str
    form: tuple[str, int]

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.leaf)


def uses(model: nn.Module) -> dict[int, list[Use]]:
    """Where each parameter of a known layer is read, by the parameter's identity, in definition order."""
    found: dict[int, list[Use]] = {}
    # A MultiheadAttention has its output projection's weight but never calls that module.
    never = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if id(module) in never:
            continue
        for leaf, kind, form in _leaves(module):
            parameter = model.get_parameter(f"{name}.{leaf}" if name else leaf)
            found.setdefault(id(parameter), []).append(Use(name, module, leaf, kind, form))
    return found


def _leaves(module: nn.Module) -> Iterator[tuple[str, str, tuple[str, int]]]:
    """The tensors of a module that are weights of known arithmetic: name, kind, form."""
    here = [leaf for leaf, tensor in module._parameters.items() if tensor is not None and tensor.ndim >= 2]
    if isinstance(module, (*CONV, *TRANSPOSED)):
        kind = "conv" if isinstance(module, CONV) else "transposed conv"
        known = [("weight", kind, (kind, module.groups))]
    elif isinstance(module, nn.MultiheadAttention):
        known = [("in_proj_weight", "attention", ("three parts", 1))]
        known += [(f"{letter}_proj_weight", "attention", ("rows", 1)) for letter in "qkv"]
        here += ["out_proj.weight"] if "weight" in module.out_proj._parameters else []
        known += [("out_proj.weight", "linear", ("rows", 1))]
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        known = [(leaf, "recurrent", ("rows", 1)) for leaf in here if leaf.startswith("weight_")]
    elif isinstance(module, nn.Linear):
        known = [("weight", "linear", ("rows", 1))]
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        known = [("weight", "embedding", ("rows", 1))]
    elif is_conv1d(module):
        known = [("weight", "transposed linear", ("columns", 1))]
    else:
        known = []
    return (line for line in known if line[0] in here)


def mask_of(batch: Any) -> Tensor | None:
    """A batch's `attention_mask` (B, T), True at real tokens."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


class Identities:
    """Numbers for tensors: the same number means the very same tensor object, alive and unchanged since."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[weakref.ref[Tensor], int]] = {}
        self._next = itertools.count()

    def of(self, tensor: Tensor) -> int:
        # Tensors made in inference mode keep no count of changes.
        key = (id(tensor), -1 if tensor.is_inference() else tensor._version)
        known = self._seen.get(key)
        if known is None or known[0]() is not tensor:
            known = self._seen[key] = (weakref.ref(tensor), next(self._next))
        return known[1]


class _Stop(BaseException):
    """Ends a forward once all that is wanted was seen; not an `Exception`, so that no model takes it for an error."""


def watch(
    wanted: Sequence[Use], take: Take, forward: Callable[[], Any], where: str, mask: Tensor | None, once: bool
) -> Counter[Use]:
    """Runs a forward, calls `take(use, call, inputs)` for every use of a wanted weight, and returns how often each was.

    With `once` each use is known to come once, and the forward ends with the last of them. Raises `NumericalError` for
    an input that holds NaN or infinity; `where` says in which batch.
    """
    by_module: dict[nn.Module, list[Use]] = {}
    for use in wanted:
        by_module.setdefault(use.module, []).append(use)
    calls: Counter[Use] = Counter()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        here = by_module[module]
        with torch.no_grad(), torch.autocast(here[0].parameter.device.type, enabled=False):
            read = _read(Call(module, args, kwargs, output, mask), {use.leaf for use in here})
            for use in here:
                _refuse_not_finite(use, read[use.leaf], where)
                take(use, calls[use], read[use.leaf])
                calls[use] += 1
        if once and len(calls) == len(wanted):
            raise _Stop

    handles = []
    try:
        handles += [module.register_forward_hook(hook, with_kwargs=True) for module in by_module]
        with contextlib.suppress(_Stop):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _refuse_not_finite(use: Use, read: Sequence[Input], where: str) -> None:
    for one in read:
        # Not finite wherever a value is not, or where squares, which are what will be summed, overflow.
        if one.x.is_floating_point() and not bool(torch.linalg.vector_norm(one.x).isfinite()):
            raise NumericalError(
                f"{use.name or 'The model'}: what {use.leaf} reads holds NaN, infinity or numbers whose squares overflow, "
                f"in {where} of the data. Nothing was changed. Look at that batch, and at the layers before this one: half "
                "precision overflows at 65504."
            )


def _read(call: Call, leaves: Collection[str]) -> dict[str, list[Input]]:
    """What each wanted tensor of a module read in one call, by its name in the module.

    Most read one input; an attention's fused projection reads three (query, key, value), a part each.
    """
    module = call.module
    if isinstance(module, nn.MultiheadAttention):
        return inputs.attention(call, leaves)
    if isinstance(module, nn.RNNBase):
        return recurrent.sequence(call, leaves)
    if isinstance(module, nn.RNNCellBase):
        return recurrent.cell(call)
    if isinstance(module, CONV):
        return inputs.conv(call)
    if isinstance(module, TRANSPOSED):
        return inputs.transposed(call)
    if isinstance(module, nn.Embedding):
        return inputs.lookup(call)
    return inputs.linear(call)


@contextlib.contextmanager
def quiet(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode, no gradients, exact products, no fast path; modes, buffers and settings come back."""
    modes = {module: module.training for model in models for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for model in models:
            model.eval()
        with torch.no_grad(), _exact_products():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 products; the older switches read as before once these are back."""
    backends: Any = torch.backends
    places = [getattr(backend, op) for backend in (backends.cudnn, backends.mkldnn) for op in ("conv", "rnn")]
    places += [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
