"""Which documents share a row: planned once, from the documents' lengths, and mapped into memory afterwards."""

import bisect
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64

from camelid.data.store import locked, map_array, write_json

# S places of a row; a document of n tokens has n - 1: each but the last predicts the next

Overlong = Literal["split", "truncate", "drop"]

VERSION = 1
BLOCK = 2**20  # documents or rows that are worked on at once: what a plan needs of memory


@dataclass(frozen=True, eq=False)
class Plan:
    """The pieces of each row: rows[r] is the first of row r. A piece is `lengths` places from token `starts` on."""

    rows: Int64[np.ndarray, " rows"]
    starts: Int64[np.ndarray, " pieces"]
    lengths: Int32[np.ndarray, " pieces"]
    counts: dict[str, int]
    """rows, pieces, places, lost (places of what was cut off or dropped); documents, and how many of them are short (of
    one token, nothing to predict), split, truncated, dropped"""


@dataclass(frozen=True)
class Pattern:
    """Rows that are filled alike."""

    rows: int
    items: tuple[tuple[int, int], ...]
    """length and how many of it, the longest first"""


def open_plan(
    folder: Path, offsets: np.ndarray, sequence_length: int, *, whole_rows: bool, overlong: Overlong, fingerprint: str
) -> Plan:
    """The plan in a folder, made if it is not there.

    `offsets` (int64, documents + 1) says where documents begin; `whole_rows` gives each piece a row of its own, in the
    documents' order. `fingerprint` says whose documents they are.
    """
    about = {"version": VERSION, "store": fingerprint}
    manifest = folder / "plan.json"
    if (found := _read(manifest, about)) is None:
        work = folder.with_name(f".{folder.name}.incomplete")
        with locked(work):
            if (found := _read(manifest, about)) is None:
                shutil.rmtree(folder, ignore_errors=True)
                found = _write(work, offsets, sequence_length, whole_rows, overlong)
                write_json(work / "plan.json", about | {"counts": found})
                (work / ".lock").unlink()
                work.rename(folder)
            else:
                shutil.rmtree(work)
    rows, pieces = found["rows"], found["pieces"]
    return Plan(
        map_array(folder / "rows.bin", np.dtype("<i8"), rows + 1, at_random=True),
        map_array(folder / "starts.bin", np.dtype("<i8"), pieces, at_random=True),
        map_array(folder / "lengths.bin", np.dtype("<i4"), pieces, at_random=True),
        found,
    )


def _read(manifest: Path, about: dict[str, Any]) -> dict[str, int] | None:
    """The counts of a plan that is whole, and of this store."""
    if not manifest.is_file():
        return None
    content = json.loads(manifest.read_bytes())
    return content["counts"] if all(content.get(key) == value for key, value in about.items()) else None


def _write(
    folder: Path, offsets: np.ndarray, sequence_length: int, whole_rows: bool, overlong: Overlong
) -> dict[str, int]:
    counts = dict.fromkeys(("short", "split", "truncated", "dropped", "lost"), 0) | {"documents": len(offsets) - 1}
    of_length = np.zeros(sequence_length + 1, np.int64)
    for _, lengths in _pieces(offsets, sequence_length, overlong, counts):
        of_length += np.bincount(lengths, minlength=sequence_length + 1)
    counts["pieces"] = pieces = int(of_length.sum())
    counts["places"] = int(of_length @ np.arange(sequence_length + 1))
    blocks = _pieces(offsets, sequence_length, overlong, dict(counts))
    if whole_rows:
        counts["rows"] = pieces
        _lay_in_order(folder, blocks, pieces)
    else:
        patterns = fill(of_length)
        counts["rows"] = sum(pattern.rows for pattern in patterns)
        _lay_by_patterns(folder, blocks, patterns, of_length, counts["rows"])
    return counts


