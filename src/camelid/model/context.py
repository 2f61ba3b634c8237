"""What a forward pass needs besides parameters and tokens."""

import zlib
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Phase = Literal["training", "scoring", "prefill", "decode"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What the products and layers of one forward pass may need besides their operands.

    Axes: B batch.
    """

    phase: Phase = field(default="scoring", metadata={"static": True})
    """what the pass is for; part of the compiled program. In "prefill", attention sees the tokens of the pass alone, so
    the cache must be empty before"""
    embedding_dropout: float = field(default=0.0, metadata={"static": True})
    """probability with which an element of the token embeddings is dropped"""
    attention_dropout: float = field(default=0.0, metadata={"static": True})
    """probability with which an attention weight is dropped"""
    residual_dropout: float = field(default=0.0, metadata={"static": True})
    """probability with which an element that attention or the MLP adds to the residual stream is dropped"""
    adapter_dropout: float = field(default=0.0, metadata={"static": True})
    """probability with which an input of an adapter's factors is dropped; lookups in a table drop nothing"""
    adapter_inputs: bool = field(default=False, metadata={"static": True})
    """whether the input of a product is followed, on its last axis, by the one of the adapter's factors, from which
    elements are dropped already: see `weights.beside_dropped`"""
    mlp_dropout: float = field(default=0.0, metadata={"static": True})
    """probability with which an element of the MLP's hidden layer, the input of its last matrix, is dropped"""
    forgetful_ratios: tuple[float, float] = field(default=(0.0, 0.0), metadata={"static": True})
    """the smallest and largest fraction of a row's tokens that attention forgets; see `mask.forgetful_mask`"""
    module: str = field(default="", metadata={"static": True})
    """the name of the weight that is multiplied, so that adapters with the same input drop different elements"""
    dropout_key: Key[Array, ""] | None = None
    """the PRNG key of this training step, or of one of its layers; None: nothing is dropped"""
    rows: Int[Array, " B"] | None = None
    """the number of each row within the global batch, needed for dropout"""
    adapters: Int[Array, " B"] | None = None
    """for each row the index of its adapter, if weights hold several; a negative index: the base alone, also for
    weights with one adapter"""

    def layer(self, index: int | Int[Array, ""]) -> "Context":
        """The context of one layer, which has a dropout key of its own."""
        if self.dropout_key is None or not self._drops:
            return self
        return replace(self, dropout_key=jax.random.fold_in(self.dropout_key, index))

    @property
    def _drops(self) -> bool:
        rates = self.embedding_dropout, self.attention_dropout, self.residual_dropout, self.mlp_dropout
        return any((*rates, self.adapter_dropout))

    def at(self, module: str) -> "Context":
        """The context of the product with one weight of a layer."""
        return replace(self, module=module)

    def row_keys(self, purpose: str) -> Key[Array, " B"]:
        """A key for each row of the batch, which differs between purposes such as "attention"."""
        assert self.dropout_key is not None
        assert self.rows is not None, "dropout is drawn for each row by its number within the global batch"
        key = jax.random.fold_in(self.dropout_key, zlib.crc32(purpose.encode()))
        return jax.vmap(jax.random.fold_in, (None, 0))(key, self.rows)


def dropout(x: Float[Array, "B S F"], rate: float, purpose: str, context: Context) -> Float[Array, "B S F"]:
    """Sets elements of `x` to 0 with probability `rate` and divides the others by 1 - rate (arXiv:1207.0580).

    Which elements are dropped depends on the context's key, the row's number within the global batch, the purpose, and
    the element's place in the row. Microbatches, the mesh and the other rows make no difference.
    """
    if rate == 0.0 or context.dropout_key is None:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(context.row_keys(purpose))
    return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))
