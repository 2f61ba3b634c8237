"""How long a run trains and what it leaves behind; declared without JAX, so that the command line starts fast."""

from dataclasses import dataclass
from typing import Literal

from camelid.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    """updates in all, those of earlier starts of the run and of init_optimizer included"""
    accumulate: int = 1
    """microbatches a step: each holds batch_size / accumulate rows"""
    log_every: int = 1
    """steps between lines of metrics.jsonl"""
    checkpoint_every: int = 1000
    """steps between checkpoints; one more is made at the end, and at SIGTERM"""
    keep_checkpoints: int = 2
    """the newest so many stay"""
    evaluate_every: int | None = None
    """steps between validation losses; the last step is always validated where there is validation text"""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """services that get the metrics too; each is an extra of the same name"""
    seed: int = 0
    """of fresh parameters"""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name} = {value}", "It counts things: choose 1 or more.")
