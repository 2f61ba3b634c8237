"""Named architectures of released models, for training from scratch. Checkpoints contain their own configuration."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from camelid.errors import UserError
from camelid.model.config import LinearScaling, Llama3Scaling, ModelConfig

Fields = Mapping[str, Any]

_LLAMA1 = {
    "family": "llama",
    "vocab_size": 32000,
    "context_length": 2048,
    "norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "bos_id": 1,
    "eos_ids": (2,),
    "pad_id": 0,
}
_LLAMA2 = _LLAMA1 | {"context_length": 4096, "norm_eps": 1e-5, "pad_id": None}
_CODELLAMA = _LLAMA2 | {"vocab_size": 32016, "context_length": 16384, "rope_theta": 1_000_000.0}
_LLAMA3 = _LLAMA2 | {
    "vocab_size": 128256,
    "context_length": 8192,
    "rope_theta": 500_000.0,
    "bos_id": 128000,
    "eos_ids": (128001,),
}


def _longer(factor: float) -> dict[str, Any]:
    """Llama 3 with its context extended to 131,072 tokens by RoPE scaling."""
    scaling = Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    return _LLAMA3 | {"context_length": 131072, "rope_scaling": scaling}


_LLAMA3_1 = _longer(8.0)
_LLAMA3_2 = _longer(32.0) | {"tie_embeddings": True}
_TINYLLAMA = _LLAMA2 | {"context_length": 2048}
_SMOLLM = _TINYLLAMA | {"vocab_size": 49152, "tie_embeddings": True, "bos_id": 0, "eos_ids": (0,)}
_MISTRAL = _LLAMA2 | {"family": "mistral", "context_length": 32768}
_MISTRAL_V3 = _MISTRAL | {"vocab_size": 32768, "rope_theta": 1_000_000.0}
_MISTRAL_NEMO = _MISTRAL_V3 | {"vocab_size": 131072, "context_length": 128000}

_QWEN2 = {
    "family": "qwen2",
    "vocab_size": 152064,
    "context_length": 131072,
    "norm_eps": 1e-6,
    "qkv_bias": True,
    "rope_theta": 1_000_000.0,
    "bos_id": 151643,
    "eos_ids": (151643,),
}
_QWEN2_TIED = _QWEN2 | {"vocab_size": 151936, "tie_embeddings": True}
_QWEN2_SHORT = _QWEN2_TIED | {"context_length": 32768}
_QWEN2_LARGE = _QWEN2 | {"norm_eps": 1e-5}
_QWEN3 = _QWEN2 | {
    "family": "qwen3",
    "vocab_size": 151936,
    "context_length": 40960,
    "qkv_bias": False,
    "qk_norm": True,
    "eos_ids": (151645,),
}
_QWEN3_TIED = _QWEN3 | {"tie_embeddings": True}

_GEMMA = {
    "family": "gemma",
    "vocab_size": 256000,
    "context_length": 8192,
    "norm_eps": 1e-6,
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
    "rope_theta": 10_000.0,
    "tie_embeddings": True,
    "bos_id": 2,
    "eos_ids": (1,),
    "pad_id": 0,
}
_GEMMA2 = _GEMMA | {
    "family": "gemma2",
    "post_norms": True,
    "query_pre_attn_scalar": 256,
    "attn_softcap": 50.0,
    "logits_softcap": 30.0,
    "sliding_window": 4096,
    "window_pattern": (True, False),
}
_GEMMA3 = _GEMMA | {
    "family": "gemma3_text",
    "vocab_size": 262208,
    "context_length": 131072,
    "post_norms": True,
    "qk_norm": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "window_pattern": (True, True, True, True, True, False),
    "rope_theta": 1_000_000.0,
    "rope_scaling": LinearScaling(factor=8.0),
    "local_rope_theta": 10_000.0,
    "eos_ids": (1, 106),
}
_GEMMA3_1B = _GEMMA3 | {"vocab_size": 262144, "context_length": 32768, "sliding_window": 512, "rope_scaling": None}

_PHI = {
    "family": "phi",
    "vocab_size": 51200,
    "context_length": 2048,
    "norm": "layer",
    "norm_eps": 1e-5,
    "parallel_block": True,
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "rope_theta": 10_000.0,
    "rotary_fraction": 0.5,
} | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "head_bias"), True)
_PHI2 = _PHI | {"rotary_fraction": 0.4, "bos_id": 50256, "eos_ids": (50256,)}
_PHI3 = {
    "family": "phi3",
    "vocab_size": 32064,
    "context_length": 4096,
    "norm_eps": 1e-5,
    "sliding_window": 2047,
    "rope_theta": 10_000.0,
    "bos_id": 1,
    "eos_ids": (32000,),
    "pad_id": 32000,
}
_STABLELM = {
    "family": "stablelm",
    "vocab_size": 50304,
    "context_length": 4096,
    "norm": "layer",
    "norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rotary_fraction": 0.25,
    "bos_id": 0,
    "eos_ids": (0,),
}


def _sized(family: Fields, embed: int, mlp: int, layers: int, heads: int, kv_heads: int, **own: Any) -> ModelConfig:
    sizes = {
        "embed_dim": embed,
        "mlp_dim": mlp,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": embed // heads,
    }
    return ModelConfig(**{**family, **sizes, **own})


def _gemma(family: Fields, embed: int, mlp: int, layers: int, heads: int, kv_heads: int, **own: Any) -> ModelConfig:
    own = {"head_dim": 256, "embed_scale": math.sqrt(embed)} | own
    return _sized(family, embed, mlp, layers, heads, kv_heads, **own)


# The values of each released checkpoint's config.json.
PRESETS: Mapping[str, ModelConfig] = {
    #                                           embed    mlp  layers heads kv_heads
    "debug": _sized(_LLAMA1, 128, 256, 2, 4, 4),  # this and llama_1b are EasyLM's; no checkpoints were released
    "llama_1b": _sized(_LLAMA1, 2048, 5504, 22, 16, 16),
    "llama_7b": _sized(_LLAMA1, 4096, 11008, 32, 32, 32),
    "llama_13b": _sized(_LLAMA1, 5120, 13824, 40, 40, 40),
    "llama_30b": _sized(_LLAMA1, 6656, 17920, 60, 52, 52),
    "llama_65b": _sized(_LLAMA1, 8192, 22016, 80, 64, 64, norm_eps=1e-5),
    "llama2_7b": _sized(_LLAMA2, 4096, 11008, 32, 32, 32),
    "llama2_13b": _sized(_LLAMA2, 5120, 13824, 40, 40, 40),
    "llama2_70b": _sized(_LLAMA2, 8192, 28672, 80, 64, 8),
    "codellama_7b": _sized(_CODELLAMA, 4096, 11008, 32, 32, 32),
    "codellama_13b": _sized(_CODELLAMA, 5120, 13824, 40, 40, 40),
    "codellama_34b": _sized(_CODELLAMA, 8192, 22016, 48, 64, 8, vocab_size=32000),
    "llama3_8b": _sized(_LLAMA3, 4096, 14336, 32, 32, 8),
    "llama3_70b": _sized(_LLAMA3, 8192, 28672, 80, 64, 8),
    "llama3_1_8b": _sized(_LLAMA3_1, 4096, 14336, 32, 32, 8),
    "llama3_1_70b": _sized(_LLAMA3_1, 8192, 28672, 80, 64, 8),
    "llama3_1_405b": _sized(_LLAMA3_1, 16384, 53248, 126, 128, 8),
    "llama3_2_1b": _sized(_LLAMA3_2, 2048, 8192, 16, 32, 8),
    "llama3_2_3b": _sized(_LLAMA3_2, 3072, 8192, 28, 24, 8),
    "openllama_3b": _sized(_LLAMA1, 3200, 8640, 26, 32, 32),
    "openllama_7b": _sized(_LLAMA1, 4096, 11008, 32, 32, 32),
    "openllama_13b": _sized(_LLAMA1, 5120, 13824, 40, 40, 40),
    "tinyllama_1b": _sized(_TINYLLAMA, 2048, 5632, 22, 32, 4),
    "smollm_135m": _sized(_SMOLLM, 576, 1536, 30, 9, 3),
    "smollm_360m": _sized(_SMOLLM, 960, 2560, 32, 15, 5),
    "smollm_1_7b": _sized(_SMOLLM, 2048, 8192, 24, 32, 32),
    "mistral_7b": _sized(_MISTRAL, 4096, 14336, 32, 32, 8, sliding_window=4096),
    "mistral_7b_v0_3": _sized(_MISTRAL_V3, 4096, 14336, 32, 32, 8),
    "mistral_nemo_12b": _sized(_MISTRAL_NEMO, 5120, 14336, 40, 32, 8, head_dim=128),
    "qwen2_0_5b": _sized(_QWEN2_TIED, 896, 4864, 24, 14, 2),
    "qwen2_1_5b": _sized(_QWEN2_TIED, 1536, 8960, 28, 12, 2),
    "qwen2_7b": _sized(_QWEN2, 3584, 18944, 28, 28, 4),
    "qwen2_72b": _sized(_QWEN2_LARGE, 8192, 29568, 80, 64, 8),
    "qwen2_5_0_5b": _sized(_QWEN2_SHORT, 896, 4864, 24, 14, 2),
    "qwen2_5_1_5b": _sized(_QWEN2_TIED, 1536, 8960, 28, 12, 2),
    "qwen2_5_3b": _sized(_QWEN2_SHORT, 2048, 11008, 36, 16, 2),
    "qwen2_5_7b": _sized(_QWEN2, 3584, 18944, 28, 28, 4),
    "qwen2_5_14b": _sized(_QWEN2_LARGE, 5120, 13824, 48, 40, 8),
    "qwen2_5_32b": _sized(_QWEN2_LARGE, 5120, 27648, 64, 40, 8),
    "qwen2_5_72b": _sized(_QWEN2_LARGE, 8192, 29568, 80, 64, 8),
    "qwen3_0_6b": _sized(_QWEN3_TIED, 1024, 3072, 28, 16, 8, head_dim=128),
    "qwen3_1_7b": _sized(_QWEN3_TIED, 2048, 6144, 28, 16, 8, head_dim=128),
    "qwen3_4b": _sized(_QWEN3_TIED, 2560, 9728, 36, 32, 8, head_dim=128),
    "qwen3_8b": _sized(_QWEN3, 4096, 12288, 36, 32, 8, head_dim=128),
    "qwen3_14b": _sized(_QWEN3, 5120, 17408, 40, 40, 8, head_dim=128),
    "qwen3_32b": _sized(_QWEN3, 5120, 25600, 64, 64, 8, head_dim=128),
    "gemma_2b": _gemma(_GEMMA, 2048, 16384, 18, 8, 1),
    "gemma_7b": _gemma(_GEMMA, 3072, 24576, 28, 16, 16),
    "gemma2_2b": _gemma(_GEMMA2, 2304, 9216, 26, 8, 4),
    "gemma2_9b": _gemma(_GEMMA2, 3584, 14336, 42, 16, 8),
    "gemma2_27b": _gemma(_GEMMA2, 4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
    "gemma3_1b": _gemma(_GEMMA3_1B, 1152, 6912, 26, 4, 1),
    "gemma3_4b": _gemma(_GEMMA3, 2560, 10240, 34, 8, 4),
    "gemma3_12b": _gemma(_GEMMA3, 3840, 15360, 48, 16, 8),
    "gemma3_27b": _gemma(_GEMMA3, 5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
    "phi_1": _sized(_PHI, 2048, 8192, 24, 32, 32),
    "phi_1_5": _sized(_PHI, 2048, 8192, 24, 32, 32),
    "phi_2": _sized(_PHI2, 2560, 10240, 32, 32, 32),
    "phi3_mini_4k": _sized(_PHI3, 3072, 8192, 32, 32, 32),
    "stablelm_3b": _sized(_STABLELM, 2560, 6912, 32, 32, 32),
}

# Names used by other systems. docs/migrating/index.md lists which system each is from, and differences of values.
ALIASES: Mapping[str, str] = {
    "llama_3b": "openllama_3b",
    "1b": "llama_1b",
    "3b": "openllama_3b",
    "7b": "llama_7b",
    "13b": "llama_13b",
    "30b": "llama_30b",
    "65b": "llama_65b",
    "llama1-7B": "llama_7b",
    "llama2-7B": "llama2_7b",
    "llama2-13B": "llama2_13b",
    "llama2-70B": "llama2_70b",
    "model_config_llama1_7B": "llama_7b",
    "model_config_llama2_7B": "llama2_7b",
    "model_config_llama2_13B": "llama2_13b",
    "model_config_llama2_70B": "llama2_70b",
    "llama_7b_lora": "llama_7b",
    "llama_7b_flash": "llama2_7b",
    "llama_70b": "llama2_70b",
    "llama_70bflash": "llama2_70b",
    "open_llama_3b": "openllama_3b",
    "open_llama_7b": "openllama_7b",
    "open_llama_13b": "openllama_13b",
    "tiny_llama_1b": "tinyllama_1b",
    "llama_33b": "llama_30b",
    "mistral_7b_v0_1": "mistral_7b",
}


def preset(name: str) -> ModelConfig:
    """The config of a preset, given its name or an alias.

    Raises:
      UserError: If there is no such preset; the advice contains the most similar names.
    """
    if (known := ALIASES.get(name, name)) in PRESETS:
        return PRESETS[known]
    names = {own.lower().replace("-", "_"): own for own in [*ALIASES, *PRESETS]}
    plain = name.lower().replace("-", "_").replace(".", "_")
    near = [names[own] for own in difflib.get_close_matches(plain, names, 3)]
    ask = f"Did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"there is no preset {name!r}", f"{ask}`camelid inspect --presets` lists all.")
