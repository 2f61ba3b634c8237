"""What a forward pass needs besides parameters and tokens."""

from dataclasses import dataclass, field
from typing import Literal

import jax
from jaxtyping import Array, Int

Phase = Literal["training", "scoring", "prefill", "decode"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What the products and layers of one forward pass may need besides their operands.

    Axes: B batch.
    """

    phase: Phase = field(default="scoring", metadata={"static": True})
    """what the pass is for; part of the compiled program"""
    dropout_key: Array | None = None
    """the PRNG key of this training step's dropout; None: nothing is dropped"""
    rows: Int[Array, " B"] | None = None
    """the number of each row within the global batch, so that its dropout depends on no microbatch and no mesh"""
    adapters: Int[Array, " B"] | None = None
    """for each row the index of its adapter, where weights hold several"""
