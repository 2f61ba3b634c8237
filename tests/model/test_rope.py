from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.phi import modeling_phi

from camelid.model.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from camelid.model.rope import rotate, rotations
from tiny import tiny_config

pytestmark = pytest.mark.quick_compile

turning = partial(jax.jit, static_argnames="config")(rotations)

HEAD_DIM, ORIGINAL, CONTEXT = 64, 4096, 16384
yarn = partial(YarnScaling, original_context=ORIGINAL)
llama3 = partial(Llama3Scaling, low_freq_factor=1.0, high_freq_factor=4.0, original_context=ORIGINAL)


def longrope(pairs: int, original: int = ORIGINAL, **options: float) -> LongRopeScaling:
    short, long = (tuple(np.linspace(1.0, most, pairs).tolist()) for most in (1.7, 40.0))
    return LongRopeScaling(short_factor=short, long_factor=long, original_context=original, **options)


SCALINGS = {
    "none": None,
    "linear": LinearScaling(factor=2.5),
    "dynamic": DynamicScaling(factor=2.0),
    "dynamic, steeper": DynamicScaling(factor=8.0),
    "llama3, 3.1": llama3(factor=8.0),
    "llama3, 3.2": llama3(factor=32.0),
    "llama3, narrow": llama3(factor=4.0, low_freq_factor=2.0, high_freq_factor=2.5),
    "yarn": yarn(factor=4.0),
    "yarn, wide": yarn(factor=40.0, beta_fast=64.0, beta_slow=0.5),
    "yarn, not truncated": yarn(factor=4.0, truncate=False),
    "yarn, one border": yarn(factor=4.0, beta_fast=8.0, beta_slow=8.0, truncate=False),
    "yarn, one border, at the first pair": yarn(factor=4.0, original_context=5),
    "yarn, borders before the first pair": yarn(factor=4.0, beta_fast=1e6, beta_slow=1e5),
    "yarn, a border beyond the last feature": yarn(factor=4.0, beta_slow=1e-9),
    "yarn, attention_factor": yarn(factor=4.0, attention_factor=1.37, mscale=0.7, mscale_all_dim=0.3),
    "yarn, two mscales": yarn(factor=40.0, mscale=1.0, mscale_all_dim=0.707),
    "yarn, one mscale": yarn(factor=40.0, mscale=0.707),
    "yarn, an mscale of 0": yarn(factor=40.0, mscale=0.707, mscale_all_dim=0.0),
    "yarn, no factor": yarn(),
    "yarn, a factor below 1": yarn(factor=0.5, mscale=0.7, mscale_all_dim=0.3),
    "longrope": longrope,
    "longrope, factor": partial(longrope, factor=32.0),
    "longrope, a factor below 1": partial(longrope, factor=0.5),
    "longrope, attention_factor": partial(longrope, factor=32.0, attention_factor=1.19),
}


def model(scaling: Any, **overrides: Any) -> ModelConfig:
    """A config of real sizes; a scaling that needs to know how many pairs there are is a function of that."""
    sizes = {"head_dim": HEAD_DIM, "rope_theta": 500_000.0, "context_length": CONTEXT} | overrides
    pairs = tiny_config(**sizes).rotary_dim // 2
    return tiny_config(**sizes, rope_scaling=scaling(pairs) if callable(scaling) else scaling)


