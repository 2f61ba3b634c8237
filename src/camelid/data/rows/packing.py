"""Documents to rows: laid end to end and cut, packed whole where they fit best, or one a row."""

import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer

from camelid.data.preparation.store import Store
from camelid.data.rows.batch import Batch
from camelid.data.rows.best_fit import Overlong, Plan, open_plan
from camelid.disk.paths import make_writable

# B rows of a batch, S tokens of a row

Method = Literal["stream", "best_fit", "none"]

OR_DATA_CACHE = ", or data.cache in the recipe,"
"""for advice on a cache of data that cannot be written"""


class Pieces(NamedTuple):
    """Parts of documents, in the order in which they stand in rows."""

    row: Integer[np.ndarray, " pieces"]
    """of the batch; these rise"""
    start: Integer[np.ndarray, " pieces"]
    """the first token, as a place in the store"""
    length: Integer[np.ndarray, " pieces"]
    closes: Bool[np.ndarray, " pieces"]
    """whether the document ends with it, so that its last token predicts nothing of the same document"""


@dataclass(frozen=True)
class Packing:
    """A store's documents as rows of `sequence_length` tokens.

    stream: row r is tokens [r S, r S + S) of all documents end to end. A document may go on in the next row; there it
    is the first segment and its positions begin again. best_fit: documents stay whole, those of more than a row are
    split, truncated or dropped; none: the same with a row for each. With `cross_documents` a row is one segment.
    `looped`, it goes on at the beginning where the documents end, as EasyLM's rows do, until one ends with a row.
    """

    store: Store
    sequence_length: int
    method: Method = "stream"
    overlong: Overlong = "split"
    cross_documents: bool = False
    looped: bool = False
    """with stream and cross_documents"""
    cache: Path | None = None
    """where plans are kept for stores in folders that cannot be written"""

    @cached_property
    def plan(self) -> Plan | None:
        """Which pieces stand in which row; None: stream, which needs none."""
        if self.method == "stream":
            return None
        name = f"{self.method}-{self.sequence_length}-{self.overlong}"
        home = self.store.folder / "plans"
        if self.cache is not None and not os.access(self.store.folder, os.W_OK):
            home = self.cache / "plans" / self.store.fingerprint[:32]
            if not (home / name).exists():
                make_writable(home, OR_DATA_CACHE)
        return open_plan(
            home / name,
            self.store.offsets,
            self.sequence_length,
            whole_rows=self.method == "none",
            overlong=self.overlong,
            fingerprint=self.store.fingerprint,
        )

    def __getstate__(self):
        # The plan is opened again, not copied.
        return {name: value for name, value in vars(self).items() if name != "plan"}

    @cached_property
    def num_rows(self) -> int:
        if self.plan is not None:
            return self.plan.counts["rows"]
        if self.looped:
            return self.store.num_tokens // math.gcd(self.store.num_tokens, self.sequence_length)
        # The very last token predicts nothing, so no row is made for it alone.
        return max(0, -(-(self.store.num_tokens - 1) // self.sequence_length))

    @property
    def rows_per_epoch(self) -> float:
        """Rows in which every token stands once."""
        return self.store.num_tokens / self.sequence_length if self.looped else float(self.num_rows)

    @property
    def num_places(self) -> int:
        """Tokens that stand in all rows."""
        if self.plan is not None:
            return self.plan.counts["places"]
        if self.looped:
            return self.num_rows * self.sequence_length
        return min(self.store.num_tokens, self.num_rows * self.sequence_length)

    @property
    def fill_rate(self) -> float:
        """The share of the rows that holds tokens."""
        return self.num_places / max(1, self.num_rows * self.sequence_length)

    def rows(self, rows: Int64[np.ndarray, " B"]) -> Batch:
        """These rows; one past the last is all padding."""
        if self.looped:
            return self._around(rows)
        pieces = self._stream(rows) if self.plan is None else self._planned(self.plan, rows)
        return self._assemble(len(rows), pieces)

    def _around(self, rows: np.ndarray) -> Batch:
        """Rows of one segment, of tokens that follow each other for ever."""
        store = self.store
        place = rows[:, None] * self.sequence_length + np.arange(self.sequence_length)
        after = (place + 1) % store.num_tokens
        if store.codes is None:
            begins = store.offsets[np.searchsorted(store.offsets, after)] == after
            weights = np.where(begins, np.float32(store.first), np.float32(1))
        else:
            weights = store.levels[store.codes[after]]
        return Batch(
            tokens=store.tokens[place % store.num_tokens].astype(np.int32),
            targets=store.tokens[after].astype(np.int32),
            weights=weights,
            positions=np.broadcast_to(np.arange(self.sequence_length, dtype=np.int32), place.shape).copy(),
            segments=np.ones(place.shape, np.int32),
        )

    def _stream(self, rows: np.ndarray) -> Pieces:
        offsets, size = self.store.offsets, self.sequence_length
        begin = np.where(rows < self.num_rows, rows * size, self.store.num_tokens)
        end = np.minimum(begin + size, self.store.num_tokens)
        if self.cross_documents and self.store.codes is not None:
            # Where documents begin is told by the weights alone.
            row = np.flatnonzero(begin < end)
            return Pieces(row, begin[row], (end - begin)[row], end[row] == self.store.num_tokens)
        first = np.searchsorted(offsets, begin, "right") - 1
        last = np.searchsorted(offsets, end, "left") - 1
        row, nth = _repeated(np.where(begin < end, last - first + 1, 0))
        document = first[row] + nth
        start = np.maximum(offsets[document], begin[row])
        stop = np.minimum(offsets[document + 1], end[row])
        return Pieces(row, start, stop - start, stop == offsets[document + 1])

    def _planned(self, plan: Plan, rows: np.ndarray) -> Pieces:
        known = np.minimum(rows, self.num_rows)
        first = plan.rows[known]
        row, nth = _repeated(plan.rows[np.minimum(known + 1, self.num_rows)] - first)
        piece = first[row] + nth
        return Pieces(row, plan.starts[piece], plan.lengths[piece].astype(np.int64), np.zeros(len(piece), bool))

    def _assemble(self, num_rows: int, pieces: Pieces) -> Batch:
        store, size = self.store, self.sequence_length
        filled = np.zeros(num_rows, np.int64)
        np.add.at(filled, pieces.row, pieces.length)
        inside = np.arange(size) < filled[:, None]
        piece, position = _repeated(pieces.length)
        place = pieces.start[piece] + position
        after = np.minimum(place + 1, store.num_tokens - 1)
        closing = (np.cumsum(pieces.length) - 1)[pieces.closes]
        targets = store.tokens[after]
        if store.codes is None:
            weights = np.ones(len(place), np.float32)
            weights[closing] = store.first
        else:
            weights = store.levels[store.codes[after]]
        ending = closing[place[closing] == store.num_tokens - 1] if self.cross_documents else closing
        targets[ending], weights[ending] = 0, 0
        if self.cross_documents:
            segments, positions = inside.astype(np.int32), np.where(inside, np.arange(size, dtype=np.int32), 0)
        else:
            before = np.searchsorted(pieces.row, pieces.row)  # pieces in the rows before
            segments = _spread(inside, (np.arange(len(before)) - before + 1)[piece], np.int32)
            positions = _spread(inside, position, np.int32)
        return Batch(
            tokens=_spread(inside, store.tokens[place], np.int32),
            targets=_spread(inside, targets, np.int32),
            weights=_spread(inside, weights, np.float32),
            positions=positions,
            segments=segments,
        )


def _repeated(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[2, 0, 3] -> [0, 0, 2, 2, 2], [0, 1, 0, 1, 2]"""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def _spread(inside: np.ndarray, values: np.ndarray, dtype: type) -> np.ndarray:
    """Values at the places of rows that are filled, one after another; 0 elsewhere."""
    if len(values) == inside.size:
        return values.astype(dtype, copy=False).reshape(inside.shape)
    spread = np.zeros(inside.shape, dtype)
    spread[inside] = values
    return spread
