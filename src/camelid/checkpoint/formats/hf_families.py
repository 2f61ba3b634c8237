"""The families of Hugging Face, as tables: which field of config.json corresponds to which field of ModelConfig.

A family is identified by the model_type of config.json. It only translates: nothing that is computed depends on it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from camelid.checkpoint.formats.hf_rows import GEMMA2, LLAMA, PHI, PHI3
from camelid.checkpoint.layout import TensorRule
from camelid.model.config import LongRopeScaling, ModelConfig, RopeScaling

REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """A field of config.json and the fields of ModelConfig to which it corresponds."""

    ours: tuple[str, ...]
    """fields of ModelConfig, all of which get its value"""
    theirs: str
    default: Any = REQUIRED
    """the value if the field is absent, or a function of config.json; if it is None or a function, also of null"""
    names: Mapping[Any, Any] | None = None
    """their values mapped to camelid's; if several have one meaning, the first is written"""
    minimum: int | None = None
    """of a number; None: it must be positive"""
    computed_if_null: bool = False
    """whether null means the result of the function `default` even in families with another default"""


def _field(ours: str, theirs: str, default: Any = REQUIRED, names: Mapping[Any, Any] | None = None) -> Field:
    return Field(tuple(ours.split()), theirs, default, names)


NEW_GELU = {"gelu_new": "gelu_tanh"}  # an older name of the same function
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", **NEW_GELU, "gelu": "gelu"}
SIZES = (
    _field("vocab_size", "vocab_size"),
    _field("embed_dim", "hidden_size"),
    _field("mlp_dim", "intermediate_size"),
    _field("num_layers", "num_hidden_layers"),
    _field("num_heads", "num_attention_heads"),
    # Null means multi-head attention; if another number was meant, the shapes of the tensors do not match.
    Field(("num_kv_heads",), "num_key_value_heads", lambda hf: hf["num_attention_heads"], computed_if_null=True),
    _field("context_length", "max_position_embeddings", lambda hf: hf.get("max_sequence_length", 2048)),
    Field(("init_std",), "initializer_range", 0.02, minimum=0),
    _field("tie_embeddings", "tie_word_embeddings", False),
    _field("bos_id", "bos_token_id", None),
    _field("pad_id", "pad_token_id", None),
)
RMS = _field("norm_eps", "rms_norm_eps", 1e-6)
LAYER_NORM = _field("norm_eps", "layer_norm_eps", 1e-5)
HEAD_DIM = _field("head_dim", "head_dim", lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
HIDDEN_ACT = _field("activation", "hidden_act", "silu", ACTIVATIONS)
# For families without such a field, which some of their files contain nevertheless.
HEAD_DIM_IMPLIED = {"head_dim": lambda c: c["embed_dim"] // c["num_heads"]}
HEAD_DIM_REPEATED = {"head_dim": lambda config: config.head_dim}
ATTENTION_BIAS = _field("qkv_bias o_bias", "attention_bias", False)
PARTIAL_ROTARY = _field("rotary_fraction", "partial_rotary_factor", 1.0)


SCALINGS: Mapping[str, type[RopeScaling]] = {cls.kind: cls for cls in get_args(RopeScaling)}

# Fields of every family that have one supported meaning, with their permitted values.
FIXED: Mapping[str, tuple] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "is_causal": (True, None),  # false makes attention bidirectional, as in sentence embedding models
}


@dataclass(frozen=True)
class Family:
    """How one model_type of config.json corresponds to ModelConfig."""

    architecture: str
    fields: tuple[Field, ...]
    rows: tuple[TensorRule, ...] = LLAMA
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """values of absent fields of config.json, if they differ from the defaults of other families"""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """fields of ModelConfig that config.json does not contain; values, or functions of the fields that were read"""
    fixed: Mapping[str, tuple] = field(default_factory=dict)
    """fields of config.json that have one supported meaning, with their permitted values"""
    written: Mapping[str, Any] = field(default_factory=dict)
    """additional fields that are written"""
    windows: "Windows | None" = None
    """None: the family has no sliding window"""
    rope_theta: float = 10_000.0
    rope_types: Mapping[str, type[RopeScaling]] = field(default_factory=lambda: SCALINGS)
    """its names for the types of rope scaling that it supports; of several names for one type, the first is written"""
    original_context_at_top: bool = False
    """whether original_max_position_embeddings is a field of config.json, and not of rope_scaling"""
    rope_by_layer: bool = False
    """whether rope_parameters contains two tables, for layers with and without a sliding window"""
    repeated: Mapping[str, Callable[[ModelConfig], Any]] = field(default_factory=dict)
    """fields of config.json that must equal a function of the others"""


@dataclass(frozen=True)
class Windows:
    """How a family specifies which layers have a sliding window."""

    pattern: Callable[[Mapping[str, Any]], Sequence[bool]]
    """a function of config.json, whose result is repeated over the layers; used if there is no layer_types"""
    settings: Mapping[str, int] = field(default_factory=dict)
    """the fields that `pattern` reads, with the minimum of each; False: a bool"""
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    layer_types: bool = True
    """whether the family has the field layer_types"""


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
    for period in range(1, config.num_layers + 2):  # the field of versions before layer_types
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
        # In the config.json of the first release, "gelu" means the tanh approximation used in training.
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
        # The released text_config of the larger models omits the fields that equal the defaults of transformers.
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
        # Some tools write attention_bias, but nothing reads it: the biases are always present.
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
        # Phi-4-mini writes these fields with the values that disable them.
        fixed={
            **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (False, None)),
            **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1, None)),
        },
        repeated=HEAD_DIM_REPEATED,
        windows=EVERY_LAYER,
        rope_types=dict.fromkeys(("longrope", "su", "yarn"), LongRopeScaling),
        original_context_at_top=True,
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
