"""Perplexity of a model on a text, which is scored in consecutive windows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from camelid.errors import UserError, in_python
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.decoder import Decoder
from camelid.model.finite import not_finite
from camelid.model.tokens import token_row
from camelid.parallel.batch_sharding import BatchSharding, data_parallel_size
from camelid.parallel.hosts import to_host

ROWS = 16  # windows per device in one forward pass


@dataclass(frozen=True)
class Perplexity:
    """The result of `perplexity`."""

    perplexity: float
    """exp(loss); infinity if that overflows"""
    loss: float
    """mean cross-entropy, in nats per token"""
    bits_per_byte: float
    """total cross-entropy in bits, divided by the number of bytes of the text"""
    tokens: int
    """number of tokens that were scored"""


def windows(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Rows of `length` tokens, the next token of each as its target, and weights that are 0 for padding.

    Every token except the first is a target once:

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
    compute: ComputeConfig,
    mesh: Mesh,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """The perplexity of a model on a text.

    The text is divided into consecutive windows that do not overlap: a token is predicted from those before it in its
    window. In a multi-process run, every process must call this with the same text.

    Args:
      params: Parameters of the model.
      tokens: Token ids of the text.
      text_bytes: Number of bytes of the text in UTF-8, for bits per byte.
      length: Number of tokens in a window.
      config: Configuration of the model.
      compute: Precision and kernels.
      mesh: The devices that hold `params`.
      progress: Called with the number of windows scored so far and the total.

    Raises:
      UserError: If there are fewer than two tokens, an id is not in the vocabulary, `length` is not between 1 and the
        model's context, or the loss is NaN or infinite.
    """
    if len(tokens):
        tokens = token_row(tokens, "the text", config.vocab_size)
    if len(tokens) < 2:
        what = f"the text has {len(tokens) or 'no'} token"
        raise UserError(what, "At least two are needed: the first token is only read, not scored.")
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
    return Perplexity(perplexity=perplexity_of(loss), loss=loss, bits_per_byte=bits, tokens=int(weight))


def _rows(x: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` rows starting at `start`, padded with rows of zeros (weight 0)."""
    found = x[start : start + count]
    return np.concatenate([found, np.zeros((count - len(found), x.shape[1]), x.dtype)])


@partial(jax.jit, static_argnames=("config", "compute"))
def _score(
    params: Decoder, rows: dict[str, jax.Array], config: ModelConfig, compute: ComputeConfig
) -> tuple[jax.Array, jax.Array]:
    """The sum of weight x -log p(target) over all tokens, and the sum of the weights."""
    positions = jnp.broadcast_to(jnp.arange(rows["tokens"].shape[1]), rows["tokens"].shape)
    x, _ = params.hidden(rows["tokens"], positions, None, config, compute)
    log_prob = params.token_log_probs(x, rows["targets"], config).log_prob
    return -jnp.sum(log_prob * rows["weights"]), jnp.sum(rows["weights"])


def perplexity_of(loss: float) -> float:
    """exp(loss), of a mean loss in nats per token; infinity if that overflows."""
    return math.exp(loss) if loss < 709 else math.inf
