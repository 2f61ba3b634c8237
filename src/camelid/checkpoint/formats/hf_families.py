"""Hugging Face's families as tables: which tensor is which parameter, which field of config.json says what.

A family is named by config.json's model_type. Nothing that is computed depends on it: a Family only translates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from camelid.checkpoint.layout import TensorRule
from camelid.model.config import LongRopeScaling, ModelConfig, RopeScaling

# Tensors --------------------------------------------------------------------------------

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
    # The norm before the MLP: the file's name says where it stands, after attention.
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


def _named_otherwise(rows: Sequence[TensorRule], names: Mapping[str, str]) -> tuple[TensorRule, ...]:
    """The rows with parts of their tensors' names replaced."""
    for theirs, instead in names.items():
        rows = [replace(row, name=row.name.replace(theirs, instead)) for row in rows]
    return tuple(rows)


PHI = _named_otherwise(
    LLAMA,
    {".o_proj.": ".dense.", ".up_proj.": ".fc1.", ".down_proj.": ".fc2.", "model.norm.": "model.final_layernorm."},
)
PHI3 = _named_otherwise(  # rows of one name lie end to end in it
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
    *_named_otherwise(LLAMA, {".post_attention_layernorm.": ".pre_feedforward_layernorm."}),
    TensorRule("layers.attn_post_norm.scale", "model.layers.{layer}.post_attention_layernorm.weight", "embed"),
    TensorRule("layers.mlp_post_norm.scale", "model.layers.{layer}.post_feedforward_layernorm.weight", "embed"),
)

TIED_HEAD = "lm_head.weight"  # some files repeat the embedding table as the head
# Computed, never trained; versions until 4.31 saved them, and some programs still do.
BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb(_local)?\.(original_)?(inv_freq|cos_cached|sin_cached)"


# config.json --------------------------------------------------------------------------------

REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """One field of config.json and what it says of a model."""

    ours: tuple[str, ...]
    """fields of ModelConfig, all of which have its value"""
    theirs: str
    default: Any = REQUIRED
    """what an absent one means, or a function of config.json; if that is null, or computed, a null one means it too"""
    names: Mapping[Any, Any] | None = None
    """their values to ours; of two with one meaning, the first is written"""
    least: int | None = None
    """of a number; None: it is positive"""
    computed_if_null: bool = False
    """whether null means what the function `default` gives in families that have another default, too"""


def _field(ours: str, theirs: str, default: Any = REQUIRED, names: Mapping[Any, Any] | None = None) -> Field:
    return Field(tuple(ours.split()), theirs, default, names)


