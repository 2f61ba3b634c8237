"""Converts between the metadata of a GGUF file and a ModelConfig.

Scalings of the rotary frequencies are compared by their divisors, by which each frequency is divided. Linear scaling
has one divisor, which is in the metadata; Llama 3's scaling has a tensor of them, rope_freqs.weight.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.containers.ggml import QUANTIZATIONS
from camelid.checkpoint.containers.gguf_file import AGAIN, ALIGNMENT, FLOAT32, TEXT, UINT32, describe_value
from camelid.checkpoint.tensors import DTYPES, Tensor
from camelid.errors import UserError
from camelid.model.config import LinearScaling, Llama3Scaling, ModelConfig, RopeScaling
from camelid.model.rope import llama3, unscaled

EMBED, HEAD, ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
ORIGINAL = "Use the original checkpoint."
CONFIG = "Describe the model with --config PRESET_OR_JSON, or put its config.json in the same folder."

# general.file_type by the tensor type of the matrices (llama.h, llama_ftype).
FILE_TYPES = {0: 0, 1: 1, 30: 32, 8: 7, 2: 2}
SIZES: Mapping[str, str] = {
    "context_length": "context_length",
    "embed_dim": "embedding_length",
    "mlp_dim": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
}
FLOATS: Mapping[str, str] = {"norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}
EXPECTED: Mapping[str, tuple] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.attn_factor": (1.0,),
}
"""Other keys of a Llama with their permitted values; any other value would change what is computed."""
IGNORED = frozenset({"tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"})
LINEAR = ("rope.scaling.factor", "rope.scale_linear")  # the second one is from early versions
ENDS = ("eos", "eot", "eom")
LLAMA3 = [
    Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    for factor in (8.0, 32.0)  # Llama 3.1 and 3.2
]


def fields_from_metadata(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the fields of ModelConfig that the file specifies; raises UserError for keys that are not supported."""
    own = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    known = {*SIZES.values(), *FLOATS.values(), *EXPECTED, *IGNORED, *LINEAR}
    known |= {"attention.value_length", "rope.dimension_count"}
    for name, value in own.items():
        if name not in known or (name in EXPECTED and value not in EXPECTED[name]):
            raise UserError(f"{path} has llama.{name} = {describe_value(value)}, which is not supported", ORIGINAL)

    def number(name: str, number_type: type, default: Any = None) -> Any:
        return default if name not in own else _number(path, name, own[name], number_type)

    fields = {ours: number(name, int) for ours, name in SIZES.items()}
    fields |= {ours: number(name, float) for ours, name in FLOATS.items()}
    fields["rope_theta"] = fields["rope_theta"] or 10_000.0
    fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
    if fields["head_dim"] is None and fields["embed_dim"] and fields["num_heads"]:
        fields["head_dim"] = fields["embed_dim"] // fields["num_heads"]
    if fields["vocab_size"] is None and EMBED in tensors:
        fields["vocab_size"] = tensors[EMBED].shape[0]
    largest = max((math.prod(tensor.shape) for tensor in tensors.values()), default=0)
    limits = {**dict.fromkeys(SIZES, largest), "num_layers": len(tensors), "context_length": 2**31}
    for ours, limit in limits.items():  # before anything of such a size is allocated
        if (fields[ours] or 0) > limit:
            raise UserError(
                f"{path} has llama.{SIZES[ours]} = {fields[ours]}, which is more than its tensors allow", AGAIN
            )
    for name in ("attention.value_length", "rope.dimension_count"):
        if number(name, int, fields["head_dim"]) != fields["head_dim"]:
            raise UserError(
                f"{path} has llama.{name} = {own[name]}, but its head dimension is {fields['head_dim']}", ORIGINAL
            )
    fields["tie_embeddings"] = HEAD not in tensors
    return {name: value for name, value in fields.items() if value is not None}


def _number(path: Path, name: str, value: Any, number_type: type) -> Any:
    limit = 2**31 if number_type is int else np.finfo(np.float32).max
    if type(value) not in (int, number_type) or not 0 < value < limit:
        raise UserError(
            f"{path} has llama.{name} = {describe_value(value)}; one positive number is supported", ORIGINAL
        )
    # The shortest decimal representation of a float32: 1e-05 instead of 9.99999974e-06.
    return value if number_type is int else float(str(np.float32(value)))


