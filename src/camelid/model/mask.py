"""Which keys each query of attention sees, and which attention weights and keys dropout removes.

Axes: B batch, S queries, T keys, K key/value heads, G query heads per key/value head, I blocks of queries, J of keys.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from camelid.model.context import Context

INVISIBLE = np.int32(2**31 - 1)  # the position of a key that no query sees
NO_WINDOW = 2**30  # a window that excludes no key
EVERY_SEGMENT = -1  # the segment of a key that the queries of all segments see, such as one of a shared prompt
MASKED = (
    -1e30
)  # the score of a key that is not seen; finite: -inf minus -inf is NaN for a query that has seen no key yet


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """A causal mask, described by the positions of queries and keys, which may be in any order.

    A query attends to keys of its own segment, and of EVERY_SEGMENT, whose positions are at most its own and, with a
    window W, greater than its own minus W:

        segments  1 1 1 1 2 2     sees   x . . . . .
                                         x x . . . .
                                         x x x . . .
                                         . x x x . .      W = 3
                                         . . . . x .      a new document
                                         . . . . x x
    """

    query_positions: Int[Array, "#B S"]
    key_positions: Int[Array, "#B T"]
    """INVISIBLE for keys that no query sees"""
    query_segments: Int[Array, "B S"] | None
    key_segments: Int[Array, "B T"] | None
    """None, for both: each row is one document"""
    window: int | Int[Array, ""] | None

    def visible(self) -> Bool[Array, "#B S T"]:
        """Whether each query sees each key."""
        queries, keys = self.query_positions[:, :, None], self.key_positions[:, None, :]
        mask = keys <= queries
        if self.window is not None:
            mask = mask & (keys > queries - self.window)
        if self.query_segments is None or self.key_segments is None:
            return mask
        queries, keys = self.query_segments[:, :, None], self.key_segments[:, None, :]
        return mask & ((queries == keys) | (keys == EVERY_SEGMENT))

    def apply(self, scores: Float[Array, "B K G S T"]) -> Float[Array, "B K G S T"]:
        """The scores, MASKED for keys that the query does not attend to."""
        return jnp.where(self.visible()[:, None, None], scores, MASKED)

    def block(self, i: Int[Array, ""], q_block: int, j: Int[Array, ""], k_block: int) -> "Mask":
        """The mask of the i-th block of `q_block` queries and the j-th block of `k_block` keys."""

        def cut(x: Array, block: Int[Array, ""], size: int) -> Array:
            return lax.dynamic_slice_in_dim(x, block * size, size, 1)

        return Mask(
            cut(self.query_positions, i, q_block),
            cut(self.key_positions, j, k_block),
            None if self.query_segments is None else cut(self.query_segments, i, q_block),
            None if self.key_segments is None else cut(self.key_segments, j, k_block),
            self.window,
        )

    def pad(self, queries: int, keys: int) -> "Mask":
        """The mask with as many queries and keys added at the end. No query sees the added keys."""

        def zeros(x: Array | None, more: int) -> Array | None:
            return None if x is None else jnp.pad(x, ((0, 0), (0, more)))

        return Mask(
            jnp.pad(self.query_positions, ((0, 0), (0, queries)), mode="edge"),
            jnp.pad(self.key_positions, ((0, 0), (0, keys)), constant_values=INVISIBLE),
            zeros(self.query_segments, queries),
            zeros(self.key_segments, keys),
            self.window,
        )

    def visible_blocks(self, q_block: int, k_block: int) -> Bool[Array, "I J"]:
        """Whether a query of block i may see a key of block j in some row, by their smallest and largest positions."""
        queries = self.query_positions.reshape(len(self.query_positions), -1, 1, q_block)
        keys = self.key_positions.reshape(len(self.key_positions), 1, -1, k_block)
        visible = keys.min(-1) <= queries.max(-1)
        if self.window is not None:
            last = jnp.where(keys == INVISIBLE, -1, keys).max(-1)
            visible = visible & (last > queries.min(-1) - self.window)
        return visible.any(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of attention weights (arXiv:1706.03762).

    Whether a weight is dropped is a hash of its row's key, its head and the positions of its query and key. It depends
    neither on the kernel and its blocks nor on how rows and heads are distributed over microbatches and devices.
    """

    rate: float = field(metadata={"static": True})
    """the probability with which a weight is dropped, in [0, 1)"""
    seeds: UInt32[Array, "B K G 2"]
    """random bits for each row and head: one word for its queries and one for its keys"""

    def factors(self, mask: Mask) -> Float[Array, "B K G S T"]:
        """What each weight is multiplied by: 0, or 1 / (1 - rate)."""
        queries, keys = (x.astype(jnp.uint32)[:, None, None] for x in (mask.query_positions, mask.key_positions))
        queries = _hash(self.seeds[..., :1] + _hash(queries))
        keys = _hash(self.seeds[..., 1:] + _hash(keys))
        bits = _hash(queries[..., :, None] + keys[..., None, :])
        return jnp.where(bits < jnp.uint32(int(self.rate * 2**32)), 0.0, 1 / (1 - self.rate))


def attention_dropout(context: Context, kv_heads: int, group: int) -> AttentionDropout | None:
    """The dropout of a layer with `kv_heads` x `group` query heads; None if its weights are not dropped."""
    if context.attention_dropout == 0 or context.dropout_key is None:
        return None
    bits = jax.vmap(lambda key: jax.random.bits(key, (kv_heads, group, 2), jnp.uint32))(context.row_keys("attention"))
    return AttentionDropout(context.attention_dropout, bits)


def forgetful_mask(
    context: Context, segments: Int[Array, "B S"] | None, rows: int, length: int
) -> Bool[Array, "B S"] | None:
    """Which tokens of each row attention may see as keys: forgetful causal masking (arXiv:2210.13432).

    Each row draws a ratio, uniformly between `context.forgetful_ratios`, and each of its tokens is hidden with that
    probability from all queries of all layers, its own included. The first token of each document is never hidden, so
    every query sees at least one key. Like dropout, the draws depend on the step's key and the row's number alone.
    Returns None, for no mask, if the ratios are 0 or the context has no dropout key.
    """
    low, high = context.forgetful_ratios
    if high == 0 or context.dropout_key is None:
        return None
    ratios = jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))(context.row_keys("forgetful ratio"))
    draws = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(context.row_keys("forgetful mask"))
    first = jnp.zeros((rows, length), bool).at[:, 0].set(True)
    if segments is not None:
        first = first.at[:, 1:].set(segments[:, 1:] != segments[:, :-1])
    return first | (draws >= ratios[:, None])


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3 (Appleby, 2011): each bit of the input changes half of the output's bits."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
