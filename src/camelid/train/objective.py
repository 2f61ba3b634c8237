"""Objectives: what training minimizes, as a sum and a weight.

The mean of a loss over a batch is a quotient of two sums. Objectives return the two sums, and the step divides once,
so that no division of the batch into microbatches or over devices changes the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from camelid.model.config import Compute, ModelConfig
from camelid.model.decoder import Decoder

Arrays = dict[str, jax.Array]
"""a batch on the devices: the fields of data.rows.batch.Batch, each (rows, sequence), and `rows`, of shape (rows,)"""
Sum = tuple[jax.Array, jax.Array]
"""a weighted sum and the sum of the weights, float32 scalars; their quotient is a mean"""


class Objective(Protocol):
    """`objective(params, batch, key)` gives the summed loss, the summed weight, and metrics.

    Each metric is itself a pair of a sum and a weight; the step reports the quotient. `batch["rows"]` holds the number
    of each row within the global batch. The key is that of the training step; without a key, nothing is random, as
    in validation.
    """

    def __call__(
        self, params: Any, batch: Arrays, key: jax.Array | None, /
    ) -> tuple[jax.Array, jax.Array, Mapping[str, Sum]]: ...


@dataclass(frozen=True)
class NextTokenLoss:
    """The objective of language models: the cross-entropy of each target, in nats, times its weight."""

    config: ModelConfig
    compute: Compute

    def __call__(
        self, params: Decoder, batch: Arrays, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Mapping[str, Sum]]:
        x, _ = params.hidden(batch["tokens"], batch["positions"], batch["segments"], self.config, self.compute)
        total, weight = params.loss(x, batch["targets"], batch["weights"], self.config)
        return total, weight, {}
