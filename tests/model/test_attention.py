"""Every kernel against dense attention, and that against a plain loop in float64."""

import math
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camelid.errors import UserError
from camelid.model import attention
from camelid.model.attention import attend, choose_kernel
from camelid.model.config import Compute
from camelid.parallel.mesh import MeshConfig, make_mesh
from programs import largest_array

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 6, 3, 10
DENSE, BLOCKWISE = Compute(attention="dense"), Compute(attention="blockwise")
# Sums of some dozens of float32 products, in another order; values and gradients are of scale 1.
CLOSE = {"rtol": 0, "atol": 2e-5}


def inputs(queries: int, keys: int | None = None, dtype=np.float32, **sizes: int) -> tuple[jax.Array, ...]:
    """q (B S H D), k and v (B K T D), and a cotangent for the output."""
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM} | sizes
    draw = np.random.default_rng(queries)
    keys = keys or queries
    q, g = (draw.normal(size=(BATCH, queries, sizes["heads"], sizes["head_dim"])) for _ in range(2))
    k, v = (draw.normal(size=(BATCH, sizes["kv_heads"], keys, sizes["head_dim"])) for _ in range(2))
    return tuple(jnp.asarray(x, dtype) for x in (3 * q, k, v, g))


def documents(length: int) -> jax.Array:
    """Segments of a packed row: two documents and padding, and a second row that is cut elsewhere."""
    at = np.arange(length)
    first = np.where(at < length // 3, 1, np.where(at < length - 4, 2, 0))
    second = np.where(at < length // 2, 1, 2)
    return jnp.asarray(np.stack([first, second]), jnp.int32)


def plain_loop(q, k, v, order, segments) -> np.ndarray:
    """Attention as its definition says, one query at a time; consecutive query heads share a key head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, s, h in np.ndindex(q.shape[:3]):
        seen = [
            t for t in range(k.shape[2]) if t <= order[b, s] and (segments is None or segments[b, s] == segments[b, t])
        ]
        kv = h * k.shape[1] // q.shape[2]
        scores = k[b, kv, seen] @ q[b, s, h] / math.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights @ v[b, kv, seen] / weights.sum()
    return out


def with_gradients(q, k, v, g, order, segments, compute: Compute) -> list[np.ndarray]:
    """The output and the gradients by q, k and v."""

    @jax.jit
    def run(q, k, v, g):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, order, segments, compute), q, k, v)
        return out, *pullback(g)

    return [np.asarray(x, np.float32) for x in run(q, k, v, g)]


@pytest.fixture
def block(monkeypatch) -> int:
    """Blocks so small that short rows have several."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    return 8


@pytest.mark.parametrize("segments", [None, documents(13)], ids=["one document", "packed"])
@pytest.mark.parametrize("compute", [DENSE, BLOCKWISE], ids=["dense", "blockwise"])
def test_attention_is_the_plain_loop(compute: Compute, segments, block):
    q, k, v, _ = inputs(13)
    order = np.broadcast_to(np.arange(13), (BATCH, 13))
    np.testing.assert_allclose(attend(q, k, v, None, segments, compute), plain_loop(q, k, v, order, segments), **CLOSE)


# Of blocks of 8: a part of one, several, several and a part.
@pytest.mark.parametrize(("length", "packed"), [(5, False), (24, True), (29, False), (29, True)])
def test_blockwise_equals_dense_in_outputs_and_gradients(length: int, packed: bool, block):
    arrays = inputs(length)
    segments = documents(length) if packed else None
    dense, blockwise = (with_gradients(*arrays, None, segments, compute) for compute in (DENSE, BLOCKWISE))
    for ours, reference in zip(blockwise, dense, strict=True):
        np.testing.assert_allclose(ours, reference, **CLOSE)


def test_blockwise_in_bfloat16_is_as_near_to_float32_as_dense_is(block):
    segments = documents(29)
    exact = with_gradients(*inputs(29), None, segments, DENSE)
    dense, blockwise = (
        with_gradients(*inputs(29, dtype=jnp.bfloat16), None, segments, compute) for compute in (DENSE, BLOCKWISE)
    )
    for ours, reference, float32 in zip(blockwise, dense, exact, strict=True):
        # Both round to 8 bits: dense the weights, blockwise their numerators, whose errors do not share a factor.
        assert np.std(ours - float32) < 1.5 * np.std(reference - float32)
        assert np.abs(ours - float32).max() < 0.03 * np.abs(float32).max()


@pytest.mark.parametrize("steps", [np.geomspace(0.03, 30, 29), np.geomspace(30, 0.03, 29)], ids=["up", "down"])
def test_blockwise_survives_blocks_whose_scores_differ_by_hundreds(steps, block):
    q, k, v, g = inputs(29)
    k = k * jnp.asarray(steps, jnp.float32)[:, None]
    dense, blockwise = (with_gradients(q, k, v, g, None, None, compute) for compute in (DENSE, BLOCKWISE))
    for ours, reference in zip(blockwise, dense, strict=True):
        # A score of 1000 is known to 1e-4 in float32, and so is its exponential, relatively.
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4 * np.abs(reference).max())


@pytest.mark.parametrize(("queries", "keys"), [(5, 29), (11, 40), (1, 29)])
def test_queries_over_a_cache_see_their_own_slots_and_earlier(queries: int, keys: int, block):
    """Rows are at different places; what lies in later slots is garbage that nobody may see."""
    q, k, v, _ = inputs(queries, keys)
    order = np.stack([np.arange(queries) + 3, np.arange(queries) + keys - queries]).astype(np.int32)
    beyond = np.arange(keys) > order[:, -1:]
    k, v = (jnp.where(beyond[:, None, :, None], 1e4, x) for x in (k, v))
    ours = attend(q, k, v, jnp.asarray(order), None, Compute())
    np.testing.assert_allclose(ours, plain_loop(q, k, v, order, None), **CLOSE)


@pytest.mark.parametrize("compute", [DENSE, BLOCKWISE], ids=["dense", "blockwise"])
def test_only_dense_makes_an_array_of_queries_by_keys(compute: Compute):
    length = 8 * attention.BLOCK
    q, k = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in ((length, 1, 2), (1, length, 2)))
    segments = jnp.zeros((1, length), jnp.int32)

    def run(q, k, v):
        return jax.vjp(lambda q, k, v: attend(q, k, v, None, segments, compute), q, k, v)[1](q)

    assert (largest_array(run, q, k, k) >= length**2) == (compute == DENSE)


