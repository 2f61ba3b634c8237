"""Objectives: what training minimizes, as a sum and a weight.

The mean of a loss over a batch is a quotient of two sums. Objectives return the two sums, and the step divides once,
so that no division of the batch into microbatches or over devices changes the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context
from camelid.model.decoder import Decoder
from camelid.model.loss import LossSums
from camelid.train.config import DropoutConfig, LossConfig

Arrays = dict[str, jax.Array]
"""a batch on the devices: the fields of data.rows.batch.Batch, each (rows, sequence), and `rows`, of shape (rows,)"""
Sum = tuple[jax.Array, jax.Array]
"""a weighted sum and the sum of the weights, float32 scalars; their quotient is a mean"""


class Objective(Protocol):
    """`objective(params, batch, key)` gives the summed loss, the summed weight, and metrics.

    Each metric is itself a pair of a sum and a weight; the step reports the quotient. A microbatch holds some rows of
    the batch, so what belongs together, such as a pair of answers, must be one row of several arrays. `batch["rows"]`
    holds the number of each row within the global batch. The key is that of the training step; without a key, nothing
    is random, as in validation.
    """

    def __call__(
        self, params: Any, batch: Arrays, key: jax.Array | None, /
    ) -> tuple[jax.Array, jax.Array, Mapping[str, Sum]]: ...


@dataclass(frozen=True, kw_only=True)
class NextTokenLoss:
    """The objective of language models: the loss of each target, in nats, times its weight.

    With a key it is that of training, with smoothing, z-loss and dropout. Without one it is the cross-entropy alone,
    with the same average.

    The metrics are `accuracy`, if it is asked for, and in training with smoothing or z-loss, where the loss is more
    than the cross-entropy, also `cross_entropy` and `z_loss`, which are parts of the loss. All are averaged as it is.
    """

    config: ModelConfig
    compute: ComputeConfig
    loss: LossConfig = LossConfig()
    dropout: DropoutConfig = DropoutConfig()
    adapter_dropout: float = 0.0
    """probability of dropping an input of an adapter's factors"""
    accuracy: bool = False
    """whether the metrics contain the fraction of targets that are the most probable token"""

    def __call__(
        self, params: Decoder, batch: Arrays, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Mapping[str, Sum]]:
        training = key is not None
        context = Context("scoring")
        if key is not None:
            context = training_context(self.dropout, self.adapter_dropout, key, batch["rows"])
        tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
        x, _ = params.hidden(tokens, positions, segments, self.config, self.compute, context=context)
        weights, weight = averaged(batch["weights"], self.loss.average)
        if self.loss.average == "rows" and self.compute.dtype == "float16":
            # By a power of two, which rounds nothing, so that a token weighs 1 or more, as it does in the average over
            # tokens: float16 would lose the gradients of smaller ones, and the loss scale multiplies them afterwards.
            factor = 2.0 ** (tokens.shape[1] - 1).bit_length()
            weights, weight = weights * factor, weight * factor
        sums = params.loss(
            x,
            batch["targets"],
            weights,
            self.config,
            context=context,
            z=self.loss.z if training else 0.0,
            label_smoothing=self.loss.label_smoothing if training else 0.0,
            accuracy=self.accuracy,
        )
        return sums.loss, weight, {name: (total, weight) for name, total in self._parts(sums, training).items()}

    def _parts(self, sums: LossSums, training: bool) -> dict[str, jax.Array]:
        parts = {"accuracy": sums.correct, "z_loss": sums.z_loss}
        if training and (self.loss.z or self.loss.label_smoothing):
            parts["cross_entropy"] = sums.cross_entropy
        return {name: total for name, total in parts.items() if total is not None}


def training_context(drop: DropoutConfig, adapter_dropout: float, key: jax.Array, rows: jax.Array) -> Context:
    """The context of a training step with this key, for rows with these numbers within the global batch."""
    return Context(
        phase="training",
        embedding_dropout=drop.embedding,
        attention_dropout=drop.attention,
        residual_dropout=drop.residual,
        mlp_dropout=drop.mlp,
        forgetful_ratios=(drop.forgetful_min_ratio, drop.forgetful_max_ratio),
        adapter_dropout=adapter_dropout,
        dropout_key=key,
        rows=rows,
    )


def averaged(weights: jax.Array, average: Literal["tokens", "rows"]) -> tuple[jax.Array, jax.Array]:
    """The weights of tokens, (rows, sequence), with which a sum divided by the second result is that average.

    "rows": the weights of a row are divided by their sum, so that each row that has any weight counts 1, and the second
    result is the number of such rows. A row is a row of the batch, whether or not it holds several documents.
    """
    if average == "tokens":
        return weights, weights.sum()
    of_row = weights.sum(1, keepdims=True)
    return weights / jnp.where(of_row > 0, of_row, 1.0), jnp.sum((of_row > 0).astype(jnp.float32))
