"""Checks of token ids given by a caller. Without them XLA would clamp an id that is out of range, without an error.

Axes: B batch, S tokens.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.parallel.hosts import to_host

ROWS = "Give a list of rows, each a list or a one-dimensional integer array of ids; a single row is [[1, 2, 3]]."


def token_row(ids: Any, name: str, vocab_size: int) -> Int[np.ndarray, " S"]:
    """A row of token ids as int32; `ids` is a sequence of integers or an array of any integer dtype.

    Raises UserError if the row is empty, is not a row of integers, or has an id outside of [0, vocab_size). The message
    refers to the row by `name`.
    """
    row = _integers(ids, name)
    if not len(row):
        raise UserError(f"{name} is empty", "Give at least one token, such as BOS.")
    if outside := [token for token in (row.min(), row.max()) if not 0 <= token < vocab_size]:
        raise UserError(
            f"{name} has token {outside[0]}, and the vocabulary has {vocab_size}",
            f"Ids are from 0 to {vocab_size - 1}; take them from the tokenizer that the model was trained with.",
        )
    return row.astype(np.int32)


def token_rows(ids: Any, config: ModelConfig) -> Int[np.ndarray, "B S"]:
    """Rows of token ids, all of the same length, as int32.

    Raises UserError as `token_row` does, and if there is no row, if lengths differ or if they exceed config.max_length.
    """
    if isinstance(ids, Tracer):
        raise UserError(
            "the token ids are traced and have no values yet",
            "Call this function outside jax.jit: it is compiled already.",
        )
    if isinstance(ids, jax.Array):
        ids = to_host(ids)
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__") or getattr(ids, "shape", None) == ():
        raise UserError(f"{_shown(ids)} is not a batch of token ids", ROWS)
    rows = [token_row(row, f"row {number}", config.vocab_size) for number, row in enumerate(ids)]
    lengths = sorted({len(row) for row in rows})
    if not rows:
        raise UserError("there are no token ids", ROWS)
    if len(lengths) > 1:
        raise UserError(
            f"the rows have different lengths, from {lengths[0]} to {lengths[-1]} tokens",
            "Give rows of equal lengths, or one row at a time; padding at the end does not change earlier logits.",
        )
    if lengths[0] > config.max_length:
        raise UserError(
            f"a row has {lengths[0]} tokens, more than the context of {config.max_length}",
            f"Give at most {config.max_length} tokens a row.",
        )
    return np.stack(rows)


def _integers(ids: Any, name: str) -> np.ndarray:
    """A row as an array of integers: of its own dtype, or of Python integers of any size."""
    if isinstance(ids, jax.Array):
        ids = to_host(ids)
    if hasattr(ids, "dtype"):
        array = np.asarray(ids)
        if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer):
            kind = f"an array of {array.dtype} with shape {array.shape}"
            raise UserError(f"{name} is {kind}, not a row of token ids", ROWS)
        return array if np.issubdtype(array.dtype, np.integer) else array.astype(np.int8)  # int4 and smaller
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__"):
        raise UserError(f"{name} is {_shown(ids)}, not a row of token ids", ROWS)
    row = []
    for item in ids:
        try:
            if isinstance(item, bool):
                raise TypeError
            row.append(operator.index(item))
        except TypeError:
            raise UserError(f"{name} contains {_shown(item)}, which is not a token id", ROWS) from None
    return np.array(row, object)


def _shown(value: Any) -> str:
    """The value as text for a message, shortened and on one line."""
    text = " ".join(repr(value).split())
    return f"{text[:60]}..." if len(text) > 60 else text
