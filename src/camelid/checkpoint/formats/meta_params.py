"""Converts params.json of Meta's checkpoints to ModelConfig and back."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from camelid.checkpoint.checkpoint import assumption_note, refuse_unsupported, refuse_wide_heads
from camelid.disk.json_files import read_json
from camelid.errors import UserError
from camelid.model.config import Llama3Scaling, ModelConfig

WHAT = "Meta's format"
PARAMS = "params.json"
AGAIN = "Download or copy the file again."

LLAMA3_THETA, CODE_LLAMA_THETA, LLAMA3_VOCABULARY = 500_000.0, 1_000_000.0, 128_256
# The scaling of Llama 3.1, which is a constant in Meta's code; that of Llama 3.2 differs only in its factor.
LLAMA3_1 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
LLAMA3_2 = replace(LLAMA3_1, factor=32.0)
MULTIPLES = tuple(2**i for i in range(12, -1, -1))
MULTIPLIERS = (None, 1.3, 1.2, 1.5)  # of released models

# By key of params.json: the type of its value, and the equivalent field of ModelConfig if there is one.
KEYS: Mapping[str, tuple[type, str]] = {
    "dim": (int, "embed_dim"),
    "n_layers": (int, "num_layers"),
    "n_heads": (int, "num_heads"),
    "n_kv_heads": (int, "num_kv_heads"),
    "norm_eps": (float, "norm_eps"),
    "rope_theta": (float, "rope_theta"),
    "vocab_size": (int, ""),
    "multiple_of": (int, ""),
    "ffn_dim_multiplier": (float, ""),
    "use_scaled_rope": (bool, ""),
    "rope_scaling_factor": (float, ""),
    "max_batch_size": (int, ""),
    "max_seq_len": (int, ""),
}
REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")
OPTIONAL = ("n_kv_heads", "ffn_dim_multiplier", "rope_scaling_factor")  # null means the same as an absent key


# Reading --------------------------------------------------------------------------------


def read_params(path: Path) -> dict[str, Any]:
    """Returns the checked values of params.json, which may be nested under a single key `model`.

    Raises UserError for unknown or missing keys and for values of a wrong type.
    """
    held = read_json(path)
    if list(held) == ["model"] and isinstance(held["model"], dict):
        held = held["model"]
    if unknown := sorted(held.keys() - KEYS.keys()):
        raise UserError(f"{path} has unknown keys: {str(unknown[:3])[1:-1]}", "This model is not supported yet.")
    params: dict[str, Any] = {key: value for key, value in held.items() if value is not None or key not in OPTIONAL}
    if params.get("vocab_size") == -1:
        del params["vocab_size"]  # Meta's code asks the tokenizer
    for key, value in params.items():
        expected = KEYS[key][0]
        valid = isinstance(value, (expected, int)) and isinstance(value, bool) == (expected is bool)
        if not valid or not (expected is bool or 0 < value < 2**63):
            raise UserError(f"{path} has {key} = {value!r}", AGAIN)
        params[key] = expected(value)
    if missing := [key for key in REQUIRED if key not in params]:
        raise UserError(f"{path} has no {', '.join(missing)}", AGAIN)
    if params["dim"] % params["n_heads"]:
        raise UserError(f"{path} has dim = {params['dim']} for n_heads = {params['n_heads']}", AGAIN)
    return params


def config_from_params(params: Mapping[str, Any], vocab_size: int, tied: bool) -> tuple[ModelConfig, tuple[str, ...]]:
    """Returns the model that params.json describes, and notes on what is assumed.

    `vocab_size` is that of the tensors, for a file that does not specify it; `tied` is whether the head equals the
    embedding table. Raises ValueError if the values do not describe a valid model.
    """
    theta, heads = params.get("rope_theta", 10_000.0), params["n_heads"]
    notes = ["the head is taken as tied to the embeddings"] if tied else []
    scaling = None
    if params.get("use_scaled_rope"):
        guess = LLAMA3_2 if tied else LLAMA3_1
        scaling = replace(guess, factor=params.get("rope_scaling_factor", guess.factor))
        if "rope_scaling_factor" not in params:
            notes.append(f"{PARAMS} has no rope_scaling_factor: {guess.factor:g} is assumed")
    context_length = _context_length(params, theta)
    notes.append(f"{PARAMS} does not specify the context length: {context_length} tokens are assumed")
    vocab_size = params.get("vocab_size", vocab_size)
    bos, eos = (128_000, (128_001, 128_008, 128_009)) if vocab_size == LLAMA3_VOCABULARY else (1, (2,))
    notes.append(f"{PARAMS} does not specify BOS and EOS: {bos} and {', '.join(map(str, eos))} are assumed")
    config = ModelConfig(
        vocab_size=vocab_size,
        embed_dim=params["dim"],
        mlp_dim=_mlp_dim(params["dim"], params.get("multiple_of", 256), params.get("ffn_dim_multiplier")),
        num_layers=params["n_layers"],
        num_heads=heads,
        num_kv_heads=params.get("n_kv_heads", heads),
        head_dim=params["dim"] // heads,
        context_length=context_length,
        norm_eps=params["norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=tied,
        bos_id=bos,
        eos_ids=eos,
        family="llama",
    )
    notes.append(assumption_note(PARAMS, config, "pad_id", "init_std", "family", *([] if tied else ["tie_embeddings"])))
    return config, tuple(notes)


def _context_length(params: Mapping[str, Any], theta: float) -> int:
    """Returns the context length of released models with the same settings."""
    if params.get("use_scaled_rope"):
        return 131_072
    by_theta = {LLAMA3_THETA: 8192, CODE_LLAMA_THETA: 16_384}
    return by_theta.get(theta, 2048 if params["norm_eps"] == 1e-6 else 4096)


def _mlp_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    width = 8 * dim // 3
    width = width if multiplier is None else int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


# Writing --------------------------------------------------------------------------------


def params_from_config(config: ModelConfig) -> dict[str, Any]:
    """Returns params.json for Meta's code; raises UserError for a model that this code does not support."""
    refuse_unsupported(WHAT, config, ("rope_scaling", "tie_embeddings"))
    if config.rope_scaling not in (None, LLAMA3_1, LLAMA3_2):
        raise UserError(f"{WHAT} cannot hold rope_scaling = {config.rope_scaling}", "Use the format hf.")
    refuse_wide_heads(WHAT, config)
    multiple_of, multiplier = _mlp_settings(config.embed_dim, config.mlp_dim)
    params: dict[str, Any] = {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": config.norm_eps,
    }
    # Older versions of Meta's code support fewer keys, and refuse others.
    if config.num_kv_heads != config.num_heads:
        params["n_kv_heads"] = config.num_kv_heads
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.rope_theta != 10_000:
        params["rope_theta"] = config.rope_theta
    if isinstance(scaling := config.rope_scaling, Llama3Scaling):
        params["use_scaled_rope"] = True
        # Meta's own files of Llama 3.1 have no factor; for a tied model, the factor of Llama 3.2 would be assumed.
        if scaling == LLAMA3_2 or config.tie_embeddings:
            params["rope_scaling_factor"] = scaling.factor
    return params


def _mlp_settings(dim: int, width: int) -> tuple[int, float | None]:
    """Returns multiple_of and ffn_dim_multiplier for an MLP of exactly this width."""
    pairs = [(multiple, multiplier) for multiplier in MULTIPLIERS for multiple in MULTIPLES]
    # 0.5 is added so that rounding cannot give a width that is one less.
    pairs.append((1, (width + 0.5) / (8 * dim // 3)))
    return next(pair for pair in pairs if _mlp_dim(dim, *pair) == width)
