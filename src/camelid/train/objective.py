"""Objectives: what training minimizes, as a sum and a weight.

The mean of a loss over a batch is a quotient of two sums. Objectives return the two sums, and the step divides once,
so that no division of the batch into microbatches or over devices changes the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context
from camelid.model.decoder import Decoder

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
    """The objective of language models: the cross-entropy of each target, in nats, times its weight.

    With a key, elements are dropped with these probabilities, which `Context` describes.
    """

    config: ModelConfig
    compute: ComputeConfig
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    adapter_dropout: float = 0.0

    def __call__(
        self, params: Decoder, batch: Arrays, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Mapping[str, Sum]]:
        context = Context("scoring") if key is None else self._training_context(key, batch["rows"])
        tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
        x, _ = params.hidden(tokens, positions, segments, self.config, self.compute, context=context)
        total, weight = params.loss(x, batch["targets"], batch["weights"], self.config, context=context)
        return total, weight, {}

    def _training_context(self, key: jax.Array, rows: jax.Array) -> Context:
        return Context(
            phase="training",
            embedding_dropout=self.embedding_dropout,
            attention_dropout=self.attention_dropout,
            residual_dropout=self.residual_dropout,
            adapter_dropout=self.adapter_dropout,
            dropout_key=key,
            rows=rows,
        )
