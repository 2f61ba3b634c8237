"""Tiny models whose axes all have different sizes, and the same models in transformers.

Nothing here goes through camelid's own reader: the names and layouts below are transformers', written down once more.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from camelid.model.config import Llama3Scaling, ModelConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import build, named

# Ours, and transformers' own; both store a matrix outputs first, so only the grouping of axes differs.
NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.attn_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.attn_norm.bias": "model.layers.{}.input_layernorm.bias",
    "layers.attn.q_proj": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attn.k_proj": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attn.v_proj": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attn.o_proj": "model.layers.{}.self_attn.o_proj.weight",
    "layers.attn.q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.attn.k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.attn.v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.attn.o_bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.attn.q_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers.attn.k_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp_norm.bias": "model.layers.{}.post_attention_layernorm.bias",
    "layers.mlp.gate_proj": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up_proj": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.down_proj": "model.layers.{}.mlp.down_proj.weight",
    "layers.mlp.gate_bias": "model.layers.{}.mlp.gate_proj.bias",
    "layers.mlp.up_bias": "model.layers.{}.mlp.up_proj.bias",
    "layers.mlp.down_bias": "model.layers.{}.mlp.down_proj.bias",
    "final_norm.scale": "model.norm.weight",
    "final_norm.bias": "model.norm.bias",
    "lm_head": "lm_head.weight",
    "lm_head_bias": "lm_head.bias",
}
_SANDWICH = {
    "layers.attn_post_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp_norm.scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers.mlp_post_norm.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
# By model_type, what is named otherwise; parameters of one name are laid end to end in it, in this order.
OTHERWISE = {
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "phi": {
        "layers.attn.o_proj": "model.layers.{}.self_attn.dense.weight",
        "layers.attn.o_bias": "model.layers.{}.self_attn.dense.bias",
        "layers.mlp.up_proj": "model.layers.{}.mlp.fc1.weight",
        "layers.mlp.up_bias": "model.layers.{}.mlp.fc1.bias",
        "layers.mlp.down_proj": "model.layers.{}.mlp.fc2.weight",
        "layers.mlp.down_bias": "model.layers.{}.mlp.fc2.bias",
        "final_norm.scale": "model.final_layernorm.weight",
        "final_norm.bias": "model.final_layernorm.bias",
    },
    "phi3": {
        "layers.attn.q_proj": "model.layers.{}.self_attn.qkv_proj.weight",
        "layers.attn.k_proj": "model.layers.{}.self_attn.qkv_proj.weight",
        "layers.attn.v_proj": "model.layers.{}.self_attn.qkv_proj.weight",
        "layers.mlp.gate_proj": "model.layers.{}.mlp.gate_up_proj.weight",
        "layers.mlp.up_proj": "model.layers.{}.mlp.gate_up_proj.weight",
    },
}
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16)


def tiny_config(**overrides: Any) -> ModelConfig:
    """A model whose axes all have different sizes, with grouped queries and heads that do not add up to embed_dim."""
    sizes = {
        "vocab_size": 97,
        "embed_dim": 48,
        "mlp_dim": 80,
        "num_layers": 4,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 10,
        "context_length": 64,
        "norm_eps": 1e-5,
        "rope_theta": 10_000.0,
    }
    return ModelConfig(**(sizes | overrides))


def tiny_params(config: ModelConfig, seed: int = 0, scale: float = 8.0) -> Decoder:
    """Random float32 parameters, `scale` times as wide as fresh ones, so that activations leave their linear part."""
    draw = np.random.default_rng(seed)

    def leaf(spec: Any) -> jax.Array:
        values = draw.standard_normal(spec.shape, np.float32)
        if spec.is_matrix:
            return jnp.asarray(scale * config.init_std * values)
        # Norms and biases differ from feature to feature too: equal ones would hide one that is left out.
        return jnp.asarray((spec.init == "norm") * (1 - config.norm_offset) + values / 4, jnp.float32)

    specs = declare_decoder(config)
    return build(specs, [leaf(spec) for spec in named(specs).values()])


def tiny_tokens(config: ModelConfig, rows: int, length: int, seed: int = 1) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length), np.int32)


def llama_twin_config(config: ModelConfig) -> transformers.LlamaConfig:
    """transformers' words for a Llama of ours."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        assert isinstance(scaling, Llama3Scaling)
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=config.init_std,
        bos_token_id=config.bos_id,
        eos_token_id=list(config.eos_ids) or None,
        pad_token_id=config.pad_id,
    )


def transformers_twin(
    config: ModelConfig, params: Decoder, theirs: transformers.PreTrainedConfig | None = None
) -> transformers.PreTrainedModel:
    """The same model in transformers (None: a Llama): float32, eager attention, evaluation mode."""
    theirs = llama_twin_config(config) if theirs is None else theirs
    twin = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").eval()
    left = dict(twin.named_parameters())
    with torch.no_grad():
        for name, array in to_transformers(params, theirs.model_type).items():
            # reshape, never transpose: a wrong number of elements raises
            left.pop(name).copy_(torch.from_numpy(array.reshape(twin.get_parameter(name).shape)))
    assert not left, f"no parameter of ours for {list(left)}"
    return twin


def to_transformers(params: Decoder, model_type: str = "llama") -> dict[str, np.ndarray]:
    """Our arrays under transformers' names, a layer each; those of one tensor with their outputs end to end."""
    leaves, names = named(params), NAMES | OTHERWISE.get(model_type, {})
    parts: dict[str, list[np.ndarray]] = {}
    for path, array in leaves.items():
        for layer, part in enumerate(array) if "{}" in names[path] else [(None, array)]:
            parts.setdefault(names[path].format(layer), []).append(np.array(part))
    return {
        name: found[0] if len(found) == 1 else np.concatenate([part.reshape(-1, part.shape[-1]) for part in found])
        for name, found in parts.items()
    }


def twin_gradients(twin: transformers.PreTrainedModel, config: ModelConfig) -> dict[str, np.ndarray]:
    """What `backward` left in the twin, by our paths and in our shapes."""
    names = NAMES | OTHERWISE.get(twin.config.model_type, {})
    gradients, taken = {}, dict.fromkeys(names.values(), 0)
    for path, spec in named(declare_decoder(config)).items():
        layers = range(config.num_layers) if spec.stacked else [0]
        start, size = taken[names[path]], spec.size // len(layers)
        parts = [twin.get_parameter(names[path].format(layer)).grad.numpy().reshape(-1) for layer in layers]
        gradients[path] = np.stack([part[start : start + size] for part in parts]).reshape(spec.shape)
        taken[names[path]] += size
    return gradients


def save_hf(twin: transformers.PreTrainedModel, folder: Path) -> Path:
    """The folder that transformers itself writes for the twin."""
    twin.save_pretrained(folder)
    return folder
