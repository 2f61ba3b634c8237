"""The objective of preference data: direct preference optimization on pairs of a chosen and a rejected answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context
from camelid.model.decoder import Decoder
from camelid.model.weights import Adapted
from camelid.train.config import DPOConfig, DropoutConfig
from camelid.train.objective import Arrays, Sum, training_context

# B rows of a batch, S tokens of a row, P pairs of a row: as many as fit, S / 2 rounded up


@dataclass(frozen=True, kw_only=True)
class DPOLoss:
    """The loss of direct preference optimization (DPO, arXiv:2305.18290), or of IPO (arXiv:2310.12036), of each pair.

    A batch has the fields of `data.rows.batch.Batch`, whose segments 2 n - 1 and 2 n are the two answers of pair n. The
    log-probability of an answer is the sum of those of its targets, times their weights. `ratio` is its difference to
    that of the reference, and `margin` the ratio of the chosen answer minus that of the rejected one:

      sigmoid   -(1 - a) log sigmoid(beta margin) - a log sigmoid(-beta margin), with label smoothing a
      ipo       (margin - 1 / (2 beta))^2, where each ratio is divided by the sum of the weights of its answer

    The reference is what `batch["reference"]` gives, as in `PairBatch`. Without this field it is the base of the
    parameters, without their adapters. Pairs with an answer that has no weight, because it was truncated, do not count.

    The metrics are means over the pairs, with TRL's names: `rewards/chosen` and `rewards/rejected` (beta x ratio),
    `rewards/margins`, `rewards/accuracies` (how often the chosen answer has the larger reward), `logps/chosen` and
    `logps/rejected`.
    """

    config: ModelConfig
    compute: ComputeConfig
    dpo: DPOConfig = DPOConfig()
    dropout: DropoutConfig = DropoutConfig()
    adapter_dropout: float = 0.0
    """probability of dropping an input of an adapter's factors"""

    def __call__(
        self, params: Decoder, batch: Arrays, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Mapping[str, Sum]]:
        context = Context("scoring")
        if key is not None:
            context = training_context(self.dropout, self.adapter_dropout, key, batch["rows"])
        logps = self.answer_log_probs(params, batch, context)
        ratios = logps - self._reference(params, batch)
        lengths = by_answer(batch["weights"], batch["segments"])
        counts = jnp.all(lengths > 0, -1).astype(jnp.float32)
        rewards = self.dpo.beta * ratios
        found = {
            "rewards/chosen": rewards[..., 0],
            "rewards/rejected": rewards[..., 1],
            "rewards/margins": rewards[..., 0] - rewards[..., 1],
            "rewards/accuracies": (rewards[..., 0] > rewards[..., 1]).astype(jnp.float32),
            "logps/chosen": logps[..., 0],
            "logps/rejected": logps[..., 1],
        }
        pairs = counts.sum()
        metrics = {name: (jnp.sum(values * counts), pairs) for name, values in found.items()}
        return jnp.sum(self._losses(ratios, lengths) * counts), pairs, metrics

    def answer_log_probs(self, params: Decoder, batch: Arrays, context: Context) -> Float[Array, "B P 2"]:
        """The log-probability of the chosen and of the rejected answer of each pair; 0 where a row has no pair."""
        tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
        x, _ = params.hidden(tokens, positions, segments, self.config, self.compute, context=context)
        log_probs = params.token_log_probs(x, batch["targets"], self.config, context=context).log_prob
        return by_answer(log_probs * batch["weights"], segments)

    def _reference(self, params: Decoder, batch: Arrays) -> Float[Array, "B P 2"]:
        """The log-probabilities of the reference, which is not differentiated."""
        if "reference" in batch:
            return by_answer(batch["reference"], batch["segments"])
        if not has_adapters(params):
            raise ValueError("a reference is needed: parameters without adapters have no base to compare with")
        base = Context("scoring", adapters=jnp.full(len(batch["tokens"]), -1))
        return self.answer_log_probs(lax.stop_gradient(params), batch, base)

    def _losses(self, ratios: Float[Array, "B P 2"], lengths: Float[Array, "B P 2"]) -> Float[Array, "B P"]:
        if self.dpo.loss == "ipo":
            means = ratios / jnp.where(lengths > 0, lengths, 1.0)
            return (means[..., 0] - means[..., 1] - 1 / (2 * self.dpo.beta)) ** 2
        scaled, smoothing = self.dpo.beta * (ratios[..., 0] - ratios[..., 1]), self.dpo.label_smoothing
        return -(1 - smoothing) * jax.nn.log_sigmoid(scaled) - smoothing * jax.nn.log_sigmoid(-scaled)


def by_answer(values: Float[Array, "B S"], segments: Int[Array, "B S"]) -> Float[Array, "B P 2"]:
    """The sums of `values` over the chosen and the rejected answer of each pair."""
    pairs = -(-segments.shape[1] // 2)

    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (before, started), (value, starts) = left, right
        return jnp.where(starts, value, before + value), started | starts

    starts = segments != jnp.roll(segments, 1, 1)
    sums, _ = lax.associative_scan(add, (values, starts.at[:, 0].set(True)), axis=1)
    is_last = (segments != jnp.roll(segments, -1, 1)).at[:, -1].set(True)
    # Of each answer one value is not 0, so that no order of the additions changes a bit.
    totals = jax.vmap(partial(jax.ops.segment_sum, num_segments=2 * pairs + 1))(jnp.where(is_last, sums, 0.0), segments)
    return totals[:, 1:].reshape(-1, pairs, 2)


def has_adapters(params: Any) -> bool:
    """Whether any weight of a model has an adapter."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    return any(isinstance(leaf, Adapted) for leaf in leaves)
