"""Documents laid end to end and cut into rows."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer

from camelid.data.batch import Batch

# B rows of a batch, S tokens of a row


@dataclass(frozen=True, eq=False)
class Packing:
    """All documents' tokens in one array; row r is tokens [r S, r S + S) of it.

    A document may go on in the next row; there it is the first segment and its positions begin again.
    """

    tokens: Integer[np.ndarray, " tokens"]
    """Of the smallest type that holds the vocabulary."""
    offsets: Int64[np.ndarray, " offsets"]
    """Where each document begins, and the end; no document is empty."""
    sequence_length: int

    @property
    def num_rows(self) -> int:
        # The very last token predicts nothing, so no row is made for it alone.
        return max(0, -(-(len(self.tokens) - 1) // self.sequence_length))

    @property
    def num_targets(self) -> int:
        """Every token but the first of each document is predicted, once an epoch."""
        return len(self.tokens) - (len(self.offsets) - 1)

    def rows(self, rows: Int64[np.ndarray, " B"]) -> Batch:
        """These rows; one past the last is all padding."""
        place = rows[:, None] * self.sequence_length + np.arange(self.sequence_length)
        inside = place < min(len(self.tokens), self.num_rows * self.sequence_length)
        last = len(self.tokens) - 1
        place = np.minimum(place, last)
        document = np.searchsorted(self.offsets, place, side="right") - 1
        begin = np.maximum(self.offsets[document], place[:, :1])
        predicts = inside & (place + 1 < self.offsets[document + 1])
        return Batch(
            tokens=_where(inside, self.tokens[place]),
            targets=_where(predicts, self.tokens[np.minimum(place + 1, last)]),
            weights=predicts.astype(np.float32),
            positions=_where(inside, place - begin),
            segments=_where(inside, document - document[:, :1] + 1),
        )


def _where(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(mask, values, 0).astype(np.int32)
