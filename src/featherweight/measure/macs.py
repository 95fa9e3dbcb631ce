# SPDX-License-Identifier: Apache-2.0
"""MACs by torch's own formulas (`torch.utils.flop_counter`), op by op as they run, each credited to its module.

torch's counter alone is not enough for deployed models: on a CPU it sees 0 FLOPs in an LSTM (one fused op a layer), in
scaled_dot_product_attention, in MultiheadAttention's fast path and in a matrix times a vector. Here those ops have
formulas too, the fast path is off while counting, and what had work to do but no formula is listed, never guessed.

Each product also knows whether an operand is made of weights alone (a parameter, a view of one, a mask times one): the
share of its non-zeros, and the bits of the grids that weight and input lie on, are what BOPs are counted from. Products
of activations count in full.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from featherweight.measure.bits import Products
from featherweight.measure.copies import higher_order, run_once

__all__ = ["Work", "count_work"]

aten = torch.ops.aten


@dataclasses.dataclass
class Work:
    """What one forward did: MACs and BOPs by module name ("" is the model), and calls of ops without a formula."""

    macs: Counter[str] = dataclasses.field(default_factory=Counter)
    bops: Counter[str] = dataclasses.field(default_factory=Counter)
    uncounted: Counter[str] = dataclasses.field(default_factory=Counter)


def count_work(model: nn.Module, example_inputs: tuple[Any, ...], formats: Mapping[str, str] | None = None) -> Work:
    """Runs the model once and counts. Give an `eval_copy`: hooks stay on it, and a forward may change it."""
    counter = _Counter(model, formats)
    _keep_stack(model, counter.stack)
    with _plain_kernels(), counter:
        run_once(model, example_inputs)
    return counter.work


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """MultiheadAttention and TransformerEncoderLayer as products to be counted, compiled regions as eager code."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # Nothing is compiled unless dynamo is loaded, and loading it to say "do not compile" takes a second.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _keep_stack(model: nn.Module, stack: list[str]) -> None:
    """Keeps the qualified names of the running modules on `stack`, innermost last; a shared one by its first."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks: its work is its caller's
            continue
        module.register_forward_pre_hook(lambda *_, name=name: stack.append(name))
        module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every op below autograd, where composite ops are already taken apart."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, formats: Mapping[str, str] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()
        self._bits = Products(model, formats)
        self.stack = [""]
        # Storages whose values come of weights alone (True) or of nothing at all, as torch.zeros does (False). Each is
        # kept alive, or its address could be taken by an activation. Whatever is not in here depends on an input.
        self._made_of_weights: dict[int, tuple[bool, Any]] = {}
        self._nonzero: dict[tuple[Any, ...], float] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._mark(tensor, True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            if func is not torch.ops.higher_order.cond:
                self.work.uncounted[str(func)] += 1
            return higher_order(self, func, args, kwargs)
        packet = func._overloadpacket
        if packet not in _CONTRACTIONS:
            with self:  # under inference_mode composite ops arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if packet in _CONTRACTIONS:
            for macs, operands in _CONTRACTIONS[packet](args, kwargs, out):
                self._credit(macs, operands)
        elif not _free_of_macs(func):
            self.work.uncounted[str(packet).replace("aten.", "", 1)] += 1
        self._follow(args, kwargs, out)
        return out

    def _credit(self, macs: int, operands: tuple[Tensor, ...]) -> None:
        layer = self.stack[-1]
        own = [t for t in operands if self._origin(t)]
        share = min((self._nonzero_share(t) for t in own), default=1.0)
        bits = min(self._bits.weight(t) for t in own or operands)
        read = min((self._bits.input(layer, t) for t in own), default=32)
        self.work.macs[layer] += macs
        self.work.bops[layer] += round(bits * macs * share * min(read, 32) / 32)

    def _nonzero_share(self, tensor: Tensor) -> float:
        key = (_address(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
        if key not in self._nonzero:
            self._nonzero[key] = float(torch.count_nonzero(tensor)) / max(tensor.numel(), 1)
        return self._nonzero[key]

    def _origin(self, tensor: Tensor) -> bool | None:
        return self._made_of_weights.get(_address(tensor), (None,))[0]

    def _follow(self, args: Any, kwargs: Any, out: Any) -> None:
        origins = [self._origin(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._mark(tensor, None if None in origins else any(origins))

    def _mark(self, tensor: Tensor, weights: bool | None) -> None:
        address = _address(tensor)
        if weights is None:
            self._made_of_weights.pop(address, None)
        elif address:
            self._made_of_weights[address] = (weights, tensor.untyped_storage())


def _address(tensor: Tensor) -> int:
    """A key for the tensor's memory that is there on every device, 0 for what has none of its own (sparse, nested)."""
    try:
        return cast(int, tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


# Each takes (args, kwargs, output) and gives (MACs, the tensors that are multiplied) for each product in the op.
Formula = Callable[[Any, Any, Any], list[tuple[int, tuple[Tensor, ...]]]]


def _torchs(packet: Any, *operands: int) -> Formula:
    def formula(args: Any, kwargs: Any, out: Any) -> list[tuple[int, tuple[Tensor, ...]]]:
        return [(flop_registry[packet](*args, **kwargs, out_val=out) // 2, tuple(args[i] for i in operands))]

    return formula


def _every_entry_once(matrix: int, vector: int) -> Formula:
    """A matrix times a vector, a vector times a vector."""
    return lambda args, kwargs, out: [(args[matrix].numel(), (args[matrix], args[vector]))]


def _attention(args: Any, kwargs: Any, out: Any) -> list[tuple[int, tuple[Tensor, ...]]]:
    """softmax(q k^T) v, in full whatever the mask; grouped queries share keys but each has its own product."""
    query, key, value = args[:3]
    pairs = prod(query.shape[:-1]) * key.shape[-2]
    return [(pairs * query.shape[-1], (query, key)), (pairs * value.shape[-1], (value,))]


def _bilinear(args: Any, kwargs: Any, out: Any) -> list[tuple[int, tuple[Tensor, ...]]]:
    """x1^T W x2: as torch.nn.Bilinear calls it, every weight once a row of the output."""
    weight = args[1]
    return [(weight.numel() * (out.numel() // out.shape[-1]), (weight,))]


def _fused_rnn(weights: Callable[[Any], list[Tensor]]) -> Formula:
    """One or more recurrent layers in one op: every entry of every matrix once a time step and sequence."""

    def formula(args: Any, kwargs: Any, out: Any) -> list[tuple[int, tuple[Tensor, ...]]]:
        steps = args[0].numel() // args[0].shape[-1]
        return [(steps * matrix.numel(), (matrix,)) for matrix in weights(args) if matrix.ndim == 2]

    return formula


_CONTRACTIONS: dict[Any, Formula] = {
    **{packet: _torchs(packet, 0, 1) for packet in (aten.mm, aten.bmm, aten._scaled_mm)},
    **{packet: _torchs(packet, 1, 2) for packet in (aten.addmm, aten.baddbmm)},
    **{packet: _torchs(packet, 1) for packet in (aten.convolution, aten._convolution, aten.cudnn_convolution)},
    aten.mv: _every_entry_once(0, 1),
    aten.dot: _every_entry_once(0, 1),
    aten.vdot: _every_entry_once(0, 1),
    aten.addmv: _every_entry_once(1, 2),
    aten.addbmm: lambda args, kwargs, out: [(args[1].numel() * args[2].shape[-1], (args[1], args[2]))],
    aten._int_mm: lambda args, kwargs, out: [(args[0].numel() * args[1].shape[-1], (args[0], args[1]))],
    aten._trilinear: _bilinear,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten.mkldnn_rnn_layer: _fused_rnn(lambda args: list(args[1:5])),
    aten._cudnn_rnn: _fused_rnn(lambda args: list(args[1])),
    aten.miopen_rnn: _fused_rnn(lambda args: list(args[1])),
}

# Work without multiply-adds, by convention: norms, softmax, pooling, look-ups, sorting, interpolation and moving data.
# Element-wise ops and reductions need no entry: torch tags them.
_FREE_NAMES = """
native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
cudnn_batch_norm miopen_batch_norm _batch_norm_no_update _batch_norm_with_update _fused_rms_norm _weight_norm_interface
renorm embedding_renorm
_softmax _log_softmax _safe_softmax _masked_softmax log_sigmoid_forward glu _prelu_kernel _thnn_fused_lstm_cell
_thnn_fused_gru_cell native_dropout _fused_dropout bernoulli multinomial rrelu_with_noise rrelu_with_noise_functional
max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d fractional_max_pool2d
fractional_max_pool3d max_unpool2d max_unpool3d
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa
embedding _embedding_bag _embedding_bag_forward_only gather index _unsafe_index _unsafe_masked_index index_select
index_add index_copy index_fill index_put _index_put_impl _unsafe_index_put index_reduce take put scatter scatter_add
scatter_reduce masked_fill masked_scatter masked_select select_scatter slice_scatter diagonal_scatter
as_strided_scatter nonzero nonzero_static one_hot
sort topk kthvalue median nanmedian mode cumsum cumprod cummax cummin logcumsumexp _cummax_helper _cummin_helper
searchsorted bucketize unique_dim unique_consecutive _unique _unique2 bincount histc isin trace
cat stack block_diag clone copy fill zero constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d repeat repeat_interleave roll rot90 flip tril triu tril_indices
triu_indices diag_embed pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im unsafe_split
unsafe_split_with_sizes _unsafe_view _reshape_alias _to_copy lift lift_fresh _pack_padded_sequence
resize resize_as set _local_scalar_dense is_same_size
arange range linspace logspace eye empty empty_like empty_strided empty_permuted full full_like ones ones_like zeros
zeros_like new_empty new_empty_strided new_full new_ones new_zeros scalar_tensor rand rand_like randn randn_like
randint randint_like randperm normal uniform random exponential complex polar hann_window hamming_window
_assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async sym_constrain_range
sym_constrain_range_for_size _fused_sdp_choice
"""
_FREE = frozenset(_FREE_NAMES.split())


def _free_of_macs(func: OpOverload) -> bool:
    namespace, _, name = func._schema.name.partition("::")
    if namespace == "prim":
        return True
    if namespace != "aten":
        return False
    base = name.removesuffix("_")
    overloads = [func]
    if base != name and hasattr(aten, base):  # in-place twins do not always carry the tag
        packet = getattr(aten, base)
        overloads += [getattr(packet, overload) for overload in packet.overloads()]
    tags = {tag for overload in overloads for tag in overload.tags}
    return (
        base in _FREE or bool(tags & {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.inplace_view}) or func.is_view
    )
