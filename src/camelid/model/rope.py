"""Rotary position embeddings (arXiv:2104.09864): pairs of features are rotated by the position times a frequency.

Axes: B batch, S tokens, H heads, D head_dim, half rotated pairs, kinds of layers (all, or global and local).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from camelid.model.config import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, ModelConfig, YarnScaling

Frequencies = Float32[np.ndarray, " half"]
"""radians per position, of each pair"""


def rotations(
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None,
    lengths: Int[Array, " B"] | None,
    config: ModelConfig,
) -> tuple[Float[Array, "kinds B S half"], Float[Array, "kinds B S half"]]:
    """Cosine and sine of every rotary angle. If there are two kinds of layers, kind 1 is those with a sliding window.

    `lengths` is the number of tokens that each row will have when it is decoded completely, for scalings that depend on
    the length. It must not change while a row is decoded, because the keys in the cache are not rotated again.
    """
    kinds = [(scaled(positions, segments, lengths, config), attention_factor(config))]
    if config.local_rope_theta is not None:
        kinds.append((unscaled(config.local_rope_theta, config.rotary_dim), 1.0))
    column = positions[..., None].astype(jnp.float32)
    cos = jnp.stack([factor * jnp.cos(column * freq) for freq, factor in kinds])
    sin = jnp.stack([factor * jnp.sin(column * freq) for freq, factor in kinds])
    return cos, sin


def rotate(
    x: Float[Array, "B S H D"], rotation: tuple[Float[Array, "B S half"], Float[Array, "B S half"]]
) -> Float[Array, "B S H D"]:
    """`x` rotated by the angles of its positions; features beyond 2 x half are unchanged.

    Feature i is paired with feature i + half, the convention of Hugging Face's checkpoints.
    """
    cos, sin = (x[:, :, None] for x in rotation)
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)


def scaled(
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None,
    lengths: Int[Array, " B"] | None,
    config: ModelConfig,
) -> Frequencies | Float32[Array, "B _ half"]:
    """The frequencies after rope scaling; those of each token or row if they depend on the length of its document."""
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
    """The frequencies theta^(-2i / dim)."""
    # Rounded where PyTorch rounds (exponent, power, reciprocal): models were trained with these values.
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return 1 / np.power(theta, exponent, dtype=np.float64).astype(np.float32)


def llama3(freq: Frequencies, scaling: Llama3Scaling) -> Frequencies:
    """Llama 3.1's scaling (arXiv:2407.21783): low frequencies are divided by the factor, high ones are unchanged."""
    turns = scaling.original_context * freq / (2 * math.pi)
    speed = np.interp(turns, (scaling.low_freq_factor, scaling.high_freq_factor), (1 / scaling.factor, 1))
    return freq * speed.astype(np.float32)


def yarn(freq: Frequencies, scaling: YarnScaling, config: ModelConfig) -> Frequencies:
    """YaRN (arXiv:2309.00071, section 3.2): low frequencies are divided by the factor, high ones are unchanged."""
    dim = config.rotary_dim

    def pair(turns: float) -> float:
        """The index of the pair with this number of rotations over the original context, as a fraction."""
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
    """Dynamic NTK-aware scaling: theta grows with the length of the document beyond context_length."""
    beyond = jnp.maximum(length - config.context_length, 0).astype(jnp.float32)
    slower = 1 + factor / config.context_length * beyond
    # The effect of a larger theta: the frequency of the last pair is divided by `slower`, the first is unchanged.
    return slower[..., None] ** -np.linspace(0, 1, len(freq), dtype=np.float32) * freq


def longrope(freq: Frequencies, scaling: LongRopeScaling, length: Int[Array, "B _"]) -> Float32[Array, "B _ half"]:
    """LongRoPE (arXiv:2402.13753): a divisor for each frequency, of which there are two sets by document length."""
    short, long = (freq / jnp.array(divisors, jnp.float32) for divisors in (scaling.short_factor, scaling.long_factor))
    return jnp.where((length > scaling.original_context)[..., None], long, short)


def document_lengths(
    positions: Int[Array, "B S"], segments: Int[Array, "B S"] | None, lengths: Int[Array, " B"] | None
) -> Int[Array, "B _"]:
    """The length of the document of each token (packed rows) or of each row, independent of the rest of the batch."""
    if lengths is not None:
        return lengths[:, None]
    if segments is None:
        return positions.max(-1, keepdims=True) + 1
    most = segments.shape[1] + 1
    return 1 + jax.vmap(lambda p, s: jax.ops.segment_max(p, s, most)[s])(positions, segments)


def attention_factor(config: ModelConfig) -> float:
    """The factor of queries and of keys after rotation (YaRN and LongRoPE); 1 for other scalings."""
    match scaling := config.rope_scaling:
        case YarnScaling() | LongRopeScaling() if scaling.attention_factor is not None:
            return scaling.attention_factor
        case YarnScaling(mscale=mscale, mscale_all_dim=all_dim):
            # One without the other, or 0, is ignored.
            over, under = (mscale, all_dim) if mscale and all_dim else (1, 0)
            growth = 0.1 * math.log(max(stretch(scaling, config), 1))
            return (1 + over * growth) / (1 + under * growth)
        case LongRopeScaling(original_context=original):
            return math.sqrt(1 + math.log(max(stretch(scaling, config), 1)) / math.log(original))
    return 1.0


def stretch(scaling: YarnScaling | LongRopeScaling, config: ModelConfig) -> float:
    """The factor by which the context is extended."""
    return config.context_length / scaling.original_context if scaling.factor is None else scaling.factor
