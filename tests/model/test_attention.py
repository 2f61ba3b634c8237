"""Every kernel is compared with dense attention, and dense attention with a plain loop in float64."""

import dataclasses
import math
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from camelid.errors import UserError
from camelid.model import attention, blockwise
from camelid.model.attention import View
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context
from camelid.model.kernels import Scoring, choose_kernel
from camelid.model.mask import EVERY_SEGMENT, Mask
from camelid.parallel.mesh import MeshConfig, make_mesh
from programs import largest_array

pytestmark = pytest.mark.quick_compile

SCORING = Context()
BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 6, 3, 10
DENSE, BLOCKWISE = ComputeConfig(attention="dense"), ComputeConfig(attention="blockwise")
# Sums of some dozens of float32 products, in another order; values and gradients are of scale 1.
CLOSE = {"rtol": 0, "atol": 2e-5}


def model(**of_attention) -> ModelConfig:
    """A config with the given fields of attention; attention does not read the others."""
    sizes = dict.fromkeys(("vocab_size", "embed_dim", "mlp_dim", "num_layers", "head_dim", "context_length"), 2)
    return ModelConfig(**sizes, num_heads=1, num_kv_heads=1, norm_eps=1e-5, rope_theta=1e4, **of_attention)


PLAIN = model()
# Scores have a standard deviation of some 3, so that a cap of 2 bends most of them.
CAPPED = model(attn_softcap=2.0, query_pre_attn_scalar=7)
WINDOW = model(sliding_window=5)
CAPPED_WINDOW = model(attn_softcap=2.0, query_pre_attn_scalar=7, sliding_window=11)


def attend(q, k, v, query_positions, segments, windowed, config: ModelConfig, compute: ComputeConfig, context=SCORING):
    """attention.attend over keys in order."""
    return attention.attend(q, View(k, v, segments=segments), query_positions, windowed, config, compute, context)


def inputs(queries: int, keys: int | None = None, dtype=np.float32, **sizes: int) -> tuple[jax.Array, ...]:
    """q (B S H D), k and v (B K T D), and a cotangent for the output."""
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM} | sizes
    draw = np.random.default_rng(queries)
    keys = keys or queries
    q, g = (draw.normal(size=(BATCH, queries, sizes["heads"], sizes["head_dim"])) for _ in range(2))
    k, v = (draw.normal(size=(BATCH, sizes["kv_heads"], keys, sizes["head_dim"])) for _ in range(2))
    return tuple(jnp.asarray(x, dtype) for x in (3 * q, k, v, g))


def documents(length: int) -> jax.Array:
    """Segments of two packed rows: two documents and padding, and two documents of other lengths."""
    at = np.arange(length)
    first = np.where(at < length // 3, 1, np.where(at < length - 4, 2, 0))
    second = np.where(at < length // 2, 1, 2)
    return jnp.asarray(np.stack([first, second]), jnp.int32)


def plain_loop(q, k, v, order, segments, config: ModelConfig = PLAIN, local: bool = True) -> np.ndarray:
    """Attention by its definition, one query at a time; consecutive query heads share a key/value head."""
    window = config.sliding_window if local else None
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, s, h in np.ndindex(q.shape[:3]):
        seen = [
            t
            for t in range(order[b, s] + 1)
            if (segments is None or segments[b, s] == segments[b, t]) and (window is None or order[b, s] - t < window)
        ]
        kv = h * k.shape[1] // q.shape[2]
        scores = k[b, kv, seen] @ q[b, s, h] / math.sqrt(config.query_pre_attn_scalar or q.shape[3])
        if config.attn_softcap is not None:
            scores = config.attn_softcap * np.tanh(scores / config.attn_softcap)
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights @ v[b, kv, seen] / weights.sum()
    return out


def with_gradients(
    q, k, v, g, order, segments, compute: ComputeConfig, config: ModelConfig = PLAIN, local: bool | jax.Array = True
) -> list[np.ndarray]:
    """The output and the gradients by q, k and v."""

    def run(q, k, v, g, local):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, order, segments, local, config, compute), q, k, v)
        return out, *pullback(g)

    static = (4,) if isinstance(local, bool) else ()
    return [np.asarray(x, np.float32) for x in jax.jit(run, static_argnums=static)(q, k, v, g, local)]


