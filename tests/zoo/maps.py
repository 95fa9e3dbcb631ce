# SPDX-License-Identifier: Apache-2.0
"""Segmentation, depth, detection and video networks of the library transformers, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.zoo.architectures import Architecture, Inputs, image, transformers_model
from tests.zoo.vision import ENCODER

_RESNET = {"model_type": "resnet", "embedding_size": 12, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
_DETR: dict[str, Any] = {
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "num_queries": 5,
    "num_labels": 7,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}


def _backbone() -> Any:
    import transformers

    options = {key: value for key, value in _RESNET.items() if key != "model_type"}
    return transformers.ResNetConfig(**options, out_features=["stage4"])


def _frames() -> Inputs:
    return (torch.randn(2, 4, 3, 32, 32),)


def _map(label: str, family: str, task: str, example: Callable[[], Inputs], **options: Any) -> Architecture:
    return transformers_model(label, f"{family}For{task}", f"{family}Config", example, **options)


def _detector(label: str, family: str, **options: Any) -> Architecture:
    def build() -> torch.nn.Module:
        import transformers

        config = getattr(transformers, f"{family}Config")(**{**_DETR, **options}, backbone_config=_backbone())
        return getattr(transformers, f"{family}ForObjectDetection")(config)

    return Architecture(label, build, image(64), f"transformers: {family}ForObjectDetection")


def _video() -> torch.nn.Module:
    import transformers

    config = transformers.VideoMAEConfig(**ENCODER, num_frames=4, tubelet_size=2)
    return transformers.VideoMAEForVideoClassification(config)


SHELF = (
    _map(
        "segformer",
        "Segformer",
        "SemanticSegmentation",
        image(64),
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 24, 40, 48],
        num_attention_heads=[1, 2, 4, 4],
        sr_ratios=[4, 2, 1, 1],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=32,
        num_labels=7,
    ),
    _map(
        "upernet",
        "UperNet",
        "SemanticSegmentation",
        image(64),
        backbone_config={
            "model_type": "convnext",
            "hidden_sizes": [12, 16, 24, 40],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        hidden_size=32,
        pool_scales=[1, 2],
        auxiliary_in_channels=24,
        auxiliary_channels=16,
        num_labels=7,
    ),
    _map(
        "dpt",
        "DPT",
        "DepthEstimation",
        image(32),
        **{key: value for key, value in ENCODER.items() if key not in ("num_labels", "num_hidden_layers")},
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[12, 16, 24, 32],
        fusion_hidden_size=20,
    ),
    _map(
        "mobilenet_v2_deeplab",
        "MobileNetV2",
        "SemanticSegmentation",
        image(64),
        depth_multiplier=0.25,
        min_depth=4,
        num_labels=7,
    ),
    _map(
        "mobilevit_deeplab",
        "MobileViT",
        "SemanticSegmentation",
        image(64),
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 12, 16, 24, 32, 40, 48],
        aspp_out_channels=32,
        num_labels=7,
    ),
    _map(
        "glpn",
        "GLPN",
        "DepthEstimation",
        image(64),
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 24, 40, 48],
        num_attention_heads=[1, 2, 4, 4],
        sr_ratios=[4, 2, 1, 1],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=16,
    ),
    _map(
        "swin2sr",
        "Swin2SR",
        "ImageSuperResolution",
        image(32),
        image_size=32,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        upscale=2,
    ),
    _detector("detr", "Detr"),
    _detector("conditional_detr", "ConditionalDetr"),
    _map("yolos", "Yolos", "ObjectDetection", image(32), **{**ENCODER, "image_size": [32, 32]}, num_detection_tokens=5),
    _map("timesformer", "Timesformer", "VideoClassification", _frames, **{**ENCODER, "num_frames": 4}),
    Architecture("videomae", _video, _frames, "transformers: VideoMAEForVideoClassification"),
)
