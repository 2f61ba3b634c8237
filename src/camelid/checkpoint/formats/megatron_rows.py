"""Names and layouts of the tensors of Megatron-LM 307dcf37f0 and core_v0.12.3, as tables of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from camelid.checkpoint.layout import TensorRule

QUERY, KEY, VALUE, GATE, UP = "query", "key", "value", "gate", "up"
MCORE = {
    "embed": "embedding.word_embeddings.weight",
    "attn_norm": "decoder.layers.{layer}.input_layernorm.weight",
    "qkv": "decoder.layers.{layer}.self_attention.linear_qkv.weight",
    "o_proj": "decoder.layers.{layer}.self_attention.linear_proj.weight",
    "mlp_norm": "decoder.layers.{layer}.pre_mlp_layernorm.weight",
    "fc1": "decoder.layers.{layer}.mlp.linear_fc1.weight",
    "fc2": "decoder.layers.{layer}.mlp.linear_fc2.weight",
    "final_norm": "decoder.final_layernorm.weight",
    "lm_head": "output_layer.weight",
}
ENGINE = MCORE | {  # Transformer Engine's layers hold the norm before them
    "attn_norm": "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
    "mlp_norm": "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
}
LEGACY = {
    "embed": "language_model.embedding.word_embeddings.weight",
    "attn_norm": "language_model.encoder.layers.{layer}.input_norm.weight",
    "qkv": "language_model.encoder.layers.{layer}.self_attention.query_key_value.weight",
    "o_proj": "language_model.encoder.layers.{layer}.self_attention.dense.weight",
    "mlp_norm": "language_model.encoder.layers.{layer}.post_attention_norm.weight",
    "fc1": "language_model.encoder.layers.{layer}.mlp.dense_h_to_4h.weight",
    "fc2": "language_model.encoder.layers.{layer}.mlp.dense_4h_to_h.weight",
    "final_norm": "language_model.encoder.final_norm.weight",
    "lm_head": "language_model.output_layer.weight",
}
NAMES = {"mcore": MCORE, "legacy": LEGACY}
BUFFERS = r".*rotary_pos_emb\.inv_freq|.*rotary_emb\.inv_freq"
# Modules with an empty extra state, which Megatron's strict loader requires.
STATES = ("qkv", "o_proj", "fc1", "fc2", "lm_head")
PADDING = 128  # Megatron's make_vocab_size_divisible_by, for each rank
CUT = frozenset({"heads", "kv_heads", "mlp", "vocab", "vocab_in"})


def rows(names: Mapping[str, str], version: float = 3.0, split: bool = False) -> tuple[TensorRule, ...]:
    """Returns the rows of a shard; with `split`, gate and up are separate tensors, as the reader presents them.

    Queries, keys and values are interleaved by group. Before version 2, which had no grouped queries, they were the
    fastest axis within a head (version 1), or concatenated (version 0, which the reader presents as three tensors).
    """
    grouped, ours = "(kv_heads slot head_dim) embed", "(kv_heads slot) head_dim embed"
    first = [
        TensorRule("layers.attn.q_proj", names["qkv"], grouped, ours, along="slot"),
        TensorRule("layers.attn.k_proj", names["qkv"], grouped, ours, along="slot"),
        TensorRule("layers.attn.v_proj", names["qkv"], grouped, ours, along="slot"),
    ]
    if version < 2:
        words = (("q_proj", "heads", QUERY), ("k_proj", "kv_heads", KEY), ("v_proj", "kv_heads", VALUE))
        first = [
            TensorRule(f"layers.attn.{name}", f"{names['qkv']} ({word})", f"({heads} head_dim) embed")
            if version < 1
            else TensorRule(
                f"layers.attn.{name}",
                names["qkv"],
                f"({heads} head_dim slot) embed",
                f"{heads} (head_dim slot) embed",
                along="slot",
            )
            for name, heads, word in words
        ]
    return (
        TensorRule("embed", names["embed"], "vocab_in embed_in"),
        TensorRule("layers.attn_norm.scale", names["attn_norm"], "embed"),
        *first,
        TensorRule("layers.attn.o_proj", names["o_proj"], "embed (heads head_dim)"),
        TensorRule("layers.mlp_norm.scale", names["mlp_norm"], "embed"),
        TensorRule("layers.mlp.gate_proj", names["fc1"] + f" ({GATE})" * split, "mlp embed"),
        TensorRule("layers.mlp.up_proj", names["fc1"] + f" ({UP})" * split, "mlp embed"),
        TensorRule("layers.mlp.down_proj", names["fc2"], "embed mlp"),
        TensorRule("final_norm.scale", names["final_norm"], "embed"),
        TensorRule("lm_head", names["lm_head"], "vocab embed"),
    )


def stacked(rows: Sequence[TensorRule]) -> tuple[TensorRule, ...]:
    """Returns the rows for tensors that contain all layers on a leading axis, as in distributed checkpoints."""

    def one(row: TensorRule) -> TensorRule:
        if "{layer}" not in row.name:
            return row
        name = row.name.replace(".{layer}", "")
        if row.path in ("layers.mlp.gate_proj", "layers.mlp.up_proj"):
            return TensorRule(row.path, name, "layers (slot mlp) embed", "(mlp slot) embed", along="slot")
        return replace(row, name=name, axes=f"layers {row.axes}")

    return tuple(map(one, rows))
