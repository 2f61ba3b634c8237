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

from camelid.model.config import ModelConfig, RopeScaling
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import build, named

# Ours, and transformers' own; both store a matrix outputs first, so only the grouping of axes differs.
NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.attn_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.attn.q_proj": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attn.k_proj": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attn.v_proj": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attn.o_proj": "model.layers.{}.self_attn.o_proj.weight",
    "layers.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp.gate_proj": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up_proj": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.down_proj": "model.layers.{}.mlp.down_proj.weight",
    "final_norm.scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16)


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
        # Norms differ from feature to feature too: equal ones would hide a scale that is left out.
        return jnp.asarray(scale * config.init_std * values if spec.is_matrix else 1 + values / 4)

    specs = declare_decoder(config)
    return build(specs, [leaf(spec) for spec in named(specs).values()])


def tiny_tokens(config: ModelConfig, rows: int, length: int, seed: int = 1) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length), np.int32)


def transformers_twin(config: ModelConfig, params: Decoder) -> transformers.LlamaForCausalLM:
    """The same model in transformers: float32, eager attention, evaluation mode."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
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
            attn_implementation="eager",
        )
    ).eval()
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for name, array in to_transformers(params).items():
            # reshape, never transpose: a wrong number of elements raises
            theirs.pop(name).copy_(torch.from_numpy(array.reshape(twin.get_parameter(name).shape)))
    assert not theirs, f"no parameter of ours for {list(theirs)}"
    return twin


def to_transformers(params: Decoder) -> dict[str, np.ndarray]:
    """Our arrays under transformers' names, a layer each, in our shapes."""
    tensors = {}
    for path, array in named(params).items():
        if "{}" in NAMES[path]:
            tensors |= {NAMES[path].format(layer): np.array(part) for layer, part in enumerate(array)}
        else:
            tensors[NAMES[path]] = np.array(array)
    return tensors


def twin_gradients(twin: transformers.LlamaForCausalLM, config: ModelConfig) -> dict[str, np.ndarray]:
    """What `backward` left in the twin, by our paths and in our shapes."""
    gradients = {}
    for path, spec in named(declare_decoder(config)).items():
        layers = range(config.num_layers) if spec.stacked else [0]
        parts = [twin.get_parameter(NAMES[path].format(layer)).grad.numpy() for layer in layers]
        gradients[path] = np.stack(parts).reshape(spec.shape)
    return gradients


def save_hf(twin: transformers.LlamaForCausalLM, folder: Path) -> Path:
    """The folder that transformers itself writes for the twin."""
    twin.save_pretrained(folder)
    return folder
