# SPDX-License-Identifier: Apache-2.0
"""Where channels may be scaled: down in what makes them, up in weights that read them, and the model answers the same.

Found by following what a layer or norm gives, operation by operation, to layers that read it, through operations that a
positive factor for each channel passes through. Whether it truly does, channels in that order, is then proved: random
factors on a copy in float64 must leave the answer as it was. A link that does not pass is left out, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from featherweight.edits.effective import reshape_in_place
from featherweight.edits.exact import Exact, double, run
from featherweight.layers import Readers, Weight, from_matrix, read_by, to_matrix, weights

__all__ = [
    "Link",
    "column_peaks",
    "find_links",
    "is_norm",
    "row_peaks",
    "scale",
    "without",
]

_READS = ("linear", "transposed linear", "conv", "transposed conv")
# A positive factor for each channel passes through these as it is; where one mixes channels, the proof tells.
_PASSES = frozenset(
    [
        "relu",
        "relu_",
        "leaky_relu",
        "leaky_relu_",
        "_prelu_kernel",
        "threshold",
        "dropout",
        "native_dropout",
        "alias",
        "detach",
        "clone",
        "copy_",
        "_to_copy",
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "permute",
        "transpose",
        "t",
        "expand",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "unfold",
        "constant_pad_nd",
        "reflection_pad1d",
        "reflection_pad2d",
        "replication_pad1d",
        "replication_pad2d",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "max_pool1d_with_indices",
        "max_pool2d",
        "max_pool1d",
        "mkldnn_max_pool2d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "mean",
        "sum",
        "amax",
        "amin",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "mul",
        "mul_",
        "div",
        "div_",
        "bmm",
        "mm",
        "matmul",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
    ]
)
_PROOF = 1e-9


@dataclasses.dataclass(frozen=True)
class Link:
    """Channels that `source` makes and that the layers `readers` read, and nothing else does."""

    source: str
    readers: tuple[str, ...]


def is_norm(module: nn.Module) -> bool:
    """Whether a module scales channels by a weight of one axis, as LayerNorm, RMSNorm and their kin do."""
    weight = module._parameters.get("weight")
    return type(module).__name__.lower().endswith(("norm", "norm1d", "norm2d", "norm3d")) and (
        weight is not None and weight.ndim == 1
    )


def find_links(
    model: nn.Module,
    inputs: tuple[Any, ...],
    wanted: Callable[[str, nn.Module], bool],
    readers: Collection[str],
) -> tuple[tuple[Link, ...], dict[str, str]]:
    """The links from `wanted` modules to layers named in `readers`, proved on `inputs`; and why others are none.

    Changes nothing.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 1))
    >>> find_links(model, (torch.randn(4, 2),), lambda name, module: name in ("0", "2"), ["0", "2", "4"])
    ((Link(source='0', readers=('2',)),), {'2': 'gelu reads it'})
    """
    modules = dict(model.named_modules())
    sources = [name for name, module in modules.items() if wanted(name, module)]
    able = {w.layer for w in weights(model)[0] if w.kind in _READS and not w.aliases}
    shared = _shared(model)
    seen = read_by(model, lambda: model(*inputs))
    left: dict[str, str] = {}
    found: list[Link] = []
    for name in sources:
        if any(id(p) in shared for p in modules[name].parameters(recurse=False)):
            left[name] = "it shares a parameter with another layer"
            continue
        ends = _follow(seen, name, able)
        if isinstance(ends, str):
            left[name] = ends
        elif outside := [end for end in ends if end not in readers]:
            left[name] = f"{outside[0]}, which stays as it is, reads it"
        else:
            found.append(Link(name, ends))
    proved = _prove(model, inputs, found)
    left |= {link.source: "scaled channels change the answer" for link in found if link not in proved}
    return tuple(proved), left


def _shared(model: nn.Module) -> set[int]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _follow(seen: Readers, source: str, able: Collection[str]) -> tuple[str, ...] | str:
    """The layers in which all paths from the source end, or why they do not."""
    calls = seen.calls.get(source, ())
    if not calls:
        return "it was never called"
    took = {name: [call.took for call in calls] for name, calls in seen.calls.items()}
    scaled: set[int] = set()
    waiting: list[int] = []
    for call in calls:
        if call.gave is None:
            return "it gives more than one tensor"
        waiting.append(call.gave)
    ends: dict[str, None] = {}
    while waiting:
        tensor = waiting.pop()
        if tensor in scaled:
            continue
        scaled.add(tensor)
        if tensor in seen.answer:
            return "the model answers with it"
        for op in seen.of.get(tensor, ()):
            reader = next((name for name in reversed(op.modules) if name in able and name != source), None)
            if source in op.modules:
                continue
            if reader is not None and tensor in took[reader]:
                ends[reader] = None
            elif op.name in _PASSES:
                waiting += op.gives
            else:
                return f"{op.name.strip('_')} reads it"
    if not ends:
        return "no layer reads it"
    for end in ends:
        if not all(tensor in scaled for tensor in took[end]):
            return f"{end} reads other channels too"
    return tuple(ends)


def _prove(model: nn.Module, inputs: tuple[Any, ...], links: Sequence[Link]) -> list[Link]:
    """The links that can be scaled at will: all at once, and where that changes the answer, one by one."""
    if not links:
        return []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = _answer(double(model), inputs)

    def holds(some: Iterable[Link]) -> bool:
        twin = double(model)
        for link in some:
            count = _channels(twin, link)
            factors = 0.5 + 1.5 * torch.rand(count, generator=generator, dtype=torch.float64)
            if not scale(twin, link, factors.to(next(twin.parameters()).device)):
                return False
        with torch.no_grad():
            return all(_near(a, b) for a, b in zip(_answer(twin, inputs), expected, strict=True))

    if holds(links):
        return list(links)
    alone = [link for link in links if holds([link])]
    # Each by itself and not all together: two links that meet in one weight's channels. Keep what passes in turn.
    kept: list[Link] = []
    for link in alone:
        if holds([*kept, link]):
            kept.append(link)
    return kept


def _answer(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(run(model, inputs, Exact())) if isinstance(leaf, Tensor)]


def _near(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return (
        bool(((a - b).abs() <= _PROOF * b.abs().amax().clamp_min(1e-30)).all() | (a == b).all()) if b.numel() else True
    )


def _channels(model: nn.Module, link: Link) -> int:
    module = model.get_submodule(link.source)
    if is_norm(module):
        return len(module.get_parameter("weight"))
    [weight] = [w for w in weights(module)[0] if w.layer == ""][:1]
    return len(to_matrix(weight, weight.parameter))


@torch.no_grad()
def scale(model: nn.Module, link: Link, factors: Tensor) -> bool:
    """Divides the source's channels by `factors` and multiplies readers' columns, in your model; False if it cannot.

    Computed in float64 and rounded once. Zeros stay zeros.
    """
    readers = [(_weight(model, name), name) for name in link.readers]
    if any(weight is None or _input_channels(weight) % len(factors) for weight, _ in readers):
        return False
    module = model.get_submodule(link.source)
    if is_norm(module):
        rows = [module.get_parameter("weight")]
    else:
        weight = _weight(model, link.source)
        if weight is None:
            return False
        matrix = to_matrix(weight, weight.parameter.detach())
        _put(weight.parameter, from_matrix(weight, (matrix.double() / factors[:, None]).to(matrix.dtype)))
        rows = []
    bias = module._parameters.get("bias")
    for one in [*rows, *([] if bias is None else [bias])]:
        _put(one, (one.detach().double() / factors).to(one.dtype))
    for weight, _ in readers:
        if weight is not None:
            matrix = to_matrix(weight, weight.parameter.detach())
            # Channels of the source that became several columns (a flattened image) stand side by side.
            wide = factors.repeat_interleave(_input_channels(weight) // len(factors))
            by_group = wide.view(weight.groups, 1, 1, -1)
            split = matrix.double().view(weight.groups, len(matrix) // weight.groups, -1, weight.columns_per_tap)
            _put(weight.parameter, from_matrix(weight, (split * by_group).reshape(matrix.shape).to(matrix.dtype)))
    return True


def _put(parameter: Tensor, values: Tensor) -> None:
    # In its own memory layout: kernels go by strides, those of axes of one entry too.
    reshape_in_place(parameter, torch.empty_like(parameter).copy_(values))


def _weight(model: nn.Module, layer: str) -> Weight | None:
    """The weight of a layer of its own, as a matrix of that layer."""
    module = model.get_submodule(layer)
    return next((w for w in weights(module)[0] if w.layer == "" and w.kind in _READS), None)


def _input_channels(weight: Weight) -> int:
    return weight.columns_per_tap * weight.groups


def column_peaks(model: nn.Module, link: Link, count: int) -> Tensor:
    """The largest magnitude by channel of the link, over all its readers' columns, in float64."""
    peaks: Tensor | None = None
    for name in link.readers:
        weight = _weight(model, name)
        if weight is not None:
            matrix = to_matrix(weight, weight.parameter.detach()).double().abs()
            split = matrix.view(weight.groups, -1, weight.columns_per_tap).amax(1).flatten()
            own = split.view(count, -1).amax(1)
            peaks = own if peaks is None else torch.maximum(peaks, own)
    return torch.ones(count, dtype=torch.float64) if peaks is None else peaks


def row_peaks(model: nn.Module, link: Link) -> Tensor:
    """The largest magnitude by channel of the link's source, in float64."""
    weight = _weight(model, link.source)
    if weight is None:
        return model.get_submodule(link.source).get_parameter("weight").detach().double().abs()
    return to_matrix(weight, weight.parameter.detach()).double().abs().amax(1)


def without(links: Iterable[Link], touched: Mapping[str, str]) -> tuple[list[Link], dict[str, str]]:
    """The links none of whose layers is in `touched`, and the reason for each other."""
    kept, left = [], {}
    for link in links:
        reason = next((f"{n} {touched[n]}" for n in (link.source, *link.readers) if n in touched), "")
        if reason:
            left[link.source] = reason
        else:
            kept.append(link)
    return kept, left
