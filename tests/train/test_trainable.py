"""What is trained and what is frozen: whole parameters, adapters inside of a weight, and layers by their number."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.checkpoint.state.saved_state import open_arrays
from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import named
from camelid.model.pytree import path_name
from camelid.model.weights import Adapted, Quantized
from camelid.parallel.mesh import one_device
from camelid.train.objective import NextTokenLoss
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.schedules import learning_rate
from camelid.train.state import TrainState, abstract_state, start_state
from camelid.train.step import TrainStep
from camelid.train.trainable import combine, make_mask, partition
from tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config()
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, final_fraction=1.0, weight_decay=0.1)
RANK, ROWS, LENGTH = 3, 8, 11


def adapted() -> Decoder:
    """A decoder with low-rank adapters of the queries, as they start, and an MLP of 8-bit codes."""
    params = tiny_params(CONFIG)
    draw = np.random.default_rng(5)
    q = params.layers.attn.q_proj  # layers, heads, head_dim, embed
    adapter = Adapted(
        base=q,
        a=jnp.asarray(draw.standard_normal((len(q), RANK, q.shape[-1])), jnp.float32),
        b=jnp.zeros((*q.shape[:-1], RANK)),
        scale=jnp.full(len(q), 2.0),
    )

    def quantized(weight: jax.Array) -> Quantized:
        scale = jnp.abs(weight).max(-1, keepdims=True) / 127
        return Quantized(jnp.round(weight / scale).astype(jnp.int8), scale)

    names = ("gate_proj", "up_proj", "down_proj")
    mlp = dataclasses.replace(
        params.layers.mlp, **{name: quantized(getattr(params.layers.mlp, name)) for name in names}
    )
    attn = dataclasses.replace(params.layers.attn, q_proj=adapter)
    return dataclasses.replace(params, layers=dataclasses.replace(params.layers, attn=attn, mlp=mlp))


def is_factor(path: str, leaf: Any) -> bool:
    return path.endswith((".a", ".b"))


def train_step(**fields: Any) -> TrainStep:
    return TrainStep(
        NextTokenLoss(config=CONFIG, compute=ComputeConfig()),
        make_optimizer(OPTIMIZER, 20, declare_decoder(CONFIG)),
        learning_rate(OPTIMIZER, 20),
        1.0,
        **fields,
    )


def batch(seed: int) -> dict[str, jax.Array]:
    tokens = tiny_tokens(CONFIG, ROWS, LENGTH + 1, seed)
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((ROWS, LENGTH), np.float32)}
    arrays |= {"positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))}
    return {name: jnp.asarray(x) for name, x in (arrays | {"segments": np.ones((ROWS, LENGTH), np.int32)}).items()}


def leaves(tree: Any) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_a_tree_is_split_inside_of_its_weights_and_joined_again():
    params = adapted()
    trainable, frozen = partition(params, is_factor)
    assert leaves(trainable).keys() == {"layers.attn.q_proj.a", "layers.attn.q_proj.b"}
    assert {"layers.attn.q_proj.base", "layers.mlp.up_proj.codes", "embed"} <= leaves(frozen).keys()
    assert leaves(trainable).keys() | leaves(frozen).keys() == leaves(params).keys()
    joined = combine(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(leaf is leaves(params)[name] for name, leaf in leaves(joined).items())
    by_leaf, _ = partition(params, lambda path, leaf: leaf.dtype == jnp.int8)
    assert leaves(by_leaf).keys() == {f"layers.mlp.{name}_proj.codes" for name in ("gate", "up", "down")}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_the_adapters_of_a_quantized_decoder_are_trained(accumulate: int):
    trainable, frozen = partition(adapted(), is_factor)
    before = jax.tree.map(np.array, frozen)
    step = train_step(accumulate=accumulate)
    state = start_state(trainable, step.optimizer)
    assert {name.rpartition(".q_proj.")[2] for name, leaf in leaves(state.opt_state).items() if leaf.ndim} == {"a", "b"}
    compiled, losses = jax.jit(step, donate_argnums=0), []
    for _ in range(10):
        state, metrics = compiled(state, batch(0), frozen)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3
    assert all(np.array_equal(leaf, leaves(before)[name]) for name, leaf in leaves(frozen).items())
    assert np.abs(state.trainable.layers.attn.q_proj.b).max() > 1e-3
    # What the step trains is what the joined model computes.
    total, weight, _ = step.objective(combine(state.trainable, frozen), batch(0), None)
    assert float(total / weight) < losses[0] - 0.3


def products(step: TrainStep, *arguments: Any) -> set[tuple[int, ...]]:
    """The shapes of all matrix products in the compiled step."""
    program = jax.jit(step).lower(*arguments).compile().as_text()
    found = re.findall(r"= f32\[([\d,]+)\]\S* (?:dot|custom-call)\(", program)
    return {tuple(map(int, shape.split(","))) for shape in found}


def test_the_compiled_step_has_no_gradients_of_frozen_weights():
    # Of k_proj and v_proj, o_proj, and the head; no other product of the step has these shapes.
    gradients = {(20, 48), (48, 60), (97, 48)}
    plain = tiny_params(CONFIG)
    step = train_step()
    assert gradients <= products(step, start_state(plain, step.optimizer), batch(0))
    trainable, frozen = partition(adapted(), is_factor)
    found = products(step, start_state(trainable, step.optimizer), batch(0), frozen)
    assert found
    assert not gradients & found


def test_adapters_are_saved_without_the_frozen_weights_and_resume_to_the_same_bits(tmp_path: Path):
    trainable, frozen = partition(adapted(), is_factor)
    step = train_step()
    compiled, state = jax.jit(step), start_state(trainable, step.optimizer)
    for seed in range(2):
        state, _ = compiled(state, batch(seed), frozen)
    checkpoints = RunCheckpoints(tmp_path, 1)
    checkpoints.save(2, state)
    checkpoints.wait()
    names = {name for name in open_arrays(tmp_path / "2") if name.startswith("params.")}
    assert names == {"params.layers.attn.q_proj.a", "params.layers.attn.q_proj.b"}

    place = NamedSharding(one_device(), PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), trainable)
    restored = checkpoints.restore(2, abstract_state(shapes, step.optimizer))
    checkpoints.close()
    ends: list[TrainState] = []
    for start in (state, restored):
        for seed in range(2, 4):
            start, _ = compiled(start, batch(seed), frozen)
        ends.append(start)
    assert jax.tree.structure(ends[0]) == jax.tree.structure(ends[1])
    assert all(np.array_equal(leaf, leaves(ends[1])[name]) for name, leaf in leaves(ends[0]).items())


def test_layers_that_are_not_trained_stay_although_weights_decay():
    params, trained = tiny_params(CONFIG), (False, True, True, False)
    step = train_step(mask=make_mask(["layers.0", "layers.3"], declare_decoder(CONFIG)))
    state, metrics = jax.jit(step)(start_state(params, step.optimizer), batch(0))
    (adam,) = (part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState))
    for path, leaf in named(state.trainable).items():
        if path.startswith("layers."):
            moved = [bool(np.any(leaf[i] != named(params)[path][i])) for i in range(len(trained))]
            assert moved == list(trained), path
            assert [bool(np.any(named(adam.mu)[path][i])) for i in range(len(trained))] == list(trained), path
        else:
            assert np.any(leaf != named(params)[path]), path
    # Frozen layers take no part in the norm to which gradients are clipped.
    _, all_metrics = jax.jit(train_step())(start_state(params, step.optimizer), batch(0))
    assert float(metrics["gradient_norm"]) < 0.95 * float(all_metrics["gradient_norm"])
