"""What one training step reads."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

# B rows of a batch, S tokens of a row


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of packed documents."""

    # tokens     <s>  a   b  </s> <s>  c   d   .       . padding
    # targets     a   b  </s>  .   c   d   .   .       d goes on in another row or ends here
    # weights     1   1   1   0   1   1   0   0
    # positions   0   1   2   3   0   1   2   .
    # segments    1   1   1   1   2   2   2   .

    tokens: Int32[np.ndarray, "B S"]
    targets: Int32[np.ndarray, "B S"]
    """The next token of the same document, also when that begins the next row; of a row across documents, of any."""
    weights: Float32[np.ndarray, "B S"]
    """How much the loss counts each target: 0 where there is none, mostly 1 where there is."""
    positions: Int32[np.ndarray, "B S"]
    """Places within the document's part in this row."""
    segments: Int32[np.ndarray, "B S"]
    """Documents of a row, numbered from 1; 0 is padding."""