@pytest.fixture
def block(monkeypatch) -> int:
    """Blocks small enough that short rows have several."""
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    return 8


@pytest.mark.parametrize("config", [PLAIN, CAPPED, WINDOW, CAPPED_WINDOW], ids=["plain", "capped", "window", "both"])
@pytest.mark.parametrize("segments", [None, documents(13)], ids=["one document", "packed"])
@pytest.mark.parametrize("compute", [DENSE, BLOCKWISE], ids=["dense", "blockwise"])
def test_attention_is_the_plain_loop(compute: ComputeConfig, segments, config: ModelConfig, block):
    q, k, v, _ = inputs(13)
    order = np.broadcast_to(np.arange(13), (BATCH, 13))
    ours = attend(q, k, v, None, segments, True, config, compute)
    np.testing.assert_allclose(ours, plain_loop(q, k, v, order, segments, config), **CLOSE)


@pytest.mark.parametrize("local", [True, jnp.asarray(True)], ids=["static", "traced"])
@pytest.mark.parametrize("config", [PLAIN, CAPPED_WINDOW], ids=["plain", "capped window"])
def test_packed_continuations_of_a_cached_prompt_are_as_rows_of_their_own(config: ModelConfig, local, block):
    """Each continuation sees the prompt and itself, at the distances of a row of its own."""
    prompt, lengths = 12, [5, 3, 9, 1]
    packed = prompt + sum(lengths)
    q, k, v, _ = inputs(packed)
    segments = np.repeat([EVERY_SEGMENT, 1, 2, 3, 4], [prompt, *lengths])
    positions = np.concatenate([np.arange(prompt), *(prompt + np.arange(n) for n in lengths)])
    order = np.random.default_rng(0).permutation(packed)  # of the keys
    view = View(
        k[:, :, order],
        v[:, :, order],
        jnp.asarray(positions[order], jnp.int32)[None],
        jnp.asarray(np.stack([segments[order]] * BATCH), jnp.int32),
    )

    def continued(queries: slice):
        at, of = (jnp.asarray(np.stack([x[queries]] * BATCH), jnp.int32) for x in (positions, segments))
        return attention.attend(q[:, queries], view, at, local, config, ComputeConfig(), SCORING, of)

    together, last = continued(slice(prompt, None)), continued(slice(packed - 1, None))
    for n, length in enumerate(lengths):
        start = prompt + sum(lengths[:n])
        row = np.r_[:prompt, start : start + length]
        alone = attend(q[:, row], k[:, :, row], v[:, :, row], None, None, True, config, DENSE)[:, prompt:]
        np.testing.assert_allclose(together[:, start - prompt :][:, :length], alone, **CLOSE)
    np.testing.assert_allclose(last, together[:, -1:], **CLOSE)


