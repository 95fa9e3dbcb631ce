# SPDX-License-Identifier: Apache-2.0
"""Bias correction: what compression shifts on average is given back by the bias, at no cost.

After "Data-Free Quantization Through Weight Equalization and Bias Correction" (Nagel et al., 2019, section 4.2, its
variant with data): b + E[y_ref - y] for each output channel. Later layers see earlier ones corrected, so that each
answers for its own shift and not again for that of another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.correct.batch_norm import batch_norm_site, tracked_norms
from featherweight.correct.keep import Moved
from featherweight.correct.norms import affine_norms, norm_site
from featherweight.correct.outputs import Forward
from featherweight.correct.recurrent import recurrent_sites
from featherweight.correct.surroundings import canonical, shared_parameters
from featherweight.correct.walk import Measured, Site, tokens, walk
from featherweight.correct.zeros import put, standing_zeros
from featherweight.errors import check_word
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
    again: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda step, total: None,
) -> Moved:
    """Gives every layer of your model outputs of the reference's mean, channel by channel, by way of its bias.

    Linear layers, convolutions, the projections of MultiheadAttention, and the gates of RNN, LSTM and GRU, whose steps
    feed each other, so that their means are met to first order only. In one pass, see `walk`. What a norm reads moves
    with the biases before it: `again` says which of the corrections of norms that were made before, `moments` or else
    `batch_norm`, are made again on the way. Layers without bias, `frozen` biases, tied ones and zeros that pruning made
    stay. Saves nothing.

    Raises `OptionError`, `DataError` or `NumericalError`; the model is then as it was.

    >>> reference, model = nn.Linear(1, 2), nn.Linear(1, 2)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(reference.weight), model.bias.copy_(reference.bias - 1)
    >>> correct_bias(model, reference, [torch.randn(8, 1)], lambda model, batch: model(batch)).names
    ('bias',)
    >>> torch.allclose(model.bias, reference.bias, atol=1e-6)
    True
    """
    for word in again:
        check_word("correct_bias", "again", word, ("batch_norm", "moments"))
    fixed, held = canonical(model, frozen), standing_zeros(model, reference)
    shared = shared_parameters(model)
    sites: list[Site] = []
    left: dict[str, str] = {}
    for site in _sites(unwrap(model), held):
        if reason := _refusal(site.tensors, fixed, shared):
            left[site.name] = reason
        else:
            sites.append(site)
    if not sites:
        return Moved((), left)
    if "moments" in again:
        sites += [norm_site(name, norm, held) for name, norm in affine_norms(model, fixed)[0].items()]
    elif "batch_norm" in again:
        sites += [batch_norm_site(name, norm) for name, norm in tracked_norms(model)[0].items()]
    done, unreached = walk(model, reference, sites, batches, forward, progress)
    return Moved(tuple(done), left | unreached)


def _refusal(biases: Sequence[Tensor], fixed: Collection[int], shared: Collection[int]) -> str:
    if not biases:
        return "has no bias"
    if any(id(bias) in fixed for bias in biases):
        return "its bias is frozen"
    return "shares its bias with another layer" if any(id(bias) in shared for bias in biases) else ""


def _sites(model: nn.Module, held: dict[int, Tensor]) -> Iterator[Site]:
    """Where biases could be corrected; the biases of each are its tensors."""
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if id(module) in inside:  # never called: its attention reads its weight
            continue
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield _output_site(name, name, module, lambda call: tokens(call.output, call.mask), held)
        elif isinstance(module, CONV + TRANSPOSED):
            yield _output_site(name, name, module, _channels_last(len(module.kernel_size)), held)
        elif isinstance(module, nn.MultiheadAttention):
            yield from _attention_sites(name, module, held)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            yield from recurrent_sites(name, module, held)


def _channels_last(axes: int) -> Callable[[Call], Tensor]:
    """Reads a convolution's outputs; those of an unbatched input have their channels first."""
    return lambda call: tokens(call.output.movedim(-1 - axes, -1))


def _output_site(
    name: str, called: str, layer: nn.Module, read: Callable[[Call], Tensor], held: dict[int, Tensor]
) -> Site:
    """A layer whose bias is added to what is read of the call of the module named `called`."""
    bias = layer._parameters.get("bias")

    def fold(module: nn.Module, dense: nn.Module, mine: Measured, target: Measured) -> list[str]:
        _shift(bias, target["output"].mean - mine["output"].mean.to(target["output"].mean.device), held)
        return [f"{name}.bias".lstrip(".")]

    return Site(name, called, [] if bias is None else [bias], lambda call: {"output": read(call)}, fold)


def _shift(bias: Any, by: Tensor, held: dict[int, Tensor]) -> None:
    put(bias, bias.detach().to(torch.float64) + by.to(bias.device), held)


def _attention_sites(name: str, attention: nn.MultiheadAttention, held: dict[int, Tensor]) -> Iterator[Site]:
    """First the projections of queries, keys and values, then, that done, the output projection."""
    bias: Tensor | None = attention._parameters.get("in_proj_bias")

    def read(call: Call) -> dict[str, Tensor]:
        found = inputs.attention(call, {"in_proj_weight"})["in_proj_weight"]
        return {part: one.x for part, one in zip("qkv", found, strict=True)}

    def read_output(call: Call) -> Tensor:
        return tokens(call.output[0], call.mask if attention.batch_first else None)

    def fold(module: nn.Module, dense: nn.Module, mine: Measured, target: Measured) -> list[str]:
        _shift(bias, _projected(dense, target) - _projected(module, mine), held)
        return [f"{name}.in_proj_bias".lstrip(".")]

    yield Site(f"{name}.in_proj".lstrip("."), name, [] if bias is None else [bias], read, fold)
    yield _output_site(f"{name}.out_proj".lstrip("."), name, attention.out_proj, read_output, held)


def _projected(module: Any, inputs: Measured) -> Tensor:
    """Means of queries, keys and values (3 x channels) for these means of what they are computed from, on the CPU."""
    if module.in_proj_weight is None:
        parts = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        parts = module.in_proj_weight.chunk(3)
    means = [w.detach().cpu().double() @ m.mean.cpu() for w, m in zip(parts, inputs.values(), strict=True)]
    offset: Tensor = module.in_proj_bias.detach().cpu().double()
    return torch.cat(means) + offset
