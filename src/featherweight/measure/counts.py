# SPDX-License-Identifier: Apache-2.0
"""What a model holds and does, counted and not estimated: parameters, non-zeros, bytes, MACs, BOPs, peak memory.

A tensor counts once however many names it has, under the first. Zeros lower `nonzeros` and `bops` only: no runtime of
torch, ONNX or OpenVINO skips them, so `macs` is what those do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import OptionError
from featherweight.layers import Weight, unwrap
from featherweight.measure.bits import input_bits, stored_bits
from featherweight.measure.copies import eval_copy
from featherweight.measure.macs import Work, count_work
from featherweight.measure.memory import peak_memory
from featherweight.task import describe

__all__ = ["Counts", "LayerCounts", "count"]


@dataclasses.dataclass(frozen=True)
class LayerCounts:
    """One module's own share, its children's left out.

    `name` is "" for the model itself (work that it does by functional ops) and `kind` its class. `shape` is that of its
    weight, or None. A tied weight's entries are counted at the module that has it first; the MACs are the running
    module's. MultiheadAttention runs its `out_proj` itself, so those MACs are its own.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    nonzeros: int
    macs: int
    dense_bytes: int


@dataclasses.dataclass(frozen=True)
class Counts:
    """What was counted of one model on one example.

    `macs` are multiply-adds of one forward on the example inputs as they are, batch and all. `bops` are bits x MACs of
    non-zero weights, a weight on a grid by the grid's bits, and where a layer's input has one times its bits / 32 (a
    proxy: no stock runtime gains by zeros); products of two activations count in full. `bits` is the mean over all
    entries of weights of what each takes, `input_bits` the fewest of a grid on a layer's input, None for none.
    `dense_bytes` is the state dict's, each tensor once. `peak_memory_bytes` is described in
    `featherweight.measure.memory`. `uncounted` names ops that did work that no formula covers; with any, `macs` is a
    lower bound.
    """

    parameters: int
    nonzeros: int
    macs: int
    bops: int
    dense_bytes: int
    peak_memory_bytes: int | None
    layers: tuple[LayerCounts, ...]
    uncounted: tuple[str, ...]
    bits: float | None = None
    input_bits: int | None = None


def count(model: nn.Module, example_inputs: tuple[Any, ...], formats: Mapping[str, str] | None = None) -> Counts:
    """Counts a model by running a copy of it in eval mode, twice. The model and torch's random state stay as they were.

    `formats` are a plan's hints: how many columns of a weight share a scale, what has a codebook. Element-wise ops,
    norms, softmax, pooling and look-ups have no multiply-adds by convention, biases none either. Raises `DataError` if
    the model does not take the inputs, `OptionError` if it cannot be copied.

    >>> counts = count(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), (torch.zeros(1, 1, 8, 8),))
    >>> counts.parameters, counts.macs == 4 * 9 * 6 * 6, [layer.name for layer in counts.layers]
    (40, True, ['0'])
    """
    if not isinstance(example_inputs, tuple):
        raise OptionError(f"example_inputs is {describe(example_inputs)}; give a tuple, for one tensor: (x,).")
    model = unwrap(model)
    work = count_work(eval_copy(model), example_inputs, formats)
    held = stored_bits(model, formats)
    layers = _layers(model, work)
    state = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return Counts(
        parameters=sum(layer.parameters for layer in layers),
        nonzeros=sum(layer.nonzeros for layer in layers),
        macs=sum(work.macs.values()),
        bops=sum(work.bops.values()),
        dense_bytes=sum(map(_bytes, state.values())),
        peak_memory_bytes=peak_memory(eval_copy(model), example_inputs),
        layers=layers,
        uncounted=tuple(f"{op} x{calls}" if calls > 1 else op for op, calls in work.uncounted.items()),
        bits=_mean_bits(held),
        input_bits=input_bits(model),
    )


def _mean_bits(held: Sequence[tuple[Weight, int]]) -> float | None:
    entries = sum(weight.parameter.numel() for weight, _ in held)
    return sum(weight.parameter.numel() * bits for weight, bits in held) / entries if entries else None


def _layers(model: nn.Module, work: Work) -> tuple[LayerCounts, ...]:
    """In definition order: every module with tensors of its own or with MACs."""
    seen: set[int] = set()
    found = []
    for name, module in model.named_modules():
        owned = list(module.parameters(recurse=False))
        passing: set[str] = getattr(module, "_non_persistent_buffers_set", set())
        buffers = [buffer for leaf, buffer in module.named_buffers(recurse=False) if leaf not in passing]
        new = {id(t): t for t in (*owned, *buffers) if id(t) not in seen}
        seen |= new.keys()
        parameters = [t for t in new.values() if isinstance(t, nn.Parameter)]
        if owned or buffers or work.macs[name]:
            found.append(
                LayerCounts(
                    name=name,
                    kind=type(module).__name__,
                    shape=_weight_shape(module),
                    parameters=sum(p.numel() for p in parameters),
                    # -0.0 is a zero here: it costs a multiplication what a zero costs.
                    nonzeros=sum(int(torch.count_nonzero(p.detach())) for p in parameters),
                    macs=work.macs[name],
                    dense_bytes=sum(map(_bytes, new.values())),
                )
            )
    return tuple(found)


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """That of `weight`, or of the first parameter with rows and columns (an LSTM has four)."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight", next((p for p in parameters.values() if p.ndim > 1), None))
    return None if weight is None else tuple(weight.shape)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
