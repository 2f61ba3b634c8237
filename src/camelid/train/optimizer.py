"""AdamW with warmup and cosine decay."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from camelid.errors import UserError

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101); its moments are float32 whatever the dtype of the parameters."""

    learning_rate: float = 3e-4
    """peak learning rate, reached at the end of the warmup"""
    final_fraction: float = 0.1
    """learning rate at the end of the cosine decay and after it, as a fraction of learning_rate"""
    decay_steps: int | None = None
    """step at which the decay ends, counting the warmup; default: train.steps of the first start of the run, also when
    it is resumed with more steps"""
    warmup_steps: int = 0
    """number of steps over which the learning rate rises linearly"""
    beta1: float = 0.9
    """decay rate of the moving average of the gradients"""
    beta2: float = 0.95
    """decay rate of the moving average of the squared gradients"""
    eps: float = 1e-8
    """added to the square root of the second moment"""
    weight_decay: float = 0.1
    """decoupled weight decay of matrices; norms and biases are not decayed"""
    clip_norm: float = 1.0
    """maximum global norm of the gradients, which are scaled down to it; inf disables clipping"""

    def __post_init__(self) -> None:
        for name, fits, advice in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("final_fraction", 0 <= self.final_fraction <= 1, "from 0 to 1"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("decay_steps", self.decay_steps is None or self.decay_steps >= 1, "1 or more"),
            ("beta1", 0 <= self.beta1 < 1, "from 0 up to 1"),
            ("beta2", 0 <= self.beta2 < 1, "from 0 up to 1"),
            ("eps", 0 < self.eps < math.inf, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("clip_norm", self.clip_norm > 0, "above 0"),
        ):
            if not fits:
                raise UserError(f"optimizer.{name} = {getattr(self, name)}", f"Choose a number {advice}.")


def learning_rate(config: OptimizerConfig, steps: int) -> "optax.Schedule":
    """The schedule: it maps the number of updates so far to the learning rate of the next, the first of which is not 0.

    `steps` is train.steps. After the decay the learning rate stays at its final value.
    """
    import jax.numpy as jnp
    import optax

    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.decay_steps or steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )
    return lambda count: schedule(jnp.asarray(count + 1, jnp.float32))


def make_optimizer(config: OptimizerConfig, steps: int, decay: Any) -> "optax.GradientTransformation":
    """AdamW with its schedule. `decay` is a tree of booleans with the structure of the parameters, or a prefix of it:
    which of them have weight decay.

    `update` must be called under standard dtype promotion, as TrainStep does.
    """
    import optax

    return optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay,
    )
