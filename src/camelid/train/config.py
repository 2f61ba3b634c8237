"""How long a run trains, what is dropped, and what the run saves; declared without JAX, so that the CLI starts fast."""

from dataclasses import dataclass
from typing import Literal

from camelid.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    """total number of updates, including those of earlier starts of the run and of init_optimizer"""
    accumulate: int = 1
    """microbatches per step (gradient accumulation); each has batch_size / accumulate rows"""
    embedding_dropout: float = 0.0
    """probability of dropping an element of the token embeddings; validation never drops"""
    attention_dropout: float = 0.0
    """probability of dropping an attention weight"""
    residual_dropout: float = 0.0
    """probability of dropping an element of what attention or the MLP adds to the residual stream"""
    freeze: tuple[str, ...] = ()
    """patterns of parameters that are not trained, such as "embed" or "layers.0-3\""""
    log_every: int = 1
    """number of steps between lines of metrics.jsonl"""
    checkpoint_every: int = 1000
    """number of steps between checkpoints; another is saved at the end, and on SIGTERM"""
    keep_checkpoints: int = 2
    """number of checkpoints to keep; older ones are removed"""
    evaluate_every: int | None = None
    """number of steps between validation losses; with validation text, the last step is always validated"""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """services that also receive the metrics; each is an optional dependency of the same name"""
    seed: int = 0
    """seed of newly initialized parameters and of dropout"""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name} = {value}", "It is a number of items or steps: choose 1 or more.")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UserError(f"train.{name} = {value}", "It is a probability: choose 0 or more, and less than 1.")