def in_transformers(config: ModelConfig) -> transformers.LlamaConfig:
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": scaling.kind} | asdict(scaling)
        rope["original_max_position_embeddings"] = rope.pop("original_context", config.context_length)
        rope |= {name: list(rope[name]) for name in ("short_factor", "long_factor") if name in rope}
    rope |= {"rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_fraction}
    return transformers.LlamaConfig(
        hidden_size=config.embed_dim,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rope_parameters=rope,
    )


def per_position(config: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies, and the length that every pair is stretched to, in a document so long."""
    cos, sin = (np.asarray(x, np.float64)[0, 0, 0] for x in turning(jnp.array([[1, length - 1]]), None, None, config))
    return np.arctan2(sin, cos), np.hypot(sin, cos)


# To the border and one beyond it, of the original context and of the context.
@pytest.mark.parametrize("length", [2, ORIGINAL, ORIGINAL + 1, CONTEXT, CONTEXT + 1, 100_000])
@pytest.mark.parametrize("rotary_fraction", [1.0, 0.75])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_and_attention_factors_equal_transformers(scaling: Any, rotary_fraction: float, length: int):
    config = model(scaling, rotary_fraction=rotary_fraction)
    theirs = in_transformers(config)
    if scaling is None:
        reference, factor = modeling_phi.PhiRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        reference, factor = ROPE_INIT_FUNCTIONS[config.rope_scaling.kind](theirs, "cpu", seq_len=length)
    freq, size = per_position(config, length)
    np.testing.assert_allclose(freq, reference.numpy(), rtol=1e-6)
    np.testing.assert_allclose(size, factor, rtol=1e-6)


@pytest.mark.parametrize(
    "scaling", [None, yarn(factor=4.0), DynamicScaling(factor=8.0)], ids=["none", "yarn", "dynamic"]
)
@pytest.mark.parametrize("rotary_fraction", [1.0, 0.4], ids=["llama", "phi, in part"])
def test_queries_are_rotated_as_in_transformers(rotary_fraction: float, scaling: RopeScaling | None):
    config = model(scaling, head_dim=20, context_length=16, rotary_fraction=rotary_fraction)
    positions, draw = np.arange(40)[None], np.random.default_rng(0)
    x = draw.normal(size=(1, 40, 3, 20)).astype(np.float32)
    module = modeling_llama.LlamaRotaryEmbedding if rotary_fraction == 1.0 else modeling_phi.PhiRotaryEmbedding
    q = torch.from_numpy(x)
    cos, sin = module(in_transformers(config))(q, torch.from_numpy(positions))
    turned, rest = q[..., : config.rotary_dim], q[..., config.rotary_dim :]
    turned, _ = modeling_llama.apply_rotary_pos_emb(turned, turned, cos, sin, unsqueeze_dim=2)

    ours = rotate(jnp.asarray(x), tuple(part[0] for part in turning(jnp.asarray(positions), None, None, config)))
    np.testing.assert_allclose(ours, torch.cat([turned, rest], -1).numpy(), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(ours[..., config.rotary_dim :], x[..., config.rotary_dim :])


@pytest.mark.parametrize("scaling", [None, yarn(factor=4.0), longrope], ids=["none", "yarn", "longrope"])
def test_layers_with_a_window_may_have_a_theta_of_their_own_which_is_not_scaled(scaling: Any):
    window = {"sliding_window": 4, "window_pattern": (True, False)}
    positions = jnp.arange(2 * 9).reshape(2, 9)
    both = turning(positions, None, None, model(scaling, rotary_fraction=0.5, local_rope_theta=700.0, **window))
    everywhere = turning(positions, None, None, model(scaling, rotary_fraction=0.5, **window))
    local = turning(positions, None, None, model(None, rotary_fraction=0.5, rope_theta=700.0))
    for part, one, other in zip(both, everywhere, local, strict=True):
        assert part.shape == (2, 2, 9, HEAD_DIM // 4)
        np.testing.assert_array_equal(part, jnp.concatenate([one, other]))
        assert not np.allclose(part[0], part[1])


# Documents ---------------------------------------------------------------------------------

BY_LENGTH = pytest.mark.parametrize(
    "scaling",
    [DynamicScaling(factor=4.0), partial(longrope, original=16)],
    ids=["dynamic", "longrope"],
)


def small(scaling: Any) -> ModelConfig:
    return model(scaling, context_length=16)


def alone(length: int, config: ModelConfig) -> tuple[jax.Array, ...]:
    return turning(jnp.arange(length)[None], None, None, config)


@BY_LENGTH
def test_packed_documents_are_rotated_as_in_rows_of_their_own(scaling: Any):
    """Short and long ones, in any order, with padding behind them."""
    config, packed = small(scaling), [(12, 40, 1, 17, 16), (30, 16, 25)]
    positions, segments = np.zeros((2, 2, 90), np.int32)
    for row, documents in enumerate(packed):
        positions[row, : sum(documents)] = np.concatenate([np.arange(length) for length in documents])
        segments[row, : sum(documents)] = np.repeat(np.arange(len(documents)) + 1, documents)
    together = turning(jnp.asarray(positions), jnp.asarray(segments), None, config)
    for row, documents in enumerate(packed):
        start = 0
        for length in documents:
            for part, own in zip(together, alone(length, config), strict=True):
                np.testing.assert_allclose(part[:, row, start : start + length], own[:, 0], rtol=0, atol=1e-5)
            start += length
    same_position = [np.asarray(part)[0, 0, [11, 12 + 11]] for part in together]  # in the first two documents
    assert all(np.abs(short - long).max() > 0.3 for short, long in same_position)


@BY_LENGTH
def test_a_document_of_as_many_tokens_as_the_row_and_as_many_documents_as_tokens(scaling: Any):
    config = small(scaling)
    positions = jnp.stack([jnp.arange(20), jnp.zeros(20, jnp.int32)])
    segments = jnp.stack([jnp.ones(20, jnp.int32), 1 + jnp.arange(20)])
    for part, own, single in zip(
        turning(positions, segments, None, config), alone(20, config), alone(1, config), strict=True
    ):
        np.testing.assert_allclose(part[:, 0], own[:, 0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(part[:, 1], np.broadcast_to(single[:, 0], part[:, 1].shape), rtol=0, atol=1e-5)


@BY_LENGTH
def test_a_row_is_rotated_as_it_is_alone_however_long_the_others_are(scaling: Any):
    config = small(scaling)
    positions = jnp.stack([jnp.minimum(jnp.arange(50), length - 1) for length in (50, 16, 17)])
    for part, *own in zip(
        turning(positions, None, None, config), *(alone(length, config) for length in (50, 16, 17)), strict=True
    ):
        for row, one in enumerate(own):
            np.testing.assert_allclose(part[:, row, : one.shape[2]], one[:, 0], rtol=0, atol=1e-5)


@BY_LENGTH
def test_a_row_decoded_a_token_at_a_time_is_rotated_as_the_whole_that_it_is_to_be(scaling: Any):
    """However far it has come, and whatever its positions so far would say."""
    config, lengths = small(scaling), (40, 16, 17)
    for at in (0, 5, 15):
        now = turning(jnp.full((3, 1), at), None, jnp.array(lengths), config)
        for part, *whole in zip(now, *(alone(length, config) for length in lengths), strict=True):
            for row, one in enumerate(whole):
                np.testing.assert_allclose(part[:, row, 0], one[:, 0, at], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SCALINGS if "dynamic" not in name and "longrope" not in name])
def test_lengths_cost_nothing_where_no_frequency_depends_on_them(name: str):
    config, row = model(SCALINGS[name]), jnp.arange(6)[None]

    def operations(segments: jax.Array | None, lengths: jax.Array | None) -> list[str]:
        program = jax.make_jaxpr(partial(rotations, config=config))(row, segments, lengths)
        return [str(line.primitive) for line in program.eqns]

    plain = operations(None, None)
    assert operations(row, None) == operations(None, jnp.array([90_000])) == plain
    assert not {"pow", "reduce_max", "max", "gather"} & set(plain)


# What rotation is for ----------------------------------------------------------------------


def turned(x: jax.Array, positions: jax.Array, config: ModelConfig) -> jax.Array:
    cos, sin = turning(positions, None, None, config)
    return rotate(x, (cos[0], sin[0]))


def test_scores_depend_on_the_distance_alone():
    config = tiny_config()
    draw = np.random.default_rng(0)
    q, k = (jnp.asarray(draw.normal(size=(1, 1, 1, config.head_dim)), jnp.float32) for _ in range(2))

    def score(at: int, other: int) -> float:
        return float(jnp.vdot(*(turned(x, jnp.array([[p]]), config) for x, p in ((q, at), (k, other)))))

    assert score(5, 2) == pytest.approx(score(45, 42), abs=1e-5)
    assert abs(score(5, 2) - score(5, 3)) > 0.01


def test_angles_are_exact_far_into_the_context_and_whatever_the_activations_are():
    """bfloat16 could not tell position 1001 from 1002."""
    config = tiny_config()
    positions = np.array([[1001, 1002]])
    angles = positions[..., None] * config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    for part, exact in zip(
        turning(jnp.asarray(positions), None, None, config), (np.cos(angles), np.sin(angles)), strict=True
    ):
        assert part.dtype == jnp.float32
        np.testing.assert_allclose(
            part[0], exact, rtol=0, atol=2e-4
        )  # an angle of 1002 is known to 6e-5, twice rounded


@pytest.mark.parametrize("rotary_fraction", [1.0, 0.6])
def test_bfloat16_is_rounded_once_after_rotation(rotary_fraction: float):
    config = tiny_config(rotary_fraction=rotary_fraction)
    x, positions = jax.random.normal(jax.random.key(0), (1, 2, 1, config.head_dim), jnp.bfloat16), jnp.array([[7, 8]])
    ours, in_float32 = turned(x, positions, config), turned(x.astype(jnp.float32), positions, config)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, in_float32.astype(jnp.bfloat16))
    np.testing.assert_array_equal(ours[..., config.rotary_dim :], x[..., config.rotary_dim :])
