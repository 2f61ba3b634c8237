"""Which documents share a row: planned once, from the documents' lengths, and mapped into memory afterwards."""

import bisect
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64

from camelid.data.preparation.store import map_array, writing
from camelid.disk.atomic import write_json
from camelid.disk.locks import locked

# S places of a row; a document of n tokens has n - 1: each but the last predicts the next

Overlong = Literal["split", "truncate", "drop"]

MANIFEST, VERSION = "plan.json", 1
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
    if (found := _read(folder, about)) is None:
        work = folder.with_name(f".{folder.name}.incomplete")
        with locked(work), writing(folder):
            if (found := _read(folder, about)) is None:
                shutil.rmtree(folder, ignore_errors=True)
                found = _write(work, offsets, sequence_length, whole_rows, overlong)
                write_json(work / MANIFEST, about | {"counts": found})
                for name in (*_arrays(found), MANIFEST):
                    with (work / name).open("rb") as file:
                        os.fsync(file.fileno())
                (work / ".lock").unlink()
                work.rename(folder)
            else:
                shutil.rmtree(work)
    rows, starts, lengths = (map_array(folder / name, *kind, at_random=True) for name, kind in _arrays(found).items())
    return Plan(rows, starts, lengths, found)


def _arrays(counts: dict[str, int]) -> dict[str, tuple[np.dtype, int]]:
    """The files of a plan, in the order of Plan's fields: their type, and how many numbers they hold."""
    long, short = np.dtype("<i8"), np.dtype("<i4")
    rows, pieces = counts["rows"], counts["pieces"]
    return {"rows.bin": (long, rows + 1), "starts.bin": (long, pieces), "lengths.bin": (short, pieces)}


def _read(folder: Path, about: dict[str, Any]) -> dict[str, int] | None:
    """The counts of a plan that is whole, and of this store."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        arrays = _arrays(content["counts"])
        sizes = {name: (folder / name).stat().st_size for name in arrays}
    except (OSError, ValueError, LookupError, TypeError):
        return None  # what is damaged is made again
    whole = sizes == {name: dtype.itemsize * count for name, (dtype, count) in arrays.items()}
    return content["counts"] if whole and about.items() <= content.items() else None


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
        _lay_in_order(folder, blocks, counts)
    else:
        patterns = fill(of_length)
        counts["rows"] = sum(pattern.rows for pattern in patterns)
        _lay_by_patterns(folder, blocks, patterns, of_length, counts)
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


def _lay_in_order(folder: Path, blocks: Iterator[tuple[np.ndarray, np.ndarray]], counts: dict[str, int]) -> None:
    rows, all_starts, all_lengths = _create(folder, counts)
    rows[-1] = counts["pieces"]
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
    counts: dict[str, int],
) -> None:
    rows, starts, lengths = _create(folder, counts)
    # By length, in the documents' order: where the next piece of this length goes.
    places = _mapped(folder / "places.bin", starts.dtype, len(starts))
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
    rows[-1] = counts["pieces"]
    assert (row, piece) == (counts["rows"], counts["pieces"])
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


def _create(folder: Path, counts: dict[str, int]) -> list[np.ndarray]:
    """The arrays of a plan, mapped to be written."""
    return [_mapped(folder / name, *kind) for name, kind in _arrays(counts).items()]


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    with path.open("wb") as file:
        if not count:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        # Where a disk is full, writing into a mapped file ends the process without a word.
        os.posix_fallocate(file.fileno(), 0, dtype.itemsize * count)
    return np.memmap(path, dtype, "r+")
