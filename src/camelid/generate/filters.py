"""Filters of logits: each keeps the tokens that may be drawn, and sets the logits of all others to -inf.

Settings are arrays with a value for each row or one for all, among them a value that keeps every token. Tokens whose
logits are equal are kept or removed together. No filter sorts the vocabulary: thresholds are searched bit by bit, each
bit at the cost of one comparison and one sum over all logits, which together take a small part of the time of sorting.

Axes: B batch, V vocab.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped, UInt32


def keep_top_k(logits: Float[Array, "B V"], top_k: Int[Array, " #B"]) -> Float[Array, "B V"]:
    """Keeps the `top_k` largest logits of each row, and those equal to the last of them; 0 keeps every token."""
    vocab = logits.shape[-1]
    k = jnp.where((top_k < 1) | (top_k > vocab), vocab, top_k)[:, None]
    return _kept(logits, _enough(_ordered(logits), jnp.ones(logits.shape, jnp.int32), k))


def keep_top_p(logits: Float[Array, "B V"], top_p: Float[Array, " #B"]) -> Float[Array, "B V"]:
    """Keeps the fewest tokens, the most probable first, whose probabilities add up to `top_p`; 1 keeps every token.

    The token whose probability crosses `top_p` is kept (nucleus sampling, arXiv:1904.09751).
    """
    kept = _enough(_ordered(logits), jax.nn.softmax(logits, -1), top_p[:, None])
    return _kept(logits, kept | (top_p == 1)[:, None])


def keep_min_p(logits: Float[Array, "B V"], min_p: Float[Array, " #B"]) -> Float[Array, "B V"]:
    """Keeps tokens with at least `min_p` times the probability of the most probable one (arXiv:2407.01082).

    0 keeps every token.
    """
    probabilities = jax.nn.softmax(logits, -1)
    return _kept(logits, probabilities >= min_p[:, None] * probabilities.max(-1, keepdims=True))


def keep_typical_p(logits: Float[Array, "B V"], typical_p: Float[Array, " #B"]) -> Float[Array, "B V"]:
    """Keeps the fewest tokens whose probabilities add up to `typical_p`, those of the most typical surprise first.

    That is a negative log-probability close to its mean, the entropy (locally typical sampling, arXiv:2202.00666).
    1 keeps every token.
    """
    log_probs = jax.nn.log_softmax(logits, -1)
    probabilities = jnp.exp(log_probs)
    entropy = -jnp.sum(jnp.where(probabilities > 0, probabilities * log_probs, 0.0), -1, keepdims=True)
    kept = _enough(_ordered(-jnp.abs(log_probs + entropy)), probabilities, typical_p[:, None])
    return _kept(logits, kept | (typical_p == 1)[:, None])


def _kept(logits: Float[Array, "B V"], kept: Array) -> Float[Array, "B V"]:
    return jnp.where(kept, logits, -jnp.inf)


def _enough(
    keys: UInt32[Array, "B V"], weights: Shaped[Array, "B V"], needed: Shaped[Array, "#B 1"]
) -> Shaped[Array, "B V"]:
    """Which tokens have the largest keys, the fewest whose weights add up to `needed`, and all with the least of these.

    All tokens, if the weights of all do not add up to it.
    """

    def one_bit(i: Array, threshold: Array) -> Array:
        larger = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        total = jnp.sum(jnp.where(keys >= larger, weights, 0), -1, keepdims=True)
        return jnp.where(total >= needed, larger, threshold)

    return keys >= lax.fori_loop(0, 32, one_bit, jnp.zeros((len(keys), 1), jnp.uint32))


def _ordered(values: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Unsigned integers in the order of the values, equal where these are equal."""
    sign = jnp.uint32(1 << 31)
    values = jnp.where(values == 0, 0.0, values.astype(jnp.float32))  # -0 has other bits than 0, but is equal
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits < sign, bits | sign, ~bits)
