"""Processors of logits, which depend on the tokens of a row so far. They come before temperature and filters.

Settings are arrays with a value for each row or one for all, among them a value that changes nothing.

Axes: B batch, V vocab, L the tokens of the longest row.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def penalize_repetition(
    logits: Float[Array, "B V"], occurred: Bool[Array, "B V"], penalty: Float[Array, " #B"]
) -> Float[Array, "B V"]:
    """Divides the logits of tokens that occurred by `penalty`, or multiplies them if they are negative.

    1 changes nothing. The formula is that of CTRL (arXiv:1909.05858, section 4.1), with its signs as in transformers.
    """
    penalty = penalty[:, None]
    return jnp.where(occurred, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_counts(
    logits: Float[Array, "B V"],
    counts: Int[Array, "B V"],
    presence_penalty: Float[Array, " #B"],
    frequency_penalty: Float[Array, " #B"],
) -> Float[Array, "B V"]:
    """logits - counts x frequency_penalty - (counts > 0) x presence_penalty, the formula of OpenAI's API."""
    frequency = counts.astype(logits.dtype) * frequency_penalty[:, None]
    return logits - frequency - jnp.where(counts > 0, presence_penalty[:, None], 0.0)


def forbid_repeated_ngrams(
    logits: Float[Array, "B V"], tokens: Int[Array, "B L"], lengths: Int[Array, " B"], size: Int[Array, " #B"]
) -> Float[Array, "B V"]:
    """Sets to -inf the logits of tokens that would complete a sequence of `size` tokens for the second time.

    `lengths[b]` of the tokens of row b count. 0 changes nothing.
    """
    size, length = jnp.broadcast_to(size, lengths.shape)[:, None], lengths[:, None]
    index = jnp.arange(tokens.shape[1])

    def one_back(back: Array, matches: Array) -> Array:
        """Whether each token also follows what the next one follows, compared `back` tokens before both."""
        before_each = jnp.roll(tokens, back, -1)
        before_next = jnp.take_along_axis(tokens, jnp.maximum(length - back, 0), 1)
        return matches & ((back >= size) | ((index >= back) & (before_each == before_next)))

    start = (size > 0) & (index < length) & (length >= size - 1)
    forbidden = lax.fori_loop(1, jnp.max(size), one_back, jnp.broadcast_to(start, tokens.shape))
    return jnp.where(count_tokens(tokens, forbidden, logits.shape[-1]) > 0, -jnp.inf, logits)


def forbid_tokens(logits: Float[Array, "B V"], ids: Int[Array, " ids"], rows: Bool[Array, " B"]) -> Float[Array, "B V"]:
    """Sets the logits of some tokens to -inf, in these rows."""
    return jnp.where(rows[:, None] & jnp.zeros(logits.shape[-1], bool).at[ids].set(True), -jnp.inf, logits)


def count_tokens(tokens: Int[Array, "B L"], counted: Bool[Array, "B L"], vocab: int) -> Int[Array, "B V"]:
    """How often each token occurs in each row, at the places that are counted."""
    add = jax.vmap(lambda row, weights: jnp.zeros(vocab, jnp.int32).at[row].add(weights, mode="drop"))
    return add(tokens, counted.astype(jnp.int32))
