"""Rotary position embedding (arXiv:2104.09864): each pair of features turns with the position, at its own frequency.

Axes: B batch, S tokens, H heads, D head_dim; half, the pairs that are rotated; kinds, of layers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from camelid.model.config import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, ModelConfig, YarnScaling

Frequencies = Float32[np.ndarray, " half"]
"""radians a position, of each pair"""


def rotations(
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None,
    lengths: Int[Array, " B"] | None,
    config: ModelConfig,
) -> tuple[Float[Array, "kinds B S half"], Float[Array, "kinds B S half"]]:
    """Cosine and sine of every angle, for all layers; kind 1, where there is one, is for those with the window.

    `lengths`, what rows are to reach when they are decoded, must not change then: keys are cached as they were rotated.
    """
    kinds = [(scaled(positions, segments, lengths, config), attention_factor(config))]
    if config.local_rope_theta is not None:
        kinds.append((unscaled(config.local_rope_theta, config.rotary_dim), 1.0))
    place = positions[..., None].astype(jnp.float32)
    cos = jnp.stack([factor * jnp.cos(place * freq) for freq, factor in kinds])
    sin = jnp.stack([factor * jnp.sin(place * freq) for freq, factor in kinds])
    return cos, sin


def rotate(
    x: Float[Array, "B S H D"], rotation: tuple[Float[Array, "B S half"], Float[Array, "B S half"]]
) -> Float[Array, "B S H D"]:
    """`x` turned to its positions: feature i with i + half, the convention of Hugging Face's files; the rest stay."""
    cos, sin = (part[:, :, None] for part in rotation)
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)


def scaled(
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None,
    lengths: Int[Array, " B"] | None,
    config: ModelConfig,
) -> Frequencies | Float32[Array, "B _ half"]:
    """Frequencies; where they depend on how long a document is, those of each token or row."""
    freq = unscaled(config.rope_theta, config.rotary_dim)
    match config.rope_scaling:
        case None:
            return freq
        case LinearScaling(factor=factor):
            return freq / np.float32(factor)
        case Llama3Scaling() as scaling:
            return llama3(freq, scaling)
        case YarnScaling() as scaling:
            return yarn(freq, scaling, config)
        case DynamicScaling(factor=factor):
            return dynamic(freq, factor, document_lengths(positions, segments, lengths), config)
        case LongRopeScaling() as scaling:
            return longrope(freq, scaling, document_lengths(positions, segments, lengths))


def unscaled(theta: float, dim: int) -> Frequencies:
    # Rounded where PyTorch rounds (exponent, power, reciprocal): these are the numbers that models were trained with.
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return 1 / np.power(theta, exponent, dtype=np.float64).astype(np.float32)


def llama3(freq: Frequencies, scaling: Llama3Scaling) -> Frequencies:
    turns = scaling.original_context * freq / (2 * math.pi)
    speed = np.interp(turns, (scaling.low_freq_factor, scaling.high_freq_factor), (1 / scaling.factor, 1))
    return freq * speed.astype(np.float32)


def yarn(freq: Frequencies, scaling: YarnScaling, config: ModelConfig) -> Frequencies:
    dim = config.rotary_dim

    def pair(turns: float) -> float:
        """Which pair turns so often over the original context; between two of them, a fraction."""
        return dim * math.log(scaling.original_context / (2 * math.pi * turns)) / (2 * math.log(config.rope_theta))

    kept, slow = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        kept, slow = math.floor(kept), math.ceil(slow)
    kept, slow = max(kept, 0), min(slow, dim - 1)
    slowed = np.clip((np.arange(dim // 2) - kept) / (slow - kept or 0.001), 0, 1)
    return freq * (1 - slowed + slowed / stretch(scaling, config)).astype(np.float32)


def dynamic(
    freq: Frequencies, factor: float, length: Int[Array, "B _"], config: ModelConfig
) -> Float32[Array, "B _ half"]:
    beyond = jnp.maximum(length - config.context_length, 0).astype(jnp.float32)
    slower = 1 + factor / config.context_length * beyond
    # What a larger theta does: the last pair turns so much slower, the first as before.
    return slower[..., None] ** -np.linspace(0, 1, len(freq), dtype=np.float32) * freq


def longrope(freq: Frequencies, scaling: LongRopeScaling, length: Int[Array, "B _"]) -> Float32[Array, "B _ half"]:
    short, long = (freq / jnp.array(divisors, jnp.float32) for divisors in (scaling.short_factor, scaling.long_factor))
    return jnp.where((length > scaling.original_context)[..., None], long, short)


def document_lengths(
    positions: Int[Array, "B S"], segments: Int[Array, "B S"] | None, lengths: Int[Array, " B"] | None
) -> Int[Array, "B _"]:
    """How long the document of each token or row is, so that neither its neighbours nor other rows matter."""
    if lengths is not None:
        return lengths[:, None]
    if segments is None:
        return positions.max(-1, keepdims=True) + 1
    most = segments.shape[1] + 1
    return 1 + jax.vmap(lambda place, of: jax.ops.segment_max(place, of, most)[of])(positions, segments)


def attention_factor(config: ModelConfig) -> float:
    """What queries and keys are multiplied by."""
    match scaling := config.rope_scaling:
        case YarnScaling() | LongRopeScaling() if scaling.attention_factor is not None:
            return scaling.attention_factor
        case YarnScaling(mscale=mscale, mscale_all_dim=all_dim):
            # Either alone says nothing, and nor does 0.
            over, under = (mscale, all_dim) if mscale and all_dim else (1, 0)
            growth = 0.1 * math.log(max(stretch(scaling, config), 1))
            return (1 + over * growth) / (1 + under * growth)
        case LongRopeScaling(original_context=original):
            return math.sqrt(1 + math.log(max(stretch(scaling, config), 1)) / math.log(original))
    return 1.0


def stretch(scaling: YarnScaling | LongRopeScaling, config: ModelConfig) -> float:
    return config.context_length / scaling.original_context if scaling.factor is None else scaling.factor