@pytest.mark.parametrize(
    ("positions", "of_keys", "of_queries"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_segments_of_only_queries_or_only_keys_are_refused(positions: bool, of_keys: bool, of_queries: bool):
    q, k, v, _ = inputs(13)
    at = jnp.broadcast_to(jnp.arange(13), (BATCH, 13)) if positions else None
    view = View(k, v, segments=documents(13) if of_keys else None)
    with pytest.raises(ValueError, match="segments"):
        attention.attend(q, view, at, True, PLAIN, DENSE, SCORING, documents(13) if of_queries else None)


@pytest.mark.parametrize("window", [1, 5, 8, 9, 12, 13, 14])
@pytest.mark.parametrize("compute", [DENSE, BLOCKWISE], ids=["dense", "blockwise"])
def test_a_query_sees_as_many_tokens_as_the_window_its_own_the_last(compute: ComputeConfig, window: int, block):
    q, k, v, _ = inputs(13)
    out = attend(0 * q, k, v, None, None, True, model(sliding_window=window), compute)
    v = np.repeat(np.asarray(v), HEADS // KV_HEADS, 1)  # scores are equal, so each output is a mean
    means = [v[:, :, max(0, last + 1 - window) : last + 1].mean(2) for last in range(13)]
    np.testing.assert_allclose(out, np.stack(means, 1), **CLOSE)


# In blocks of 8: part of one, several, several and a part.
@pytest.mark.parametrize(("length", "packed"), [(5, False), (24, True), (29, False), (29, True)])
def test_blockwise_equals_dense_in_outputs_and_gradients(length: int, packed: bool, block):
    arrays = inputs(length)
    segments = documents(length) if packed else None
    dense, blockwise = (with_gradients(*arrays, None, segments, compute) for compute in (DENSE, BLOCKWISE))
    for ours, reference in zip(blockwise, dense, strict=True):
        np.testing.assert_allclose(ours, reference, **CLOSE)


# In blocks of 8: the own token alone, part of a block, one, one and a token or two, two and a part, almost all, all.
WINDOWS = {f"window of {n}": model(sliding_window=n) for n in (1, 5, 8, 9, 10, 19, 28, 29, 100)}
VARIANTS = WINDOWS | {"capped": CAPPED, "capped window": CAPPED_WINDOW}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_blockwise_equals_dense_for_every_window_and_with_a_cap(config: ModelConfig, packed: bool, block):
    arrays = inputs(29)
    segments = documents(29) if packed else None
    dense, blockwise = (with_gradients(*arrays, None, segments, compute, config) for compute in (DENSE, BLOCKWISE))
    for ours, reference in zip(blockwise, dense, strict=True):
        np.testing.assert_allclose(ours, reference, **CLOSE)


@pytest.mark.parametrize("config", [PLAIN, CAPPED_WINDOW], ids=["plain", "capped window"])
@pytest.mark.parametrize("starts", [[2], [0, 11]], ids=["one order for all rows", "an order a row"])
def test_blockwise_equals_dense_wherever_the_queries_are(starts: list[int], config: ModelConfig, monkeypatch, block):
    monkeypatch.setattr(attention, "choose_kernel", lambda asked, *_, **__: asked)
    q, k, v, g = inputs(29, 40)
    order = jnp.asarray(starts, jnp.int32)[:, None] + jnp.arange(29)
    grouped = q.reshape(BATCH, 29, KV_HEADS, -1, HEAD_DIM).transpose(0, 2, 3, 1, 4)
    scoring = Scoring(1 / math.sqrt(7), config.attn_softcap)
    mask = Mask(order, jnp.arange(40)[None], None, None, config.sliding_window and jnp.int32(config.sliding_window))

    def run(kernel):
        out, pullback = jax.vjp(lambda *qkv: kernel(*qkv, mask, None, scoring), grouped, k, v)
        return out, *pullback(g.reshape(grouped.shape))

    for ours, reference in zip(run(blockwise.blockwise), run(attention.dense), strict=True):
        np.testing.assert_allclose(ours, reference, **CLOSE)


def in_any_order(kernel: str, order: np.ndarray, config: ModelConfig, arrays, segments, valid) -> list[np.ndarray]:
    """Output and gradients in the original order, from queries and keys that are both stored in `order`."""
    q, k, v, g = arrays
    back = np.argsort(order)
    view = View(
        k[:, :, order],
        v[:, :, order],
        jnp.asarray(order)[None],
        None if segments is None else segments[:, order],
        None if valid is None else valid[:, order],
    )
    q, g = (x[:, order].reshape(BATCH, len(order), KV_HEADS, -1, HEAD_DIM).transpose(0, 2, 3, 1, 4) for x in (q, g))
    mask = attention._mask(view, None, None, config.sliding_window and jnp.int32(config.sliding_window))
    scoring = Scoring(1 / math.sqrt(7), config.attn_softcap)
    run = {"dense": attention.dense, "blockwise": blockwise.blockwise}[kernel]
    out, pullback = jax.vjp(lambda *qkv: run(*qkv, mask, None, scoring), q, view.keys, view.values)
    dq, dk, dv = pullback(g)
    return [np.asarray(x) for x in (out[:, :, :, back], dq[:, :, :, back], dk[:, :, back], dv[:, :, back])]


def by_definition(q, k, v, visible: np.ndarray, cap: float | None) -> np.ndarray:
    """Outputs (B K G S D) in float64, 0 for queries that see no key."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q = q.reshape(BATCH, q.shape[1], KV_HEADS, -1, HEAD_DIM).transpose(0, 2, 3, 1, 4)
    scores = q @ k[:, :, None].swapaxes(3, 4) / math.sqrt(7)
    weights = np.exp(scores if cap is None else cap * np.tanh(scores / cap)) * visible[:, None, None]
    return weights @ v[:, :, None] / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


# Chunks of 8 tokens in the order of context parallelism, where each device has an early and a late one; other orders.
ORDERS = {
    "chunks": np.concatenate([np.arange(32).reshape(4, 8)[i] for i in (0, 3, 1, 2)]),
    "backwards": np.arange(29)[::-1].copy(),
    "shuffled": np.random.default_rng(0).permutation(29),
}


@pytest.mark.parametrize("config", [PLAIN, WINDOW, CAPPED_WINDOW], ids=["plain", "window", "capped window"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_order_of_keys_makes_no_difference(order: np.ndarray, packed: bool, config: ModelConfig, block):
    length = len(order)
    segments = documents(length) if packed else None
    valid = jnp.asarray(np.random.default_rng(1).random((BATCH, length)) < 0.7).at[:, 0].set(True)
    q, k, v, g = inputs(length)
    for keys in (None, valid):
        at = np.arange(length)
        visible = (at <= at[:, None]) & (at > at[:, None] - (config.sliding_window or length))
        if segments is not None:
            visible = visible & (np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None])
        if keys is not None:
            visible = visible & np.asarray(keys)[:, None]
        # What queries that see no key return is not defined.
        seen = np.broadcast_to(visible, (BATCH, length, length)).any(-1)
        arrays = (q, k, v, jnp.where(seen[..., None, None], g, 0))
        expected = in_any_order("dense", at, config, arrays, segments, keys)
        plain = by_definition(q, k, v, np.broadcast_to(visible, (BATCH, length, length)), config.attn_softcap)
        np.testing.assert_allclose(np.where(seen[:, None, None, :, None], expected[0], 0), plain, **CLOSE)
        for kernel in ("dense", "blockwise"):
            out, *gradients = in_any_order(kernel, order, config, arrays, segments, keys)
            np.testing.assert_allclose(
                *(np.where(seen[:, None, None, :, None], x, 0) for x in (out, expected[0])), **CLOSE
            )
            for ours, reference in zip(gradients, expected[1:], strict=True):
                np.testing.assert_allclose(ours, reference, **CLOSE)


def test_blocks_are_skipped_in_any_order(block):
    """Keys in chunks of another order: a block that no query of a block sees is not read, forward or backward."""
    order = ORDERS["chunks"]  # positions 0-7, 24-31, 8-15, 16-23
    q, k, v, g = inputs(32)
    config = model(sliding_window=9)
    # The keys at 0-7 are seen by queries at 0-15, and those at 24-31 by queries there.
    good = in_any_order("dense", order, config, (q, k, v, g), None, None)
    for bad, spoiled in ((slice(0, 8), slice(0, 16)), (slice(24, 32), slice(24, 32))):
        bad_k, bad_v = (x.at[:, :, bad].set(jnp.nan) for x in (k, v))
        found = in_any_order("blockwise", order, config, (q, bad_k, bad_v, g), None, None)
        for axis, ours, reference in zip((3, 3), found[:2], good[:2], strict=True):
            ours, reference = (np.moveaxis(x, axis, 0) for x in (ours, reference))
            clean = np.setdiff1d(np.arange(32), np.arange(32)[spoiled])
            assert np.isnan(ours[spoiled]).any((1, 2, 3, 4)).all()
            np.testing.assert_allclose(ours[clean], reference[clean], **CLOSE)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("compute", [DENSE, BLOCKWISE], ids=["dense", "blockwise"])
def test_a_traced_local_means_what_a_python_bool_means(compute: ComputeConfig, local: bool, block):
    arrays, segments = inputs(29), documents(29)
    traced = with_gradients(*arrays, None, segments, compute, CAPPED_WINDOW, jnp.asarray(local))
    known = with_gradients(*arrays, None, segments, DENSE, CAPPED_WINDOW if local else CAPPED)
    for ours, reference in zip(traced, known, strict=True):
        np.testing.assert_allclose(ours, reference, **CLOSE)


@pytest.mark.parametrize("compute", [DENSE, BLOCKWISE], ids=["dense", "blockwise"])
def test_one_scan_runs_layers_with_and_without_the_window(compute: ComputeConfig, block):
    q, k, v, g = inputs(29, heads=HEADS, kv_heads=HEADS)
    layers = [True, False, True]

    def layer(q, k, v, local):
        return attend(q, k, v, None, None, local, CAPPED_WINDOW, compute)

    def scanned(q, k, v):
        one = jax.checkpoint(lambda q, local: (layer(q, k, v, local), None), prevent_cse=False)
        return lax.scan(one, q, jnp.asarray(layers))[0]

    def one_by_one(q, k, v):
        for local in layers:
            q = layer(q, k, v, local)
        return q

    def run(function):
        out, pullback = jax.vjp(function, q, k, v)
        return out, *pullback(g)

    for ours, reference in zip(*(jax.jit(run, static_argnums=0)(f) for f in (scanned, one_by_one)), strict=True):
        np.testing.assert_allclose(ours, reference, **CLOSE)


@pytest.mark.parametrize("local", [True, jnp.asarray(True)], ids=["static", "traced"])
def test_blocks_outside_the_window_are_skipped_forward_and_backward(local, block):
    """A block that is read spreads its NaN, hidden or not; these are read for the first two blocks of queries only."""
    q, k, v, g = inputs(29)
    bad_k, bad_v = (x.at[:, :, :block].set(jnp.nan) for x in (k, v))
    config = model(sliding_window=9)
    # out and dq have tokens along axis 1, dk and dv along 2.
    bad = with_gradients(q, bad_k, bad_v, g, None, None, BLOCKWISE, config, local)
    good = with_gradients(q, k, v, g, None, None, DENSE, config)
    for axis, ours, reference in zip((1, 1, 2, 2), bad, good, strict=True):
        ours, reference = (np.moveaxis(x, axis, 0) for x in (ours, reference))
        assert np.isnan(ours[:block]).all()
        np.testing.assert_allclose(ours[2 * block :], reference[2 * block :], **CLOSE)


def test_blocks_outside_the_window_are_skipped_in_a_cache(block):
    q, k, v, _ = inputs(11, 40)
    order = np.stack([np.arange(11) + 17, np.arange(11) + 29]).astype(np.int32)
    bad_k, bad_v = (x.at[:, :, :block].set(jnp.nan) for x in (k, v))
    ours = attend(q, bad_k, bad_v, jnp.asarray(order), None, True, model(sliding_window=10), ComputeConfig())
    np.testing.assert_allclose(ours, plain_loop(q, k, v, order, None, model(sliding_window=10)), **CLOSE)


@pytest.mark.parametrize("config", [PLAIN, CAPPED_WINDOW], ids=["plain", "capped window"])
def test_blockwise_in_bfloat16_is_as_near_to_float32_as_dense_is(config: ModelConfig, block):
    segments = documents(29)
    exact = with_gradients(*inputs(29), None, segments, DENSE, config)
    dense, blockwise = (
        with_gradients(*inputs(29, dtype=jnp.bfloat16), None, segments, compute, config)
        for compute in (DENSE, BLOCKWISE)
    )
    for ours, reference, float32 in zip(blockwise, dense, exact, strict=True):
        # Both round to 8 bits: dense the weights, blockwise their numerators, whose errors do not share a factor.
        assert np.std(ours - float32) < 1.5 * np.std(reference - float32)
        assert np.abs(ours - float32).max() < 0.03 * np.abs(float32).max()


@pytest.mark.parametrize("steps", [np.geomspace(0.03, 30, 29), np.geomspace(30, 0.03, 29)], ids=["up", "down"])
@pytest.mark.parametrize("config", [PLAIN, WINDOW], ids=["plain", "window"])
def test_blockwise_survives_blocks_whose_scores_differ_by_hundreds(config: ModelConfig, steps, block):
    q, k, v, g = inputs(29)
    k = k * jnp.asarray(steps, jnp.float32)[:, None]
    dense, blockwise = (with_gradients(q, k, v, g, None, None, compute, config) for compute in (DENSE, BLOCKWISE))
    for ours, reference in zip(blockwise, dense, strict=True):
        # A score of 1000 is known to 1e-4 in float32, and so is its exponential, relatively.
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4 * np.abs(reference).max())


def test_what_a_query_does_not_see_leaves_no_trace_of_rounding(block):
    """A query that sees nothing in its first blocks averages them at first; not one bit of that may remain."""
    q, k, v, g = inputs(32)
    segments = jnp.asarray(np.arange(32) // 20 + jnp.asarray([[1], [0]]), jnp.int32)  # also: segment 0 is padding
    seen = np.arange(32) >= 20
    other = [jnp.where(seen[:, None], x, 1e3 * x) for x in (k, v)]
    config = model(sliding_window=11)
    ours, theirs = (with_gradients(q, *kv, g, None, segments, BLOCKWISE, config) for kv in ((k, v), other))
    for axis, a, b in zip((1, 1, 2, 2), ours, theirs, strict=True):
        a, b = (np.moveaxis(x, axis, 0) for x in (a, b))
        np.testing.assert_array_equal(a[20:], b[20:])


@pytest.mark.parametrize("config", [PLAIN, CAPPED_WINDOW], ids=["plain", "capped window"])
@pytest.mark.parametrize("local", [False, True, jnp.asarray(True)], ids=["all tokens", "local", "traced"])
@pytest.mark.parametrize(("queries", "keys"), [(5, 29), (11, 40), (1, 29)])
def test_queries_over_a_cache_see_their_own_slots_and_earlier(queries: int, keys: int, local, config, block):
    """Rows have different lengths; later slots contain garbage that no query may see."""
    q, k, v, _ = inputs(queries, keys)
    order = np.stack([np.arange(queries) + 3, np.arange(queries) + keys - queries]).astype(np.int32)
    beyond = np.arange(keys) > order[:, -1:]
    k, v = (jnp.where(beyond[:, None, :, None], 1e4, x) for x in (k, v))
    ours = attend(q, k, v, jnp.asarray(order), None, local, config, ComputeConfig())
    np.testing.assert_allclose(ours, plain_loop(q, k, v, order, None, config, bool(local)), **CLOSE)


@pytest.mark.parametrize("config", [PLAIN, CAPPED_WINDOW], ids=["plain", "capped window"])
@pytest.mark.parametrize("compute", [DENSE, BLOCKWISE], ids=["dense", "blockwise"])
def test_only_dense_makes_an_array_of_queries_by_keys(compute: ComputeConfig, config: ModelConfig):
    length = 8 * blockwise.BLOCK
    q, k = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in ((length, 1, 2), (1, length, 2)))
    segments = jnp.zeros((1, length), jnp.int32)

    def run(q, k, v):
        return jax.vjp(lambda q, k, v: attend(q, k, v, None, segments, True, config, compute), q, k, v)[1](q)

    assert (largest_array(run, q, k, k) >= length**2) == (compute == DENSE)


# The device's kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_a_kernel_that_the_device_lacks_is_refused(kernel: str):
    q, k, v, _ = inputs(13)
    device = jax.default_backend()
    with pytest.raises(UserError, match=f"attention = '{kernel}' .* requires .* this run has {device}, float32"):
        attend(q, k, v, None, None, False, PLAIN, ComputeConfig(attention=kernel))


H200, A100 = ("gpu", "NVIDIA H200", "9.0"), ("gpu", "NVIDIA A100-SXM4-40GB", "8.0")
V100, MI250 = ("gpu", "Tesla V100-SXM2-16GB", "7.0"), ("gpu", "AMD Instinct MI250X", "gfx90a")
CPU, TPU = ("cpu", "cpu", None), ("tpu", "TPU v5e", None)


@pytest.fixture
def on_device(monkeypatch):
    """Makes choose_kernel see devices of the given kind in this process."""

    def on_device(platform: str, kind: str, capability: str | None) -> None:
        about = {"platform": platform, "device_kind": kind}
        if capability is not None:
            about["compute_capability"] = capability
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(**about)] * 2)

    return on_device


def test_capped_scores_are_not_for_cudnn(on_device):
    on_device(*H200)
    with pytest.raises(UserError, match=r"'cudnn' .* no attn_softcap, .* this run has gpu .* attn_softcap = 50\.0"):
        choose_kernel("cudnn", "bfloat16", 512, 64, own_keys=True, cap=50.0, dropout=0.0)
    on_device(*TPU)
    assert choose_kernel("auto", "bfloat16", 512, 128, own_keys=True, cap=50.0, dropout=0.0) == "splash"


@pytest.mark.parametrize(
    ("device", "dtype", "length", "head_dim", "own", "kernel"),
    [
        (CPU, "float32", 512, 64, True, "blockwise"),
        (CPU, "bfloat16", 512, 64, True, "blockwise"),
        (CPU, "bfloat16", 1, 64, False, "dense"),
        (CPU, "bfloat16", 512, 64, False, "blockwise"),
        (H200, "bfloat16", 500, 64, True, "cudnn"),
        (A100, "float16", 500, 128, True, "cudnn"),
        (("gpu", "NVIDIA GB300", "12.1"), "bfloat16", 500, 64, True, "cudnn"),
        (H200, "bfloat16", 1, 64, False, "dense"),
        (V100, "bfloat16", 512, 64, False, "blockwise"),
        (TPU, "float32", 512, 128, True, "splash"),
    ],
)
def test_auto_takes_the_kernel_that_fits(on_device, device, dtype, length, head_dim, own, kernel):
    on_device(*device)
    assert choose_kernel("auto", dtype, length, head_dim, own_keys=own, cap=None, dropout=0.0) == kernel


@pytest.mark.parametrize(
    ("device", "dtype", "length", "head_dim", "cap", "here"),
    [
        (V100, "float16", 500, 64, None, "gpu (Tesla V100-SXM2-16GB)"),
        (MI250, "bfloat16", 500, 64, None, "gpu (AMD Instinct MI250X)"),
        (("gpu", "a GPU that says nothing", None), "bfloat16", 500, 64, None, "gpu (a GPU that says nothing)"),
        (H200, "float32", 500, 64, None, "float32"),
        (H200, "bfloat16", 500, 256, None, "head_dim = 256"),
        (H200, "bfloat16", 500, 10, None, "head_dim = 10"),
        (H200, "bfloat16", 501, 64, None, "501 tokens"),
        (H200, "bfloat16", 500, 64, 50.0, "attn_softcap = 50.0"),
        (TPU, "bfloat16", 500, 128, None, "500 tokens"),
        (TPU, "bfloat16", 512, 64, None, "head_dim = 64"),
    ],
)
def test_auto_falls_back_with_one_line_and_the_kernel_itself_is_refused(
    on_device, device, dtype, length, head_dim, cap, here
):
    on_device(*device)
    with pytest.warns(UserWarning, match=re.escape(here)) as noted:
        assert choose_kernel("auto", dtype, length, head_dim, own_keys=True, cap=cap, dropout=0.0) == "blockwise"
    (note,) = noted
    assert "\n" not in str(note.message)
    with pytest.raises(UserError, match=re.escape(here)):
        choose_kernel(
            {"gpu": "cudnn", "tpu": "splash"}[device[0]], dtype, length, head_dim, own_keys=True, cap=cap, dropout=0.0
        )


# Static, and traced as in a scan over layers.
LOCAL = pytest.mark.parametrize(
    ("config", "local"),
    [
        (PLAIN, False),
        (model(sliding_window=75), True),
        (model(sliding_window=75), jnp.asarray(True)),
        (model(sliding_window=75), jnp.asarray(False)),
    ],
    ids=["all tokens", "window", "traced window", "traced all tokens"],
)


# Plain scores on a mesh are in test_replicated_heads_read_the_keys_that_they_read_on_one_device.
@LOCAL
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(
    ("mesh", "cap"),
    [(None, None), (None, 2.0), (MeshConfig(data=2, fsdp=1, tensor=4), 2.0)],
    ids=["plain", "capped", "capped on a mesh"],
)
def test_splash_equals_dense_in_outputs_and_gradients(
    packed: bool, mesh: MeshConfig | None, cap: float | None, config: ModelConfig, local, monkeypatch
):
    """The kernel of TPUs, interpreted by Pallas on other devices."""
    monkeypatch.setattr(attention, "choose_kernel", lambda asked, *_, **__: asked)
    monkeypatch.setattr(attention, "splash", partial(attention.splash, interpret=True))
    length = 256
    config = dataclasses.replace(config, attn_softcap=cap)
    arrays = inputs(length, heads=8, kv_heads=4, head_dim=128)
    segments = documents(length) if packed else None
    with nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        splash = with_gradients(*arrays, None, segments, ComputeConfig(attention="splash"), config, local)
    dense = with_gradients(*arrays, None, segments, DENSE, config, local)
    for ours, reference in zip(splash, dense, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


@pytest.fixture
def everywhere(monkeypatch):
    """Fused kernels on any device: splash interpreted by Pallas, and cuDNN's call computed by XLA."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(attention, "choose_kernel", lambda asked, *_, **__: asked)
    monkeypatch.setattr(attention, "splash", partial(attention.splash, interpret=True))
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *qkv, implementation, **how: plain(*qkv, implementation="xla", **how)
    )


# Query heads, key/value heads, devices that share the heads: more of them than key heads, and device borders that lie
# within the group of a key head, on its border, and across it (12 / 6 on 4: heads 0 1 2 read keys 0 0 1).
RATIOS = [(16, 2, 4), (8, 2, 8), (4, 1, 4), (12, 6, 4), (8, 4, 4)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor", "replicate"),
    [
        *[(*ratio, ("kv_heads",)) for ratio in RATIOS],
        (8, 4, 4, ("heads",)),
        (8, 4, 4, ()),
        (8, 2, 8, ("heads", "kv_heads")),
    ],
)
@pytest.mark.parametrize("kernel", ["dense", "blockwise", "cudnn", "splash"])
def test_replicated_heads_read_the_keys_that_they_read_on_one_device(
    kernel: str, heads: int, kv_heads: int, tensor: int, replicate: tuple[str, ...], everywhere
):
    """Outputs and gradients of a packed batch whose rows are sharded over the other devices."""
    length = 128
    arrays = inputs(length, heads=heads, kv_heads=kv_heads, head_dim=128)
    alone = with_gradients(*arrays, None, documents(length), DENSE)
    compute = ComputeConfig(attention=kernel, replicate=replicate)  # pyright: ignore[reportArgumentType]
    with jax.set_mesh(make_mesh(MeshConfig(data=8 // tensor, tensor=tensor))):
        shared = with_gradients(*arrays, None, documents(length), compute)
    for ours, reference in zip(shared, alone, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


@LOCAL
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_what_cudnn_is_asked_for_is_dense_attention(packed: bool, config: ModelConfig, local, monkeypatch):
    """The call of cuDNN's kernel, computed by JAX on devices without cuDNN."""
    monkeypatch.setattr(attention, "choose_kernel", lambda asked, *_, **__: asked)
    plain, asked = jax.nn.dot_product_attention, []

    def without_cudnn(*qkv, implementation: str, **how):
        asked.append((implementation, how["mask"] is None, how["local_window_size"]))
        return plain(*qkv, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    config = dataclasses.replace(config, query_pre_attn_scalar=7)
    segments = documents(200) if packed else None
    cudnn, dense = (
        with_gradients(*inputs(200), None, segments, compute, config, local)
        for compute in (ComputeConfig(attention="cudnn"), DENSE)
    )
    for ours, reference in zip(cudnn, dense, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
    # cuDNN before 9.10.2 takes a mask or a window, not both.
    assert asked
    assert all(kernel == "cudnn" and (no_mask or sides is None) for kernel, no_mask, sides in asked)


@pytest.mark.gpu
@LOCAL
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_cudnn_equals_dense_in_outputs_and_gradients(packed: bool, dtype, config: ModelConfig, local):
    length = 200
    segments = documents(length) if packed else None
    exact = with_gradients(*inputs(length, head_dim=64), None, segments, DENSE, config, local)
    arrays = inputs(length, dtype=dtype, head_dim=64)
    dense, cudnn = (
        with_gradients(*arrays, None, segments, compute, config, local)
        for compute in (DENSE, ComputeConfig(attention="cudnn"))
    )
    for ours, reference, float32 in zip(cudnn, dense, exact, strict=True):
        assert np.std(ours - float32) < 1.2 * np.std(reference - float32)
