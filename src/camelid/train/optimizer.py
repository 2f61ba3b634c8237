"""AdamW with warmup and cosine decay."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from camelid.errors import UserError

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101); its moments are float32 whatever the parameters are."""

    learning_rate: float = 3e-4
    """at the end of warmup"""
    final_fraction: float = 0.1
    """the learning rate at the end of the decay and after it, as a fraction of learning_rate"""
    decay_steps: int | None = None
    """the step at which the decay ends, warmup included; left out: train.steps, and that of its beginning when a run
    goes on with more steps"""
    warmup_steps: int = 0
    """steps over which the learning rate rises in a line"""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """of matrices; norms never decay"""
    clip_norm: float = 1.0
    """gradients are scaled down to this global norm; inf leaves them"""

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
    """From the number of finished updates to the learning rate of the next one; the first is already above zero.

    `steps` is train.steps. After the decay the learning rate stays at its final value.
    """
    import jax.numpy as jnp
    import optax

    rises = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.decay_steps or steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )
    return lambda count: rises(jnp.asarray(count + 1, jnp.float32))


def make_optimizer(config: OptimizerConfig, steps: int, decay: Any) -> "optax.GradientTransformation":
    """`decay` is a tree of booleans shaped as the parameters: which of them weight decay touches."""
    import jax
    import optax

    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay,
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # optax raises floats to the power of an integer count.
        with jax.numpy_dtype_promotion("standard"):
            return adamw.update(updates, state, params)

    return optax.GradientTransformation(adamw.init, update)