# The device's kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_a_kernel_that_the_device_lacks_is_refused(kernel: str):
    q, k, v, _ = inputs(13)
    with pytest.raises(UserError, match=f"attention = '{kernel}' needs .* here are {jax.default_backend()}, float32"):
        attend(q, k, v, None, None, Compute(attention=kernel))


@pytest.mark.parametrize(
    ("device", "dtype", "length", "head_dim", "own", "kernel"),
    [
        ("cpu", "float32", 512, 64, True, "blockwise"),
        ("cpu", "bfloat16", 512, 64, True, "blockwise"),
        ("cpu", "bfloat16", 1, 64, False, "dense"),
        ("cpu", "bfloat16", 512, 64, False, "blockwise"),
        ("gpu", "bfloat16", 500, 64, True, "cudnn"),
        ("gpu", "float16", 500, 128, True, "cudnn"),
        ("gpu", "float32", 500, 64, True, "blockwise"),
        ("gpu", "bfloat16", 500, 256, True, "blockwise"),
        ("gpu", "bfloat16", 500, 10, True, "blockwise"),
        ("gpu", "bfloat16", 1, 64, False, "dense"),
        ("tpu", "float32", 512, 128, True, "splash"),
        ("tpu", "bfloat16", 500, 128, True, "blockwise"),
        ("tpu", "bfloat16", 512, 64, True, "blockwise"),
    ],
)
def test_auto_takes_the_kernel_that_fits(monkeypatch, device, dtype, length, head_dim, own, kernel):
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    assert choose_kernel("auto", dtype, length, head_dim, own) == kernel


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=1, tensor=4)], ids=["one device", "mesh"])
def test_splash_equals_dense_in_outputs_and_gradients(packed: bool, mesh: MeshConfig | None):
    """TPU's kernel, as Pallas interprets it on other devices."""
    length = 256
    q, k, v, g = inputs(length, heads=8, kv_heads=4, head_dim=128)
    segments = documents(length) if packed else None

    @jax.jit
    def run(q, k, v, g):
        out, pullback = jax.vjp(lambda *qkv: attention._splash(*qkv, segments, (), interpret=True), q, k, v)
        return out, *pullback(g)

    with nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        splash = run(q, k, v, g)
    for ours, reference in zip(splash, with_gradients(q, k, v, g, None, segments, DENSE), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_cudnn_equals_dense_in_outputs_and_gradients(packed: bool, dtype):
    length = 200
    segments = documents(length) if packed else None
    exact = with_gradients(*inputs(length, head_dim=64), None, segments, DENSE)
    arrays = inputs(length, dtype=dtype, head_dim=64)
    dense, cudnn = (with_gradients(*arrays, None, segments, compute) for compute in (DENSE, Compute(attention="cudnn")))
    for ours, reference, float32 in zip(cudnn, dense, exact, strict=True):
        assert np.std(ours - float32) < 1.2 * np.std(reference - float32)
