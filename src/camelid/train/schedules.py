"""The learning rate of every update."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from camelid.train.optimizer_config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The schedule: it maps the number of updates so far to the learning rate of the next.

    `steps` is train.steps. With `first_update = "warm"` the schedule is one step ahead, so that the first update is not
    lost to a learning rate of 0. After the decay the learning rate stays at its final value.
    """
    options, warmup = config.options, config.warmup(steps)
    rising = optax.linear_schedule(options["warmup_start"], options["learning_rate"], warmup)
    schedule = optax.join_schedules([rising, _after_warmup(options, warmup, config.end(steps))], [warmup])
    ahead = 1 if config.first_update == "warm" else 0
    return lambda count: schedule(jnp.asarray(count + ahead, jnp.float32))


def _after_warmup(options: Mapping[str, Any], warmup: int, end: int) -> optax.Schedule:
    """The schedule from the end of the warmup on, as a function of the steps since then."""
    peak, length = options["learning_rate"], end - warmup
    if options["schedule"] == "constant":
        return optax.constant_schedule(peak)
    if options["schedule"] == "inverse_sqrt":
        scale = max(warmup, 1)  # a ratio of a short run may be no step
        return lambda count: peak * jnp.sqrt(scale / (count + scale))
    if options["schedule"] == "cosine":
        return _cosine(options, length)
    final = peak * options["final_fraction"]
    match options["schedule"]:
        case "linear":
            return optax.linear_schedule(peak, final, length)
        case "polynomial":
            return optax.polynomial_schedule(peak, final, options["power"], length)
        case "wsd":
            cooldown = min(max(round(options["cooldown_ratio"] * end), 1), length)
            falling = optax.polynomial_schedule(peak, final, options["power"], cooldown)
            return optax.join_schedules([optax.constant_schedule(peak), falling], [length - cooldown])
    raise AssertionError(options["schedule"])


def _cosine(options: Mapping[str, Any], length: int) -> optax.Schedule:
    """Cosine decay, with warm restarts as in SGDR (arXiv:1608.03983); no restart follows the last cycle."""
    relative = [options["restart_growth"] ** number for number in range(options["restarts"] + 1)]
    lengths: list[Any] = [length * each / sum(relative) for each in relative]  # need not be whole numbers
    cycles = [
        optax.cosine_decay_schedule(options["learning_rate"], each, options["final_fraction"]) for each in lengths
    ]
    return optax.join_schedules(cycles, list(itertools.accumulate(lengths))[:-1])
