"""Converts `args`, the settings in Megatron-LM's checkpoints, to ModelConfig and back."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.checkpoint import assumption_note, refuse_unsupported
from camelid.checkpoint.containers.pickles import printable
from camelid.errors import UserError
from camelid.model.config import Llama3Scaling, ModelConfig

WHAT = "Megatron-LM"
# Equivalent sizes: Megatron's name to the field of ModelConfig.
SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "embed_dim",
    "ffn_hidden_size": "mlp_dim",
    "num_attention_heads": "num_heads",
    "kv_channels": "head_dim",
}
# Settings that a Llama requires: the value, and Megatron's default if the setting is absent.
MUST: Mapping[str, tuple[Any, Any]] = {
    "swiglu": (True, False),
    "normalization": ("RMSNorm", "LayerNorm"),
    "add_bias_linear": (False, True),
}
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "add_qkv_bias": (False, None),
    "apply_layernorm_1p": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "attention_output_gate": (False, None),
    "heterogeneous_layers_config_path": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False, None),
    "no_rope_freq": (None,),
    "num_experts": (None, 0),
    "openai_gelu": (False, None),
    "qk_l2_norm": (False, None),
    "qk_layernorm": (False, None),
    "rotary_interleaved": (False, None),
    "rotary_percent": (1.0, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_type": ("vanilla", None),
    "squared_relu": (False, None),
    "window_size": (None,),
}
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}
"""the scaling that --use-rope-scaling selects, apart from its factor"""


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of the same type, except int and float; values from a file may be anything."""
    numbers = {type(one), type(other)} <= {int, float}
    return (numbers or type(one) is type(other)) and one == other


def describe_value(value: Any) -> str:
    """Returns a plain value as text, or the type of any other value, whose text could be very long."""
    plain = isinstance(value, str | float | None) or (isinstance(value, int) and abs(value) < 2**63)
    return printable(value) if plain else f"a {type(value).__name__}"


def check_plain(file: Path, args: Mapping[str, Any]) -> None:
    """Raises UserError for settings of a model that is not a Llama."""
    for key, (value, silent) in MUST.items():
        if not same(args.get(key, silent), value):
            raise _refused(file, key, args.get(key, silent))
    for key, values in PLAIN.items():
        if not any(same(args.get(key, values[0]), value) for value in values):
            raise _refused(file, key, args[key])
    if not same(args.get("position_embedding_type"), "rope") and args.get("use_rotary_position_embeddings") is not True:
        raise _refused(file, "position_embedding_type", args.get("position_embedding_type"))


def _refused(file: Path, key: str, value: Any) -> UserError:
    return UserError(
        f"{file} has {key} = {describe_value(value)}, which camelid does not support", "Give a checkpoint of a Llama."
    )


def vocab_step(args: Mapping[str, Any]) -> int:
    """Returns the number to whose multiple the vocabulary of each rank is padded."""
    step = args.get("make_vocab_size_divisible_by", 128)
    return step if type(step) is int and 0 < step <= 2**16 else 128


