"""Training in 16 bits is refused where it would lose updates or gradients without a word."""

import jax.numpy as jnp
import pytest

from camelid.errors import UserError
from camelid.runs.recipe import structure

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


def test_float16_is_refused_with_the_reason_and_the_way_out():
    with pytest.raises(UserError, match=r"^compute.dtype = 'float16' needs loss scaling .*\nUse 'bfloat16'"):
        structure(TABLE | {"compute": {"dtype": "float16"}})


def test_products_in_bfloat16_with_parameters_in_float32_are_not_refused():
    compute = structure(TABLE | {"compute": {"dtype": "bfloat16"}}).compute
    assert (compute.dtype, compute.param_dtype) == ("bfloat16", "float32")


def test_the_reasons_are_true():
    weight, update = jnp.asarray(0.02, jnp.bfloat16), jnp.asarray(2e-5, jnp.float32)
    assert (weight.astype(jnp.float32) - update).astype(jnp.bfloat16) == weight
    assert jnp.asarray(2e-8, jnp.float32).astype(jnp.float16) == 0
    assert jnp.asarray(2e-8, jnp.float32).astype(jnp.bfloat16) != 0
