"""Attention, grouped-query, with its kernels behind one function.

Axes: B batch, S queries, T keys, H query heads, K key/value heads, G query heads per K, D head_dim, C block.

Every query knows its `order`: the index, among the keys, of its own token. It sees it and earlier ones of its segment,
in a layer with a window no more than so many:

    segments  1 1 1 1 2 2     sees   x . . . . .
                                     x x . . . .
                                     x x x . . .
                                     . x x x . .      a window of 3
                                     . . . . x .      each document starts again
                                     . . . . x x
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from camelid.model.config import Compute, ModelConfig
from camelid.model.kernels import Scoring, choose_kernel, cudnn, either, splash, visible
from camelid.model.weights import KEPT, dot

BLOCK = 256  # tokens; the scores of one pair of blocks stay in a CPU's cache, and products are still large
HIDDEN = -1e30  # finite: a row whose first blocks are all hidden must not become NaN


def attend(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    order: Int[Array, "B S"] | None,
    segments: Int[Array, "B S"] | None,
    local: bool | Bool[Array, ""],
    config: ModelConfig,
    compute: Compute,
) -> Float[Array, "B S H D"]:
    """Softmax(scores of q and k) v over the visible keys, scores and softmax in float32.

    `order` None: the keys are the queries' own tokens (training, scoring). `segments` None: each row is one document.
    `local`: whether this layer has config.sliding_window; traced where one program serves layers that differ.
    Raises UserError where a kernel was asked for that the device, the model or the shapes do not allow.
    """
    B, S, H, D = q.shape
    T = k.shape[2]
    width = D if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    scoring = Scoring(1 / math.sqrt(width), config.attn_softcap)
    window = config.sliding_window
    if window is not None and (local is False or window >= T):
        window = None  # it hides nothing
    kernel = choose_kernel(compute.attention, q.dtype, S, D, order is None, scoring.cap)
    if kernel == "cudnn":
        run = partial(cudnn, segments=segments, scale=scoring.scale, replicate=compute.replicate)
        return either(run, local, window, q, k, v)
    if kernel == "splash":
        run = partial(splash, segments=segments, scoring=scoring, replicate=compute.replicate)
        return either(run, local, window, q, k, v)
    grouped = q.reshape(B, S, k.shape[1], -1, D).transpose(0, 2, 3, 1, 4)
    if order is None:
        order = jnp.arange(S)[None]
    reach = None if window is None else jnp.where(local, window, T)
    out = {"dense": dense, "blockwise": blockwise}[kernel](grouped, k, v, order, segments, reach, scoring)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, S, H, D)


def _scores(q: Float[Array, "B K G S D"], k: Float[Array, "B K T D"], scoring: Scoring) -> Float[Array, "B K G S T"]:
    scores = dot("BKGSD,BKTD->BKGST", q, k) * scoring.scale
    return scores if scoring.cap is None else scoring.cap * jnp.tanh(scores / scoring.cap)


def _slope(scores: Float[Array, "B K G S T"], scoring: Scoring) -> float | Float[Array, "B K G S T"]:
    """The derivative of scores by the products that they were made of."""
    return scoring.scale if scoring.cap is None else scoring.scale * (1 - jnp.square(scores / scoring.cap))


def _hide(scores: Float[Array, "B K G S T"], mask: Bool[Array, "#B S T"]) -> Float[Array, "B K G S T"]:
    return jnp.where(mask[:, None, None], scores, HIDDEN)


def dense(
    q: Float[Array, "B K G S D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    order: Int[Array, "#B S"],
    segments: Int[Array, "B S"] | None,
    window: Int[Array, ""] | None,
    scoring: Scoring,
) -> Float[Array, "B K G S D"]:
    """The reference: every score at once."""
    mask = visible(order, jnp.arange(k.shape[2]), segments, segments, window)
    scores = _hide(_scores(q, k, scoring), mask)
    return dot("BKGST,BKTD->BKGSD", jax.nn.softmax(scores, -1).astype(v.dtype), v).astype(q.dtype)


def blockwise(
    q: Float[Array, "B K G S D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    order: Int[Array, "#B S"],
    segments: Int[Array, "B S"] | None,
    window: Int[Array, ""] | None,
    scoring: Scoring,
) -> Float[Array, "B K G S D"]:
    """Scores one block of queries by one block of keys at a time, with a running softmax (arXiv:2205.14135).

    Blocks of keys that no query of the block sees are skipped. Memory grows with the length, not with its square.
    """
    S, T = q.shape[3], k.shape[2]
    q_block, k_block = min(BLOCK, S), min(BLOCK, T)
    more_q, more_k = -S % q_block, -T % k_block
    if more_q or more_k:
        # Padded keys come after every order, so nothing sees them; what padded queries see is cut off below.
        q = jnp.pad(q, ((0, 0),) * 3 + ((0, more_q), (0, 0)))
        k, v = (jnp.pad(x, ((0, 0),) * 2 + ((0, more_k), (0, 0))) for x in (k, v))
        order = jnp.pad(order, ((0, 0), (0, more_q)), mode="edge")
        segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, more_q)))
    out: Array = _blockwise(q, k, v, order, segments, window, scoring, q_block, k_block)
    return out[:, :, :, :S]


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _blockwise(q, k, v, order, segments, window, scoring, q_block, k_block):
    return _blockwise_forward(q, k, v, order, segments, window, scoring, q_block, k_block)[0]


def _blockwise_forward(q, k, v, order, segments, window, scoring, q_block, k_block):
    def one_query_block(_, i):
        q_i, order_i, segments_i = _query_block(q, order, segments, i, q_block)

        def one_key_block(j, running):
            top, total, mixed = running
            k_j, v_j, mask = _key_block(k, v, order_i, segments_i, segments, window, j, k_block)
            scores = _hide(_scores(q_i, k_j, scoring), mask)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            fade = jnp.exp(top - new_top)
            mixed = mixed * fade[..., None] + dot("BKGST,BKTD->BKGSD", weights.astype(v.dtype), v_j)
            return new_top, total * fade + weights.sum(-1), mixed

        flat = q_i.shape[:-1]
        start = (jnp.full(flat, HIDDEN), jnp.zeros(flat), jnp.zeros(q_i.shape, jnp.float32))
        # A query that sees nothing in its first blocks averages them; its first visible key fades that to exactly 0.
        first = 0 if window is None else jnp.maximum(order_i.min() - window + 1, 0) // k_block
        top, total, mixed = lax.fori_loop(first, order_i.max() // k_block + 1, one_key_block, start)
        return None, ((mixed / total[..., None]).astype(q.dtype), top + jnp.log(total))

    blocks = jnp.arange(q.shape[3] // q_block)
    _, (out, log_total) = lax.scan(one_query_block, None, blocks)
    out, log_total = (checkpoint_name(_join(x), KEPT) for x in (out, log_total))
    return out, (q, k, v, order, segments, window, out, log_total)


def _blockwise_backward(scoring, q_block, k_block, saved, g):
    q, k, v, order, segments, window, out, log_total = saved
    drop = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)  # sum over keys of weight x its gradient
    blocks = q.shape[3] // q_block
    orders = order.reshape(order.shape[0], blocks, q_block)  # they grow along the row
    last_seen = orders.max((0, 2))
    first_seen = None if window is None else orders.min((0, 2)) - window + 1

    def one_key_block(dq, j):
        def one_query_block(i, running):
            dq, dk, dv = running
            q_i, order_i, segments_i = _query_block(q, order, segments, i, q_block)
            g_i, drop_i, log_total_i = (_cut(x, i, q_block, 3) for x in (g, drop, log_total))
            k_j, v_j, mask = _key_block(k, v, order_i, segments_i, segments, window, j, k_block)
            scores = _scores(q_i, k_j, scoring)
            weights = jnp.exp(_hide(scores, mask) - log_total_i[..., None])
            dv = dv + dot("BKGST,BKGSD->BKTD", weights.astype(v.dtype), g_i)
            dweights = dot("BKGSD,BKTD->BKGST", g_i, v_j)
            dscores = (weights * (dweights - drop_i[..., None]) * _slope(scores, scoring)).astype(q.dtype)
            dk = dk + dot("BKGST,BKGSD->BKTD", dscores, q_i)
            dq_i = _cut(dq, i, q_block, 3) + dot("BKGST,BKTD->BKGSD", dscores, k_j)
            return lax.dynamic_update_slice_in_dim(dq, dq_i, i * q_block, 3), dk, dv

        zeros = jnp.zeros((*k.shape[:2], k_block, k.shape[3]), jnp.float32)
        first = jnp.sum(last_seen < j * k_block)
        stop = blocks if first_seen is None else jnp.sum(first_seen < (j + 1) * k_block)
        dq, dk, dv = lax.fori_loop(first, stop, one_query_block, (dq, zeros, zeros))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = lax.scan(one_key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(k.shape[2] // k_block))
    return dq.astype(q.dtype), _join(dk, 2), _join(dv, 2), None, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _cut(x: Array, block: Array, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _join(blocks: Float[Array, "n ..."], axis: int = 3) -> Array:
    """Blocks stacked by a scan, laid end to end along `axis` of each."""
    x = jnp.moveaxis(blocks, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _query_block(q, order, segments, i, size):
    return _cut(q, i, size, 3), _cut(order, i, size, 1), None if segments is None else _cut(segments, i, size, 1)


def _key_block(k, v, order_i, segments_i, segments, window, j, size):
    segments_j = None if segments is None else _cut(segments, j, size, 1)
    mask = visible(order_i, j * size + jnp.arange(size), segments_i, segments_j, window)
    return _cut(k, j, size, 2), _cut(v, j, size, 2), mask
