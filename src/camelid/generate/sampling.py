"""From logits to the next token of each row.

Axes: B batch, V vocab.
"""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from camelid.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token of each row is selected. Fields of shape (1,) apply to all rows."""

    temperature: Shaped[Array | np.ndarray, " #B"]
    """float32; logits are divided by it. 0: greedy, the token of the largest logit"""
    top_k: Shaped[Array | np.ndarray, " #B"]
    """int32; only the top_k largest logits are kept. 0: all"""
    top_p: Shaped[Array | np.ndarray, " #B"]
    """float32; only the fewest tokens whose probabilities add up to top_p are kept. 1: all"""


def sampling(temperature: float, top_k: int | None, top_p: float | None) -> Sampling:
    """The same settings for all rows; None turns a filter off. Raises UserError for values out of range."""
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
    return Sampling(
        np.array([temperature], np.float32),
        np.array([0 if top_k is None else min(top_k, 2**31 - 1)], np.int32),
        np.array([1 if top_p is None else top_p], np.float32),
    )


def whole_number(name: str, value: Any) -> int:
    """The value as an int. Raises UserError if it is not an integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} = {value!r} is not a whole number", f"Give {name} as an int.") from None


def select(
    logits: Float[Array, "B V"], sampling: Sampling, seeds: UInt32[Array, " B"], steps: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of each row, int32.

    A drawn token depends on the row's logits, settings, seed and step (the number of its tokens before this one) alone,
    not on the other rows.
    """
    greedy = jnp.argmax(logits, -1).astype(jnp.int32)
    random = jnp.asarray(sampling.temperature) > 0

    def draw(seed: Array, step: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    def drawn() -> Array:
        scaled = logits / jnp.where(random, sampling.temperature, 1.0)[:, None]
        kept = filter_logits(scaled, sampling.top_k, sampling.top_p)
        return jnp.where(random, jax.vmap(draw)(seeds, steps, kept).astype(jnp.int32), greedy)

    return lax.cond(jnp.any(random), drawn, lambda: greedy)


def all_finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Whether each row has neither NaN nor infinity; -inf is allowed, since it only excludes a token."""
    return ~jnp.any(jnp.isnan(logits) | (logits == jnp.inf), -1)


def filter_logits(
    logits: Float[Array, "B V"], top_k: Shaped[Array | np.ndarray, " #B"], top_p: Shaped[Array | np.ndarray, " #B"]
) -> Float[Array, "B V"]:
    """The logits with -inf for all but the `top_k` largest, and of these all but the fewest that reach `top_p`.

    The token whose probability crosses `top_p` is kept, and so are tokens equal to the last one that is kept
    (nucleus sampling, arXiv:1904.09751). `top_k` 0 and `top_p` 1 keep every token.
    """
    vocab = logits.shape[-1]
    k, p = jnp.asarray(top_k)[:, None], jnp.asarray(top_p)[:, None]
    k = jnp.broadcast_to(jnp.where((k < 1) | (k > vocab), vocab, k), (len(logits), 1))

    def most_probable() -> Array:
        return jnp.where(logits < _kth_largest(logits, k), -jnp.inf, logits)

    def filtered() -> Array:
        descending = jnp.sort(logits, -1, descending=True)
        smallest = jnp.take_along_axis(descending, k - 1, -1)
        descending = jnp.where(descending < smallest, -jnp.inf, descending)
        probabilities = jax.nn.softmax(descending, -1)
        before = jnp.cumsum(probabilities, -1) - probabilities
        in_nucleus = jnp.min(jnp.where(before < p, descending, jnp.inf), -1, keepdims=True)
        smallest = jnp.where(p < 1, jnp.maximum(smallest, in_nucleus), smallest)
        return jnp.where(logits < smallest, -jnp.inf, logits)

    # Only top-p needs the order of the logits.
    needed = jnp.where(jnp.any(p < 1), 2, jnp.any(k < vocab).astype(jnp.int32))
    return lax.switch(needed, (lambda: logits, most_probable, filtered))


def _kth_largest(logits: Float[Array, "B V"], k: Int[Array, "B 1"]) -> Float[Array, "B 1"]:
    """The k-th largest logit of each row, k from 1 to V; equal ones count as often as they occur.

    It is found bit by bit, from the highest: each bit costs one comparison of all logits, which together take a small
    part of the time of sorting them.
    """
    sign = jnp.uint32(1 << 31)
    bits = lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    ordered = jnp.where(bits < sign, bits | sign, ~bits)  # as unsigned integers, in the order of the logits

    def one_bit(i: Array, found: Array) -> Array:
        larger = found | (sign >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(ordered >= larger, -1, keepdims=True) >= k, larger, found)

    found = lax.fori_loop(0, 32, one_bit, jnp.zeros(k.shape, jnp.uint32))
    return lax.bitcast_convert_type(jnp.where(found < sign, ~found, found ^ sign), jnp.float32).astype(logits.dtype)
