"""The tensors of Hugging Face's families, as tables of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from camelid.checkpoint.layout import TensorRule

LLAMA = (
    TensorRule("embed", "model.embed_tokens.weight", "vocab_in embed_in"),
    TensorRule("layers.attn_norm.scale", "model.layers.{layer}.input_layernorm.weight", "embed"),
    TensorRule("layers.attn_norm.bias", "model.layers.{layer}.input_layernorm.bias", "embed"),
    TensorRule("layers.attn.q_proj", "model.layers.{layer}.self_attn.q_proj.weight", "(heads head_dim) embed"),
    TensorRule("layers.attn.k_proj", "model.layers.{layer}.self_attn.k_proj.weight", "(kv_heads head_dim) embed"),
    TensorRule("layers.attn.v_proj", "model.layers.{layer}.self_attn.v_proj.weight", "(kv_heads head_dim) embed"),
    TensorRule("layers.attn.o_proj", "model.layers.{layer}.self_attn.o_proj.weight", "embed (heads head_dim)"),
    TensorRule("layers.attn.q_bias", "model.layers.{layer}.self_attn.q_proj.bias", "(heads head_dim)"),
    TensorRule("layers.attn.k_bias", "model.layers.{layer}.self_attn.k_proj.bias", "(kv_heads head_dim)"),
    TensorRule("layers.attn.v_bias", "model.layers.{layer}.self_attn.v_proj.bias", "(kv_heads head_dim)"),
    TensorRule("layers.attn.o_bias", "model.layers.{layer}.self_attn.o_proj.bias", "embed"),
    TensorRule("layers.attn.q_norm.scale", "model.layers.{layer}.self_attn.q_norm.weight", "head_dim"),
    TensorRule("layers.attn.k_norm.scale", "model.layers.{layer}.self_attn.k_norm.weight", "head_dim"),
    # This is the norm before the MLP; transformers named it after its position behind attention.
    TensorRule("layers.mlp_norm.scale", "model.layers.{layer}.post_attention_layernorm.weight", "embed"),
    TensorRule("layers.mlp_norm.bias", "model.layers.{layer}.post_attention_layernorm.bias", "embed"),
    TensorRule("layers.mlp.gate_proj", "model.layers.{layer}.mlp.gate_proj.weight", "mlp embed"),
    TensorRule("layers.mlp.up_proj", "model.layers.{layer}.mlp.up_proj.weight", "mlp embed"),
    TensorRule("layers.mlp.down_proj", "model.layers.{layer}.mlp.down_proj.weight", "embed mlp"),
    TensorRule("layers.mlp.gate_bias", "model.layers.{layer}.mlp.gate_proj.bias", "mlp"),
    TensorRule("layers.mlp.up_bias", "model.layers.{layer}.mlp.up_proj.bias", "mlp"),
    TensorRule("layers.mlp.down_bias", "model.layers.{layer}.mlp.down_proj.bias", "embed"),
    TensorRule("final_norm.scale", "model.norm.weight", "embed"),
    TensorRule("final_norm.bias", "model.norm.bias", "embed"),
    TensorRule("lm_head", "lm_head.weight", "vocab embed"),
    TensorRule("lm_head_bias", "lm_head.bias", "vocab"),
)


def _renamed(rows: Sequence[TensorRule], names: Mapping[str, str]) -> tuple[TensorRule, ...]:
    """Returns the rows with parts of their tensors' names replaced."""
    for old, new in names.items():
        rows = [replace(row, name=row.name.replace(old, new)) for row in rows]
    return tuple(rows)


PHI = _renamed(
    LLAMA,
    {".o_proj.": ".dense.", ".up_proj.": ".fc1.", ".down_proj.": ".fc2.", "model.norm.": "model.final_layernorm."},
)
PHI3 = _renamed(  # rows with the same name are concatenated in one tensor
    LLAMA,
    {
        ".q_proj.": ".qkv_proj.",
        ".k_proj.": ".qkv_proj.",
        ".v_proj.": ".qkv_proj.",
        ".gate_proj.": ".gate_up_proj.",
        ".up_proj.": ".gate_up_proj.",
    },
)
GEMMA2 = (
    *_renamed(LLAMA, {".post_attention_layernorm.": ".pre_feedforward_layernorm."}),
    TensorRule("layers.attn_post_norm.scale", "model.layers.{layer}.post_attention_layernorm.weight", "embed"),
    TensorRule("layers.mlp_post_norm.scale", "model.layers.{layer}.post_feedforward_layernorm.weight", "embed"),
)

TIED_HEAD = "lm_head.weight"  # some files contain a copy of the embedding table as the head
# Computed rather than trained; transformers saved them until version 4.31, and some programs still do.
BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb(_local)?\.(original_)?(inv_freq|cos_cached|sin_cached)"
