"""Training in 16 bits is refused where it would lose updates, and scales the loss where it would lose gradients."""

import math
import tomllib

import jax.numpy as jnp
import pytest

from camelid.errors import UserError
from camelid.runs.recipe import structure, write_recipe
from camelid.train.config import LossScaleConfig

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


def test_the_average_of_rows_is_refused_in_float16_because_it_loses_gradients():
    rows = TABLE | {"loss": {"average": "rows"}}
    message = r"^loss.average = 'rows' with compute.dtype = 'float16' loses gradients: .*\nSet"
    with pytest.raises(UserError, match=message):
        structure(rows | {"compute": {"dtype": "float16"}})
    assert structure(rows | {"compute": {"dtype": "bfloat16"}}).loss.average == "rows"
    # The reason: with a vocabulary of 32000 and 2048 tokens in a row, the gradients of logits become zero.
    gradient, weight, scale = jnp.float32(1 / 32000), jnp.float32(1 / 2048), jnp.float16(2.0**15)
    assert (gradient * weight).astype(jnp.float16) * scale == 0
    assert gradient.astype(jnp.float16) != 0


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
