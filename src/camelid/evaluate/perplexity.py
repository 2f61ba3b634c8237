"""How well a model predicts a text: every token is scored once, in windows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from camelid.errors import UserError, in_python
from camelid.model.config import Compute, ModelConfig
from camelid.model.decoder import Decoder
from camelid.model.finite import not_finite
from camelid.model.tokens import token_row
from camelid.parallel.batch_sharding import BatchSharding, data_parallel_size
from camelid.parallel.hosts import to_host

ROWS = 16  # windows that a device scores at once


@dataclass(frozen=True)
class Perplexity:
    perplexity: float
    loss: float
    """nats a token"""
    bits_per_byte: float
    tokens: int
    """that were scored"""


def windows(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Rows of `length` tokens and their targets, the tokens one later; each token but the first is a target once.

    tokens  a b c d e f      rows  a b c    targets  b c d
                                   d e .             e f .     (length 3)
    """
    count = -(-(len(tokens) - 1) // length)
    padded = np.zeros(count * length + 1, np.int32)
    padded[: len(tokens)] = tokens
    weights = np.arange(count * length) < len(tokens) - 1
    return {
        "tokens": padded[:-1].reshape(count, length),
        "targets": padded[1:].reshape(count, length),
        "weights": weights.reshape(count, length).astype(np.float32),
    }


@in_python
def perplexity(
    params: Decoder,
    tokens: np.ndarray,
    text_bytes: int,
    length: int,
    config: ModelConfig,
    compute: Compute,
    mesh: Mesh,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Scores `tokens`, which stand for `text_bytes` bytes of UTF-8, in windows of `length`.

    Raises UserError where there is nothing to score, an id is beyond the vocabulary, a window is longer than the
    model's context, or the loss is not finite.
    """
    if len(tokens):
        tokens = token_row(tokens, "the text", config.vocab_size)
    if len(tokens) < 2:
        what = f"the text has {len(tokens) or 'no'} token"
        raise UserError(what, "At least two are needed: one to see, one to score.")
    if not 1 <= length <= config.max_length:
        raise UserError(
            f"sequence length {length} does not fit the context of {config.max_length}",
            f"Use --sequence-length {config.max_length} or less.",
        )
    rows = windows(tokens, length)
    count = len(rows["tokens"])
    at_once = ROWS * data_parallel_size(mesh)
    sharding = BatchSharding(at_once, mesh)
    total = weight = 0.0
    with jax.set_mesh(mesh):
        for start in range(0, count, at_once):
            batch = {name: _rows(x, start, at_once) for name, x in rows.items()}
            sums = to_host(_score(params, sharding.place(batch), config, compute))
            total, weight = total + float(sums[0]), weight + float(sums[1])
            if not math.isfinite(total):
                raise not_finite(params, compute, "the loss is")
            progress(min(start + at_once, count), count)
    loss = total / weight
    bits = total / math.log(2) / max(text_bytes, 1)
    return Perplexity(
        perplexity=math.exp(loss) if loss < 709 else math.inf, loss=loss, bits_per_byte=bits, tokens=int(weight)
    )


def _rows(x: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` rows from `start` on, filled up with zeros (weight 0) after the last."""
    part = x[start : start + count]
    return np.concatenate([part, np.zeros((count - len(part), x.shape[1]), x.dtype)])


@partial(jax.jit, static_argnames=("config", "compute"))
def _score(params: Decoder, rows: dict[str, jax.Array], config: ModelConfig, compute: Compute):
    positions = jnp.broadcast_to(jnp.arange(rows["tokens"].shape[1]), rows["tokens"].shape)
    x, _ = params.hidden(rows["tokens"], positions, None, config, compute)
    return params.loss(x, rows["targets"], rows["weights"], config)
