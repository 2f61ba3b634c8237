"""What a forward pass needs besides parameters and tokens."""

import zlib
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
from jaxtyping import Array, Int, Key

Phase = Literal["training", "scoring", "prefill", "decode"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What the products and layers of one forward pass may need besides their operands.

    Axes: B batch.
    """

    phase: Phase = field(default="scoring", metadata={"static": True})
    """what the pass is for; part of the compiled program"""
    embedding_dropout: float = field(default=0.0, metadata={"static": True})
    """probability with which an element of the token embeddings is dropped"""
    attention_dropout: float = field(default=0.0, metadata={"static": True})
    """probability with which an attention weight is dropped"""
    residual_dropout: float = field(default=0.0, metadata={"static": True})
    """probability with which an element that attention or the MLP adds to the residual stream is dropped"""
    dropout_key: Key[Array, ""] | None = None
    """the PRNG key of this training step, in a layer that of the layer; None: nothing is dropped"""
    rows: Int[Array, " B"] | None = None
    """the number of each row within the global batch: its dropout depends on no microbatch, mesh or packing"""
    adapters: Int[Array, " B"] | None = None
    """for each row the index of its adapter, where weights hold several"""

    def layer(self, index: int | Int[Array, ""]) -> "Context":
        """The context of one layer."""
        return (
            self if self.dropout_key is None else replace(self, dropout_key=jax.random.fold_in(self.dropout_key, index))
        )

    def row_keys(self, purpose: str) -> Key[Array, " B"]:
        """A key for each row, another for each purpose, say "attention"."""
        assert self.dropout_key is not None
        assert self.rows is not None, "dropout is drawn for each row by its number within the global batch"
        key = jax.random.fold_in(self.dropout_key, zlib.crc32(purpose.encode()))
        return jax.vmap(jax.random.fold_in, (None, 0))(key, self.rows)
