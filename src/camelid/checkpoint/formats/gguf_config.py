"""What the metadata of a GGUF file says of its model: as a ModelConfig, and back.

A scaling of the rotary frequencies is compared by what it divides each of them by, here called the stretch. Of a linear
one that is a number in the metadata; of Llama 3's it is a tensor, rope_freqs.weight.
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
CONFIG = "Give the model with --config PRESET_OR_JSON, or put its config.json beside the file."

# general.file_type by the code of the matrices (llama.h, llama_ftype).
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
"""What a Llama may say beside; anything else changes what is computed."""
SILENT = frozenset({"tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"})
LINEAR = ("rope.scaling.factor", "rope.scale_linear")  # the second is of early files
ENDS = ("eos", "eot", "eom")
LLAMA3 = [
    Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    for factor in (8.0, 32.0)  # of Llama 3.1 and 3.2
]


def fields_of(path: Path, held: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of ModelConfig, as far as the file knows them."""
    own = {key.removeprefix("llama."): value for key, value in held.items() if key.startswith("llama.")}
    known = {*SIZES.values(), *FLOATS.values(), *EXPECTED, *SILENT, *LINEAR}
    known |= {"attention.value_length", "rope.dimension_count"}
    for name, value in own.items():
        if name not in known or (name in EXPECTED and value not in EXPECTED[name]):
            raise UserError(f"{path} has llama.{name} = {describe_value(value)}, which camelid does not read", ORIGINAL)

    def one(name: str, kind: type, default: Any = None) -> Any:
        return default if name not in own else _number(path, name, own[name], kind)

    said = {ours: one(name, int) for ours, name in SIZES.items()}
    said |= {ours: one(name, float) for ours, name in FLOATS.items()}
    said["rope_theta"] = said["rope_theta"] or 10_000.0
    said["num_kv_heads"] = said["num_kv_heads"] or said["num_heads"]
    if said["head_dim"] is None and said["embed_dim"] and said["num_heads"]:
        said["head_dim"] = said["embed_dim"] // said["num_heads"]
    if said["vocab_size"] is None and EMBED in tensors:
        said["vocab_size"] = tensors[EMBED].shape[0]
    most = max((math.prod(tensor.shape) for tensor in tensors.values()), default=0)
    limits = {**dict.fromkeys(SIZES, most), "num_layers": len(tensors), "context_length": 2**31}
    for ours, limit in limits.items():  # before anything is made of such a size
        if (said[ours] or 0) > limit:
            raise UserError(f"{path} has llama.{SIZES[ours]} = {said[ours]}, and no tensors for it", AGAIN)
    for name in ("attention.value_length", "rope.dimension_count"):
        if one(name, int, said["head_dim"]) != said["head_dim"]:
            raise UserError(f"{path} has llama.{name} = {own[name]}, and heads of {said['head_dim']}", ORIGINAL)
    said["tie_embeddings"] = HEAD not in tensors
    return {name: value for name, value in said.items() if value is not None}


def _number(path: Path, name: str, value: Any, kind: type) -> Any:
    fits = type(value) in (int, kind) and 0 < value < (2**31 if kind is int else np.finfo(np.float32).max)
    if not fits:
        raise UserError(
            f"{path} has llama.{name} = {describe_value(value)}; camelid computes one positive number", ORIGINAL
        )
    # The shortest decimal of a float32: 1e-05 and not 9.99999974e-06.
    return value if kind is int else float(str(np.float32(value)))


