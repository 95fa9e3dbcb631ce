# SPDX-License-Identifier: Apache-2.0
"""Every pattern of operations that couples channels, as a small network: `PATTERNS[name]`, `build(name)`.

The first 59 are those on which other libraries were measured; the rest are what real architectures add.
"""

from __future__ import annotations

from tests.graph import attentions, blocks, channels, convolutions, flow, recurrent, tokens, weights
from tests.graph.pattern import PATTERNS, Pattern, build

__all__ = ["MEASURED", "PATTERNS", "Pattern", "build", "files"]

files = (attentions, blocks, channels, convolutions, flow, recurrent, tokens, weights)

_TABLE = """
chain_flatten residual densecat cat_then_add cat_same_twice chunk_gate split_slice grouped_conv grouped_conv_expand
depthwise transposed se_block prelu interpolate_skip permute_linear tokens_flatten shared_conv shared_head_fpn
layerscale_param frozen_conv swiglu swiglu_fused_chunk attn_sep_matmul attn_sep_sdpa attn_fused_qkv stack_sum
window_partition cls_token_pos tied_embedding unused_branch
chunk_c2f depthwise_mult2 transposed_grouped instnorm_running pixel_shuffle pixel_unshuffle channel_shuffle flatten_hwc
gather_roll buffer_scale frozen_residual lstm gru mha_module batchnorm1d_over_tokens attn_static_attrs gqa_repeat
gqa_enable patch_merging weight_norm
functional_conv cbam_channel_statistics groupnorm nonzero_act
manual_pixelshuffle mlp_mixer yolo_c2f_sppf shufflenet_unit swin_shift
"""
MEASURED = tuple(_TABLE.split())
