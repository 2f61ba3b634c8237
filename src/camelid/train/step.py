"""One training step: microbatches, clipping, update, metrics."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from camelid.model.config import Compute, ModelConfig
from camelid.model.decoder import Decoder
from camelid.train.state import TrainState

Arrays = dict[str, jax.Array]  # a batch on the devices: the fields of data.batch.Batch, each (rows, sequence)


@dataclass(frozen=True)
class Trainer:
    """What every step of a run shares; a static argument of the compiled step."""

    config: ModelConfig
    compute: Compute
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    clip_norm: float
    accumulate: int = 1

    def step(self, state: TrainState, batch: Arrays) -> tuple[TrainState, Arrays]:
        """The state after one update, and the step's metrics: loss, weight, gradient_norm, learning_rate."""
        total, weight, grads = self.gradients(state.params, batch)
        norm = optax.tree.norm(grads)
        shrink = jnp.minimum(1.0, self.clip_norm / norm)
        grads = jax.tree.map(lambda g: g * shrink, grads)
        params = _float32(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, params)
        new = optax.apply_updates(params, updates)
        new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state.params)
        metrics = {
            "loss": _mean(total, weight),
            "weight": weight,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, new, opt_state), metrics

    def gradients(self, params: Decoder, batch: Arrays) -> tuple[jax.Array, jax.Array, Any]:
        """The summed loss, the summed weight, and float32 gradients of their quotient."""

        def one_microbatch(carry, rows: Arrays):
            (total, weight), grads = jax.value_and_grad(self.loss, has_aux=True)(params, rows)
            return jax.tree.map(jnp.add, carry, (total, weight, _float32(grads))), None

        if self.accumulate == 1:
            (total, weight), grads = jax.value_and_grad(self.loss, has_aux=True)(params, batch)
            grads = _float32(grads)
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            start = (jnp.zeros(()), jnp.zeros(()), zeros)
            (total, weight, grads), _ = lax.scan(one_microbatch, start, self.microbatches(batch))
        # Divided once, by the weight of the whole batch: no cutting of it can change the result.
        return total, weight, jax.tree.map(lambda g: _mean(g, weight), grads)

    def microbatches(self, batch: Arrays) -> Arrays:
        """Each array as (accumulate, rows, sequence); a device keeps its own rows."""
        n = self.accumulate
        return {name: x.reshape(-1, n, x.shape[-1]).swapaxes(0, 1) for name, x in batch.items()}

    def loss(self, params: Decoder, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        """Summed loss and summed weight of some rows."""
        x, _ = params.hidden(batch["tokens"], batch["positions"], batch["segments"], self.config, self.compute)
        return params.loss(x, batch["targets"], batch["weights"], self.config)


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """0 for a batch of padding alone, which must not turn the parameters into NaN."""
    return total / jnp.where(weight > 0, weight, 1.0)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
