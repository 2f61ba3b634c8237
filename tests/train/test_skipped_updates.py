"""Updates that are skipped, the loss scale of float16, and the moving average of the parameters, beside torch."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from camelid.model.params import Spec
from camelid.parallel.mesh import MeshConfig, make_mesh
from camelid.train.config import LossScaleConfig
from camelid.train.counters import STATISTICS_STEPS, loss_deviation, start_counters, update_counters
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.schedules import learning_rate
from camelid.train.state import TrainState, abstract_state, start_state
from camelid.train.step import TrainStep

OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=3, weight_decay=0.2, decay=("all",), clip_norm=0.5)
SPECS = {"w": Spec((), ("mlp",), ("embed",), (6, 8), "normal"), "b": Spec((), ("embed",), (), (8,), "zeros")}
DECAY, STEPS, ROWS = 0.9, 8, 8


def regression(params: dict, rows: dict, key: jax.Array | None):
    """Squared errors, and a root whose derivative at 0 is infinite."""
    errors = rows["x"] @ params["w"] + params["b"] - rows["y"][:, None]
    loss = jnp.sum(errors**2, axis=1) + jnp.sqrt(jnp.sum(params["w"] ** 2) * rows["root"])
    return (
        jnp.sum(loss),
        jnp.float32(len(loss)),
        {"small": (jnp.sum(loss < 1.0, dtype=jnp.float32), jnp.float32(len(loss)))},
    )


def make_step(**fields: Any) -> TrainStep:
    optimizer = make_optimizer(OPTIMIZER, STEPS, SPECS)
    schedule = learning_rate(OPTIMIZER, STEPS)
    return TrainStep(regression, optimizer, schedule, OPTIMIZER.clip_norm, ema_decay=DECAY, **fields)


def params() -> dict[str, jax.Array]:
    draw = np.random.default_rng(0)
    return {"w": jnp.asarray(draw.normal(size=(6, 8)), jnp.float32), "b": jnp.zeros(8)}


def batch(seed: int, **rows: float) -> dict[str, jax.Array]:
    """Regression data; `x=nan` makes one element of x NaN, `root=0` the gradient alone."""
    draw = np.random.default_rng(seed)
    made = {"x": draw.normal(size=(ROWS, 6)), "y": draw.normal(size=ROWS), "root": draw.uniform(1, 2, ROWS)}
    for name, value in rows.items():
        made[name].reshape(-1)[3] = value
    return {name: jnp.asarray(array, jnp.float32) for name, array in made.items()}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def numbers(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


STEP = make_step()
compiled = jax.jit(STEP)


def start(**options: Any) -> TrainState:
    return start_state(params(), STEP.optimizer, averaged=True, **options)


@pytest.mark.parametrize("bad", [{"x": math.nan}, {"y": math.inf}, {"root": 0.0}], ids=str)
def test_an_update_that_is_not_finite_is_skipped_bit_for_bit_and_the_schedule_goes_on(bad: dict[str, float]):
    state, _ = compiled(start(), batch(0))
    after, metrics = compiled(state, batch(1, **bad))
    assert math.isfinite(metrics["loss"]) == ("root" in bad)
    assert not math.isfinite(metrics["gradient_norm"])
    # With a NaN, no comparison holds: a fraction would be reported as 0, and not as missing.
    assert math.isfinite(metrics["small"]) == ("root" in bad)
    assert bits((after.trainable, after.ema)) == bits((state.trainable, state.ema))
    adam, decay, schedule = state.opt_state
    assert bits(after.opt_state[:2]) == bits((adam, decay))
    assert (int(schedule.count), int(after.opt_state[2].count)) == (1, 2)
    assert (int(after.step), float(metrics["learning_rate"])) == (2, pytest.approx(0.2 / 3, rel=1e-6))
    assert (int(after.counters["skipped"]), int(after.counters["skipped_in_a_row"])) == (1, 1)
    later, metrics = compiled(after, batch(2))
    assert bits(later.trainable) != bits(after.trainable)
    assert (int(later.counters["skipped"]), int(later.counters["skipped_in_a_row"])) == (1, 0)


def trained(step: Any, state: TrainState, bad: tuple[int, ...]) -> tuple[TrainState, list[dict[str, float]]]:
    seen = []
    for number in range(STEPS):
        state, metrics = step(state, batch(number, **({"x": math.nan} if number in bad else {})))
        seen.append(numbers(metrics))
    return state, seen


BAD = (2, 3, 6)


def test_training_with_skipped_updates_and_its_average_equal_torch():
    state, seen = trained(compiled, start(), BAD)
    theirs = {name: torch.tensor(np.array(array), requires_grad=True) for name, array in params().items()}
    model = torch.nn.ParameterDict(theirs)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY))
    average.update_parameters(model)  # the first call copies the parameters
    betas = (OPTIMIZER.beta1, OPTIMIZER.beta2)
    adamw = torch.optim.AdamW(model.parameters(), lr=1.0, betas=betas, eps=OPTIMIZER.eps, weight_decay=0.2)
    for number in range(STEPS):
        if number in BAD:
            continue
        rows = {name: torch.tensor(np.array(array)) for name, array in batch(number).items()}
        errors = rows["x"] @ model["w"] + model["b"] - rows["y"][:, None]
        loss = ((errors**2).sum(1) + torch.sqrt((model["w"] ** 2).sum() * rows["root"])).mean()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        adamw.param_groups[0]["lr"] = seen[number]["learning_rate"]
        adamw.step()
        average.update_parameters(model)
        assert seen[number]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in ("w", "b"):
        np.testing.assert_allclose(state.trainable[name], model[name].detach(), atol=1e-5)
        np.testing.assert_allclose(state.ema[name], average.module[name].detach(), atol=1e-5)
        assert np.abs(state.ema[name] - state.trainable[name]).max() > 1e-2
    assert [row["skipped"] for row in seen] == [0, 0, 1, 2, 2, 2, 3, 3]
    assert [row["skipped_in_a_row"] for row in seen] == [0, 0, 1, 2, 0, 0, 1, 0]


def test_the_average_starts_as_a_copy_which_can_be_donated_with_the_parameters():
    state = start()
    copies = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.ema)}
    assert bits(state.ema) == bits(state.trainable)
    assert copies.isdisjoint(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.trainable))


def test_a_mesh_skips_the_same_updates_and_keeps_the_same_sharded_average():
    mesh = make_mesh(MeshConfig(fsdp=8))
    axes = {"w": jax.P(None, "fsdp"), "b": jax.P("fsdp")}
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=jax.NamedSharding(mesh, axes[name]))
        for name, array in params().items()
    }
    places = jax.tree.map(lambda x: x.sharding, abstract_state(shapes, STEP.optimizer, averaged=True))
    assert places.ema == places.trainable
    with jax.set_mesh(mesh):
        sharded = jax.jit(STEP, out_shardings=(places, None), donate_argnums=0)
        state, seen = trained(sharded, jax.device_put(start(), places), BAD)
    alone, expected = trained(compiled, start(), BAD)
    assert state.ema["w"].sharding == places.trainable["w"]
    for one, other in zip(seen, expected, strict=True):
        assert other == pytest.approx(one, rel=1e-5, nan_ok=True)
    for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# The loss scale -------------------------------------------------------------------------------

SCALE = LossScaleConfig(initial=2.0**12, factor=2.0, window=3)


def next_counters(counters: dict, loss: Any, finite: Any, scale: LossScaleConfig = SCALE) -> dict:
    return update_counters(counters, jnp.asarray(loss, jnp.float32), jnp.float32(1), jnp.asarray(finite), scale)


def test_the_loss_scale_follows_the_rule_of_torch():
    scaler = torch.amp.GradScaler("cpu", SCALE.initial, growth_factor=2.0, backoff_factor=0.5, growth_interval=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=0.0)
    counters = start_counters(SCALE)
    overflows = np.random.default_rng(0).random(60) < 0.25
    advance = jax.jit(lambda counters, finite: next_counters(counters, 1.0, finite))
    seen = set()
    for overflow in overflows:
        scaler.scale(weight.sum() * 0).backward()
        weight.grad = torch.full((1,), math.inf if overflow else 1.0)
        scaler.step(sgd)
        scaler.update()
        counters = advance(counters, not overflow)
        assert float(counters["loss_scale"]) == scaler.get_scale()
        seen.add(scaler.get_scale())
    assert min(seen) < SCALE.initial < max(seen)
    assert (int(counters["overflows"]), int(counters["skipped"])) == (overflows.sum(), 0)


def test_an_overflow_that_no_smaller_scale_can_prevent_counts_as_skipped():
    scale_config = LossScaleConfig(initial=2, window=2)
    counters = start_counters(scale_config)
    advance = jax.jit(lambda counters, loss, finite: next_counters(counters, loss, finite, scale_config))
    for loss, finite, scale, overflows, in_a_row in [
        (1.0, False, 1, 1, 0),
        (1.0, False, 1, 1, 1),  # the scale is as small as it can be
        (math.nan, False, 1, 1, 2),
        (1.0, True, 1, 1, 0),
        (1.0, True, 2, 1, 0),
        (math.nan, False, 1, 1, 1),  # not because of the scale, although torch divides it too
    ]:
        counters = advance(counters, loss, finite)
        found = [counters[name] for name in ("loss_scale", "overflows", "skipped_in_a_row")]
        assert [float(value) for value in found] == [scale, overflows, in_a_row]
    assert int(counters["skipped"]) == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_scale_changes_no_bit_where_nothing_overflows(accumulate: int):
    """Only with a product that has 16 bits would it: the scale and its divisor are powers of two."""
    step = make_step(accumulate=accumulate)
    scaled = dataclasses.replace(step, loss_scale=LossScaleConfig())
    one, metrics = jax.jit(step)(start(), batch(0))
    other, metrics_scaled = jax.jit(scaled)(start(loss_scale=LossScaleConfig()), batch(0))
    assert bits((other.trainable, other.opt_state, other.ema)) == bits((one.trainable, one.opt_state, one.ema))
    assert numbers(metrics_scaled) == numbers(metrics) | {"loss_scale": 65536, "overflows": 0}


def test_gradients_that_overflow_float16_halve_the_scale_until_they_do_not():
    """The cotangent of the product is scale / 64, for 48 numbers in the batch; the largest float16 is 65504."""

    def half(params: dict, rows: dict, key: jax.Array | None):
        errors = (rows["x"].astype(jnp.float16) @ params["w"].astype(jnp.float16)).astype(jnp.float32)
        return jnp.sum(errors), jnp.float32(len(errors)), {}

    config = LossScaleConfig(initial=2.0**24, window=4)
    step = dataclasses.replace(make_step(), objective=half, loss_scale=config)
    state, run, seen = start(loss_scale=config), jax.jit(step), []
    for number in range(12):
        before = bits((state.trainable, state.opt_state[0]))
        state, metrics = run(state, batch(number))
        seen.append(numbers(metrics))
        assert (bits((state.trainable, state.opt_state[0])) == before) == (not math.isfinite(metrics["gradient_norm"]))
    finite = [math.isfinite(row["gradient_norm"]) for row in seen]
    first = finite.index(True)
    assert 1 <= first <= 8
    assert all(finite[first : first + 4])
    assert [row["loss_scale"] for row in seen[: first + 3]] == [
        2.0 ** (24 - min(n, first)) for n in range(1, first + 4)
    ]
    assert seen[first + 3]["loss_scale"] == 2.0 ** (25 - first)
    assert {row["skipped"] for row in seen} == {0.0}
    assert seen[-1]["overflows"] == finite.count(False)


# Statistics of the loss -----------------------------------------------------------------------


def test_the_running_mean_and_variance_of_the_loss_are_numpys_and_a_spike_stands_out():
    draw = np.random.default_rng(0)
    losses = draw.normal(3.0, 0.1, STATISTICS_STEPS).astype(np.float32)
    advance = jax.jit(lambda counters, loss: update_counters(counters, loss, jnp.float32(1), jnp.isfinite(loss), None))
    counters = start_counters(None)
    for number, loss in enumerate(losses):
        if number == 50:
            counters = advance(counters, jnp.float32(math.nan))  # changes nothing
        assert float(loss_deviation(counters, jnp.float32(9.0))) == 0
        counters = advance(counters, loss)
    assert float(counters["loss_mean"]) == pytest.approx(losses.mean(), rel=1e-5)
    assert float(counters["loss_variance"]) == pytest.approx(losses.var(), rel=1e-4)
    expected = (9.0 - losses.mean()) / losses.std()
    assert float(loss_deviation(counters, jnp.float32(9.0))) == pytest.approx(expected, rel=1e-3)
    mean, variance, rate = losses.mean(), losses.var(), 1 / STATISTICS_STEPS
    for loss in draw.normal(2.0, 0.2, 150).astype(np.float32):
        counters = advance(counters, loss)
        variance = (1 - rate) * (variance + rate * (loss - mean) ** 2)
        mean = (1 - rate) * mean + rate * loss
    assert float(counters["loss_mean"]) == pytest.approx(mean, rel=1e-4)
    assert float(counters["loss_variance"]) == pytest.approx(variance, rel=1e-3)


def test_a_batch_without_weight_does_not_count_as_a_loss_of_zero():
    counters = update_counters(start_counters(None), jnp.float32(0), jnp.float32(0), jnp.asarray(True), None)
    assert int(counters["loss_count"]) == 0


@pytest.mark.parametrize("name", ["palm", "adafactor"])
def test_the_schedule_of_weight_decay_advances_with_that_of_the_learning_rate(name: str):
    config = OptimizerConfig(name=name, weight_decay=0.1, warmup_steps=3)
    step = dataclasses.replace(make_step(), optimizer=make_optimizer(config, STEPS, SPECS))
    state, _ = jax.jit(step)(start_state(params(), step.optimizer, averaged=True), batch(0, x=math.nan))
    decay = state.opt_state[-1].inner_state
    assert decay._fields == ("count",)
    assert int(decay.count) == int(state.step) == 1
    factored, *_ = jax.tree.leaves(state.opt_state[0], is_leaf=lambda node: isinstance(node, optax.FactoredState))
    assert not np.asarray(factored.count).any()  # of the moments, which are as they were


def test_schedules_of_chained_optimizers_advance_too():
    optimizer = optax.chain(optax.clip(1.0), optax.multi_transform({"a": optax.adam(lambda n: 0.1)}, "a"))
    step = dataclasses.replace(make_step(), optimizer=optimizer)
    state, _ = jax.jit(step)(start_state(params(), optimizer, averaged=True), batch(0, x=math.nan))
    schedules = [
        node
        for node in jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
        if isinstance(node, optax.ScaleByScheduleState)
    ]
    assert [int(node.count) for node in schedules] == [1]
