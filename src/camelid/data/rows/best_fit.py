"""Plans which documents share a row, from the lengths of the documents alone.

A plan is computed when a process first needs it and kept in memory: about two seconds and 12 bytes per document.
"""

import bisect
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64, Integer

# S tokens of a row. A document of n tokens fills n - 1 places: its last token is used only as a target.

Overlong = Literal["split", "truncate", "drop"]


@dataclass(frozen=True, eq=False)
class Plan:
    """The fragments of each row: row r holds fragments `offsets[r]` up to `offsets[r + 1]`."""

    offsets: Int64[np.ndarray, " offsets"]
    starts: Int64[np.ndarray, " fragments"]
    """Index in the store of the first token of each fragment."""
    lengths: Integer[np.ndarray, " fragments"]
    """Places that each fragment fills, from 1 to S."""
    split: int
    """Number of documents that were split over several rows."""
    truncated: int
    """Number of documents that were truncated to one row."""
    dropped: int
    """Number of documents that were dropped because they are longer than a row."""
    lost: int
    """Number of places that truncated and dropped documents would have filled."""

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_places(self) -> int:
        """Places of all rows that hold a token."""
        return int(self.lengths.sum(dtype=np.int64))


@dataclass(frozen=True)
class Pattern:
    """Rows that are filled alike."""

    num_rows: int
    items: tuple[tuple[int, int], ...]
    """(length, number of fragments of this length) in each of the rows, the longest first."""


def make_plan(
    offsets: Int64[np.ndarray, " offsets"], sequence_length: int, *, one_per_row: bool, overlong: Overlong
) -> Plan:
    """Returns the plan for documents that begin at `offsets` (the last one is the end) in rows of `sequence_length`.

    Fragments go to rows by best fit, the longest first, or with `one_per_row` to a row each, in the order of the
    documents. `overlong` decides what happens to documents longer than a row.
    """
    places = np.diff(offsets) - 1
    is_over = places > sequence_length
    over = int(np.count_nonzero(is_over))
    if overlong == "split":
        starts, lengths = _split(offsets[:-1], places, sequence_length)
    else:
        kept = places > 0 if overlong == "truncate" else (places > 0) & ~is_over
        starts, lengths = offsets[:-1][kept], np.minimum(places[kept], sequence_length)
    lost = int(places.sum() - lengths.sum())
    # The sort by length is much faster with 16 bits, and the plan is smaller.
    lengths = lengths.astype(np.min_scalar_type(sequence_length))
    if one_per_row:
        row_offsets = np.arange(len(starts) + 1)
    else:
        row_offsets, starts, lengths = pack(starts, lengths, sequence_length)
    counts = {name: over * (overlong == name) for name in ("split", "truncate", "drop")}
    return Plan(row_offsets, starts, lengths, counts["split"], counts["truncate"], counts["drop"], lost)


def _split(starts: np.ndarray, places: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The starts and lengths of fragments of at most `sequence_length` places."""
    counts = -(-places // sequence_length)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    before = nth * sequence_length
    return np.repeat(starts, counts) + before, np.minimum(np.repeat(places, counts) - before, sequence_length)


def pack(starts: np.ndarray, lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The offsets of the rows, and the starts and lengths of the fragments in the order of the rows.

    Any other numbers may take the place of `starts`, such as those of the pairs whose lengths are given.
    """
    patterns = fill(np.bincount(lengths, minlength=sequence_length + 1))
    in_rows = [np.repeat(*np.array(pattern.items, dtype=lengths.dtype).T) for pattern in patterns]
    num_rows = [pattern.num_rows for pattern in patterns]
    widths = np.repeat(np.array([len(row) for row in in_rows], np.int64), num_rows)
    packed_lengths = np.concatenate([lengths[:0], *map(np.tile, in_rows, num_rows)])
    # Fragments of one length are assigned in the order of the documents.
    packed_starts = np.empty_like(starts)
    packed_starts[np.argsort(packed_lengths, kind="stable")] = starts[np.argsort(lengths, kind="stable")]
    return np.append(0, np.cumsum(widths)), packed_starts, packed_lengths


def fill(counts: Int64[np.ndarray, " lengths"]) -> list[Pattern]:
    """Best-fit decreasing: packs `counts[n]` fragments of each length n into rows of `len(counts) - 1` places.

    Each fragment goes to the fullest row that has room for it. Fragments of equal length are assigned together, to
    equal rows together, so that the time grows with the number of patterns and not with the number of fragments.
    """
    size = len(counts) - 1
    # By the room that is left: the patterns of the rows, and the number of rows of each.
    open_rows: dict[int, list[tuple[tuple[tuple[int, int], ...], int]]] = {}
    rooms: list[int] = []  # the keys of `open_rows`, sorted

    def add(room: int, items: tuple[tuple[int, int], ...], num_rows: int) -> None:
        if room not in open_rows:
            open_rows[room] = []
            bisect.insort(rooms, room)
        open_rows[room].append((items, num_rows))

    for length in range(size, 0, -1):
        left = int(counts[length])
        while left:
            at = bisect.bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else size
            # A row that receives a fragment becomes the fullest one that has room, until no more fit into it.
            each = room // length
            items, num_rows = open_rows[room].pop() if at < len(rooms) else ((), -(-left // each))
            if at < len(rooms) and not open_rows[room]:
                del open_rows[room], rooms[at]
            full = min(num_rows, left // each)
            if full:
                add(room - each * length, (*items, (length, each)), full)
                left, num_rows = left - full * each, num_rows - full
            if num_rows and left:
                add(room - left * length, (*items, (length, left)), 1)
                left, num_rows = 0, num_rows - 1
            if num_rows:
                add(room, items, num_rows)
    return [Pattern(num_rows, items) for room in rooms for items, num_rows in open_rows[room]]
