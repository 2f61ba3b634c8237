"""Scalars that a run carries from step to step: skipped updates, the loss scale of float16, statistics of the loss.

They are part of the training state, so that they are computed on the devices and saved in checkpoints.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from camelid.train.config import LossScaleConfig

STATISTICS_STEPS = 100
"""about how many steps the running mean and variance of the loss cover"""


def start_counters(loss_scale: LossScaleConfig | None) -> dict[str, jax.Array]:
    """The scalars before the first step, by name; those of the loss scale are absent if it is None."""
    names = ["skipped", "skipped_in_a_row", "loss_count"]
    scalars = {"loss_mean": 0.0, "loss_variance": 0.0}
    if loss_scale is not None:
        names += ["overflows", "steps_at_scale"]
        scalars["loss_scale"] = loss_scale.initial
    floats = {name: jnp.asarray(value, jnp.float32) for name, value in scalars.items()}
    return {name: jnp.zeros((), jnp.int32) for name in names} | floats


def update_counters(
    counters: Mapping[str, jax.Array],
    loss: jax.Array,
    weight: jax.Array,
    finite: jax.Array,
    loss_scale: LossScaleConfig | None,
) -> dict[str, jax.Array]:
    """The scalars after a step with this mean loss and summed weight.

    `finite` is whether the loss and all gradients are finite, so that the parameters are updated. An update that is
    skipped counts in `overflows` if a smaller loss scale can help, and otherwise in `skipped` and `skipped_in_a_row`.
    """
    overflow = jnp.zeros((), bool)
    scaling = {}
    if loss_scale is not None:
        overflow = ~finite & jnp.isfinite(loss) & (counters["loss_scale"] > 1)
        scaling = {
            "overflows": counters["overflows"] + overflow.astype(jnp.int32),
            **_next_scale(counters, finite, loss_scale),
        }
    skipped = ~finite & ~overflow
    return {
        "skipped": counters["skipped"] + skipped.astype(jnp.int32),
        "skipped_in_a_row": jnp.where(skipped, counters["skipped_in_a_row"] + 1, 0),
        **_loss_statistics(counters, loss, finite & (weight > 0)),
        **scaling,
    }


def loss_deviation(counters: Mapping[str, jax.Array], loss: jax.Array) -> jax.Array:
    """How many standard deviations a loss is above the running mean of the losses before it; 0 for the first 100."""
    deviation = (loss - counters["loss_mean"]) / jnp.sqrt(counters["loss_variance"])
    return jnp.where((counters["loss_count"] >= STATISTICS_STEPS) & (counters["loss_variance"] > 0), deviation, 0.0)


def _next_scale(counters: Mapping[str, jax.Array], finite: jax.Array, config: LossScaleConfig) -> dict[str, jax.Array]:
    """The rule of torch.amp.GradScaler and MindSpore's DynamicLossScaleUpdateCell; the scale is at least 1."""
    scale, steps = counters["loss_scale"], jnp.where(finite, counters["steps_at_scale"] + 1, 0)
    grows = steps == config.window
    larger, smaller = scale * config.factor, jnp.maximum(scale / config.factor, 1.0)
    larger = jnp.where(jnp.isfinite(larger), larger, scale)
    scale = jnp.where(finite, jnp.where(grows, larger, scale), smaller)
    return {"loss_scale": scale, "steps_at_scale": jnp.where(grows, 0, steps)}


def _loss_statistics(counters: Mapping[str, jax.Array], loss: jax.Array, counts: jax.Array) -> dict[str, jax.Array]:
    """Mean and variance of the losses, of the first ones with equal and then with exponentially decaying weights.

    The incremental formulas are those of Welford and of Finch, "Incremental calculation of weighted mean and variance"
    (2009), section 9.
    """
    count = counters["loss_count"] + counts.astype(jnp.int32)
    rate = 1.0 / jnp.clip(count, 1, STATISTICS_STEPS).astype(jnp.float32)
    difference = loss - counters["loss_mean"]
    mean = counters["loss_mean"] + rate * difference
    variance = (1 - rate) * (counters["loss_variance"] + rate * difference**2)
    return {
        "loss_count": count,
        "loss_mean": jnp.where(counts, mean, counters["loss_mean"]),
        "loss_variance": jnp.where(counts, variance, counters["loss_variance"]),
    }
