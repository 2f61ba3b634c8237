"""The marker quick_compile reaches every compilation of a test, in this process and in commands, and no other's."""

import jax
import pytest
from jax._src import compiler

import quick


def options() -> bytes:
    return compiler.get_compile_options(num_replicas=1, num_partitions=2).SerializeAsString()


@pytest.mark.quick_compile
def test_quick_compile_is_on_where_it_is_asked_for(user_env: dict[str, str]):
    assert jax.config.read("jax_disable_most_optimizations")
    assert quick.OLD_FUSIONS.encode() in options()
    assert user_env["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    assert quick.OLD_FUSIONS in user_env["XLA_FLAGS"]
    # What else is in the options is still read.
    assert compiler.get_compile_options(num_replicas=1, num_partitions=2).num_partitions == 2


def test_quick_compile_is_off_elsewhere(user_env: dict[str, str]):
    assert not jax.config.read("jax_disable_most_optimizations")
    assert quick.OLD_FUSIONS.encode() not in options()
    assert "JAX_DISABLE_MOST_OPTIMIZATIONS" not in user_env
    assert quick.OLD_FUSIONS not in user_env["XLA_FLAGS"]
