# SPDX-License-Identifier: Apache-2.0
"""Image classifiers of the library transformers, small."""

from __future__ import annotations

from typing import Any

from tests.zoo.architectures import Architecture, image, transformers_model

ENCODER: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}


def _classifier(label: str, family: str, **options: Any) -> Architecture:
    size = options.pop("pixels", 32)
    options.setdefault("num_labels", 7)
    return transformers_model(label, f"{family}ForImageClassification", f"{family}Config", image(size), **options)


SHELF = (
    _classifier("resnet", "ResNet", embedding_size=12, hidden_sizes=[16, 32, 40], depths=[1, 2, 1]),
    _classifier("bit", "Bit", embedding_size=16, hidden_sizes=[32, 64, 96], depths=[1, 2, 1], num_groups=4),
    _classifier("convnext", "ConvNext", hidden_sizes=[16, 24, 40], depths=[1, 2, 1], num_stages=3),
    _classifier("convnextv2", "ConvNextV2", hidden_sizes=[16, 24, 40], depths=[1, 2, 1], num_stages=3),
    _classifier("mobilenet_v1", "MobileNetV1", depth_multiplier=0.25, min_depth=4, pixels=40),
    _classifier("mobilenet_v2", "MobileNetV2", depth_multiplier=0.25, min_depth=4, pixels=40),
    _classifier(
        "efficientnet",
        "EfficientNet",
        width_coefficient=1.0,
        depth_coefficient=0.5,
        hidden_dim=1280,
        image_size=48,
        pixels=48,
        in_channels=[32, 8, 16, 24],
        out_channels=[8, 16, 24, 32],
        kernel_sizes=[3, 3, 5, 3],
        strides=[1, 2, 2, 1],
        num_block_repeats=[1, 2, 2, 1],
        expand_ratios=[1, 6, 6, 6],
    ),
    _classifier("regnet", "RegNet", embedding_size=12, hidden_sizes=[16, 32, 48], depths=[1, 2, 1], groups_width=8),
    _classifier(
        "regnet_x",
        "RegNet",
        embedding_size=12,
        hidden_sizes=[16, 32, 48],
        depths=[1, 1, 1],
        groups_width=8,
        layer_type="x",
    ),
    _classifier(
        "hgnet_v2",
        "HGNetV2",
        embedding_size=16,
        stem_channels=[3, 8, 16],
        stage_in_channels=[16, 24, 32],
        stage_mid_channels=[8, 12, 16],
        stage_out_channels=[24, 32, 48],
        stage_num_blocks=[1, 1, 1],
        stage_downsample=[False, True, True],
        stage_light_block=[False, False, True],
        stage_kernel_size=[3, 3, 5],
        stage_numb_of_layers=[2, 2, 3],
        depths=[1, 1, 1],
        hidden_sizes=[24, 32, 48],
        pixels=64,
    ),
    _classifier(
        "textnet",
        "TextNet",
        stem_out_channels=12,
        hidden_sizes=[12, 16, 24, 32, 40],
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 3]], [[3, 1]]],
        conv_layer_strides=[[1], [2, 1], [2], [2]],
        depths=[1, 2, 1, 1],
    ),
    _classifier(
        "focalnet",
        "FocalNet",
        embed_dim=24,
        depths=[1, 2],
        hidden_sizes=[24, 48],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        image_size=32,
        patch_size=4,
    ),
    _classifier("poolformer", "PoolFormer", hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], pixels=64),
    _classifier("swiftformer", "SwiftFormer", embed_dims=[16, 24, 32, 40], depths=[1, 1, 2, 1], pixels=64),
    _classifier("vit", "ViT", **ENCODER),
    _classifier("deit", "DeiT", **ENCODER),
    _classifier("beit", "Beit", **ENCODER, use_relative_position_bias=True),
    _classifier("data2vec_vision", "Data2VecVision", **ENCODER, use_shared_relative_position_bias=True),
    _classifier("dinov2", "Dinov2", **{**ENCODER, "mlp_ratio": 2}),
    _classifier("dinov2_registers", "Dinov2WithRegisters", **{**ENCODER, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    _classifier("ijepa", "IJepa", **ENCODER),
    _classifier("siglip", "Siglip", vision_config=ENCODER, text_config={**ENCODER, "vocab_size": 97}),
    _classifier(
        "swin", "Swin", embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=4, image_size=32, patch_size=2
    ),
    _classifier(
        "swinv2", "Swinv2", embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=4, image_size=32, patch_size=2
    ),
    _classifier(
        "pvt",
        "Pvt",
        image_size=64,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 24, 40, 48],
        num_attention_heads=[1, 2, 4, 4],
        sequence_reduction_ratios=[4, 2, 1, 1],
        mlp_ratios=[3, 3, 2, 2],
        pixels=64,
    ),
    _classifier(
        "pvt_v2",
        "PvtV2",
        image_size=64,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 24, 40, 48],
        num_attention_heads=[1, 2, 4, 4],
        mlp_ratios=[3, 3, 2, 2],
        pixels=64,
    ),
    _classifier(
        "levit",
        "Levit",
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 4, 2, 2, 2], ["Subsample", 8, 6, 2, 2, 2]],
        pixels=64,
    ),
    _classifier("cvt", "Cvt", embed_dim=[16, 32, 48], num_heads=[1, 2, 4], depth=[1, 2, 3], pixels=64),
    _classifier(
        "mobilevit",
        "MobileViT",
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 12, 16, 24, 32, 40, 48],
        num_attention_heads=4,
        pixels=64,
    ),
    _classifier(
        "mobilevitv2",
        "MobileViTV2",
        image_size=64,
        width_multiplier=0.5,
        pixels=64,
        base_attn_unit_dims=[32, 48, 64],
        n_attn_blocks=[1, 1, 1],
    ),
    _classifier(
        "hiera",
        "Hiera",
        embed_dim=24,
        image_size=[64, 64],
        patch_size=[7, 7],
        patch_stride=[4, 4],
        patch_padding=[3, 3],
        mlp_ratio=2.0,
        depths=[1, 1, 2],
        num_heads=[1, 2, 4],
        embed_dim_multiplier=2.0,
        num_query_pool=2,
        query_stride=[2, 2],
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, True, False],
        pixels=64,
    ),
)
