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
from camelid.train.objective import Arrays, Objective
from camelid.train.state import TrainState
from camelid.train.trainable import combine, mask_layers


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
    trained_layers: tuple[bool, ...] | None = None
    """for each layer, whether it is trained; None if all are"""
    mask: Callable[[Any], Any] | None = None
    """sets the gradients and the updates of what is not trained to zero; None if all parameters are trained"""

    def __call__(self, state: TrainState, batch: Arrays, frozen: Any = None) -> tuple[TrainState, Arrays]:
        """The state after one update, and the metrics of the step.

        The metrics are loss, weight, gradient_norm, learning_rate and those of the objective, all float32 scalars.
        `frozen` holds the parameters that are not trained, as `partition` returns them: they get no gradients.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        (total, weight, extra), grads = self.gradients(state.trainable, frozen, batch, key)
        norm = optax.tree.norm(grads)
        shrink = jnp.minimum(1.0, self.clip_norm / norm)
        grads = jax.tree.map(lambda g: g * shrink, grads)
        params = _float32(state.trainable)
        # optax raises floats to the power of an integer count.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.optimizer.update(grads, state.opt_state, params)
        new = optax.apply_updates(params, self._masked(updates))
        new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state.trainable)
        metrics = {
            **{name: _mean(*pair) for name, pair in extra.items()},
            "loss": _mean(total, weight),
            "weight": weight,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
        }
        return dataclasses.replace(state, step=state.step + 1, trainable=new, opt_state=opt_state), metrics

    def gradients(self, trainable: Any, frozen: Any, batch: Arrays, key: jax.Array) -> tuple[tuple, Any]:
        """What the objective returns for the entire batch, and the float32 gradients of the mean loss."""

        def loss(trainable: Any, rows: Arrays) -> tuple[jax.Array, tuple]:
            total, weight, metrics = self.objective(combine(trainable, frozen), rows, key)
            return total, (total, weight, dict(metrics))

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
        # Divided once, by the weight of the entire batch: no division into microbatches can change the result.
        return sums, self._masked(jax.tree.map(lambda g: _mean(g, sums[1]), grads))

    def microbatches(self, batch: Arrays) -> Arrays:
        """Each array as (accumulate, rows, ...); a row stays on its device."""
        n = self.accumulate
        return {name: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}

    def _masked(self, tree: Any) -> Any:
        """Gradients or updates without those that are frozen, which weight decay must not move either."""
        tree = tree if self.trained_layers is None else mask_layers(tree, self.trained_layers)
        return tree if self.mask is None else self.mask(tree)


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """0 for a batch of padding alone, which must not turn the parameters into NaN."""
    return total / jnp.where(weight > 0, weight, 1.0)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
