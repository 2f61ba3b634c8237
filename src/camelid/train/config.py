"""How long a run trains, on which loss, and what it saves; declared without JAX, so that the CLI starts fast."""

import math
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


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimization (arXiv:2305.18290): training on pairs of a chosen and a rejected answer."""

    beta: float = 0.1
    """how strongly the model is kept near the reference; the tau of IPO"""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """the loss of DPO, or of IPO (arXiv:2310.12036), which averages log-probabilities over the tokens of an answer"""
    label_smoothing: float = 0.0
    """sigmoid: assumed probability that the two answers of a pair are interchanged (conservative DPO)"""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"dpo.beta = {self.beta}", "Choose a number above 0, such as 0.1.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"dpo.label_smoothing = {self.label_smoothing}", "It is a probability: choose 0 or more, below 0.5."
            )
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError(
                f"dpo.label_smoothing = {self.label_smoothing} does not apply to dpo.loss = 'ipo'",
                "Leave it out, or use loss = 'sigmoid'.",
            )
