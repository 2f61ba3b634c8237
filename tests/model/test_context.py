"""Dropout depends on the step's key, the row's number, the layer and the place; on no division of the batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camelid.model.config import ComputeConfig
from camelid.model.context import Context, dropout
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import shardings
from camelid.parallel.batch_sharding import BatchSharding
from camelid.parallel.mesh import MeshConfig, make_mesh
from tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config(vocab_size=96)
ROWS, LENGTH = 8, 14
TOKENS = tiny_tokens(CONFIG, ROWS, LENGTH)
RATES = {"embedding_dropout": 0.2, "residual_dropout": 0.3, "mlp_dropout": 0.25}
BOTH = tuple(RATES.items())


@pytest.fixture(scope="module")
def params() -> Decoder:
    return tiny_params(CONFIG)


@functools.partial(jax.jit, static_argnames=("rates",))
def hidden(params: Decoder, tokens, rows, key, rates: Any = BOTH) -> jax.Array:
    context = Context("training", dropout_key=key, rows=rows, **dict(rates))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return params.hidden(jnp.asarray(tokens), positions, None, CONFIG, ComputeConfig(), context=context)[0]


@pytest.fixture(scope="module")
def together(params: Decoder) -> np.ndarray:
    return np.asarray(hidden(params, TOKENS, jnp.arange(ROWS), jax.random.key(5)))


def assert_close(ours: Any, reference: np.ndarray) -> None:
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_rows_in_microbatches_are_dropped_as_in_one_batch(params: Decoder, together: np.ndarray):
    # Every second row, as a device keeps its own when the batch is divided.
    for rows in (np.arange(0, ROWS, 2), np.arange(1, ROWS, 2)):
        assert_close(hidden(params, TOKENS[rows], jnp.asarray(rows), jax.random.key(5)), together[rows])


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_rows_on_a_mesh_are_dropped_as_on_one_device(params: Decoder, together: np.ndarray, sizes: dict[str, int]):
    mesh = make_mesh(MeshConfig(**sizes))
    placed = jax.device_put(params, shardings(declare_decoder(CONFIG), params, mesh))
    batch = BatchSharding(ROWS, mesh).place({"tokens": TOKENS, "rows": np.arange(ROWS, dtype=np.int32)[:, None]})
    with jax.set_mesh(mesh):
        assert_close(hidden(placed, batch["tokens"], batch["rows"][:, 0], jax.random.key(5)), together)


def test_another_step_and_another_row_drop_other_elements(params: Decoder, together: np.ndarray):
    for rows, seed in ((jnp.arange(ROWS), 6), (jnp.arange(ROWS) + 1, 5)):
        other = hidden(params, TOKENS, rows, jax.random.key(seed))
        assert (np.abs(other - together).max((1, 2)) > 0.01).all()


@pytest.mark.parametrize("rate", RATES)
def test_each_rate_drops_something(params: Decoder, rate: str):
    run = functools.partial(hidden, params, TOKENS, jnp.arange(ROWS), jax.random.key(5))
    assert np.abs(run(((rate, RATES[rate]),)) - run(())).max() > 0.01


def test_without_rates_or_without_a_key_nothing_is_dropped_and_nothing_is_drawn(params: Decoder):
    def program(context: Context) -> str:
        positions = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
        run = jax.jit(
            lambda p: p.hidden(jnp.asarray(TOKENS), positions, None, CONFIG, ComputeConfig(), context=context)[0]
        )
        return str(jax.make_jaxpr(run)(params))

    plain = program(Context())
    assert program(Context(dropout_key=jax.random.key(0), rows=jnp.arange(ROWS))) == plain
    assert program(Context(**RATES)) == plain
    assert "random_bits" in program(Context(dropout_key=jax.random.key(0), rows=jnp.arange(ROWS), **RATES))


def test_the_share_of_dropped_elements_is_the_rate_and_the_mean_is_kept():
    context = Context(dropout_key=jax.random.key(1), rows=jnp.arange(40))
    x = dropout(jnp.ones((40, 25, 100)), 0.3, "embedding", context)
    # Of n draws, the share is off by sqrt(rate (1 - rate) / n), times a few.
    assert abs(np.mean(x == 0) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / x.size)
    np.testing.assert_allclose(np.unique(x), [0, 1 / 0.7], rtol=1e-6)


@pytest.mark.parametrize("rate", ["residual_dropout", "mlp_dropout"])
def test_layers_and_purposes_drop_different_elements(rate: str):
    context = Context(dropout_key=jax.random.key(1), rows=jnp.arange(4), **{rate: 0.5})
    masks = [
        np.asarray(dropout(jnp.ones((4, 9, 30)), 0.5, purpose, context.layer(layer))) > 0
        for layer in (0, 1)
        for purpose in ("attention output", "mlp output", "mlp hidden")
    ]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert abs(np.mean(mask == other) - 0.5) < 0.1


def test_layers_with_adapters_drop_different_inputs():
    context = Context(adapter_dropout=0.5, dropout_key=jax.random.key(1), rows=jnp.arange(4))
    one, other = (jax.random.key_data(context.layer(layer).row_keys("adapter of q_proj")) for layer in (0, 1))
    assert (one != other).all()


def test_dropout_in_bfloat16_stays_in_bfloat16():
    context = Context(dropout_key=jax.random.key(1), rows=jnp.arange(4))
    assert dropout(jnp.ones((4, 9, 30), jnp.bfloat16), 0.5, "embedding", context).dtype == jnp.bfloat16