NEW_GELU = {"gelu_new": "gelu_tanh"}  # the same function by an older name
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", **NEW_GELU, "gelu": "gelu"}
SIZES = (
    _field("vocab_size", "vocab_size"),
    _field("embed_dim", "hidden_size"),
    _field("mlp_dim", "intermediate_size"),
    _field("num_layers", "num_hidden_layers"),
    _field("num_heads", "num_attention_heads"),
    # Null is every head its own; if another number was meant, the shapes of the tensors do not fit.
    Field(("num_kv_heads",), "num_key_value_heads", lambda hf: hf["num_attention_heads"], computed_if_null=True),
    _field("context_length", "max_position_embeddings", lambda hf: hf.get("max_sequence_length", 2048)),
    Field(("init_std",), "initializer_range", 0.02, least=0),
    _field("tie_embeddings", "tie_word_embeddings", False),
    _field("bos_id", "bos_token_id", None),
    _field("pad_id", "pad_token_id", None),
)
RMS = _field("norm_eps", "rms_norm_eps", 1e-6)
LAYER_NORM = _field("norm_eps", "layer_norm_eps", 1e-5)
HEAD_DIM = _field("head_dim", "head_dim", lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
HIDDEN_ACT = _field("activation", "hidden_act", "silu", ACTIVATIONS)
# Families without a field for it; some of their files have one all the same.
HEAD_DIM_IMPLIED = {"head_dim": lambda c: c["embed_dim"] // c["num_heads"]}
HEAD_DIM_REPEATED = {"head_dim": lambda config: config.head_dim}
ATTENTION_BIAS = _field("qkv_bias o_bias", "attention_bias", False)
PARTIAL_ROTARY = _field("rotary_fraction", "partial_rotary_factor", 1.0)


SCALINGS: Mapping[str, type[RopeScaling]] = {cls.kind: cls for cls in get_args(RopeScaling)}

# Of every family: values of fields for which camelid computes the right thing.
FIXED: Mapping[str, tuple] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "is_causal": (True, None),  # false makes attention bidirectional, as in models of sentence embeddings
}


@dataclass(frozen=True)
class Family:
    """How one model_type says what a ModelConfig says."""

    architecture: str
    fields: tuple[Field, ...]
    rows: tuple[TensorRule, ...] = LLAMA
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """what absent fields of config.json mean, where other families have another default or none"""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """what it says of a ModelConfig without a field, or a function of the values that the fields gave"""
    fixed: Mapping[str, tuple] = field(default_factory=dict)
    """values of fields for which camelid computes the right thing"""
    written: Mapping[str, Any] = field(default_factory=dict)
    """what is written beside all that"""
    windows: "Windows | None" = None
    """None: the family has no sliding window"""
    rope_theta: float = 10_000.0
    rope_kinds: Mapping[str, type[RopeScaling]] = field(default_factory=lambda: SCALINGS)
    """its names for the kinds of rope scaling that it has; of two for one kind, the first is written"""
    original_context_beside: bool = False
    """whether original_max_position_embeddings stands beside rope_scaling, where others have it inside"""
    rope_by_layer: bool = False
    """whether rope_parameters holds two tables, one of them for layers with a window"""
    repeated: Mapping[str, Callable[[ModelConfig], Any]] = field(default_factory=dict)
    """fields that only repeat what others say"""


@dataclass(frozen=True)
class Windows:
    """How a family says which layers have a sliding window."""

    pattern: Callable[[Mapping[str, Any]], Sequence[bool]]
    """by config.json, repeated over the layers, where layer_types does not tell"""
    settings: Mapping[str, int] = field(default_factory=dict)
    """the fields that pattern reads, and the least that each may be; False: a bool"""
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    layer_types: bool = True
    """whether the family has that field"""


EVERY_LAYER = Windows(lambda hf: (hf["sliding_window"] is not None,), layer_types=False)


def _qwen_pattern(hf: Mapping[str, Any]) -> list[bool]:
    used = hf["use_sliding_window"] and hf["sliding_window"] is not None
    return [used and i >= hf["max_window_layers"] for i in range(hf["num_hidden_layers"])]


def _write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
    first = config.windowed.index(True) if True in config.windowed else config.num_layers
    return {"use_sliding_window": True in config.windowed, "max_window_layers": first}


def _gemma3_pattern(hf: Mapping[str, Any]) -> list[bool]:
    return [True] * (hf["sliding_window_pattern"] - 1) + [False]


def _write_gemma3_windows(config: ModelConfig) -> dict[str, Any]:
    layers = range(config.num_layers)
    for period in range(1, config.num_layers + 2):  # what versions before layer_types can say
        if config.windowed == tuple((i + 1) % period > 0 for i in layers):
            return {"sliding_window_pattern": period}
    return {}


_LLAMA = Family(
    "LlamaForCausalLM",
    (*SIZES, HEAD_DIM, RMS, HIDDEN_ACT, ATTENTION_BIAS, _field("mlp_bias", "mlp_bias", False)),
    defaults={"bos_token_id": 1, "eos_token_id": 2},
    fixed={"rope_interleaved": (False, None)},
)
_QWEN2 = Family(
    "Qwen2ForCausalLM",
    (*SIZES, HEAD_DIM, RMS, HIDDEN_ACT),
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32}
    | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    implied={"qkv_bias": True},
    fixed={"use_mrope": (False, None)},
    windows=Windows(_qwen_pattern, {"use_sliding_window": False, "max_window_layers": 0}, _write_qwen_windows),
)
_GEMMA = Family(
    "GemmaForCausalLM",
    (*SIZES, HEAD_DIM, RMS, ATTENTION_BIAS),
    defaults={"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    | {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    implied={"norm_offset": 1.0, "activation": "gelu_tanh", "embed_scale": lambda c: math.sqrt(c["embed_dim"])},
    fixed={
        # In config.json of the first release "gelu" stands for the approximation that the model was trained with.
        "hidden_act": ("gelu_pytorch_tanh", "gelu", None),
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "use_bidirectional_attention": (False, None),
    },
    written=dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh"),
)
_GEMMA2 = replace(
    _GEMMA,
    architecture="Gemma2ForCausalLM",
    rows=GEMMA2,
    fields=(
        *_GEMMA.fields,
        _field("query_pre_attn_scalar", "query_pre_attn_scalar", 256),
        _field("attn_softcap", "attn_logit_softcapping", None),
        _field("logits_softcap", "final_logit_softcapping", None),
    ),
    defaults={
        **_GEMMA.defaults,
        "num_key_value_heads": 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    implied={**_GEMMA.implied, "post_norms": True},
    windows=Windows(lambda hf: (True, False)),
    repeated={"sliding_window_size": lambda config: config.sliding_window},
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(
        "MistralForCausalLM",
        (*SIZES, HEAD_DIM, RMS, HIDDEN_ACT),
        defaults={"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 131072}
        | {"num_key_value_heads": 8, "sliding_window": 4096},
        windows=EVERY_LAYER,
    ),
    "qwen2": _QWEN2,
    "qwen3": replace(
        _QWEN2,
        architecture="Qwen3ForCausalLM",
        fields=(*_QWEN2.fields, ATTENTION_BIAS),
        defaults={**_QWEN2.defaults, "head_dim": 128},
        implied={"qk_norm": True},
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        architecture="Gemma3ForCausalLM",
        fields=(*_GEMMA2.fields, _field("local_rope_theta", "rope_local_base_freq", 10_000.0)),
        # The released text_config of the larger models leaves out what transformers has as a default.
        defaults={
            **_GEMMA.defaults,
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        implied={**_GEMMA2.implied, "qk_norm": True},
        windows=Windows(_gemma3_pattern, {"sliding_window_pattern": 1}, _write_gemma3_windows),
        rope_theta=1_000_000.0,
        rope_by_layer=True,
        repeated={},
    ),
    "phi": Family(
        "PhiForCausalLM",
        (*SIZES, LAYER_NORM, _field("activation", "hidden_act", "gelu_new", NEW_GELU | ACTIVATIONS), PARTIAL_ROTARY),
        rows=PHI,
        defaults={"partial_rotary_factor": 0.5, "bos_token_id": 1, "eos_token_id": 2},
        implied={
            "norm": "layer",
            "parallel_block": True,
            "gated_mlp": False,
            **HEAD_DIM_IMPLIED,
        }
        | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "head_bias"), True),
        # attention_bias is written by some tools and read by none: the biases are there always.
        fixed={"attention_bias": (False, None), "qk_layernorm": (False, None)},
        repeated={"rotary_dim": lambda config: config.rotary_dim, **HEAD_DIM_REPEATED},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        (*SIZES, RMS, HIDDEN_ACT, PARTIAL_ROTARY),
        rows=PHI3,
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None}
        | {"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000, "original_max_position_embeddings": 4096},
        implied=HEAD_DIM_IMPLIED,
        # Phi-4-mini spells out what it does not have.
        fixed={
            **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (False, None)),
            **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1, None)),
        },
        repeated=HEAD_DIM_REPEATED,
        windows=EVERY_LAYER,
        rope_kinds=dict.fromkeys(("longrope", "su", "yarn"), LongRopeScaling),
        original_context_beside=True,
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        (
            *SIZES,
            LAYER_NORM,
            HIDDEN_ACT,
            PARTIAL_ROTARY,
            _field("qkv_bias", "use_qkv_bias", False),
            _field("parallel_block", "use_parallel_residual", False),
        ),
        defaults={"max_position_embeddings": 4096, "num_key_value_heads": 32, "partial_rotary_factor": 0.25}
        | {"bos_token_id": 0, "eos_token_id": 0},
        implied={"norm": "layer", **HEAD_DIM_IMPLIED},
        fixed={"qk_layernorm": (False, None)},
        repeated=HEAD_DIM_REPEATED,
    ),
}
