"""Training in 16 bits is refused where it would lose updates, and scales the loss where it would lose gradients."""

import math
import tomllib
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder
from camelid.runs.recipe import structure, write_recipe
from camelid.train.config import LossConfig, LossScaleConfig
from camelid.train.objective import NextTokenLoss
from camelid.train.step import TrainStep
from tiny import tiny_config, tiny_params, tiny_tokens

CONFIG = tiny_config(num_layers=1, vocab_size=8192, context_length=1024)

TABLE = {
    "run": "runs/a",
    "init": "models/a",
    "data": {"train": ["a.txt"], "sequence_length": 32, "batch_size": 8},
    "train": {"steps": 20},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_parameters_are_refused_with_the_reason_and_the_way_out(dtype: str):
    about = rf"^compute.param_dtype = '{dtype}' loses updates in training: .*\nLeave it out, .* float32"
    with pytest.raises(UserError, match=about):
        structure(TABLE | {"compute": {"param_dtype": dtype}})


@cache
def program(average: Literal["tokens", "rows"], dtype: str) -> Callable[..., Any]:
    """The gradients of the mean loss, as a step computes them, and the loss, of a batch with these weights."""
    compute = ComputeConfig(dtype=dtype)
    objective = NextTokenLoss(config=CONFIG, compute=compute, loss=LossConfig(average=average))
    scale = LossScaleConfig(initial=1024) if dtype == "float16" else None
    step = TrainStep(objective, optax.identity(), lambda count: 1.0, 1.0, loss_scale=scale)
    tokens = jnp.asarray(tiny_tokens(CONFIG, 2, 1024))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1)}
    batch |= {"positions": positions, "segments": jnp.ones_like(tokens)}
    initial = None if scale is None else jnp.float32(scale.initial)

    @jax.jit
    def run(params: Decoder, weights: jax.Array):
        rows = batch | {"weights": weights}
        (total, weight, _), summed = step.summed_gradients(params, None, rows, jax.random.key(0), initial)
        return step.mean_gradients(summed, weight), total / weight

    return run


def gradients(average: Literal["tokens", "rows"], dtype: str, weights: jax.Array) -> tuple[list[np.ndarray], float]:
    found, loss = program(average, dtype)(tiny_params(CONFIG, scale=1.0), weights)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)], float(loss)


@pytest.mark.quick_compile
def test_the_average_of_rows_keeps_its_gradients_in_float16():
    """Divided by the tokens of their row before they are rounded, those of logits lose bits, whatever the loss scale.

    Where all tokens of 1024 have a weight of 1, a row's average is that of its tokens, to the last bit.
    """
    full = jnp.ones((2, 1024))
    for one, other in zip(gradients("rows", "float16", full)[0], gradients("tokens", "float16", full)[0], strict=True):
        np.testing.assert_array_equal(one, other)
    uneven = full.at[1, 3:].set(0.0)
    half, loss = gradients("rows", "float16", uneven)
    exact, expected = gradients("rows", "float32", uneven)
    assert loss == pytest.approx(expected, rel=1e-3)
    for one, other in zip(half, exact, strict=True):
        # Activations have 11 bits. Without the factor, the gradient of the final norm is off by 2%.
        assert np.linalg.norm(one - other) < 5e-3 * np.linalg.norm(other)


def test_products_in_float16_have_a_loss_scale_and_others_refuse_one():
    recipe = structure(TABLE | {"compute": {"dtype": "float16"}})
    assert recipe.loss_scale == LossScaleConfig(initial=65536, factor=2, window=1000)
    given = TABLE | {"loss_scale": {"initial": 1024, "window": 20}}
    scaled = structure(given | {"compute": {"dtype": "float16"}})
    assert scaled.loss_scale == LossScaleConfig(initial=1024, window=20)
    assert structure(tomllib.loads(write_recipe(scaled))) == scaled
    assert structure(TABLE).loss_scale is None
    about = r"^the recipe has a loss_scale and compute.dtype = 'bfloat16'\nOnly float16 .* remove the table"
    with pytest.raises(UserError, match=about):
        structure(given | {"compute": {"dtype": "bfloat16"}})


@pytest.mark.parametrize(
    ("table", "about"),
    [
        ({"loss_scale": {"initial": 0.5}}, r"loss_scale.initial = 0.5\nChoose a number of 1 or more"),
        ({"loss_scale": {"factor": 1}}, r"loss_scale.factor = 1.0\nChoose a number above 1"),
        (
            {"loss_scale": {"initial": 3000}},
            r"loss_scale.initial = 3000.0 is not a power of two: .*\nChoose 2048 or 4096",
        ),
        ({"loss_scale": {"factor": 1.5}}, r"loss_scale.factor = 1.5 is not a power of two: .*\nChoose 2\."),
        ({"loss_scale": {"window": 0}}, r"loss_scale.window = 0\nChoose a number of steps"),
        ({"ema": {"decay": 1}}, r"ema.decay = 1.0\nChoose a number from 0 up to 1"),
        ({"train": {"steps": 1, "max_skipped": -1}}, r"train.max_skipped = -1\nIt is a number of steps"),
        ({"train": {"steps": 1, "spike_sigma": math.nan}}, r"train.spike_sigma = nan\nChoose a number above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_out_of_range_are_refused(table: dict, about: str):
    with pytest.raises(UserError, match=about):
        structure(TABLE | {"compute": {"dtype": "float16"}} | table)


def test_products_in_bfloat16_with_parameters_in_float32_are_not_refused():
    compute = structure(TABLE | {"compute": {"dtype": "bfloat16"}}).compute
    assert (compute.dtype, compute.param_dtype) == ("bfloat16", "float32")


def test_the_reasons_are_true():
    weight, update = jnp.asarray(0.02, jnp.bfloat16), jnp.asarray(2e-5, jnp.float32)
    assert (weight.astype(jnp.float32) - update).astype(jnp.bfloat16) == weight
    assert jnp.asarray(2e-8, jnp.float32).astype(jnp.float16) == 0
    assert jnp.asarray(2e-8, jnp.float32).astype(jnp.bfloat16) != 0
