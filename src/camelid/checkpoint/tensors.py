"""Tensors in files, read by byte range."""

import math
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from camelid.errors import UserError

CHUNK = 2**20  # bytes that are cast or copied at once; they stay in a core's cache
COMPARED_BYTES = 128 * 2**20  # bytes of each of two tensors that are compared at once
COLUMN_CACHE_BYTES = 256 * 2**20  # of a tensor that is read by columns are held at once

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INFINITY: Mapping[np.dtype, int] = {DTYPES["F16"]: 0x7C00, DTYPES["BF16"]: 0x7F80}
"""the bits of infinity, in the dtypes with a smaller range than float32"""

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, of which no values have been read."""

    file: Path
    name: str
    offset: int
    """bytes from the start of the file"""
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def files(self) -> frozenset[Path]:
        """All files that hold a part of it."""
        return frozenset({self.file})

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """Reads the slice `index` into a new array of a dtype."""
        out = np.empty([s.stop - s.start for s in index], dtype)
        self.read_into(out, index)
        return out

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Reads the slice `index` into `out`, a contiguous array of the slice's shape, and casts to its dtype.

        Rows of the first axis are read completely, CHUNK bytes at a time unless they are read directly into `out`.
        Raises UserError if the file ends early, or if a finite value is too large for the dtype of `out`.
        """
        rows = range(*index[0].indices(self.shape[0]))
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if len(rows) == 1 and len(self.shape) > 1:
            row = Tensor(self.file, self.name, self.offset + rows.start * row_bytes, self.shape[1:], self.dtype)
            return row.read_into(out[0], index[1:])
        complete_rows = all(range(n) == range(*s.indices(n)) for s, n in zip(index[1:], self.shape[1:], strict=True))
        with self.file.open("rb", buffering=0) as file:
            if complete_rows and out.dtype == self.dtype:
                return _read_exactly(file, self.offset + rows.start * row_bytes, out)
            step = max(1, CHUNK // max(row_bytes, 1))
            held = np.empty((min(step, len(rows)), *self.shape[1:]), self.dtype)
            for start in range(0, len(rows), step):
                chunk = held[: len(rows) - start]
                _read_exactly(file, self.offset + (rows.start + start) * row_bytes, chunk)
                cast(self, chunk[:, *index[1:]], out[start : start + step])


def cast(tensor: Tensor, values: np.ndarray, out: np.ndarray) -> None:
    """Assigns out[...] = values of a tensor; raises UserError if one is too large for the dtype of `out`."""
    _assign(f"{tensor.name} in {tensor.file}", values, out)


def rounded(what: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts values to a dtype; raises UserError that names `what` they are if one is too large for the dtype."""
    if values.dtype == dtype:
        return values
    out = np.empty(values.shape, dtype)
    _assign(what, values, out)
    return out


def _assign(what: str, values: np.ndarray, out: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        out[...] = values
    # Compares bits without the sign: isinf takes as long as the cast, and numpy detects no overflow from bfloat16.
    if out.dtype == values.dtype or (infinity := INFINITY.get(out.dtype)) is None:
        return
    if np.left_shift(out.view(np.uint16), 1).max(initial=0) < 2 * infinity:
        return
    if (beyond := np.isinf(out) & np.isfinite(values)).any():
        ends = {dtype.name: float(ml_dtypes.finfo(dtype).max) for dtype in CODES}
        end = ends[out.dtype.name]
        raise UserError(
            f"{what} holds {float(values[beyond][0]):.3g}, and the largest {out.dtype} is {end:.5g}",
            f"Choose {' or '.join(name for name, other in ends.items() if other > end)}.",
        )


def _read_exactly(file, offset: int, out: np.ndarray) -> None:
    view = out.reshape(-1).view(np.uint8).data
    while view:
        count = os.preadv(file.fileno(), [view], offset)
        if count == 0:
            raise UserError(f"{file.name} ended while it was read", "Download or copy the file again.")
        view, offset = view[count:], offset + count


@dataclass(frozen=True)
class ConcatenatedTensor(Tensor):
    """Tensors that are concatenated along an axis, such as the shards of one."""

    parts: tuple[Tensor, ...]
    axis: int

    @property
    def files(self) -> frozenset[Path]:
        """All files that hold a part of it."""
        return frozenset().union(*(part.files for part in self.parts))

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """As Tensor.read_into; reads the part of each tensor that is within the slice."""
        want, start = index[self.axis], 0
        before, after = index[: self.axis], index[self.axis + 1 :]
        for part in self.parts:
            stop = start + part.shape[self.axis]
            first, last = max(want.start, start), min(want.stop, stop)
            if first < last:
                at = out[*(slice(None) for _ in before), slice(first - want.start, last - want.start)]
                held = at if self.axis == 0 else np.empty(at.shape, out.dtype)
                part.read_into(held, (*before, slice(first - start, last - start), *after))
                if held is not at:
                    at[...] = held
            start = stop


def concatenate(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Concatenates tensors along an axis; raises UserError if their dtypes or other axes differ."""
    first, *rest = parts
    for part in rest:
        fits = part.dtype == first.dtype and len(part.shape) == len(first.shape)
        if not fits or any(a != b for i, (a, b) in enumerate(zip(first.shape, part.shape, strict=True)) if i != axis):
            raise UserError(
                f"{first.name} is {first.shape} {first.dtype} in {first.file}, and {part.shape} {part.dtype} in "
                f"{part.file}",
                "The shards belong to different checkpoints.",
            )
    if not rest:
        return first
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
    return ConcatenatedTensor(first.file, first.name, 0, shape, first.dtype, tuple(parts), axis)


@dataclass(frozen=True)
class CachedColumns:
    """Columns of a tensor that a thread has read."""

    tensor: Tensor
    around: tuple[Index, Index]
    """the slices of the axes before and after `axis`"""
    start: int
    values: np.ndarray
    axis: int

    def holds(self, tensor: Tensor, around: tuple[Index, Index], want: slice) -> bool:
        stop = self.start + self.values.shape[self.axis]
        # Tensors may share file and name: gate and up of one matrix.
        return self.tensor is tensor and self.around == around and self.start <= want.start and want.stop <= stop


class ColumnCache:
    """Reads tensors by columns: each thread keeps the columns that it had to read along with the requested ones."""

    def __init__(self) -> None:
        self._held = threading.local()

    def read(self, tensor: Tensor, index: Index, dtype: np.dtype) -> np.ndarray:
        """As `tensor.read`, but consecutive slices of columns read the file once for COLUMN_CACHE_BYTES of them."""
        cut = [axis for axis, n in enumerate(tensor.shape) if axis and index[axis] != slice(0, n)]
        if not cut:
            self._held.band = None
            return tensor.read(index, dtype)
        axis, want = cut[-1], index[cut[-1]]
        before, after = index[:axis], index[axis + 1 :]
        band: CachedColumns | None = getattr(self._held, "band", None)
        if band is None or not band.holds(tensor, (before, after), want):
            self._held.band = band = None  # freed before the next columns are read
            column = math.prod(s.stop - s.start for s in index) // (want.stop - want.start) * tensor.dtype.itemsize
            stop = min(max(want.stop, want.start + COLUMN_CACHE_BYTES // column), tensor.shape[axis])
            values = tensor.read((*before, slice(want.start, stop), *after), tensor.dtype)
            self._held.band = band = CachedColumns(tensor, (before, after), want.start, values, axis)
        within = [slice(None)] * axis + [slice(want.start - band.start, want.stop - band.start)]
        values = band.values[*within]
        if values.dtype == dtype:
            return values
        out = np.empty(values.shape, dtype)
        cast(tensor, values, out)
        return out


@dataclass(frozen=True)
class PlannedTensor:
    """Name, shape and dtype of a tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def same_values(one: Tensor, other: Tensor, *, transposed: bool = False) -> bool:
    """Whether two tensors are equal bit for bit; with `transposed`, whether `one` is the transpose of `other`.

    They are read in blocks of COMPARED_BYTES, up to the first difference. Scalars are never reported as equal.
    """
    shape = other.shape[::-1] if transposed else other.shape
    if (one.shape, one.dtype) != (shape, other.dtype) or not one.shape:
        return False
    length, *rest = other.shape
    bits = np.dtype(f"u{one.dtype.itemsize}")
    rows = max(1, COMPARED_BYTES // max(1, math.prod(rest) * bits.itemsize))
    for start in range(0, length, rows):
        index = (slice(start, min(start + rows, length)), *(slice(0, n) for n in rest))
        theirs = other.read(index, other.dtype).view(bits)
        ours = one.read(index[::-1] if transposed else index, one.dtype).view(bits)
        if not np.array_equal(ours.T if transposed else ours, theirs):
            return False
    return True


def files_holding(tensors: Iterable[Tensor]) -> list[Path]:
    """All files that hold some tensors, sorted."""
    return sorted(frozenset().union(*(tensor.files for tensor in tensors)))


def summarize(names: Sequence[str], most: int = 3) -> str:
    """The first `most` of some names, and how many more there are, for messages."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def file_names(files: Collection[Path], folder: Path, most: int = 3) -> str:
    """The first `most` of some files, relative to a folder, and how many more there are."""
    names = [str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file) for file in sorted(files)]
    return summarize(names, most)


def unverified_note(files: Collection[Path], folder: Path) -> tuple[str, ...]:
    """The note on files that are too large for their checksums to be verified when opened."""
    if not files:
        return ()
    are, their = ("are", "their checksums") if len(files) > 1 else ("is", "its checksums")
    return (f"{file_names(files, folder)} {are} larger than 1 GiB: convert --check verifies {their}",)


def dtype_named(name: str) -> np.dtype:
    """The numpy dtype of "float32", "bfloat16" or "float16"; raises UserError for another."""
    table = {dtype.name: dtype for dtype in CODES}
    if name not in table:
        raise UserError(f"dtype {name!r} is unknown", f"Choose one of {', '.join(table)}.")
    return table[name]
