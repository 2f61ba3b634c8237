"""Attention dropout: the same weights are dropped whatever the kernel, its blocks, the microbatch and the mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camelid.errors import UserError
from camelid.model import blockwise
from camelid.model.attention import View, attend
from camelid.model.config import ComputeConfig
from camelid.model.context import Context
from camelid.model.kernels import choose_kernel
from camelid.parallel.mesh import MeshConfig, make_mesh
from model.test_attention import CAPPED_WINDOW, CLOSE, PLAIN, documents, inputs
from model.test_attention import on_device as on_device  # a fixture

pytestmark = pytest.mark.quick_compile

RATE, ROWS, LENGTH = 0.3, jnp.asarray([4, 9]), 29
DENSE, BLOCKWISE = ComputeConfig(attention="dense"), ComputeConfig(attention="blockwise")


def training(rows=ROWS, rate: float = RATE, seed: int = 0) -> Context:
    return Context(phase="training", attention_dropout=rate, dropout_key=jax.random.key(seed), rows=rows)


def with_gradients(q, k, v, g, segments, compute: ComputeConfig, config=PLAIN, context: Context | None = None):
    """The output and the gradients by q, k and v."""

    @jax.jit
    def run(q, k, v, g, context):
        def out(q, k, v):
            return attend(q, View(k, v, segments=segments), None, True, config, compute, context)

        y, pullback = jax.vjp(out, q, k, v)
        return y, *pullback(g)

    return [np.asarray(x) for x in run(q, k, v, g, training() if context is None else context)]


@pytest.fixture(params=[8, 5])
def block(request, monkeypatch) -> int:
    monkeypatch.setattr(blockwise, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("config", [PLAIN, CAPPED_WINDOW], ids=["plain", "capped window"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_blockwise_equals_dense_in_outputs_and_gradients_for_any_block(packed: bool, config, block: int):
    segments = documents(LENGTH) if packed else None
    ours, reference = (with_gradients(*inputs(LENGTH), segments, c, config) for c in (BLOCKWISE, DENSE))
    assert np.abs(reference[0] - with_gradients(*inputs(LENGTH), segments, DENSE, config, Context())[0]).max() > 0.1
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def factors(context: Context, heads: int, kv_heads: int, length: int, compute: ComputeConfig = DENSE) -> np.ndarray:
    """What each weight is multiplied by (B H S T), from outputs for equal scores and one-hot values."""
    assert context.rows is not None
    q = jnp.zeros((len(context.rows), length, heads, length))
    keys = jnp.zeros((len(q), kv_heads, length, length))
    values = jnp.broadcast_to(jnp.eye(length), keys.shape)
    out = attend(q, View(keys, values), None, False, PLAIN, compute, context)
    return np.asarray(out * jnp.arange(1, length + 1)[:, None, None].astype(jnp.float32)).transpose(0, 2, 1, 3)


def test_outputs_are_those_of_the_definition():
    """Weights after the softmax are dropped or divided by 1 - rate, in float64."""
    q, k, v, _ = inputs(LENGTH)
    heads, kv_heads, head_dim = q.shape[2], k.shape[1], q.shape[3]
    of = factors(training(), heads, kv_heads, LENGTH)
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q.transpose(0, 2, 1, 3), k, v))
    k64, v64 = (np.repeat(x, heads // kv_heads, 1) for x in (k64, v64))
    scores = np.where(np.tri(LENGTH, dtype=bool), q64 @ k64.swapaxes(2, 3) / math.sqrt(head_dim), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True) * of) @ v64
    ours = attend(q, View(k, v), None, False, PLAIN, BLOCKWISE, training())
    np.testing.assert_allclose(ours.transpose(0, 2, 1, 3), expected, **CLOSE)


def test_drops_are_as_frequent_as_the_rate_and_independent():
    """In every row, head, query and key; and a weight says nothing about its neighbors in any of the four."""
    length = 200
    of = factors(training(jnp.arange(3)), 4, 2, length)
    seen = np.broadcast_to(np.tri(length, dtype=bool), of.shape)
    np.testing.assert_allclose(of[seen & (of > 0)], 1 / (1 - RATE), rtol=1e-4)
    dropped = np.where(seen, of == 0, np.nan).astype(np.float32)
    for axes in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        count = seen.sum(axes)
        errors = (np.nanmean(dropped, axes) - RATE) / np.sqrt(RATE * (1 - RATE) / count)
        assert np.abs(errors[count > 50]).max() < 4.5  # standard errors; the largest of at most 200
    for axis in range(4):
        for distance in (1, 2, 7):
            if distance >= of.shape[axis]:
                continue
            a, b = (
                np.take(dropped, range(*ends), axis) - RATE
                for ends in ((distance, of.shape[axis]), (0, of.shape[axis] - distance))
            )
            both = ~np.isnan(a * b)
            assert abs(np.sum((a * b)[both])) < 4.5 * RATE * (1 - RATE) * np.sqrt(both.sum())


def test_rows_are_known_by_their_numbers_and_steps_by_their_keys():
    """A microbatch, or another order of rows, drops the same weights of a row."""
    both = factors(training(), 4, 2, 20)
    np.testing.assert_array_equal(factors(training(ROWS[1:]), 4, 2, 20), both[1:])
    np.testing.assert_array_equal(factors(training(ROWS[::-1]), 4, 2, 20), both[::-1])
    assert (factors(training(seed=1), 4, 2, 20) != both).any((0, 2, 3)).all()
    assert (factors(training().layer(1), 4, 2, 20) != factors(training().layer(2), 4, 2, 20)).any((0, 2, 3)).all()


@pytest.mark.parametrize("compute", [DENSE, BLOCKWISE], ids=["dense", "blockwise"])
def test_a_mesh_drops_what_one_device_does(compute: ComputeConfig):
    arrays, rows = inputs(LENGTH, heads=8, kv_heads=4), jnp.arange(2)
    alone = with_gradients(*arrays, documents(LENGTH), DENSE, context=training(rows))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
        shared = with_gradients(*arrays, documents(LENGTH), compute, context=training(rows))
    for a, b in zip(shared, alone, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("compute", [DENSE, BLOCKWISE], ids=["dense", "blockwise"])
def test_without_dropout_the_program_is_the_one_that_knows_none(compute: ComputeConfig):
    q, k, v, _ = inputs(LENGTH)

    def program(context: Context) -> str:
        return str(jax.make_jaxpr(lambda q, k, v: attend(q, View(k, v), None, False, PLAIN, compute, context))(q, k, v))

    assert program(training(rate=0.0)) == program(Context()) != program(training())
    assert program(Context(attention_dropout=RATE)) == program(Context())  # no key: nothing is dropped


@pytest.mark.parametrize(("platform", "kernel"), [("gpu", "cudnn"), ("tpu", "splash")])
def test_kernels_that_cannot_reproduce_it_are_refused(on_device, platform: str, kernel: str):
    on_device(platform, "NVIDIA H200", "9.0")
    shapes = ("bfloat16", 512, 128)
    assert choose_kernel("auto", *shapes, own_keys=True, cap=None, dropout=0.0) == kernel
    with pytest.raises(
        UserError, match=f"'{kernel}' cannot be used: .* no attention dropout.* attention dropout = 0.1"
    ):
        choose_kernel(kernel, *shapes, own_keys=True, cap=None, dropout=0.1)
    with pytest.warns(UserWarning, match="slower blockwise kernel: .* attention dropout = 0.1"):
        assert choose_kernel("auto", *shapes, own_keys=True, cap=None, dropout=0.1) == "blockwise"
