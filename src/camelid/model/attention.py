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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from camelid.errors import UserError
from camelid.model.config import Compute, ModelConfig
from camelid.model.weights import KEPT, dot
from camelid.parallel.rules import COMPUTE, partition

BLOCK = 256  # tokens; the scores of one pair of blocks stay in a CPU's cache, and products are still large
HIDDEN = -1e30  # finite: a row whose first blocks are all hidden must not become NaN


@dataclass(frozen=True)
class Scoring:
    """How a query times a key becomes a score: cap tanh(scale x / cap), without a cap scale x."""

    scale: float
    cap: float | None


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
        cudnn = partial(_cudnn, segments=segments, scale=scoring.scale)
        return _either(cudnn, local, window, q, k, v)
    if kernel == "splash":
        splash = partial(_splash, segments=segments, scoring=scoring, replicate=compute.replicate)
        return _either(splash, local, window, q, k, v)
    grouped = q.reshape(B, S, k.shape[1], -1, D).transpose(0, 2, 3, 1, 4)
    if order is None:
        order = jnp.arange(S)[None]
    reach = None if window is None else jnp.where(local, window, T)
    out = {"dense": dense, "blockwise": blockwise}[kernel](grouped, k, v, order, segments, reach, scoring)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, S, H, D)


def choose_kernel(asked: str, dtype: Any, length: int, head_dim: int, own: bool, cap: float | None) -> str:
    """The kernel for these shapes on this device; `own`: the keys are the queries' own tokens."""
    if not own:
        # Few queries over a cache: scores are small, and the device's kernels want queries and keys of one length.
        return "dense" if length == 1 else "blockwise"
    device = jax.default_backend()
    fits = {
        # Odd lengths: JAX cannot train them with a mask.
        "cudnn": device == "gpu"
        and jnp.dtype(dtype).itemsize == 2
        and head_dim in range(8, 129, 8)
        and length % 2 == 0
        and cap is None,
        "splash": device == "tpu" and head_dim % 128 == 0 and length % 128 == 0,
    }
    if asked == "auto":
        return next((kernel for kernel, ok in fits.items() if ok), "blockwise")
    if not fits.get(asked, True):
        need = {
            "cudnn": "a GPU, a 16-bit compute.dtype, a head_dim that 8 divides, at most 128, an even number of tokens "
            "and no attn_softcap",
            "splash": "a TPU, and a head_dim and a sequence length that 128 divides",
        }[asked]
        raise UserError(
            f"attention = {asked!r} needs {need}; here are {device}, {jnp.dtype(dtype).name}, head_dim = {head_dim}, "
            f"{length} tokens and attn_softcap = {cap}",
            'Use compute.attention = "auto".',
        )
    return asked


def visible(
    order: Int[Array, "#B S"],
    keys: Int[Array, " T"],
    q_segments: Int[Array, "B S"] | None,
    k_segments: Int[Array, "B T"] | None,
    window: int | Int[Array, ""] | None,
) -> Bool[Array, "#B S T"]:
    """Which keys each query sees."""
    mask = keys <= order[..., None]
    if window is not None:
        mask = mask & (keys > order[..., None] - window)
    if q_segments is None or k_segments is None:
        return mask
    return mask & (q_segments[:, :, None] == k_segments[:, None, :])


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


def _either(kernel: Callable[..., Array], local: bool | Bool[Array, ""], window: int | None, *qkv: Array) -> Array:
    """A device's kernel, whose window is part of the program: for a traced `local` it is compiled with and without."""
    if window is None or local is True:
        return kernel(*qkv, window=window)
    return lax.cond(local, partial(kernel, window=window), partial(kernel, window=None), *qkv)


def _cudnn(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    segments: Int[Array, "B S"] | None,
    scale: float,
    window: int | None,
) -> Float[Array, "B S H D"]:
    """cuDNN's fused kernel; it reads segments as a mask of S x S, one byte-pair for each row of the batch."""
    mask = None
    if segments is not None:
        # The mask holds the window too: together they are refused by cuDNN before 9.10.2.
        at = jnp.arange(q.shape[1])
        mask, window = visible(at[None], at, segments, segments, window)[:, None], None
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    sides = None if window is None else (window - 1, 0)  # tokens before and after a query's own
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=True, local_window_size=sides, implementation="cudnn"
    )


def _splash(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    segments: Int[Array, "B S"] | None,
    scoring: Scoring,
    window: int | None,
    replicate: tuple[str, ...],
    interpret: bool = False,
) -> Float[Array, "B S H D"]:
    """TPU's fused kernel; each device runs it on its own rows and heads."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    segments = jnp.ones(q.shape[:2], jnp.int32) if segments is None else segments
    scaled = (q * scoring.scale).astype(q.dtype).transpose(0, 2, 1, 3)

    def on_device(q, k, v, segments):
        heads, length = q.shape[1:3]
        square = (length, length)
        mask = splash.CausalMask(square) if window is None else splash.LocalMask(square, (window - 1, 0), 0)
        kernel = splash.make_splash_mha(
            mask=splash.MultiHeadMask([mask] * heads),
            attn_logits_soft_cap=scoring.cap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        # One kernel for all kinds of heads: keys and values are repeated for the queries that share them.
        k, v = (jnp.repeat(x, heads // x.shape[1], 1) for x in (k, v))
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
        assert isinstance(out, Array)  # it gives more only where asked for residuals
        return out

    if not (mesh := jax.sharding.get_abstract_mesh()).empty:
        heads, kv_heads, rows = (
            partition(tuple(axes.split()), COMPUTE, replicate)
            for axes in ("batch heads seq head_dim", "batch kv_heads seq head_dim", "batch seq")
        )
        specs = (heads, kv_heads, kv_heads, rows)
        on_device = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return on_device(scaled, k, v, segments).transpose(0, 2, 1, 3)
