"""Rotary position embedding (arXiv:2104.09864): each pair of features turns with the position, at its own frequency."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from camelid.model.config import ModelConfig


def frequencies(config: ModelConfig) -> Float[Array, " half"]:
    """Radians a position, one for each pair of features."""
    freq = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if (scaling := config.rope_scaling) is None:
        return freq
    turns = scaling.original_context * freq / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return freq * (kept + (1.0 - kept) / scaling.factor)


def rotations(positions: Int[Array, "B S"], config: ModelConfig) -> tuple[Float[Array, "B S half"], ...]:
    """Cosine and sine of every angle; computed once for all layers."""
    angle = positions[..., None].astype(jnp.float32) * frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B S H D"], rotation: tuple[Float[Array, "B S half"], ...]) -> Float[Array, "B S H D"]:
    """`x` turned to its positions; feature i pairs with feature i + D / 2, the convention of Hugging Face's files."""
    cos, sin = (part[:, :, None] for part in rotation)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
