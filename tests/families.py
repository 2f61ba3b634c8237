"""One tiny model of every family, in our words and in transformers'. Neither is made from the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

from camelid.model.config import DynamicScaling, LinearScaling, LongRopeScaling, ModelConfig, YarnScaling
from tiny import LLAMA3, llama_twin_config, tiny_config

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
RMS = {"rms_norm_eps": 1e-5}
GEMMA = {"norm_offset": 1.0, "activation": "gelu_tanh", "embed_scale": 48**0.5, "tie_embeddings": True}
SHORT, LONG = [1.0, 1.25, 1.5, 2.0], [1.0, 2.5, 6.0, 12.0]


@dataclass(frozen=True)
class Family:
    ours: ModelConfig
    theirs: Callable[[], transformers.PreTrainedConfig]
    grows: bool = False
    """whether rotations depend on how long the text gets"""


def llama(**ours: Any) -> Family:
    """A Llama whose words in transformers tiny.py writes."""
    config = tiny_config(**ours)
    return Family(config, lambda: llama_twin_config(config))


def family(cls: str, theirs: dict[str, Any], ours: dict[str, Any], *, grows: bool = False) -> Family:
    """A family with SIZES; what `theirs` gives as `...` is left out."""
    given = {name: value for name, value in (SIZES | theirs).items() if value is not ...}
    return Family(tiny_config(**ours), lambda: getattr(transformers, cls)(**given), grows)


def scaled(kind: Any, rope: dict[str, Any], *, grows: bool = False) -> Family:
    """A Llama of another rope scaling."""
    theirs = RMS | {"rope_parameters": {"rope_theta": 10_000.0} | rope}
    return family("LlamaConfig", theirs, {"rope_scaling": kind, "context_length": 64}, grows=grows)


FAMILIES = {
    "llama, grouped queries, heads wider than embed": llama(),
    "llama, every head its own keys, heads as wide as embed": llama(num_kv_heads=6, head_dim=8),
    "llama, one key head for all, tied": llama(num_kv_heads=1, tie_embeddings=True),
    "llama, rope_theta and norm_eps": llama(rope_theta=500.0, norm_eps=0.05),
    "llama, llama3 scaling beyond the original context, tied": llama(
        rope_scaling=LLAMA3, rope_theta=500_000.0, tie_embeddings=True
    ),
    "llama, biases": family(
        "LlamaConfig",
        RMS | {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    ),
    "llama, linear scaling": scaled(LinearScaling(factor=3.0), {"rope_type": "linear", "factor": 3.0}),
    "llama, yarn": scaled(
        YarnScaling(factor=4.0, original_context=16),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "llama, dynamic scaling beyond the context": Family(
        tiny_config(rope_scaling=DynamicScaling(factor=4.0), context_length=16),
        lambda: transformers.LlamaConfig(
            **SIZES
            | RMS
            | {"max_position_embeddings": 16}
            | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}}
        ),
        grows=True,
    ),
    "mistral, sliding window": family("MistralConfig", RMS | {"sliding_window": 7}, {"sliding_window": 7}),
    "mistral, none": family("MistralConfig", RMS | {"sliding_window": None}, {}),
    "qwen2, windows in later layers": family(
        "Qwen2Config",
        RMS | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
        {"qkv_bias": True, "sliding_window": 7, "window_pattern": (False, False, False, True)},
    ),
    "qwen2, tied": family(
        "Qwen2Config", RMS | {"tie_word_embeddings": True}, {"qkv_bias": True, "tie_embeddings": True}
    ),
    "qwen3": family("Qwen3Config", RMS, {"qk_norm": True}),
    "gemma": family(
        "GemmaConfig",
        RMS | {"num_key_value_heads": 1, "tie_word_embeddings": ...},
        GEMMA | {"num_kv_heads": 1},
    ),
    "gemma2": family(
        "Gemma2Config",
        RMS
        | {"sliding_window": 7, "query_pre_attn_scalar": 13, "attn_logit_softcapping": 3.0}
        | {"final_logit_softcapping": 4.0, "tie_word_embeddings": ..., "num_hidden_layers": 5},
        GEMMA
        | {"sliding_window": 7, "window_pattern": (True, False), "query_pre_attn_scalar": 13, "attn_softcap": 3.0}
        | {"logits_softcap": 4.0, "post_norms": True, "num_layers": 5},
    ),
    "gemma3": family(
        "Gemma3TextConfig",
        RMS
        | {"sliding_window": 7, "sliding_window_pattern": 3, "query_pre_attn_scalar": 13, "num_hidden_layers": 5}
        | {"tie_word_embeddings": ...}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
        GEMMA
        | {"sliding_window": 7, "window_pattern": (True, True, False), "query_pre_attn_scalar": 13, "num_layers": 5}
        | {"post_norms": True, "qk_norm": True, "rope_theta": 50_000.0, "local_rope_theta": 100.0}
        | {"rope_scaling": LinearScaling(factor=8.0)},
    ),
    "phi": family(
        "PhiConfig",
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "head_dim": ...},
        {"head_dim": 8, "norm": "layer", "parallel_block": True, "gated_mlp": False, "activation": "gelu_tanh"}
        | {"rotary_fraction": 0.5}
        | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "head_bias"), True),
    ),
    "phi3, sliding window": family(
        "Phi3Config", RMS | {"sliding_window": 7, "head_dim": ...}, {"sliding_window": 7, "head_dim": 8}
    ),
    "phi3, longrope beyond the original context": family(
        "Phi3Config",
        RMS
        | {"head_dim": ..., "original_max_position_embeddings": 16, "max_position_embeddings": 64}
        | {"rope_parameters": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}},
        {"head_dim": 8}
        | {"rope_scaling": LongRopeScaling(short_factor=tuple(SHORT), long_factor=tuple(LONG), original_context=16)},
        grows=True,
    ),
    "stablelm": family(
        "StableLmConfig",
        {"layer_norm_eps": 1e-5, "use_qkv_bias": True, "partial_rotary_factor": 0.5, "head_dim": ...},
        {"head_dim": 8, "norm": "layer", "qkv_bias": True, "rotary_fraction": 0.5},
    ),
    "stablelm, parallel": family(
        "StableLmConfig",
        {"layer_norm_eps": 1e-5, "use_parallel_residual": True, "head_dim": ...},
        {"head_dim": 8, "norm": "layer", "parallel_block": True, "rotary_fraction": 0.25},
    ),
}