def held_stretch(
    path: Path, held: Mapping[str, Any], tensors: Mapping[str, Tensor], said: Mapping[str, Any]
) -> np.ndarray:
    """What the file divides each frequency by."""
    linear = 1.0
    if held.get("llama.rope.scaling.type", "linear") == "linear":
        factors = [_number(path, name, held[f"llama.{name}"], float) for name in LINEAR if held.get(f"llama.{name}")]
        linear = factors[0] if factors else 1.0
    if (tensor := tensors.get(ROPE)) is None:
        return np.array([linear])
    if tensor.dtype != DTYPES["F32"] or tensor.shape != (said.get("head_dim", 0) // 2,):
        raise UserError(
            f"{ROPE} in {path} is {tensor.shape} {tensor.dtype}, for heads of {said.get('head_dim')}", AGAIN
        )
    factors = np.empty(tensor.shape, np.float32)
    tensor.read_into(factors, (slice(None),))
    with np.errstate(all="ignore"):
        return factors * np.float32(linear)


def stretch_of(scaling: RopeScaling | None, theta: float, head_dim: int) -> np.ndarray | None:
    """What a scaling divides each frequency by; None for one that GGUF has no words for."""
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


def _same(ours: np.ndarray | None, held: np.ndarray) -> bool:
    # Other converters round elsewhere; between two of Llama 3's scalings the difference is thousands of times larger.
    return ours is not None and bool(np.allclose(ours, held, rtol=1e-4, atol=0))


def disagreements(config: ModelConfig, said: Mapping[str, Any], stretch: np.ndarray) -> str:
    """What a config and a file say otherwise, in words."""
    odd = []
    for name in said.keys() - {"context_length"}:  # which a user may choose
        ours, theirs = getattr(config, name), said[name]
        if ours != theirs and not (name in FLOATS and np.float32(ours) == np.float32(theirs)):
            odd.append(f"{name} = {ours}, and {theirs} in the file")
    if config.rotary_fraction != 1.0:
        odd.append(f"rotary_fraction = {config.rotary_fraction}, and 1.0 in the file")
    if not odd and not _same(stretch_of(config.rope_scaling, config.rope_theta, config.head_dim), stretch):
        odd.append(f"rope_scaling = {config.rope_scaling}, and other frequencies in the file")
    return "; ".join(sorted(odd))


def config_of(
    path: Path, held: Mapping[str, Any], said: Mapping[str, Any], stretch: np.ndarray, by_pair: bool, notes: list[str]
) -> ModelConfig:
    """The model that the file describes; `by_pair`: whether each frequency has a divisor of its own."""
    for ours, name in {**SIZES, **FLOATS}.items():
        if ours not in said:
            raise UserError(f"{path} has no llama.{name}", CONFIG)
    scaled = LLAMA3 if by_pair else [LinearScaling(factor=float(str(np.float32(stretch[0]))))]
    fits = [s for s in (None, *scaled) if _same(stretch_of(s, said["rope_theta"], said["head_dim"]), stretch)]
    if not fits:
        raise UserError(f"{ROPE} in {path} has none of the factors that Llama 3.1 and 3.2 use", CONFIG)
    if isinstance(fits[0], Llama3Scaling):
        notes.append(f"{ROPE} is what Llama 3's scaling gives: factor {fits[0].factor:g}, 1, 4, trained on 8192")

    def token(name: str) -> int | None:
        value = held.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or (type(value) is int and 0 <= value < said["vocab_size"]):
            return value
        notes.append(
            f"tokenizer.ggml.{name}_token_id = {describe_value(value)} is no token of the vocabulary and was left out"
        )
        return None

    ends = dict.fromkeys(value for name in ENDS if (value := token(name)) is not None)
    try:
        return ModelConfig(
            **said,
            rope_scaling=fits[0],
            bos_id=token("bos"),
            eos_ids=tuple(ends),
            pad_id=token("padding"),
            family="llama",
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}", AGAIN) from error


def metadata_of(config: ModelConfig, code: int, bos_id: int | None, eos_id: int | None) -> dict[str, tuple[int, Any]]:
    """By key: type and value; `code`: the type of most matrices; `bos_id` and `eos_id`: the tokenizer's own."""
    held: dict[str, tuple[int, Any]] = {
        "general.architecture": (TEXT, "llama"),
        "general.type": (TEXT, "model"),
        "general.name": (TEXT, "llama"),
        "general.alignment": (UINT32, ALIGNMENT),
        "general.file_type": (UINT32, FILE_TYPES[code]),
    }
    if code in QUANTIZATIONS:
        held["general.quantization_version"] = UINT32, 2
    held |= {f"llama.{name}": (UINT32, getattr(config, ours)) for ours, name in SIZES.items()}
    held |= {f"llama.{name}": (FLOAT32, getattr(config, ours)) for ours, name in FLOATS.items()}
    held |= {f"llama.{name}": (UINT32, config.head_dim) for name in ("attention.value_length", "rope.dimension_count")}
    if isinstance(config.rope_scaling, LinearScaling):
        held["llama.rope.scaling.type"] = TEXT, "linear"
        held["llama.rope.scaling.factor"] = FLOAT32, config.rope_scaling.factor
    # Templates know the first one by name.
    eos_ids = tuple(dict.fromkeys(token for token in (eos_id, *config.eos_ids) if token is not None))
    if len(eos_ids) > len(ENDS):
        raise UserError(f"GGUF cannot hold eos_ids = {eos_ids}: it has room for {len(ENDS)}", "Use the format hf.")
    bos_id = config.bos_id if bos_id is None else bos_id
    ids = {"bos": bos_id, "padding": config.pad_id, **dict(zip(ENDS, eos_ids, strict=False))}
    held |= {f"tokenizer.ggml.{name}_token_id": (UINT32, value) for name, value in ids.items() if value is not None}
    return held
