# SPDX-License-Identifier: Apache-2.0
"""Speech, and pairs of image and text, of the library transformers, small."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.architectures import Inputs, named, signal, tokens, transformers_model, words
from tests.zoo.text import ENCODER as TEXT
from tests.zoo.text import SEQ2SEQ
from tests.zoo.vision import ENCODER as VISION

SPEECH: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "conv_dim": [16, 24, 32],
    "conv_stride": [5, 4, 2],
    "conv_kernel": [10, 5, 3],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 20,
    "num_labels": 7,
    "vocab_size": 29,
}


def _spectrum(mels: int, frames: int) -> torch.Tensor:
    return torch.randn(2, mels, frames)


def _pair() -> Inputs:
    return {"input_ids": words(8), "pixel_values": torch.randn(2, 3, 32, 32)}


PROJECTION = {
    "text_config": {**TEXT, "projection_dim": 20},
    "vision_config": {**VISION, "projection_dim": 20},
    "projection_dim": 20,
}

SHELF = (
    transformers_model(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        named(input_features=lambda: _spectrum(16, 40), decoder_input_ids=lambda: words(6)),
        **{
            **SEQ2SEQ,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "num_mel_bins": 16,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            "eos_token_id": 1,
            "bos_token_id": 1,
        },
    ),
    transformers_model("wav2vec2", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", signal(800), **SPEECH),
    transformers_model(
        "wav2vec2_ctc",
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        signal(800),
        **{**SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    ),
    transformers_model("hubert", "HubertForSequenceClassification", "HubertConfig", signal(800), **SPEECH),
    transformers_model("wavlm", "WavLMForSequenceClassification", "WavLMConfig", signal(800), **SPEECH),
    transformers_model("sew", "SEWForSequenceClassification", "SEWConfig", signal(1600), **SPEECH, squeeze_factor=2),
    transformers_model(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        named(input_features=lambda: torch.randn(2, 40, 16), decoder_input_ids=lambda: words(6)),
        **{
            **SEQ2SEQ,
            "max_source_positions": 64,
            "max_target_positions": 32,
            "input_feat_per_channel": 16,
            "conv_channels": 40,
            "num_conv_layers": 2,
            "conv_kernel_sizes": [5, 3],
        },
    ),
    transformers_model(
        "moonshine",
        "MoonshineForConditionalGeneration",
        "MoonshineConfig",
        named(input_values=lambda: torch.randn(2, 4000), decoder_input_ids=lambda: words(6)),
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        max_position_embeddings=64,
    ),
    transformers_model(
        "sam_vision",
        "SamVisionModel",
        "SamVisionConfig",
        lambda: (torch.randn(2, 3, 64, 64),),
        hidden_size=48,
        output_channels=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=80,
    ),
    transformers_model(
        "perceiver",
        "PerceiverForSequenceClassification",
        "PerceiverConfig",
        tokens(),
        num_latents=6,
        d_latents=40,
        d_model=48,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        vocab_size=97,
        max_position_embeddings=16,
        num_labels=7,
    ),
    transformers_model(
        "audio_spectrogram",
        "ASTForAudioClassification",
        "ASTConfig",
        lambda: (torch.randn(2, 40, 32),),
        **{**VISION, "max_length": 40, "num_mel_bins": 32, "time_stride": 6, "frequency_stride": 6},
    ),
    transformers_model(
        "encodec",
        "EncodecModel",
        "EncodecConfig",
        lambda: (torch.randn(2, 1, 320),),
        num_filters=8,
        hidden_size=24,
        upsampling_ratios=[4, 2],
        codebook_size=32,
        codebook_dim=24,
        num_lstm_layers=1,
        target_bandwidths=[24.0],
    ),
    transformers_model("clip", "CLIPModel", "CLIPConfig", _pair, **PROJECTION),
    transformers_model(
        "siglip_pair",
        "SiglipModel",
        "SiglipConfig",
        _pair,
        text_config={**TEXT, "projection_size": 48},
        vision_config=VISION,
    ),
    transformers_model(
        "clipseg",
        "CLIPSegForImageSegmentation",
        "CLIPSegConfig",
        _pair,
        **PROJECTION,
        reduce_dim=16,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=40,
        extract_layers=[0, 1],
        num_hidden_layers=2,
    ),
    transformers_model(
        "vilt",
        "ViltForQuestionAnswering",
        "ViltConfig",
        _pair,
        **{**VISION, **TEXT, "modality_type_vocab_size": 2, "max_image_length": -1},
    ),
    transformers_model(
        "blip_caption",
        "BlipForConditionalGeneration",
        "BlipConfig",
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": words(6)},
        text_config={**TEXT, "encoder_hidden_size": 48, "bos_token_id": 1, "pad_token_id": 0, "sep_token_id": 2},
        vision_config=VISION,
    ),
    transformers_model(
        "decision_transformer",
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        lambda: {
            "states": torch.randn(2, 5, 11),
            "actions": torch.randn(2, 5, 3),
            "rewards": torch.randn(2, 5, 1),
            "returns_to_go": torch.randn(2, 5, 1),
            "timesteps": torch.arange(5).repeat(2, 1),
            "attention_mask": torch.ones(2, 5),
        },
        state_dim=11,
        act_dim=3,
        hidden_size=48,
        max_ep_len=32,
        n_layer=2,
        n_head=4,
    ),
    transformers_model(
        "patchtst",
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        lambda: (torch.randn(2, 32, 3),),
        num_input_channels=3,
        context_length=32,
        patch_length=4,
        patch_stride=4,
        d_model=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=80,
        prediction_length=6,
    ),
)
