# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: outlier channels of activations are scaled down where they are made, and up in weights that read them.

"SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (Xiao et al. 2022, arXiv
2211.10438, equation 4): s_j = max|X_j|^α / max|W_j|^(1 - α). Weights have a scale for each row and bear it; activations
have one for the tensor. The factors go into the norm before (its weight and bias), or into the rows of the layer before
where a positive factor passes through what lies between: values only, and no operation is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.layers.calls import mask_of, quiet
from featherweight.layers.inputs import Call
from featherweight.quantize.links import Link, column_peaks, row_peaks, scale

__all__ = ["factors_of", "smooth"]


def factors_of(activations: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """s by channel (equation 4) from the largest magnitudes of both; 1 where either is zero.

    >>> factors_of(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 4.0]), alpha=0.5)
    tensor([4.0000, 0.5000])
    """
    even = (activations > 0) & (columns > 0)
    safe = torch.where(even, activations, 1.0).pow(alpha) / torch.where(even, columns, 1.0).pow(1 - alpha)
    return torch.where(even, safe, 1.0)


def smooth(
    model: nn.Module,
    links: Sequence[Link],
    batches: Iterable[Any],
    forward: Callable[[Any, Any], Any],
    alpha: float,
) -> float:
    """Smooths what links' readers read, in your model; its answers stay, to rounding. Returns the largest factor."""
    peaks = _peaks(model, links, batches, forward)
    largest = 1.0
    for link in links:
        if link.source not in peaks:
            continue
        count = len(row_peaks(model, link))
        activations = peaks[link.source].view(count, -1).amax(1)
        factors = factors_of(activations, column_peaks(model, link, count).to(activations.device), alpha)
        if scale(model, link, factors):
            largest = max(largest, float(factors.log().abs().amax().exp()))
    return largest


def _peaks(
    model: nn.Module, links: Sequence[Link], batches: Iterable[Any], forward: Callable[[Any, Any], Any]
) -> dict[str, Tensor]:
    """The largest magnitude by channel of what each link's readers read, over all batches, in float64."""
    found: dict[str, Tensor] = {}
    at: dict[str, Any] = {"mask": None}

    def watching(source: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = Call(module, args, kwargs, None).argument(0, "input").detach()
            mask = at["mask"]
            if mask is not None and x.ndim > 2 and x.shape[:2] == mask.shape:
                x = x[mask.to(x.device)]
            axis = -1 - len(getattr(module, "kernel_size", ()))  # a convolution's channels come before its space
            own = x.abs().movedim(axis, -1).flatten(0, -2).amax(0).double()
            found[source] = torch.maximum(found[source], own) if source in found else own

        return hook

    handles = [
        model.get_submodule(reader).register_forward_pre_hook(watching(link.source), with_kwargs=True)
        for link in links
        for reader in link.readers
    ]
    try:
        with quiet(model):
            for batch in batches:
                at["mask"] = mask_of(batch)
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
