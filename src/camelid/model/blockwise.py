"""Attention one block of queries and one block of keys at a time, without storing all scores.

The forward pass keeps a running maximum and normalizer of each query (arXiv:2205.14135); the backward pass recomputes
the scores from the queries, the keys and the logsumexp of each query (FlashAttention-2, arXiv:2307.08691).

Axes: B batch, S queries, T keys, K key/value heads, G query heads per key/value head, D head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from camelid.model.kernels import Scoring
from camelid.model.mask import MASKED, AttentionDropout, Mask
from camelid.model.products import dot, kept

BLOCK = 256  # tokens; the scores of one pair of blocks stay in a CPU's cache, and products are still large


def blockwise(
    q: Float[Array, "B K G S D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    mask: Mask,
    dropout: AttentionDropout | None,
    scoring: Scoring,
) -> Float[Array, "B K G S D"]:
    """The kernel for any device. Memory grows with the length, not with its square.

    Pairs of blocks in which no query sees a key are skipped, whatever the order of queries and keys.
    """
    S, T = q.shape[3], k.shape[2]
    q_block, k_block = min(BLOCK, S), min(BLOCK, T)
    more_q, more_k = -S % q_block, -T % k_block
    if more_q or more_k:
        q = jnp.pad(q, ((0, 0),) * 3 + ((0, more_q), (0, 0)))
        k, v = (jnp.pad(x, ((0, 0),) * 2 + ((0, more_k), (0, 0))) for x in (k, v))
        mask = mask.pad(more_q, more_k)
    # As leaves: custom_vjp fills pytrees with placeholders, which the classes' annotations do not allow.
    leaves, structure = jax.tree.flatten((mask, dropout))
    out: Array = _blockwise(q, k, v, leaves, structure, scoring, q_block, k_block)
    return out[:, :, :, :S]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _blockwise(q, k, v, leaves, structure, scoring, q_block, k_block):
    return _forward(q, k, v, leaves, structure, scoring, q_block, k_block)[0]


def _forward(q, k, v, leaves, structure, scoring, q_block, k_block):
    mask, dropout = jax.tree.unflatten(structure, leaves)
    key_blocks, counts = _true_first(mask.visible_blocks(q_block, k_block))

    def one_query_block(_, i):
        q_i = _block(q, i, q_block, 3)

        def one_key_block(n, running):
            maximum, normalizer, total = running
            j = key_blocks[i, n]
            k_j, v_j = (_block(x, j, k_block, 2) for x in (k, v))
            mask_ij = mask.block(i, q_block, j, k_block)
            scores = mask_ij.apply(scoring.scores(q_i, k_j))
            new_maximum = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            correction = jnp.exp(maximum - new_maximum)
            normalizer = normalizer * correction + weights.sum(-1)
            if dropout is not None:
                weights = weights * dropout.factors(mask_ij)
            total = total * correction[..., None] + dot("BKGST,BKTD->BKGSD", weights.astype(v.dtype), v_j)
            return new_maximum, normalizer, total

        # A query that sees nothing in its first blocks averages them; the correction of the first key that it sees
        # multiplies that by exactly 0.
        shape = q_i.shape[:-1]
        start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q_i.shape, jnp.float32))
        maximum, normalizer, total = lax.fori_loop(0, counts[i], one_key_block, start)
        normalizer = jnp.maximum(normalizer, 1)  # it is at least 1, or 0 if no block was visible: padding
        return None, ((total / normalizer[..., None]).astype(q.dtype), maximum + jnp.log(normalizer))

    _, (out, logsumexp) = lax.scan(one_query_block, None, jnp.arange(q.shape[3] // q_block))
    out, logsumexp = (kept(_concatenate(x, 3)) for x in (out, logsumexp))
    return out, (q, k, v, leaves, out, logsumexp)


def _backward(structure, scoring, q_block, k_block, saved, g):
    q, k, v, leaves, out, logsumexp = saved
    mask, dropout = jax.tree.unflatten(structure, leaves)
    # The sum over keys of each weight times its gradient, which dropout does not change.
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)
    query_blocks, counts = _true_first(mask.visible_blocks(q_block, k_block).T)

    def one_key_block(dq, j):
        k_j, v_j = (_block(x, j, k_block, 2) for x in (k, v))

        def one_query_block(n, running):
            dq, dk, dv = running
            i = query_blocks[j, n]
            q_i, g_i, delta_i, logsumexp_i = (_block(x, i, q_block, 3) for x in (q, g, delta, logsumexp))
            mask_ij = mask.block(i, q_block, j, k_block)
            scores = scoring.scores(q_i, k_j)
            weights = jnp.exp(mask_ij.apply(scores) - logsumexp_i[..., None])
            dweights = dot("BKGSD,BKTD->BKGST", g_i, v_j)
            dropped = weights
            if dropout is not None:
                factors = dropout.factors(mask_ij)
                dropped, dweights = weights * factors, dweights * factors
            dv = dv + dot("BKGST,BKGSD->BKTD", dropped.astype(v.dtype), g_i)
            dscores = (weights * (dweights - delta_i[..., None]) * scoring.derivative(scores)).astype(q.dtype)
            dk = dk + dot("BKGST,BKGSD->BKTD", dscores, q_i)
            dq_i = _block(dq, i, q_block, 3) + dot("BKGST,BKTD->BKGSD", dscores, k_j)
            return lax.dynamic_update_slice_in_dim(dq, dq_i, i * q_block, 3), dk, dv

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        dq, dk, dv = lax.fori_loop(0, counts[j], one_query_block, (dq, zeros, zeros))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = lax.scan(one_key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(k.shape[2] // k_block))
    return dq.astype(q.dtype), _concatenate(dk, 2), _concatenate(dv, 2), None


_blockwise.defvjp(_forward, _backward)


def _true_first(visible: Bool[Array, "I J"]) -> tuple[Int[Array, "I J"], Int[Array, " I"]]:
    """For each row, the indices of its entries with those that are True first, in ascending order; and their number."""
    return jnp.argsort(~visible, -1, stable=True), visible.sum(-1)


def _block(x: Array, block: Int[Array, ""], size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _concatenate(blocks: Float[Array, "n ..."], axis: int) -> Array:
    """The blocks that a scan stacked, concatenated along `axis` of each."""
    x = jnp.moveaxis(blocks, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
