import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from camelid.model.config import RopeScaling
from camelid.model.rope import frequencies, rotate, rotations
from tiny import tiny_config


@pytest.mark.parametrize(("factor", "original_context"), [(8.0, 8192), (32.0, 8192)], ids=["llama 3.1", "llama 3.2"])
def test_llama3_frequencies_equal_transformers(factor: float, original_context: int):
    scaling = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=original_context)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original_context,
    }
    theirs = transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=rope
    )
    reference, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    ours = frequencies(tiny_config(head_dim=128, rope_theta=500_000.0, rope_scaling=scaling))
    np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-6)


def test_scores_depend_on_the_distance_alone():
    config = tiny_config()
    turn = jax.jit(lambda x, positions: rotate(x, rotations(positions, config)))
    draw = np.random.default_rng(0)
    q, k = (jnp.asarray(draw.normal(size=(1, 1, 1, config.head_dim)), jnp.float32) for _ in range(2))

    def score(at: int, other: int) -> float:
        turned = (turn(x, jnp.array([[p]])) for x, p in ((q, at), (k, other)))
        return float(jnp.vdot(*turned))

    assert score(5, 2) == pytest.approx(score(45, 42), abs=1e-5)
    assert abs(score(5, 2) - score(5, 3)) > 0.01


def test_angles_are_exact_far_into_the_context_and_whatever_the_activations_are():
    """bfloat16 could not tell position 1001 from 1002."""
    config = tiny_config()
    positions = np.array([[1001, 1002]])
    rotation = rotations(jnp.asarray(positions), config)
    angles = positions[..., None] * config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    for part, exact in zip(rotation, (np.cos(angles), np.sin(angles)), strict=True):
        assert part.dtype == jnp.float32
        np.testing.assert_allclose(part, exact, rtol=0, atol=2e-4)  # an angle of 1002 is known to 6e-5, twice rounded
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, config.head_dim), jnp.bfloat16)
    turned, in_float32 = rotate(x, rotation), rotate(x.astype(jnp.float32), rotation)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, in_float32.astype(jnp.bfloat16))
