"""Turns the documents of a store into rows: concatenated and split, packed by best fit, or one document per row."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer

from camelid.data.preparation.store import Store
from camelid.data.rows.batch import Batch, PairBatch
from camelid.data.rows.best_fit import Overlong, Plan, make_plan
from camelid.data.rows.pairs import make_pair_plan

# B rows of a batch, S tokens of a row

Method = Literal["stream", "best_fit", "none"]


class Fragments(NamedTuple):
    """Parts of documents, in the order in which they appear in rows."""

    row: Integer[np.ndarray, " fragments"]
    """Index of the row in the batch; never decreases."""
    start: Integer[np.ndarray, " fragments"]
    """Index in the store of the first token."""
    length: Integer[np.ndarray, " fragments"]
    """Number of tokens."""
    is_last: Bool[np.ndarray, " fragments"]
    """Whether the fragment ends with the last token of its document, which has no target in the same document."""


@dataclass(frozen=True)
class Packing:
    """The documents of a store as rows of `sequence_length` tokens.

    - `stream`: row r holds tokens [r S, r S + S) of all documents concatenated. A document may continue in the next
      row, where it is the first segment and its positions start at 0 again.
    - `best_fit`: documents are kept intact, several in a row; those longer than a row are split, truncated or dropped.
    - `none`: as `best_fit`, but with one document (or part of a split one, or pair) in each row.
    """

    store: Store
    sequence_length: int
    method: Method = "stream"
    overlong: Overlong = "split"
    cross_documents: bool = False
    """Whether each row is one segment, so that attention and predictions cross the borders of documents."""
    looped: bool = False
    """With `stream` and `cross_documents`: the last row of an epoch continues with the first document, as in EasyLM; an
    epoch ends when a row ends with the last document."""
    pairs: bool = False
    """With `best_fit` and `none`: documents 2 n and 2 n + 1 are the answers of a pair, which are next to each other in
    one row."""
    reference: Float32[np.ndarray, " documents"] | None = None
    """With pairs: for each document what PairBatch.reference holds; None: rows are without it."""

    @cached_property
    def plan(self) -> Plan | None:
        """Which fragments each row holds; None for `stream`."""
        if self.method == "stream":
            return None
        plan = make_pair_plan if self.pairs else make_plan
        return plan(self.store.offsets, self.sequence_length, one_per_row=self.method == "none", overlong=self.overlong)

    def __getstate__(self):
        # A process that receives a copy computes the plan again, which takes no longer than sending it.
        return {name: value for name, value in vars(self).items() if name != "plan"}

    @cached_property
    def num_rows(self) -> int:
        if self.plan is not None:
            return self.plan.num_rows
        if self.looped:
            return self.store.num_tokens // math.gcd(self.store.num_tokens, self.sequence_length)
        # The last token of the store has no target, so it gets no row of its own.
        return max(0, -(-(self.store.num_tokens - 1) // self.sequence_length))

    @property
    def rows_per_epoch(self) -> float:
        """Number of rows in which every token appears once."""
        return self.store.num_tokens / self.sequence_length if self.looped else float(self.num_rows)

    @property
    def num_places(self) -> int:
        """Number of tokens in all rows."""
        if self.plan is not None:
            return self.plan.num_places
        if self.looped:
            return self.num_rows * self.sequence_length
        return min(self.store.num_tokens, self.num_rows * self.sequence_length)

    @property
    def fill_rate(self) -> float:
        """Fraction of the places of all rows that hold a token; the rest is padding."""
        return self.num_places / max(1, self.num_rows * self.sequence_length)

    def rows(self, rows: Int64[np.ndarray, " B"]) -> Batch:
        """Returns the rows with these numbers; numbers past the last row give rows of padding."""
        if self.looped:
            return self._looped(rows)
        fragments = self._streamed(rows) if self.plan is None else self._planned(self.plan, rows)
        batch = self._assembled(len(rows), fragments)
        return batch if self.reference is None else self._with_reference(batch, fragments, self.reference)

    def _with_reference(self, batch: Batch, fragments: Fragments, reference: np.ndarray) -> PairBatch:
        found = np.zeros_like(batch.weights)
        found[(batch.segments > 0) & (batch.positions == 0)] = reference[self.documents(fragments.start)]
        return PairBatch(**vars(batch), reference=found)

    def documents(self, starts: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The numbers of the documents that hold these tokens of the store."""
        return np.searchsorted(self.store.offsets, starts, "right") - 1

    def _looped(self, rows: np.ndarray) -> Batch:
        """Rows of one segment each, from a stream of tokens that starts again after the last document."""
        store = self.store
        index = rows[:, None] * self.sequence_length + np.arange(self.sequence_length)
        target = (index + 1) % store.num_tokens
        if store.codes is None:
            begins = store.offsets[np.searchsorted(store.offsets, target)] == target
            weights = np.where(begins, np.float32(store.first), np.float32(1))
        else:
            weights = store.levels[store.codes[target]]
        return Batch(
            tokens=store.tokens[index % store.num_tokens].astype(np.int32),
            targets=store.tokens[target].astype(np.int32),
            weights=weights,
            positions=np.broadcast_to(np.arange(self.sequence_length, dtype=np.int32), index.shape).copy(),
            segments=np.ones(index.shape, np.int32),
        )

    def _streamed(self, rows: np.ndarray) -> Fragments:
        offsets, size = self.store.offsets, self.sequence_length
        begin = np.where(rows < self.num_rows, rows * size, self.store.num_tokens)
        end = np.minimum(begin + size, self.store.num_tokens)
        if self.cross_documents and self.store.codes is not None:
            # Nothing depends on where documents begin: the stored weights cover their first tokens.
            row = np.flatnonzero(begin < end)
            return Fragments(row, begin[row], (end - begin)[row], end[row] == self.store.num_tokens)
        first = np.searchsorted(offsets, begin, "right") - 1
        last = np.searchsorted(offsets, end, "left") - 1
        row, nth = _enumerated(np.where(begin < end, last - first + 1, 0))
        document = first[row] + nth
        start = np.maximum(offsets[document], begin[row])
        stop = np.minimum(offsets[document + 1], end[row])
        return Fragments(row, start, stop - start, stop == offsets[document + 1])

    def _planned(self, plan: Plan, rows: np.ndarray) -> Fragments:
        known = np.minimum(rows, self.num_rows)
        first = plan.offsets[known]
        row, nth = _enumerated(plan.offsets[np.minimum(known + 1, self.num_rows)] - first)
        n = first[row] + nth
        return Fragments(row, plan.starts[n], plan.lengths[n].astype(np.int64), np.zeros(len(n), bool))

    def _assembled(self, num_rows: int, fragments: Fragments) -> Batch:
        store, size = self.store, self.sequence_length
        filled = np.zeros(num_rows, np.int64)
        np.add.at(filled, fragments.row, fragments.length)
        inside = np.arange(size) < filled[:, None]
        fragment, position = _enumerated(fragments.length)
        index = fragments.start[fragment] + position
        target = np.minimum(index + 1, store.num_tokens - 1)
        last = (np.cumsum(fragments.length) - 1)[fragments.is_last]
        targets = store.tokens[target]
        if store.codes is None:
            weights = np.ones(len(index), np.float32)
            weights[last] = store.first
        else:
            weights = store.levels[store.codes[target]]
        without_target = last[index[last] == store.num_tokens - 1] if self.cross_documents else last
        targets[without_target], weights[without_target] = 0, 0
        if self.cross_documents:
            segments, positions = inside.astype(np.int32), np.where(inside, np.arange(size, dtype=np.int32), 0)
        else:
            before = np.searchsorted(fragments.row, fragments.row)  # fragments in the rows before
            segments = _spread(inside, (np.arange(len(before)) - before + 1)[fragment], np.int32)
            positions = _spread(inside, position, np.int32)
        return Batch(
            tokens=_spread(inside, store.tokens[index], np.int32),
            targets=_spread(inside, targets, np.int32),
            weights=_spread(inside, weights, np.float32),
            positions=positions,
            segments=segments,
        )


def _enumerated(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The group and the index within the group of each element: [2, 0, 3] -> [0, 0, 2, 2, 2], [0, 1, 0, 1, 2]."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def _spread(inside: np.ndarray, values: np.ndarray, dtype: type) -> np.ndarray:
    """An array with the values where `inside` is True, in order, and 0 elsewhere."""
    if len(values) == inside.size:
        return values.astype(dtype, copy=False).reshape(inside.shape)
    spread = np.zeros(inside.shape, dtype)
    spread[inside] = values
    return spread
