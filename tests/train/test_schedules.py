"""The learning rate of every update, for every schedule, against transformers, optax and formulas."""

import math
from typing import Any

import numpy as np
import optax
import pytest
import torch
import transformers.optimization as theirs

from camelid.errors import UserError
from camelid.runs.recipe import completed, structure
from camelid.runs.run import run
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.schedules import learning_rate

PEAK, WARMUP, STEPS = 0.5, 4, 20


def rates(config: OptimizerConfig, steps: int = STEPS, updates: int = STEPS + 5) -> np.ndarray:
    """The learning rate of each update, some after the end of the decay."""
    return np.asarray(learning_rate(config, steps)(np.arange(updates)))


def config(**fields: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": PEAK, "warmup_steps": WARMUP, "first_update": "initial"} | fields)


def of_transformers(make: Any, **arguments: Any) -> list[float]:
    """The learning rates of one of transformers' schedulers: that of the first update is its initial value."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, found = make(optimizer, num_warmup_steps=WARMUP, **arguments), []
    for _ in range(STEPS + 5):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


SAME = {
    "cosine": ({"final_fraction": 0.0}, theirs.get_cosine_schedule_with_warmup, {"num_training_steps": STEPS}),
    "restarts": (
        {"final_fraction": 0.0, "restarts": 2},
        theirs.get_cosine_with_hard_restarts_schedule_with_warmup,
        {"num_training_steps": STEPS, "num_cycles": 3},
    ),
    "linear": (
        {"schedule": "linear", "final_fraction": 0.0},
        theirs.get_linear_schedule_with_warmup,
        {"num_training_steps": STEPS},
    ),
    "constant": ({"schedule": "constant"}, theirs.get_constant_schedule_with_warmup, {}),
    "inverse_sqrt": ({"schedule": "inverse_sqrt"}, theirs.get_inverse_sqrt_schedule, {"timescale": WARMUP}),
    "polynomial": (
        {"schedule": "polynomial", "final_fraction": 0.2, "power": 2.0},
        theirs.get_polynomial_decay_schedule_with_warmup,
        {"num_training_steps": STEPS, "lr_end": 0.1, "power": 2.0},
    ),
    "wsd": (
        {"schedule": "wsd", "cooldown_ratio": 0.25, "warmup_start": 0.05},
        theirs.get_wsd_schedule,
        {"num_training_steps": STEPS, "num_decay_steps": 5, "decay_type": "linear", "min_lr_ratio": 0.1},
    ),
}


@pytest.mark.parametrize(("fields", "make", "arguments"), SAME.values(), ids=SAME)
def test_a_schedule_has_the_rates_of_transformers_before_during_and_after_the_decay(
    fields: Any, make: Any, arguments: Any
):
    expected = of_transformers(make, **arguments)
    if make is theirs.get_cosine_schedule_with_warmup:
        expected[STEPS:] = [0.0] * 5  # in transformers it rises again
    np.testing.assert_allclose(rates(config(**fields)), expected, rtol=2e-6, atol=1e-7)
    ahead = rates(config(**fields, first_update="warm"))
    np.testing.assert_allclose(ahead[:-1], expected[1:], rtol=2e-6, atol=1e-7)


def test_cycles_grow_and_end_together_with_the_decay():
    """SGDR (arXiv:1608.03983), equation 5, with T_0 = 2 and T_mult = 2 over 14 steps."""
    found = rates(config(restarts=2, restart_growth=2.0, final_fraction=0.1, warmup_steps=0), 14, 17)
    expected = []
    for length in (2, 4, 8):
        expected += [0.05 + 0.45 * (1 + math.cos(math.pi * i / length)) / 2 for i in range(length)]
    np.testing.assert_allclose(found, [*expected, 0.05, 0.05, 0.05], rtol=1e-5)


def test_palm_and_uio_have_the_rates_of_easylm_and_ll3m():
    steps = np.array([0, 1, 2500, 4999, 5000, 9999, 10_000, 10_001, 40_000])
    palm = np.asarray(learning_rate(OptimizerConfig(name="palm"), 100_000)(steps))
    np.testing.assert_allclose(palm, 1 / np.sqrt(np.maximum(steps, 10_000)), rtol=1e-6)
    uio = np.asarray(learning_rate(OptimizerConfig(name="uio"), 100_000)(steps))
    np.testing.assert_allclose(uio, np.minimum(1, steps / 5000) / np.sqrt(np.maximum(steps, 5000)), rtol=1e-6)


def test_easylm_and_llama_2_jax_begin_at_their_initial_value():
    """Both with the optax schedule that they use, the second with a warmup of one of seven epochs."""
    easylm = optax.warmup_cosine_decay_schedule(0.1, PEAK, WARMUP, STEPS, 0.05)
    found = rates(config(warmup_start=0.1, final_fraction=0.1))
    np.testing.assert_allclose(found, [easylm(step) for step in range(STEPS + 5)], rtol=1e-6)
    epoch = 3
    llama_2_jax = optax.warmup_cosine_decay_schedule(0.0, PEAK, epoch, epoch + 1, PEAK)
    settings = OptimizerConfig(
        learning_rate=PEAK, schedule="constant", warmup_ratio=1 / 7 + 1e-9, first_update="initial"
    )
    np.testing.assert_allclose(rates(settings, 7 * epoch), [llama_2_jax(step) for step in range(STEPS + 5)], rtol=1e-6)


def test_a_ratio_of_the_decay_is_the_warmup():
    ratio = config(warmup_steps=None, warmup_ratio=0.26, decay_steps=16)
    np.testing.assert_array_equal(rates(ratio), rates(config(warmup_steps=4, decay_steps=16)))
    assert not np.array_equal(rates(ratio), rates(config(warmup_steps=4)))


TABLE = {"run": "r", "init": "m", "data": {"train": ["t"], "sequence_length": 8, "batch_size": 8}}


def test_a_longer_run_keeps_its_warmup_ratio_and_a_schedule_without_an_end_needs_no_step():
    def recipe(steps: int, **optimizer: Any) -> Any:
        return structure(TABLE | {"train": {"steps": steps}, "optimizer": optimizer})

    ratio = {"schedule": "constant", "warmup_ratio": 0.5}
    longer = completed(recipe(40, **ratio), recipe(20, **ratio))
    assert longer.optimizer.decay_steps == 20
    assert longer.optimizer.warmup(40) == 10
    constant = {"schedule": "constant"}
    assert completed(recipe(40, **constant), recipe(20, **constant)).optimizer.decay_steps is None
    # A run that was stopped during its warmup, whose decay then ended one step after it.
    short = completed(recipe(40, warmup_steps=10), recipe(3, warmup_steps=10))
    assert short.optimizer.decay_steps == 11
    short.optimizer.check_decay()


def test_a_recipe_of_an_older_camelid_means_what_it_meant():
    """Its fields were these; the rates are the same bits."""
    old = {"learning_rate": 3e-4, "final_fraction": 0.1, "warmup_steps": 4, "beta1": 0.9, "beta2": 0.95}
    old |= {"eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
    recipes = [structure(TABLE | {"train": {"steps": STEPS}, "optimizer": each}) for each in (old, {"warmup_steps": 4})]
    assert recipes[0] == recipes[1]
    expected = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 4, STEPS, 3e-4 * 0.1)(np.arange(1.0, 26, dtype=np.float32))
    np.testing.assert_array_equal(rates(recipes[0].optimizer), np.asarray(expected))


@pytest.mark.parametrize("steps", [3, 4])
def test_a_decay_that_ends_before_the_warmup_is_refused_with_both_numbers(steps: int):
    recipe = structure(TABLE | {"train": {"steps": 20}, "optimizer": {"warmup_steps": 4, "decay_steps": steps}})
    message = rf"optimizer.decay_steps = {steps} is not above optimizer.warmup_steps = 4\n.*at least 5"
    with pytest.raises(UserError, match=message):
        run(recipe)