def config_from_args(file: Path, args: Mapping[str, Any]) -> tuple[ModelConfig, tuple[str, ...]]:
    """Returns the model that the settings describe, and notes on what is assumed."""
    sizes = {ours: _number(file, args, theirs) for theirs, ours in SIZES.items()}
    vocab_size = args.get("vocab_size")
    notes = []
    if vocab_size is None:
        vocab_size = _number(file, args, "padded_vocab_size")
        notes.append(f"the settings do not contain the vocabulary size without padding: {vocab_size} is assumed")
    elif type(vocab_size) is not int or vocab_size < 1:
        raise _strange(file, "vocab_size", vocab_size)
    scaling = None
    if args.get("use_rope_scaling"):
        scaling = Llama3Scaling(factor=_number(file, args, "rope_scaling_factor", 8.0), **SCALING)
    try:
        config = ModelConfig(
            **sizes,
            vocab_size=vocab_size,
            num_kv_heads=_kv_heads(file, args),
            context_length=_number(file, args, "max_position_embeddings"),
            norm_eps=_number(file, args, "norm_epsilon", 1e-5),
            rope_theta=float(_number(file, args, "rotary_base", 10_000.0)),
            rope_scaling=scaling,
            init_std=float(_number(file, args, "init_method_std", 0.02)),
            tie_embeddings=not args.get("untie_embeddings_and_output_weights", False),
            family="llama",
        )
    except ValueError as error:
        raise UserError(f"{file} describes no model: {error}", "Give --config PRESET_OR_JSON.") from error
    first = "Megatron does not store these settings of training reliably: "
    trained = (f"{key} = {getattr(config, key):g}" for key in ("norm_eps", "rope_theta", "context_length", "init_std"))
    silent = assumption_note(WHAT, config, "bos_id", "eos_ids", "pad_id", "family")
    return config, (first + ", ".join(trained) + " are assumed", silent, *notes)


def _kv_heads(file: Path, args: Mapping[str, Any]) -> int:
    return _number(file, args, "num_query_groups" if args.get("group_query_attention") else "num_attention_heads")


def _number(file: Path, args: Mapping[str, Any], key: str, default: float | None = None) -> Any:
    """Returns a positive number, which must be an integer if there is no default."""
    value = args.get(key, default)
    kinds = (int,) if default is None else (int, float)
    if type(value) not in kinds or not 0 < value < 2**53 or not math.isfinite(value):
        raise _strange(file, key, value)
    return value


def _strange(file: Path, key: str, value: Any) -> UserError:
    return UserError(f"{file} has {key} = {describe_value(value)} in its args", "Give --config PRESET_OR_JSON.")


def check_agree(file: Path, args: Mapping[str, Any], config: ModelConfig, source: str) -> None:
    """Raises UserError if the sizes differ; for other settings, the config takes precedence."""
    pairs = [(key, args[key], getattr(config, ours)) for key, ours in SIZES.items() if key in args]
    if args.get("group_query_attention") and "num_query_groups" in args:
        pairs.append(("num_query_groups", args["num_query_groups"], config.num_kv_heads))
    for key, theirs, ours in pairs:
        if not same(theirs, ours):
            raise UserError(
                f"{file} has {key} = {describe_value(theirs)}, and {source} {ours}", "They belong to different models."
            )


def args_from_config(config: ModelConfig, dtype: np.dtype, tensor_parallel: int, stages: int) -> dict[str, Any]:
    """Returns the settings of a model; raises UserError if Megatron does not support it."""
    scaling = config.rope_scaling
    if isinstance(scaling, Llama3Scaling) and all(getattr(scaling, key) == value for key, value in SCALING.items()):
        refuse_unsupported(WHAT, config, ("tie_embeddings", "rope_scaling"))
    else:
        scaling = None
        refuse_unsupported(WHAT, config, ("tie_embeddings",))
    args = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    return args | {
        "encoder_num_layers": config.num_layers,
        "group_query_attention": config.num_kv_heads != config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "max_position_embeddings": config.context_length,
        "seq_length": config.context_length,
        "encoder_seq_length": config.context_length,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(config.rope_theta) if config.rope_theta.is_integer() else config.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": scaling is not None,
        "rope_scaling_factor": scaling.factor if scaling is not None else 8.0,
        "normalization": "RMSNorm",
        "norm_epsilon": config.norm_eps,
        "apply_layernorm_1p": False,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": not config.tie_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "tokenizer_type": "HuggingFaceTokenizer",
        "init_method_std": config.init_std,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "expert_model_parallel_size": 1,
        "context_parallel_size": 1,
        "data_parallel_size": 1,
        "world_size": tensor_parallel * stages,
        "num_experts": None,
        "transformer_impl": "local",
        "fp16": dtype.name == "float16",
        "bf16": dtype.name == "bfloat16",
        "params_dtype": dtype,
        "iteration": 1,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
