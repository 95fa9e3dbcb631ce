# SPDX-License-Identifier: Apache-2.0
"""Language models that read from left to right, of the library transformers, small."""

from __future__ import annotations

from typing import Any

from tests.zoo.architectures import Architecture, tokens, transformers_model
from tests.zoo.text import ENCODER

DECODER = {key: value for key, value in ENCODER.items() if key != "num_labels"}
GROUPED = {**DECODER, "num_key_value_heads": 2}
_SPARSE = {**GROUPED, "num_experts_per_tok": 2}


def _decoder(label: str, family: str, **options: Any) -> Architecture:
    return transformers_model(label, f"{family}ForCausalLM", f"{family}Config", tokens(), **options)


SHELF = (
    transformers_model(
        "gpt2", "GPT2LMHeadModel", "GPT2Config", tokens(), vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4
    ),
    transformers_model(
        "openai_gpt",
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTConfig",
        tokens(),
        vocab_size=97,
        n_positions=64,
        n_embd=48,
        n_layer=2,
        n_head=4,
    ),
    _decoder(
        "gpt_neo",
        "GPTNeo",
        vocab_size=97,
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        intermediate_size=80,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    ),
    _decoder("gpt_neox", "GPTNeoX", **DECODER),
    _decoder("gptj", "GPTJ", vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4, rotary_dim=4),
    _decoder("gpt_bigcode", "GPTBigCode", vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4),
    _decoder("codegen", "CodeGen", vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4, rotary_dim=4),
    _decoder(
        "opt",
        "OPT",
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=80,
        word_embed_proj_dim=48,
        max_position_embeddings=64,
    ),
    _decoder("bloom", "Bloom", vocab_size=97, hidden_size=48, n_layer=2, n_head=4),
    _decoder("llama", "Llama", **GROUPED),
    _decoder("mistral", "Mistral", **GROUPED, sliding_window=4),
    _decoder("qwen2", "Qwen2", **GROUPED),
    _decoder("qwen3", "Qwen3", **GROUPED, head_dim=16),
    _decoder("gemma", "Gemma", **{**GROUPED, "num_key_value_heads": 1}, head_dim=16),
    _decoder("gemma2", "Gemma2", **GROUPED, head_dim=16, query_pre_attn_scalar=16),
    transformers_model("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", tokens(), **GROUPED, head_dim=16),
    _decoder("phi", "Phi", **DECODER, partial_rotary_factor=0.5),
    _decoder("phi3", "Phi3", **GROUPED, pad_token_id=0),
    _decoder("falcon", "Falcon", vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
    _decoder("mpt", "Mpt", vocab_size=97, d_model=48, n_heads=4, n_layers=2, max_seq_len=64, expansion_ratio=2),
    _decoder(
        "stablelm",
        "StableLm",
        **GROUPED,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    _decoder("starcoder2", "Starcoder2", **GROUPED),
    _decoder("olmo2", "Olmo2", **GROUPED),
    _decoder("cohere", "Cohere", **GROUPED),
    _decoder("granite", "Granite", **GROUPED),
    _decoder("glm4", "Glm4", **GROUPED, head_dim=12, pad_token_id=0),
    _decoder("nemotron", "Nemotron", **GROUPED),
    _decoder("smollm3", "SmolLM3", **GROUPED, pad_token_id=0),
    _decoder(
        "xglm",
        "XGLM",
        vocab_size=97,
        d_model=48,
        num_layers=2,
        attention_heads=4,
        ffn_dim=80,
        max_position_embeddings=64,
    ),
    _decoder("biogpt", "BioGpt", **DECODER),
    _decoder("mixtral", "Mixtral", **_SPARSE, num_local_experts=3),
    _decoder("qwen3_moe", "Qwen3Moe", **_SPARSE, num_experts=3, moe_intermediate_size=40, head_dim=16),
    _decoder("olmoe", "Olmoe", **_SPARSE, num_experts=3),
    _decoder(
        "deepseek_v2",
        "DeepseekV2",
        **DECODER,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=16,
        n_routed_experts=3,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
    ),
    _decoder("mamba", "Mamba", vocab_size=97, hidden_size=48, state_size=8, num_hidden_layers=2, time_step_rank=6),
    _decoder(
        "mamba2",
        "Mamba2",
        vocab_size=97,
        hidden_size=48,
        state_size=8,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=12,
        n_groups=2,
        chunk_size=4,
    ),
    _decoder(
        "rwkv",
        "Rwkv",
        vocab_size=97,
        hidden_size=48,
        attention_hidden_size=48,
        num_hidden_layers=2,
        intermediate_size=80,
        context_length=64,
    ),
    _decoder("lfm2", "Lfm2", **GROUPED, layer_types=["conv", "full_attention"]),
)
