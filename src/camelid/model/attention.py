"""Grouped-query attention (arXiv:2305.13245): one function, `attend`, in front of several kernels.

Axes: B batch, S queries, T keys, H query heads, K key/value heads, G query heads per key/value head, D head_dim.

Query heads k G to (k + 1) G - 1 read key/value head k. Attention knows no cache: it reads a View, whether the keys were
computed by the same forward pass or are stored in a cache of any kind.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from camelid.errors import UserError
from camelid.model.blockwise import blockwise
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context
from camelid.model.kernels import Scoring, choose_kernel, cudnn, either, splash
from camelid.model.mask import INVISIBLE, NO_WINDOW, AttentionDropout, Mask, attention_dropout
from camelid.model.products import dot


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """The keys and values that the queries of one layer may attend to, in any order."""

    keys: Float[Array, "B K T D"]
    """rotated to their positions"""
    values: Float[Array, "B K T D"]
    positions: Int[Array, "#B T"] | None = None
    """the place of each key within its row, which is not reset where a packed row starts a new document; None: key t is
    at position t"""
    segments: Int[Array, "B T"] | None = None
    """the document of each key within a packed row; None: each row is one document. EVERY_SEGMENT, for keys that all
    documents share, is possible where the queries have segments of their own (see `attend`)"""
    valid: Bool[Array, "B T"] | None = None
    """whether there is a key that queries may see; what is in the other places is never seen. None: all are keys"""


@dataclass(frozen=True)
class ViewByKind:
    """The view of a layer whose kind is known only at run time, in a scan over layers with and without a window."""

    windowed: Bool[Array, ""]
    """whether this layer has the sliding window"""
    read: Callable[[bool], View]
    """returns the view of a layer with (True) or without the window; called within a conditional, so that the keys of
    the other kind are not read"""


def attend(
    q: Float[Array, "B S H D"],
    view: View | ViewByKind,
    query_positions: Int[Array, "B S"] | None,
    windowed: bool | Bool[Array, ""],
    config: ModelConfig,
    compute: ComputeConfig,
    context: Context,
    query_segments: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S H D"]:
    """softmax(scores of the queries and the keys that they see) times the values; scores and softmax are float32.

    A query sees the keys of its segment up to its own position, and within the window if the layer has one (see Mask).
    `query_positions` are compared with `view.positions`; negative ones belong to padding, which sees nothing. None: the
    queries are of the same tokens as the keys, in the same order (training, scoring, the first chunk of a prompt).
    `query_segments`: the documents of queries that have positions, if `view.segments` are given. Packed continuations
    of a cached prompt, for example, see keys of EVERY_SEGMENT (the prompt) and of their own segments, and their
    positions continue from the prompt in each segment.
    `windowed`: whether this layer has config.sliding_window; a traced value if one program serves layers of both kinds.
    Raises UserError if compute.attention requests a kernel that the device, the model, the shapes or dropout rule out,
    and ValueError if only one of queries with positions and keys has segments.
    """
    if isinstance(view, ViewByKind):

        def of_kind(windowed: bool) -> Array:
            return attend(q, view.read(windowed), query_positions, windowed, config, compute, context, query_segments)

        return lax.cond(view.windowed, lambda: of_kind(True), lambda: of_kind(False))

    if (query_segments is not None) != (query_positions is not None and view.segments is not None):
        raise ValueError("queries with positions have segments if the keys have them, and only then")
    B, S, H, D = q.shape
    K, T = view.keys.shape[1:3]
    width = D if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    scoring = Scoring(1 / math.sqrt(width), config.attn_softcap)
    window = config.sliding_window
    if windowed is False or (window is not None and view.positions is None and window >= T):
        window = None  # it would exclude nothing
    dropout = attention_dropout(context, K, H // K)
    own_keys = query_positions is None and view.positions is None
    if own_keys and view.valid is not None and window is not None:
        raise UserError(
            "forgetful causal masking does not fit a model with a sliding window: all keys in a window may be hidden",
            "Leave dropout.forgetful_max_ratio out.",
        )
    rate = 0.0 if dropout is None else dropout.rate
    kernel = choose_kernel(
        compute.attention,
        q.dtype,
        S,
        D,
        own_keys=own_keys,
        cap=scoring.cap,
        dropout=rate,
        keys_hidden=view.valid is not None,
        required=context.phase != "prefill",  # prompts have lengths that no user chooses
    )
    if kernel == "cudnn":
        run = partial(cudnn, segments=view.segments, scale=scoring.scale, replicate=compute.replicate)
        return either(run, windowed, window, q, view.keys, view.values)
    if kernel == "splash":
        run = partial(splash, segments=view.segments, scoring=scoring, replicate=compute.replicate)
        return either(run, windowed, window, q, view.keys, view.values)
    grouped = q.reshape(B, S, K, -1, D).transpose(0, 2, 3, 1, 4)
    mask = _mask(
        view, query_positions, query_segments, None if window is None else jnp.where(windowed, window, NO_WINDOW)
    )
    out = {"dense": dense, "blockwise": blockwise}[kernel](grouped, view.keys, view.values, mask, dropout, scoring)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, S, H, D)


def _mask(
    view: View,
    query_positions: Int[Array, "B S"] | None,
    query_segments: Int[Array, "B S"] | None,
    window: Int[Array, ""] | None,
) -> Mask:
    positions = jnp.arange(view.keys.shape[2])[None] if view.positions is None else view.positions
    visible = positions if view.valid is None else jnp.where(view.valid, positions, INVISIBLE)
    if query_positions is None:
        query_positions, query_segments = positions, view.segments
    return Mask(query_positions, visible, query_segments, view.segments, window)


def dense(
    q: Float[Array, "B K G S D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    mask: Mask,
    dropout: AttentionDropout | None,
    scoring: Scoring,
) -> Float[Array, "B K G S D"]:
    """The reference kernel, which stores the scores of all queries and keys."""
    weights = jax.nn.softmax(mask.apply(scoring.scores(q, k)), -1)
    if dropout is not None:
        weights = weights * dropout.factors(mask)
    return dot("BKGST,BKTD->BKGSD", weights.astype(v.dtype), v).astype(q.dtype)
