"""What the system refuses ends a command in two lines: no memory, no device, no driver."""

from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import camelid
from camelid.cli.failures import LESS_MEMORY, as_user_error
from camelid.errors import UserError
from runs import assert_refused, called, command, tiny_run, write_recipe_file


def xla_error() -> Exception:
    """What XLA raises where an array does not fit."""
    try:
        jnp.zeros(2**50, jnp.float32).block_until_ready()
    except jax.errors.JaxRuntimeError as error:
        return error
    raise AssertionError("four petabytes fit")


def numpy_error() -> Exception:
    try:
        np.empty(2**50)
    except MemoryError as error:
        return error
    raise AssertionError("eight petabytes fit")


@pytest.mark.parametrize("make", [xla_error, numpy_error, MemoryError])
def test_exhausted_memory_is_explained(make, stories: Path):
    with mock.patch("camelid.api.load", side_effect=make()):
        result = called("generate", stories, "Hello")
    assert_refused(result, "out of memory")
    assert "--max-new-tokens" in result.stderr


def test_exhausted_memory_in_training_is_explained(tmp_path: Path):
    with mock.patch("camelid.runs.run.run", side_effect=xla_error()):
        result = called("train", write_recipe_file(tiny_run(tmp_path), tmp_path / "recipe.toml"))
    assert_refused(result, "out of memory: RESOURCE_EXHAUSTED")
    assert "train.accumulate" in result.stderr


def test_other_errors_keep_their_traceback():
    assert as_user_error(RuntimeError("INTERNAL: odd"), "train") is None
    assert as_user_error(ValueError("RESOURCE_EXHAUSTED"), "train") is None
    assert as_user_error(OSError("no file is named"), "train") is None


def test_advice_is_for_commands_that_there_are():
    from camelid.cli import COMMANDS

    assert LESS_MEMORY.keys() <= COMMANDS.keys()


@pytest.mark.parametrize(("platform", "name"), [("cuda", "train"), ("rocm", "generate"), ("nonsense", "train")])
def test_a_missing_driver_is_explained(
    platform: str, name: str, tmp_path: Path, stories: Path, user_env: dict[str, str]
):
    recipe = write_recipe_file(tiny_run(tmp_path), tmp_path / "recipe.toml")
    words = {"generate": [stories, "Hello"], "train": [recipe]}[name]
    result = command(name, *words, env=user_env | {"JAX_PLATFORMS": platform})
    if platform == "cuda" and result.returncode == 0:
        pytest.skip("this machine has a CUDA device")
    assert_refused(result, f"JAX cannot use JAX_PLATFORMS = {platform!r}")
    assert "Traceback" not in result.stderr


def test_python_gets_the_same_error(stories: Path):
    # As of a jaxlib for CUDA on a machine whose driver is broken.
    error = RuntimeError("Unable to initialize backend 'cuda': FAILED_PRECONDITION: No visible GPU devices.")
    patched = mock.patch.object(jax, "local_devices", side_effect=error)
    with patched, pytest.raises(UserError, match="No visible GPU devices"):
        camelid.load(str(stories))
