# SPDX-License-Identifier: Apache-2.0
"""`slice`: keeps some positions along one axis of one tensor, and sets the size attributes that follow from it.

Saves what the dropped positions cost: bytes, memory, MACs and time in every runtime. One cut of a channel is several
slices, one for each tensor that has the channel on an axis; between them the model does not run. Whatever follows from
no tensor (the shape of a LayerNorm without weights, a number in a `view`) stays as it was: `attribute` sets it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from featherweight.edits.effective import find_effective, is_computed, put, reshape_in_place
from featherweight.edits.self_attention import SelfAttention
from featherweight.edits.swap import Attention
from featherweight.errors import EditError
from featherweight.plan import Slice

__all__ = ["apply_slice"]


def apply_slice(model: nn.Module, edit: Slice) -> None:
    """Cuts the tensor in place, its gradient too, and sets the sizes of every module that holds it."""
    owner, leaf, tensor = find_effective(model, edit.tensor)
    axis, keep = edit.axis, edit.keep
    if not 0 <= axis < tensor.ndim:
        raise EditError(f"{edit.tensor} has shape {tuple(tensor.shape)}, which has no axis {axis}.")
    if not keep or any(a >= b for a, b in itertools.pairwise(keep)) or keep[0] < 0 or keep[-1] >= tensor.shape[axis]:
        raise EditError(
            f"{edit.tensor}: keep must be ascending positions below {tensor.shape[axis]}, at least one; got {_short(keep)}."
        )
    # All that may be refused is worked out before anything is changed.
    if is_computed(owner, leaf):
        changes = [(owner, _sizes(owner, leaf, tensor.shape, edit))]
        index = torch.tensor(keep, device=tensor.device)
        put(owner, leaf, tensor.index_select(axis, index), edit.tensor, axis, index)
    else:
        changes = [
            (module, _sizes(module, name, tensor.shape, edit))
            for module in model.modules()
            for name in _leaves(module, tensor)
        ] + _attention_sizes(model, tensor, edit)
        _cut(tensor, axis, keep)
    for module, sizes in changes:
        for name, value in sizes.items():
            setattr(module, name, value)


def _leaves(module: nn.Module, tensor: Tensor) -> list[str]:
    return [name for held in (module._parameters, module._buffers) for name, t in held.items() if t is tensor]


@torch.no_grad()
def _cut(tensor: Tensor, axis: int, keep: tuple[int, ...]) -> None:
    index = torch.tensor(keep, device=tensor.device)
    values, gradient = tensor.data.index_select(axis, index), tensor.grad
    reshape_in_place(tensor, values)
    tensor.grad = None if gradient is None else gradient.index_select(axis, index)


def _sizes(module: nn.Module, leaf: str, old: Sequence[int], edit: Slice) -> dict[str, Any]:
    """The module's size attributes that follow from cutting its tensor `leaf`, which had the shape `old`."""
    shape = list(old)
    shape[edit.axis] = len(edit.keep)
    if isinstance(module, nn.MultiheadAttention):
        raise EditError(
            f"{edit.tensor}: the sizes of a {type(module).__name__} are tied to each other in its forward; swap in "
            "'attention' first."
        )
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _recurrent_sizes(module, leaf, old[0], edit)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(shape)}
    if isinstance(module, _NormBase):
        return {"num_features": shape[0]}
    if leaf != "weight":
        return {}
    if isinstance(module, nn.Bilinear):
        return dict(zip(("out_features", "in1_features", "in2_features"), shape, strict=True))
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, _ConvNd):
        return _conv_sizes(module, shape, old[0], edit)
    if isinstance(module, nn.GroupNorm):
        groups = _groups_left(edit, module.num_channels // module.num_groups, "GroupNorm groups")
        return {"num_channels": shape[0], "num_groups": groups}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        sizes: dict[str, Any] = {"num_embeddings": shape[0], "embedding_dim": shape[1]}
        if edit.axis == 0 and module.padding_idx is not None:
            if module.padding_idx not in edit.keep:
                raise EditError(f"{edit.tensor}: entry {module.padding_idx} is the padding; keep it.")
            sizes["padding_idx"] = edit.keep.index(module.padding_idx)
        return sizes
    return {"num_parameters": shape[0]} if isinstance(module, nn.PReLU) else {}


def _conv_sizes(conv: _ConvNd, shape: list[int], rows: int, edit: Slice) -> dict[str, Any]:
    """Axis 0 (outputs; of a transposed conv, inputs) runs through the conv groups, axis 1 within each of them."""
    if edit.axis > 1:
        raise EditError(f"{edit.tensor}: axis {edit.axis} is of the kernel; slice cuts channels.")
    groups = conv.groups
    if edit.axis == 0 and groups > 1:
        groups = _groups_left(edit, rows // groups, "conv groups")
    through, within = ("in", "out") if isinstance(conv, _ConvTransposeNd) else ("out", "in")
    return {f"{through}_channels": shape[0], f"{within}_channels": shape[1] * groups, "groups": groups}


def _recurrent_sizes(module: nn.RNNBase | nn.RNNCellBase, leaf: str, rows: int, edit: Slice) -> dict[str, Any]:
    """Rows (and biases) are one run of hidden units for each gate; a projection's rows are its own. The sizes are read
    from the axes that the forward contracts, which every layer and direction must share in the end."""
    projection = getattr(module, "proj_size", 0) > 0
    if edit.axis == 0 and "_hr" not in leaf:
        gates = 4 if isinstance(module, nn.LSTM | nn.LSTMCell) else 3 if isinstance(module, nn.GRU | nn.GRUCell) else 1
        hidden = rows // gates
        kept = [{p % hidden for p in edit.keep if p // hidden == gate} for gate in range(gates)]
        if any(units != kept[0] for units in kept):
            raise EditError(
                f"{edit.tensor}: {_short(edit.keep)} keeps other hidden units in one of its {gates} gates than in "
                f"another; a unit is the positions h, {hidden} + h, and so on."
            )
        return {}
    if leaf in ("weight_ih_l0", "weight_ih") and edit.axis == 1:
        return {"input_size": len(edit.keep)}
    if leaf.startswith("weight_hh"):
        return {"proj_size" if projection else "hidden_size": len(edit.keep)}
    if leaf.startswith("weight_hr"):
        return {"proj_size" if edit.axis == 0 else "hidden_size": len(edit.keep)}
    return {}


def _groups_left(edit: Slice, size: int, what: str) -> int:
    """How many groups of `size` positions are left, after making sure that each has the same number: no position may
    come to stand in another's group."""
    kept = Counter(position // size for position in edit.keep)
    if len(set(kept.values())) > 1:
        raise EditError(
            f"{edit.tensor}: {_short(edit.keep)} keeps {min(kept.values())} to {max(kept.values())} positions of the "
            f"{what} of {size}; keep the same number in each, or drop whole ones."
        )
    return len(kept)


def _attention_sizes(model: nn.Module, tensor: Tensor, edit: Slice) -> list[tuple[nn.Module, dict[str, Any]]]:
    """What an attention must be told of a cut of its projections, which are layers of their own."""
    changes: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and _leaves(module.out_proj, tensor):
            raise EditError(
                f"{edit.tensor} is read by its attention, which is of one width; swap in 'attention' first."
            )
        if isinstance(module, Attention) and edit.axis == 0:
            for part in ("q", "k", "v"):
                layer, size = getattr(module, part), f"{part}_size"
                rows = layer[-1].weight if isinstance(layer, nn.Sequential) else layer.weight  # factored, or not
                if rows is tensor:
                    left = _groups_left(edit, getattr(module, size), "attention heads")
                    changes.append(
                        (module, {size: len(edit.keep) // left} | ({"num_heads": left} if part == "q" else {}))
                    )
        if isinstance(module, SelfAttention) and edit.axis == 0:
            fused = module.get_submodule(module.fused_name)
            if getattr(fused, "weight", None) is tensor:
                changes.append((module, _fused_sizes(module, edit)))
    return changes


def _fused_sizes(module: SelfAttention, edit: Slice) -> dict[str, Any]:
    """Whole heads may go, with their queries, keys and values, and the same number of positions in each that stays."""
    kept = Counter(module.part_and_head(row) for row in edit.keep)
    heads = {head for _, head in kept}
    sizes = {part: {kept[part, head] for head in heads} for part in ("q", "k", "v")}
    if any(len(size) > 1 for size in sizes.values()) or sizes["q"] != sizes["k"] or {0} in sizes.values():
        raise EditError(
            f"{edit.tensor}: {_short(edit.keep)} does not keep the same number of queries, keys and values in each "
            f"attention head that it keeps; there are {module.num_heads} heads."
        )
    return {"num_heads": len(heads), "qk_size": sizes["q"].pop(), "v_size": sizes["v"].pop()}


def _short(keep: tuple[int, ...]) -> str:
    return repr(keep) if len(keep) <= 8 else f"({', '.join(map(str, keep[:4]))}, ... {keep[-1]}), {len(keep)} positions"
