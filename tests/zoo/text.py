# SPDX-License-Identifier: Apache-2.0
"""Encoders and encoder-decoders for text of the library transformers, small."""

from __future__ import annotations

from typing import Any

from tests.zoo.architectures import Architecture, named, tokens, transformers_model, words

ENCODER: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "num_labels": 7,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def _encoder(label: str, family: str, task: str = "SequenceClassification", **options: Any) -> Architecture:
    return transformers_model(label, f"{family}For{task}", f"{family}Config", tokens(), **{**ENCODER, **options})


def _seq2seq(label: str, model: str, config: str, **options: Any) -> Architecture:
    example = named(input_ids=lambda: words(9), decoder_input_ids=lambda: words(6))
    return transformers_model(label, model, config, example, **options)


SHELF = (
    _encoder("bert", "Bert"),
    _encoder("bert_masked", "Bert", "MaskedLM"),
    _encoder("roberta", "Roberta"),
    _encoder("albert", "Albert", embedding_size=24, num_hidden_groups=1),
    transformers_model(
        "distilbert",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        tokens(),
        vocab_size=97,
        dim=48,
        n_layers=2,
        n_heads=4,
        hidden_dim=80,
        max_position_embeddings=64,
        num_labels=7,
    ),
    _encoder("electra", "Electra", embedding_size=24),
    _encoder("deberta", "Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder("deberta_v2", "DebertaV2", relative_attention=True, position_buckets=8, pos_att_type=["c2p", "p2c"]),
    _encoder("mpnet", "MPNet"),
    _encoder("squeezebert", "SqueezeBert", embedding_size=48),
    _encoder("mobilebert", "MobileBert", embedding_size=24, intra_bottleneck_size=24, num_feedforward_networks=2),
    _encoder("convbert", "ConvBert", embedding_size=24),
    transformers_model(
        "funnel",
        "FunnelForSequenceClassification",
        "FunnelConfig",
        tokens(),
        vocab_size=97,
        num_labels=7,
        d_model=48,
        block_sizes=[1, 1],
        n_head=4,
        d_head=12,
        d_inner=80,
    ),
    _encoder("fnet", "FNet"),
    _encoder("nystromformer", "Nystromformer", num_landmarks=3, segment_means_seq_len=9, conv_kernel_size=3),
    _encoder("longformer", "Longformer", attention_window=[4, 4], pad_token_id=1),
    _encoder("big_bird", "BigBird", attention_type="original_full"),
    _encoder("ibert", "IBert", quant_mode=False),
    _encoder("roformer", "RoFormer"),
    _encoder("rembert", "RemBert", input_embedding_size=24, output_embedding_size=32),
    _encoder(
        "modernbert", "ModernBert", pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    _encoder("esm", "Esm", pad_token_id=1, mask_token_id=2, position_embedding_type="rotary"),
    transformers_model(
        "xlnet",
        "XLNetForSequenceClassification",
        "XLNetConfig",
        tokens(),
        vocab_size=97,
        d_model=48,
        n_layer=2,
        n_head=4,
        d_inner=80,
        num_labels=7,
    ),
    _seq2seq(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=97,
        d_model=48,
        d_kv=8,
        d_ff=80,
        num_layers=2,
        num_heads=4,
    ),
    _seq2seq(
        "t5_gated",
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=97,
        d_model=48,
        d_kv=8,
        d_ff=80,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    _seq2seq("bart", "BartForConditionalGeneration", "BartConfig", **SEQ2SEQ),
    _seq2seq("marian", "MarianMTModel", "MarianConfig", **SEQ2SEQ),
    _seq2seq("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", **SEQ2SEQ),
    _seq2seq(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        vocab_size=97,
        hidden_size=48,
        encoder_ffn_dim=80,
        decoder_ffn_dim=72,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        max_position_embeddings=64,
        ngram=2,
    ),
)
