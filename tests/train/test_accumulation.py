"""Four microbatches of four rows give the loss, the gradient and the update of 16 rows, with everything turned on.

Rows have unequal weights, of which one row and one microbatch have none; all that is random drops something.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from camelid.data.rows.batch import Batch
from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import named, shardings
from camelid.parallel.batch_sharding import BatchSharding
from camelid.parallel.mesh import MeshConfig, make_mesh
from camelid.train.config import DropoutConfig, LossConfig
from camelid.train.objective import NextTokenLoss
from camelid.train.state import start_state
from camelid.train.step import TrainStep
from tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config(vocab_size=96, num_layers=2)
ROWS, LENGTH = 16, 12
EVERYTHING = DropoutConfig(
    embedding=0.1, attention=0.2, residual=0.1, mlp=0.2, forgetful_min_ratio=0.1, forgetful_max_ratio=0.4
)
# With the usual eps, rounding would decide the direction of tiny gradients. The state holds the clipped gradients too.
ADAM = optax.chain(optax.trace(0.0), optax.adamw(1e-2, eps=1e-3))


@pytest.fixture(scope="module")
def params() -> Decoder:
    return tiny_params(CONFIG)


def batch() -> dict[str, np.ndarray]:
    tokens = tiny_tokens(CONFIG, ROWS, LENGTH + 1)
    weights = np.random.default_rng(0).uniform(0, 1, (ROWS, LENGTH)).astype(np.float32)
    # Microbatch m has the rows m, m + 4, m + 8 and m + 12.
    weights *= np.resize(np.float32([4, 0.01, 0, 1, 2, 0, 0, 1]), ROWS)[:, None]
    weights[0, 3:] = 0
    made = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=weights,
        positions=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        segments=np.tile(np.repeat(np.int32([1, 2, 0]), [5, 6, 1]), (ROWS, 1)),
    )
    return vars(made)


def step(average, accumulate: int, dropout: DropoutConfig = EVERYTHING) -> TrainStep:
    loss = LossConfig(average=average, z=1e-3, label_smoothing=0.1)
    objective = NextTokenLoss(config=CONFIG, compute=ComputeConfig(), loss=loss, dropout=dropout, accuracy=True)
    return TrainStep(objective, ADAM, lambda count: 1e-2, 1.0, accumulate, seed=3, param_norm=True)


@functools.partial(jax.jit, static_argnames="step")
def updated(step: TrainStep, params: Decoder, given: dict[str, jax.Array]):
    """The state and the metrics of a step."""
    return step(start_state(params, ADAM), given)


def assert_same(ours, reference) -> None:
    (state, metrics), (state_there, metrics_there) = ours, reference
    grads, grads_there = (each.opt_state[0].trace for each in (state, state_there))
    assert set(metrics) >= {"loss", "cross_entropy", "z_loss", "accuracy", "param_norm", "weight"}
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(
        {name: float(x) for name, x in metrics_there.items()}, rel=1e-5
    )
    for path, grad in named(grads_there).items():
        np.testing.assert_allclose(
            named(grads)[path], grad, rtol=0, atol=1e-5 * np.abs(np.asarray(grad)).max(), err_msg=path
        )
    for path, array in named(state_there.trainable).items():
        np.testing.assert_allclose(named(state.trainable)[path], array, rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("average", ["tokens", "rows"])
def test_four_microbatches_of_four_rows_are_16_rows(params: Decoder, average):
    whole = updated(step(average, 1), params, batch())
    assert_same(updated(step(average, 4), params, batch()), whole)
    weights = batch()["weights"]
    assert float(whole[1]["weight"]) == pytest.approx(10 if average == "rows" else weights.sum(), rel=1e-6)
    moved = np.abs(np.asarray(whole[0].trainable.embed) - np.asarray(params.embed))
    assert moved.max() > 1e-3


def test_eight_devices_with_microbatches_are_one_device_without(params: Decoder):
    """Each of the four devices that share the rows has one of each microbatch."""
    whole, mesh = updated(step("rows", 1), params, batch()), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, shardings(declare_decoder(CONFIG), params, mesh))
    with jax.set_mesh(mesh):
        assert_same(updated(step("rows", 4), placed, BatchSharding(ROWS, mesh).place(batch())), whole)


def test_each_kind_of_dropout_changes_the_loss(params: Decoder):
    """Otherwise the tests above would show nothing about it."""
    none = dataclasses.replace(EVERYTHING, **dict.fromkeys([f.name for f in dataclasses.fields(EVERYTHING)], 0.0))
    given = {name: jnp.asarray(x[:8]) for name, x in batch().items()} | {"rows": jnp.arange(8)}

    def loss(dropout: DropoutConfig) -> float:
        total, weight, _ = jax.jit(step("tokens", 1, dropout).objective)(params, given, jax.random.key(0))
        return float(total / weight)

    plain = loss(none)
    for name in ("embedding", "attention", "residual", "mlp", "forgetful_max_ratio"):
        assert abs(loss(dataclasses.replace(none, **{name: 0.3})) - plain) > 1e-2, name
