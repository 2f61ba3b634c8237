"""From logits to the next token.

Axes: B batch, V vocab.
"""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from camelid.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy where `temperature` is None, else drawn after it, top-k and top-p."""

    temperature: Array | None
    top_k: int | None = dataclasses.field(metadata={"static": True})
    top_p: Array | None


def sampling(temperature: float, top_k: int | None, top_p: float | None) -> Sampling:
    """Sampling from plain numbers; temperature 0 is greedy. Raises UserError for numbers out of range."""
    if not 0 <= temperature < math.inf:
        raise UserError(
            f"temperature = {temperature} is not in [0, inf)", "Use 0 for greedy decoding, or a positive number."
        )
    if top_k is not None and whole_number("top_k", top_k) < 1:
        raise UserError(f"top_k = {top_k} is below 1", "Use 1 or more, or leave it out to keep every token.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(
            f"top_p = {top_p} is not in (0, 1]", "Use a fraction of 1, or leave it out to keep every token."
        )
    if temperature == 0:
        return Sampling(None, None, None)
    return Sampling(jnp.float32(temperature), top_k, None if top_p in (None, 1) else jnp.float32(top_p))


def whole_number(name: str, value: Any) -> int:
    """The value as an int; raises UserError where it is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} = {value!r} is not a whole number", f"Give {name} as an int.") from None


def choose(
    logits: Float[Array, "B V"], seeds: UInt32[Array, " B"], step: Int[Array, ""], how: Sampling
) -> Int[Array, " B"]:
    """The next token of each row; a row's draws depend on its own seed and the step alone."""
    if how.temperature is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    kept = keep(logits / how.temperature, how.top_k, how.top_p)

    def draw(seed: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    return jax.vmap(draw)(seeds, kept).astype(jnp.int32)


def all_finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Whether each row holds neither NaN nor infinity; -inf is allowed, as it only rules out a token."""
    return ~jnp.any(jnp.isnan(logits) | (logits == jnp.inf), -1)


def keep(logits: Float[Array, "B V"], top_k: int | None, top_p: Array | None) -> Float[Array, "B V"]:
    """-inf for all but the `top_k` best, and of these all but the fewest whose probabilities reach `top_p`.

    The token that crosses `top_p` is kept (arXiv:1904.09751).
    """
    if top_k is not None:
        worst = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < worst, -jnp.inf, logits)
    if top_p is not None:
        descending = jnp.sort(logits, -1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(descending, -1), -1) - jax.nn.softmax(descending, -1)
        worst = jnp.min(jnp.where(before < top_p, descending, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < worst, -jnp.inf, logits)
    return logits
