"""What training minimizes and reports: averages, terms of the loss, accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder
from camelid.train.config import LossConfig
from camelid.train.objective import NextTokenLoss, averaged
from tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config(num_layers=1)
ROWS, LENGTH = 4, 12


@pytest.fixture(scope="module")
def params() -> Decoder:
    return tiny_params(CONFIG)


def batch() -> dict[str, jax.Array]:
    """Rows with unequal weights; one has none."""
    tokens = tiny_tokens(CONFIG, ROWS, LENGTH + 1)
    weights = np.random.default_rng(0).uniform(0, 1, (ROWS, LENGTH)).astype(np.float32)
    weights *= np.float32([[4], [0.01], [0], [1]])
    weights[0, 3:] = 0
    arrays = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segments": np.ones((ROWS, LENGTH), np.int32),
        "rows": np.arange(ROWS, dtype=np.int32),
    }
    return {name: jnp.asarray(x) for name, x in arrays.items()}


@jax.jit
def logits_of(params: Decoder, given: dict[str, jax.Array]) -> jax.Array:
    return params(given["tokens"], given["positions"], given["segments"], CONFIG, ComputeConfig())[0]


def statistics(logits: jax.Array, targets: jax.Array) -> dict[str, np.ndarray]:
    """Per token, in float64, from all logits at once."""
    exact = np.asarray(logits, np.float64)
    logsumexp = np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1)) + exact.max(-1)
    return {
        "cross_entropy": logsumexp - np.take_along_axis(exact, np.asarray(targets)[..., None], -1)[..., 0],
        "uniform": logsumexp - exact.mean(-1),
        "square": logsumexp**2,
        "accuracy": (exact.argmax(-1) == np.asarray(targets)).astype(np.float64),
    }


def mean(x: np.ndarray, weights: jax.Array, average: str) -> float:
    """The definitions, row by row."""
    w = np.asarray(weights, np.float64)
    if average == "tokens":
        return (x * w).sum() / w.sum()
    return float(np.mean([(row * own).sum() / own.sum() for row, own in zip(x, w, strict=True) if own.sum() > 0]))


@pytest.mark.parametrize("average", ["tokens", "rows"])
def test_loss_and_metrics_are_those_of_their_definitions(params: Decoder, average):
    loss = LossConfig(average=average, z=1e-3, label_smoothing=0.1)
    objective = jax.jit(NextTokenLoss(config=CONFIG, compute=ComputeConfig(), loss=loss, accuracy=True))
    given = batch()
    logits = logits_of(params, given)
    given |= {"targets": given["targets"].at[:, ::3].set(jnp.argmax(logits, -1)[:, ::3])}
    tokens = statistics(logits, given["targets"])
    expected = {name: mean(x, given["weights"], average) for name, x in tokens.items()}
    z_loss = 1e-3 * expected["square"]
    whole = 0.9 * expected["cross_entropy"] + 0.1 * expected["uniform"] + z_loss
    parts = {"accuracy": expected["accuracy"], "z_loss": z_loss, "cross_entropy": expected["cross_entropy"]}

    total, weight, metrics = objective(params, given, jax.random.key(0))
    assert float(total / weight) == pytest.approx(whole, rel=1e-5)
    assert float(weight) == pytest.approx(3 if average == "rows" else float(given["weights"].sum()), rel=1e-6)
    assert {name: float(x / w) for name, (x, w) in metrics.items()} == pytest.approx(parts, rel=1e-5)
    assert 0 < parts["accuracy"] < 1

    # That of validation is the cross-entropy, so that runs with other terms can be compared.
    total, weight, metrics = objective(params, given, None)
    assert float(total / weight) == pytest.approx(expected["cross_entropy"], rel=1e-5)
    assert {name: float(x / w) for name, (x, w) in metrics.items()} == pytest.approx(
        {"accuracy": expected["accuracy"]}, rel=1e-5
    )


def test_without_terms_there_are_no_metrics_and_nothing_more_is_computed(params: Decoder):
    def metrics(loss: LossConfig) -> set[str]:
        objective = NextTokenLoss(config=CONFIG, compute=ComputeConfig(), loss=loss)
        program, result = jax.make_jaxpr(objective, return_shape=True)(params, batch(), jax.random.key(0))
        assert "argmax" not in str(program)
        return set(result[2])

    assert metrics(LossConfig()) == set()
    assert metrics(LossConfig(z=1e-4)) == {"cross_entropy", "z_loss"}
    assert metrics(LossConfig(label_smoothing=0.1)) == {"cross_entropy"}


def test_of_rows_without_weight_nothing_is_divided():
    weights, count = averaged(jnp.zeros((3, 5)), "rows")
    assert float(count) == 0
    assert not np.asarray(weights).any()
