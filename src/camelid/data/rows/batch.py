"""The input of a training step."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

# B rows of a batch, S tokens of a row


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of packed documents."""

    # tokens     <s>  a   b  </s> <s>  c   d   .       . padding
    # targets     a   b  </s>  .   c   d   .   .       d continues in another row, or ends here
    # weights     1   1   1   0   1   1   0   0
    # positions   0   1   2   3   0   1   2   .
    # segments    1   1   1   1   2   2   2   .

    tokens: Int32[np.ndarray, "B S"]
    targets: Int32[np.ndarray, "B S"]
    """The next token of the same document, which may be in the next row; in rows across documents, the next token."""
    weights: Float32[np.ndarray, "B S"]
    """Weight of each target in the loss: 0 if there is no target, usually 1 otherwise."""
    positions: Int32[np.ndarray, "B S"]
    """Positions within the part of the document that is in this row, from 0."""
    segments: Int32[np.ndarray, "B S"]
    """Number of the document within the row, from 1; 0 is padding."""


@dataclass(frozen=True, eq=False)
class PairBatch(Batch):
    """Rows of pairs of answers, with what the reference of a preference loss predicts for them.

    Segments 2 n - 1 and 2 n of a row are the chosen and the rejected answer of its pair n.
    """

    reference: Float32[np.ndarray, "B S"]
    """At the first token of each answer, the sum of weight x log-probability of its targets; 0 at all other tokens."""