def divisors_in_file(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> np.ndarray:
    """Returns the divisors of the rotary frequencies in the file, of shape (1,) or (head_dim / 2,)."""
    linear = 1.0
    if metadata.get("llama.rope.scaling.type", "linear") == "linear":
        present = [name for name in LINEAR if metadata.get(f"llama.{name}")]
        factors = [_number(path, name, metadata[f"llama.{name}"], float) for name in present]
        linear = factors[0] if factors else 1.0
    if (tensor := tensors.get(ROPE)) is None:
        return np.array([linear])
    if tensor.dtype != DTYPES["F32"] or tensor.shape != (fields.get("head_dim", 0) // 2,):
        raise UserError(
            f"{ROPE} in {path} is {tensor.shape} {tensor.dtype}, and head_dim is {fields.get('head_dim')}", AGAIN
        )
    factors = np.empty(tensor.shape, np.float32)
    tensor.read_into(factors, (slice(None),))
    with np.errstate(all="ignore"):
        return factors * np.float32(linear)


def divisors_of_scaling(scaling: RopeScaling | None, theta: float, head_dim: int) -> np.ndarray | None:
    """Returns the divisors of the frequencies, float32 (head_dim / 2,), or None if GGUF cannot express the scaling."""
    match scaling:
        case None:
            return np.ones(head_dim // 2, np.float32)
        case LinearScaling(factor=factor):
            return np.full(head_dim // 2, factor, np.float32)
        case Llama3Scaling():
            with np.errstate(all="ignore"):
                freq = unscaled(theta, head_dim)
                return (freq / llama3(freq, scaling)).astype(np.float32)
        case _:
            return None


def _same(ours: np.ndarray | None, theirs: np.ndarray) -> bool:
    # Converters round differently; any two of Llama 3's scalings differ by thousands of times more.
    return ours is not None and bool(np.allclose(ours, theirs, rtol=1e-4, atol=0))


def disagreements(config: ModelConfig, fields: Mapping[str, Any], divisors: np.ndarray) -> str:
    """Returns a description of the fields in which a config and a file differ, empty if they agree."""
    differences = []
    for name in fields.keys() - {"context_length"}:  # which users may choose
        ours, theirs = getattr(config, name), fields[name]
        if ours != theirs and not (name in FLOATS and np.float32(ours) == np.float32(theirs)):
            differences.append(f"{name} = {ours}, and {theirs} in the file")
    if config.rotary_fraction != 1.0:
        differences.append(f"rotary_fraction = {config.rotary_fraction}, and 1.0 in the file")
    ours = divisors_of_scaling(config.rope_scaling, config.rope_theta, config.head_dim)
    if not differences and not _same(ours, divisors):
        differences.append(f"rope_scaling = {config.rope_scaling}, and other frequencies in the file")
    return "; ".join(sorted(differences))


def config_from_metadata(
    path: Path,
    metadata: Mapping[str, Any],
    fields: Mapping[str, Any],
    divisors: np.ndarray,
    notes: list[str],
    *,
    per_frequency: bool,
) -> ModelConfig:
    """Returns the model that the file describes, and appends what was assumed or ignored to `notes`.

    `per_frequency`: whether each rotary frequency has its own divisor. Raises UserError if a field is missing, or if
    the divisors match no known scaling.
    """
    for ours, name in {**SIZES, **FLOATS}.items():
        if ours not in fields:
            raise UserError(f"{path} has no llama.{name}", CONFIG)
    known = LLAMA3 if per_frequency else [LinearScaling(factor=float(str(np.float32(divisors[0]))))]
    theta, head_dim = fields["rope_theta"], fields["head_dim"]
    scalings = [s for s in (None, *known) if _same(divisors_of_scaling(s, theta, head_dim), divisors)]
    if not scalings:
        raise UserError(f"{ROPE} in {path} does not match the scaling of Llama 3.1 or 3.2", CONFIG)
    if isinstance(scalings[0], Llama3Scaling):
        notes.append(
            f"{ROPE} matches Llama 3's scaling with factor {scalings[0].factor:g}, low_freq_factor 1, high_freq_factor "
            "4 and an original context of 8192"
        )

    def token(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or (type(value) is int and 0 <= value < fields["vocab_size"]):
            return value
        notes.append(f"tokenizer.ggml.{name}_token_id = {describe_value(value)} is not in the vocabulary: ignored")
        return None

    ends = dict.fromkeys(value for name in ENDS if (value := token(name)) is not None)
    try:
        return ModelConfig(
            **fields,
            rope_scaling=scalings[0],
            bos_id=token("bos"),
            eos_ids=tuple(ends),
            pad_id=token("padding"),
            family="llama",
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}", AGAIN) from error


def metadata_from_config(
    config: ModelConfig, code: int, bos_id: int | None, eos_id: int | None
) -> dict[str, tuple[int, Any]]:
    """Returns the metadata of a model, as key to (type, value).

    `code` is the tensor type of most matrices; `bos_id` and `eos_id` are those of the tokenizer, if it has them. Raises
    UserError if the model has more end tokens than GGUF has keys.
    """
    metadata: dict[str, tuple[int, Any]] = {
        "general.architecture": (TEXT, "llama"),
        "general.type": (TEXT, "model"),
        "general.name": (TEXT, "llama"),
        "general.alignment": (UINT32, ALIGNMENT),
        "general.file_type": (UINT32, FILE_TYPES[code]),
    }
    if code in QUANTIZATIONS:
        metadata["general.quantization_version"] = UINT32, 2
    metadata |= {f"llama.{name}": (UINT32, getattr(config, ours)) for ours, name in SIZES.items()}
    metadata |= {f"llama.{name}": (FLOAT32, getattr(config, ours)) for ours, name in FLOATS.items()}
    metadata |= dict.fromkeys(("llama.attention.value_length", "llama.rope.dimension_count"), (UINT32, config.head_dim))
    if isinstance(config.rope_scaling, LinearScaling):
        metadata["llama.rope.scaling.type"] = TEXT, "linear"
        metadata["llama.rope.scaling.factor"] = FLOAT32, config.rope_scaling.factor
    # Chat templates use the first one, as eos_token.
    eos_ids = tuple(dict.fromkeys(token for token in (eos_id, *config.eos_ids) if token is not None))
    if len(eos_ids) > len(ENDS):
        raise UserError(f"GGUF cannot store eos_ids = {eos_ids}: it has keys for {len(ENDS)}", "Use the format hf.")
    bos_id = config.bos_id if bos_id is None else bos_id
    ids = {"bos": bos_id, "padding": config.pad_id, **dict(zip(ENDS, eos_ids, strict=False))}
    metadata |= {f"tokenizer.ggml.{name}_token_id": (UINT32, value) for name, value in ids.items() if value is not None}
    return metadata