def _pieces(
    offsets: np.ndarray, sequence_length: int, overlong: Overlong, counts: dict[str, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Where the pieces of documents begin, and their lengths (int64), some documents at a time."""
    first, last = 0, len(offsets) - 1
    while first < last:
        # A few huge documents are many pieces, too.
        enough = int(np.searchsorted(offsets, offsets[first] + BLOCK * sequence_length))
        stop = min(first + BLOCK, max(enough, first + 1), last)
        bounds = np.array(offsets[first : stop + 1])
        starts, places = bounds[:-1], np.diff(bounds) - 1
        over = places > sequence_length
        counts["short"] += int(np.count_nonzero(places == 0))
        if overlong == "split":
            counts["split"] += int(np.count_nonzero(over))
            ways = -(-places // sequence_length)
            part = np.arange(ways.sum()) - np.repeat(np.cumsum(ways) - ways, ways)
            starts = np.repeat(starts, ways) + part * sequence_length
            lengths = np.minimum(np.repeat(places, ways) - part * sequence_length, sequence_length)
        else:
            kept = places > 0 if overlong == "truncate" else (places > 0) & ~over
            cut = np.minimum(places[kept], sequence_length)
            counts["truncated" if overlong == "truncate" else "dropped"] += int(np.count_nonzero(over))
            counts["lost"] += int(places.sum() - cut.sum())
            starts, lengths = starts[kept], cut
        yield starts, lengths
        first = stop


def fill(of_length: Int64[np.ndarray, " lengths"]) -> list[Pattern]:
    """Best fit, the longest pieces first: of_length[n] pieces of n places into rows of len(of_length) - 1.

    Each piece goes to the fullest row that has room. Pieces of one length are dealt out together, to rows of one kind
    together, so that the work grows with the kinds and not with the pieces.
    """
    size = len(of_length) - 1
    # By the room that is left: kinds of rows, each with how many there are of it.
    kinds: dict[int, list[tuple[tuple[tuple[int, int], ...], int]]] = {}
    rooms: list[int] = []  # the keys of `kinds`, sorted

    def add(room: int, items: tuple[tuple[int, int], ...], rows: int) -> None:
        if room not in kinds:
            kinds[room] = []
            bisect.insort(rooms, room)
        kinds[room].append((items, rows))

    for length in range(size, 0, -1):
        left = int(of_length[length])
        while left:
            at = bisect.bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else size
            # Once a row has the next piece it is the fullest one that has room, until there is none in it.
            each = room // length
            items, rows = kinds[room].pop() if at < len(rooms) else ((), -(-left // each))
            if at < len(rooms) and not kinds[room]:
                del kinds[room], rooms[at]
            whole = min(rows, left // each)
            if whole:
                add(room - each * length, (*items, (length, each)), whole)
                left, rows = left - whole * each, rows - whole
            if rows and left:
                add(room - left * length, (*items, (length, left)), 1)
                left, rows = 0, rows - 1
            if rows:
                add(room, items, rows)
    return [Pattern(rows, items) for room in rooms for items, rows in kinds[room]]


def _lay_in_order(folder: Path, blocks: Iterator[tuple[np.ndarray, np.ndarray]], pieces: int) -> None:
    rows, all_starts, all_lengths = _create(folder, pieces, pieces)
    rows[-1] = pieces
    done = 0
    for starts, lengths in blocks:
        stop = done + len(starts)
        rows[done:stop] = np.arange(done, stop)
        all_starts[done:stop], all_lengths[done:stop] = starts, lengths
        done = stop


def _lay_by_patterns(
    folder: Path,
    blocks: Iterator[tuple[np.ndarray, np.ndarray]],
    patterns: list[Pattern],
    of_length: np.ndarray,
    num_rows: int,
) -> None:
    pieces = int(of_length.sum())
    rows, starts, lengths = _create(folder, num_rows, pieces)
    # By length, in the documents' order: where the next piece of this length goes.
    places = np.memmap(folder / "places.bin", "<i8", "w+", shape=(max(1, pieces),))
    begin = np.cumsum(of_length) - of_length
    used = begin.copy()
    row = piece = 0
    for pattern in _in_blocks(patterns):
        width = sum(number for _, number in pattern.items)
        firsts = piece + width * np.arange(pattern.rows)
        rows[row : row + pattern.rows] = firsts
        column = 0
        for length, number in pattern.items:
            here = (firsts[:, None] + np.arange(column, column + number)).ravel()
            places[used[length] : used[length] + len(here)] = here
            lengths[here] = length
            used[length] += len(here)
            column += number
        row, piece = row + pattern.rows, piece + width * pattern.rows
    rows[-1] = pieces
    assert (row, piece) == (num_rows, pieces)
    used = begin
    for block_starts, block_lengths in blocks:
        order = np.argsort(block_lengths, kind="stable")
        number = np.bincount(block_lengths, minlength=len(of_length))
        # Among those of its length, the n-th piece takes the n-th place.
        nth = np.arange(len(order)) - np.repeat(np.cumsum(number) - number, number)
        starts[places[np.repeat(used, number) + nth]] = block_starts[order]
        used = used + number
    del places
    (folder / "places.bin").unlink()


def _in_blocks(patterns: list[Pattern]) -> Iterator[Pattern]:
    for pattern in patterns:
        most = max(1, BLOCK // sum(number for _, number in pattern.items))
        for first in range(0, pattern.rows, most):
            yield Pattern(min(most, pattern.rows - first), pattern.items)


def _create(folder: Path, rows: int, pieces: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rows, starts and lengths, mapped to be written."""

    def create(name: str, dtype: str, count: int) -> np.ndarray:
        if not count:
            (folder / name).touch()
            return np.empty(0, dtype)
        return np.memmap(folder / name, dtype, "w+", shape=(count,))

    return (
        create("rows.bin", "<i8", rows + 1),
        create("starts.bin", "<i8", pieces),
        create("lengths.bin", "<i4", pieces),
    )
