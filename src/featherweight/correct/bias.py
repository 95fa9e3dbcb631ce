# SPDX-License-Identifier: Apache-2.0
"""Bias correction: what compression shifts on average is given back by the bias, at no cost.

After "Data-Free Quantization Through Weight Equalization and Bias Correction" (Nagel et al., 2019, section 4.2, its
variant with data): b + E[y_ref - y] for each output channel. In call order, so that a later layer answers for its own shift
and not again for that of an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.correct.batch_norm import batch_norm_site, running_statistics, tracked_norms
from featherweight.correct.keep import Moved
from featherweight.correct.outputs import Forward
from featherweight.correct.recurrent import recurrent_sites
from featherweight.correct.surroundings import canonical, undone_on_error
from featherweight.correct.walk import Measured, Site, tokens, walk
from featherweight.correct.zeros import put, standing_zeros
from featherweight.layers import inputs, unwrap
from featherweight.layers.inputs import Call
from featherweight.layers.weights import CONV, TRANSPOSED, is_conv1d

__all__ = ["correct_bias"]


def correct_bias(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    *,
    frozen: Collection[str] = (),
    batch_norm: bool = False,
    progress: Callable[[int, int], None] = lambda step, total: None,
) -> Moved:
    """Gives every layer of your model outputs of the reference's mean, channel by channel, by way of its bias.

    Linear layers, convolutions, the projections of MultiheadAttention, and the gates of RNN, LSTM and GRU, whose steps
    feed each other, so that their means are met to first order only. In call order: see `walk` for what that costs. With
    `batch_norm`, BatchNorm statistics are estimated again on the way: for where they are no longer the reference's.
    Layers without bias, `frozen` biases, tied ones and zeros that pruning made stay. Saves nothing.

    Raises `OptionError`, `DataError` or `NumericalError`; the model is then as it was.

    >>> reference, model = nn.Linear(1, 2), nn.Linear(1, 2)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(reference.weight), model.bias.copy_(reference.bias - 1)
    >>> correct_bias(model, reference, [torch.randn(8, 1)], lambda model, batch: model(batch)).names
    ('bias',)
    >>> torch.allclose(model.bias, reference.bias, atol=1e-6)
    True
    """
    fixed, held = canonical(model, frozen), standing_zeros(model, reference)
    sites: list[Site] = []
    biases: list[Tensor] = []
    left: dict[str, str] = {}
    owners = _owners(model)
    for site, own in _sites(unwrap(model), held):
        if reason := _refusal(own, fixed, owners):
            left[site.name] = reason
        else:
            sites.append(site)
            biases += own
    if not sites:
        return Moved((), left)
    norms = tracked_norms(model)[0] if batch_norm else {}
    sites += [batch_norm_site(name) for name in norms]
    with undone_on_error([*biases, *running_statistics(norms.values())]):
        done, unreached = walk(model, reference, sites, batches, forward, progress)
    return Moved(tuple(done), left | unreached)


def _owners(model: nn.Module) -> dict[int, int]:
    """How many modules hold a parameter, by its identity."""
    owners: dict[int, int] = {}
    for module in unwrap(model).modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return owners


def _refusal(biases: Sequence[Tensor], fixed: Collection[int], owners: dict[int, int]) -> str:
    if not biases:
        return "has no bias"
    if any(id(bias) in fixed for bias in biases):
        return "its bias is frozen"
    return "shares its bias with another layer" if any(owners[id(bias)] > 1 for bias in biases) else ""


def _sites(model: nn.Module, held: dict[int, Tensor]) -> Iterator[tuple[Site, list[Tensor]]]:
    """Where biases are corrected, each with the biases that it sets."""
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        bias = module._parameters.get("bias")
        own: list[Tensor] = [] if bias is None else [bias]
        if id(module) in inside:  # never called: its attention reads its weight
            continue
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield _output_site(name, module, lambda call: tokens(call.output, call.mask), held), own
        elif isinstance(module, CONV + TRANSPOSED):
            yield _output_site(name, module, _channels_last(len(module.kernel_size)), held), own
        elif isinstance(module, nn.MultiheadAttention):
            yield from _attention_sites(name, module, held)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            yield from recurrent_sites(name, module, held)


def _channels_last(axes: int) -> Callable[[Call], Tensor]:
    """Reads a convolution's outputs; those of an unbatched input have their channels first."""
    return lambda call: tokens(call.output.movedim(-1 - axes, -1))


def _output_site(name: str, layer: nn.Module, read: Callable[[Call], Tensor], held: dict[int, Tensor]) -> Site:
    where = f"{name}.out_proj".lstrip(".") if isinstance(layer, nn.MultiheadAttention) else name

    def fold(module: nn.Module, dense: nn.Module, mine: Measured, target: Measured) -> list[str]:
        inner = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
        _shift(inner.bias, target["output"].mean - mine["output"].mean.to(target["output"].mean.device), held)
        return [f"{where}.bias".lstrip(".")]

    return Site(where, name, lambda call: {"output": read(call)}, fold)


def _shift(bias: Any, by: Tensor, held: dict[int, Tensor]) -> None:
    put(bias, bias.detach().to(torch.float64) + by.to(bias.device), held)


def _attention_sites(
    name: str, attention: nn.MultiheadAttention, held: dict[int, Tensor]
) -> Iterator[tuple[Site, list[Tensor]]]:
    """First the projections of queries, keys and values, then, that done, the output projection."""

    def read(call: Call) -> dict[str, Tensor]:
        found = inputs.attention(call, {"in_proj_weight"})["in_proj_weight"]
        return {part: one.x for part, one in zip("qkv", found, strict=True)}

    def read_output(call: Call) -> Tensor:
        return tokens(call.output[0], call.mask if attention.batch_first else None)

    def fold(module: nn.Module, dense: nn.Module, mine: Measured, target: Measured) -> list[str]:
        _shift(module.in_proj_bias, _projected(dense, target) - _projected(module, mine), held)
        return [f"{name}.in_proj_bias".lstrip(".")]

    bias, last = attention.in_proj_bias, attention.out_proj.bias
    yield Site(f"{name}.in_proj".lstrip("."), name, read, fold), [] if bias is None else [bias]
    yield _output_site(name, attention, read_output, held), [] if last is None else [last]


def _projected(module: Any, inputs: Measured) -> Tensor:
    """Means of queries, keys and values (3 x channels) for these means of what they are computed from, on the CPU."""
    if module.in_proj_weight is None:
        parts = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        parts = module.in_proj_weight.chunk(3)
    means = [w.detach().cpu().double() @ m.mean.cpu() for w, m in zip(parts, inputs.values(), strict=True)]
    offset: Tensor = module.in_proj_bias.detach().cpu().double()
    return torch.cat(means) + offset
