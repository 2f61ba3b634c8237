"""The learning rate of every update, and what decays."""

import math

import jax
import numpy as np
import pytest

from camelid.errors import UserError
from camelid.model.decoder import declare_decoder
from camelid.model.params import named
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.schedules import learning_rate
from tiny import tiny_config, tiny_params

pytestmark = pytest.mark.quick_compile

CONFIG = OptimizerConfig(learning_rate=0.5, final_fraction=0.1, warmup_steps=10)


def rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """The learning rate of each update of a run."""
    schedule = learning_rate(config, steps)
    return np.array([float(schedule(finished)) for finished in range(steps)])


def test_the_learning_rate_rises_in_a_line_from_above_zero_to_its_peak_and_falls_as_a_cosine_to_its_end():
    steps = 100
    expected = [0.5 * (i + 1) / 10 for i in range(10)]
    expected += [0.05 + 0.45 * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(1, 91)]
    np.testing.assert_allclose(rates(CONFIG, steps), expected, rtol=1e-5)  # float32 cosine
    assert rates(CONFIG, steps).argmax() == 9
    np.testing.assert_allclose(rates(CONFIG, steps)[[0, 9, -1]], [0.05, 0.5, 0.05], rtol=1e-6)


def test_without_warmup_the_first_update_is_nearly_at_the_peak():
    falling = rates(OptimizerConfig(learning_rate=0.5, warmup_steps=0), 50)
    assert 0.499 < falling[0] < 0.5
    assert (np.diff(falling) < 0).all()
    assert falling[-1] == pytest.approx(0.05)


def test_a_final_fraction_of_one_keeps_the_peak():
    np.testing.assert_allclose(rates(OptimizerConfig(learning_rate=0.5, final_fraction=1.0), 20), 0.5, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 5, 10, 11])
def test_a_run_that_is_no_longer_than_its_warmup_rises_to_the_end(steps: int):
    expected = [0.5 * (i + 1) / 10 for i in range(min(steps, 10))]
    np.testing.assert_allclose(rates(CONFIG, steps)[:10], expected, rtol=1e-6)


def test_matrices_decay_and_norms_do_not():
    config = tiny_config()
    params = tiny_params(config)
    specs = declare_decoder(config)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, final_fraction=1.0, weight_decay=0.25), 9, specs)
    nothing = jax.tree.map(np.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    for path, update in named(updates).items():
        factor = 0.0 if path.endswith("norm.scale") else -0.25
        np.testing.assert_allclose(update, factor * named(params)[path], rtol=1e-6, err_msg=path)
    assert sum(path.endswith("norm.scale") for path in named(updates)) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("final_fraction", 1.5),
        ("warmup_steps", -1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
    ],
)
def test_numbers_that_cannot_train_are_refused_by_name(field: str, value: float):
    with pytest.raises(UserError, match=f"optimizer.{field} = {value}\nChoose a number"):
        OptimizerConfig(**{field: value})
