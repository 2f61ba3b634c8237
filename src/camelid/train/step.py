"""One training step: gradients of the microbatches, clipping, update, metrics."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from camelid.parallel.rules import shard
from camelid.train.config import LossScaleConfig
from camelid.train.counters import loss_deviation, update_counters
from camelid.train.objective import Arrays, Objective
from camelid.train.state import TrainState, is_schedule
from camelid.train.trainable import combine

REPORTED = ("skipped", "skipped_in_a_row", "loss_scale", "overflows")
"""the counters of a state that are metrics of the step"""
BLOCK = 16
"""numbers whose squares are summed at once on CPUs"""


@dataclass(frozen=True)
class TrainStep:
    """What all steps of a run have in common. It is called inside `jax.jit`, as `step(state, batch, frozen)`."""

    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    """gives the learning rate that is reported; the optimizer has its own"""
    clip_norm: float
    """gradients are scaled down to this global norm"""
    accumulate: int = 1
    """number of microbatches per step"""
    seed: int = 0
    """of everything random in a step; the key of step s is fold_in(key(seed), s)"""
    ema_decay: float | None = None
    """decay of the moving average of the parameters; None if the state has none"""
    loss_scale: LossScaleConfig | None = None
    """how the loss scale of float16 changes; None: gradients are not scaled"""
    param_norm: bool = False
    """whether the metrics contain param_norm, the global norm of the trained parameters after the update"""
    mask: Callable[[Any], Any] | None = None
    """sets the gradients and the updates of what is not trained to zero; None if all parameters are trained"""

    def __call__(self, state: TrainState, batch: Arrays, frozen: Any = None) -> tuple[TrainState, Arrays]:
        """The state after one update, and the metrics of the step.

        If the loss or the norm of the gradients is infinite or NaN, the update is skipped: parameters, their average
        and the optimizer's state stay as they are. The step and the counts of schedules advance.

        The metrics are loss, weight, gradient_norm, learning_rate, skipped, skipped_in_a_row, loss_deviation, in
        float16 loss_scale and overflows, and those of the objective, all float32 scalars. Those of the objective are
        NaN if the loss is not finite.
        `frozen` holds the parameters that are not trained, as `partition` returns them: they get no gradients.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        scale = None if self.loss_scale is None else state.counters["loss_scale"]
        (total, weight, extra), summed = self.summed_gradients(state.trainable, frozen, batch, key, scale)
        loss, norm = _mean(total, weight), global_norm(self.mean_gradients(summed, weight))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        shrink = jnp.minimum(1.0, self.clip_norm / norm)

        def update(state: TrainState, summed: Any) -> TrainState:
            # Divided here again, in one loop with the update: the means are never stored.
            grads = self.mean_gradients(summed, weight)
            return self._updated(state, jax.tree.map(lambda g: g * shrink, grads))

        # With jnp.where in place of lax.cond, XLA's CPU backend would copy the moments before it updates them.
        updated = lax.cond(finite, update, self._skipped, state, summed)
        counters = update_counters(state.counters, loss, weight, finite, self.loss_scale)
        metrics = {
            # Of a loss that is not finite, an accuracy of 0 would be reported.
            **{name: jnp.where(jnp.isfinite(loss), _mean(*pair), jnp.nan) for name, pair in extra.items()},
            "loss": loss,
            "weight": weight,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
            "loss_deviation": loss_deviation(state.counters, loss),
            **{name: counters[name].astype(jnp.float32) for name in REPORTED if name in counters},
            **({"param_norm": global_norm(_float32(self._masked(updated.trainable)))} if self.param_norm else {}),
        }
        return dataclasses.replace(updated, step=state.step + 1, counters=counters), metrics

    def _updated(self, state: TrainState, grads: Any) -> TrainState:
        """The state with updated parameters, moving average and optimizer state."""
        params = _float32(state.trainable)
        # optax raises floats to the power of an integer count.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.optimizer.update(grads, state.opt_state, params)
        new, ema = optax.apply_updates(params, self._masked(updates)), state.ema
        if (decay := self.ema_decay) is not None:
            ema = jax.tree.map(lambda average, p: average + (1 - decay) * (p - average), ema, new)
        new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state.trainable)
        return dataclasses.replace(state, trainable=new, opt_state=opt_state, ema=ema)

    def _skipped(self, state: TrainState, grads: Any) -> TrainState:
        """The state without an update; only the counts of schedules advance, as the step does."""

        def advanced(node: Any) -> Any:
            return node._replace(count=optax.safe_increment(node.count)) if is_schedule(node) else node

        return dataclasses.replace(state, opt_state=jax.tree.map(advanced, state.opt_state, is_leaf=is_schedule))

    def summed_gradients(
        self, trainable: Any, frozen: Any, batch: Arrays, key: jax.Array, loss_scale: jax.Array | None = None
    ) -> tuple[tuple, Any]:
        """What the objective returns for the entire batch, and the float32 gradients of the summed loss.

        In float16, they are computed of the mean loss times `loss_scale`, so that small ones do not become zero. The
        weight is known only when all microbatches are computed, so that the sum is divided by the number of tokens
        instead, rounded up to a power of two: then neither this nor the scale rounds a gradient.
        """
        size = next(iter(batch.values())).size
        scale = None if loss_scale is None else loss_scale / 2 ** (size - 1).bit_length()

        def loss(trainable: Any, rows: Arrays) -> tuple[jax.Array, tuple]:
            total, weight, metrics = self.objective(combine(trainable, frozen), rows, key)
            return total if scale is None else total * scale, (total, weight, dict(metrics))

        def one_microbatch(sums: tuple, rows: Arrays) -> tuple[tuple, None]:
            grads, found = jax.grad(loss, has_aux=True)(trainable, rows)
            return jax.tree.map(jnp.add, sums, (found, _float32(grads))), None

        batch = batch | {"rows": shard(jnp.arange(len(next(iter(batch.values())))), "batch")}
        if self.accumulate == 1:
            grads, sums = jax.grad(loss, has_aux=True)(trainable, batch)
            grads = _float32(grads)
        else:
            microbatches = self.microbatches(batch)
            _, found = jax.eval_shape(loss, trainable, jax.tree.map(lambda x: x[0], microbatches))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (found, trainable))
            (sums, grads), _ = lax.scan(one_microbatch, zeros, microbatches)
        return sums, grads if scale is None else jax.tree.map(lambda g: g / scale, grads)

    def mean_gradients(self, summed: Any, weight: jax.Array) -> Any:
        """The gradients of the mean loss, without those of frozen layers.

        Divided once, by the weight of the entire batch: no division into microbatches can change the result.
        """
        return self._masked(jax.tree.map(lambda g: _mean(g, weight), summed))

    def microbatches(self, batch: Arrays) -> Arrays:
        """Each array as (accumulate, rows, ...); a row stays on its device."""
        n = self.accumulate
        return {name: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}

    def _masked(self, tree: Any) -> Any:
        """Gradients or updates without those that are frozen, which weight decay must not move either."""
        return tree if self.mask is None else self.mask(tree)


def global_norm(tree: Any) -> jax.Array:
    """The square root of the sum of the squares of all elements, in float32."""
    if jax.default_backend() != "cpu":
        return optax.tree.norm(tree)
    return jnp.sqrt(sum(map(_sum_of_squares, jax.tree.leaves(tree)), jnp.zeros(())))


def _sum_of_squares(x: jax.Array) -> jax.Array:
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        return jnp.sum(jnp.square(x))
    # XLA's CPU backend splits a long sum into several, and stores all squares before the first; not for a short one.
    blocks = jnp.sum(jnp.square(x).reshape(*x.shape[:-1], -1, BLOCK), -1)
    return jnp.sum(lax.optimization_barrier(blocks))


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """0 for a batch of padding alone, which must not turn the parameters into NaN."""
    return total / jnp.where(weight > 0, weight, 1.0)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
