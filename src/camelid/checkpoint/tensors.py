"""Safetensors files: tensors read by byte range, and written one after another.

The format (huggingface/safetensors, README "Format"): 8 bytes with the header's length N, N bytes of JSON that gives
each tensor's dtype, shape and byte range, and the bytes of all tensors without gaps.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from camelid.errors import UserError

CHUNK = 2**20  # bytes in flight while a tensor is cast or copied; few enough to stay in a core's cache
MAX_HEADER = 100 * 2**20  # bytes; the reference implementation refuses longer ones

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor that still lies in its file."""

    file: Path
    name: str
    offset: int
    """bytes from the start of the file"""
    shape: tuple[int, ...]
    dtype: np.dtype

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fills `out`, contiguous and of the shape that `index` cuts, casting to its dtype.

        Reads whole rows of the first axis, at most CHUNK bytes at a time unless they go straight into `out`.
        """
        rows = range(*index[0].indices(self.shape[0]))
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        whole_rows = all(range(n) == range(*s.indices(n)) for s, n in zip(index[1:], self.shape[1:], strict=True))
        with self.file.open("rb", buffering=0) as file:
            if whole_rows and out.dtype == self.dtype:
                return _read_exactly(file, self.offset + rows.start * row_bytes, out)
            step = max(1, CHUNK // max(row_bytes, 1))
            held = np.empty((min(step, len(rows)), *self.shape[1:]), self.dtype)
            for start in range(0, len(rows), step):
                chunk = held[: len(rows) - start]
                _read_exactly(file, self.offset + (rows.start + start) * row_bytes, chunk)
                out[start : start + step] = chunk[:, *index[1:]]


def _read_exactly(file, offset: int, out: np.ndarray) -> None:
    view = out.reshape(-1).view(np.uint8).data
    while view:
        count = os.preadv(file.fileno(), [view], offset)
        if count == 0:
            raise UserError(f"{file.name} ended while it was read", "Download or copy the file again.")
        view, offset = view[count:], offset + count


@dataclass(frozen=True)
class Joined(Tensor):
    """Tensors of several files that lie end to end along an axis, as shards of one."""

    parts: tuple[Tensor, ...]
    axis: int

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fills `out`, contiguous and of the shape that `index` cuts, casting to its dtype."""
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


def joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """One tensor of shards; raises UserError where they do not fit together."""
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
    return Joined(first.file, first.name, 0, shape, first.dtype, tuple(parts), axis)


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, checked against its size; raises UserError where the file is cut short or not one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UserError(f"{path} is not a safetensors file, or is cut short", "Download or copy the file again.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path} has an unreadable header ({error})", "Download or copy the file again.") from error
    try:
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a header of another format", "Download or copy the file again.") from error
    if end != size:
        raise UserError(
            f"{path} is cut short: its header speaks of {end:,} bytes and it has {size:,}"
            if size < end
            else f"{path} has {size - end:,} bytes after its last tensor",
            "Download or copy the file again.",
        )
    return tensors


def _tensor(path: Path, name: str, entry: dict, start: int) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(
            f"tensor {name} in {path} is {entry['dtype']}; camelid reads {', '.join(DTYPES)}",
            "Save the checkpoint in one of these dtypes first.",
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise UserError(f"tensor {name} in {path} has {last - first} bytes for {shape} {dtype}", "The file is damaged.")
    return Tensor(path, name, start + first, shape, dtype)


@dataclass(frozen=True)
class Planned:
    """A tensor that is still to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Sequence[Planned], pieces: Iterable[Iterator[np.ndarray]]) -> None:
    """Writes one file; `pieces` gives, for each tensor in turn, arrays that lie end to end in it."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor, parts in zip(tensors, pieces, strict=True):
            written = 0
            for part in parts:
                part = np.ascontiguousarray(part, tensor.dtype)
                file.write(part.reshape(-1).view(np.uint8).data)
                written += part.nbytes
            assert written == tensor.bytes, f"{tensor.name}: {written} bytes written, {tensor.bytes} promised"
        file.flush()
        os.fsync(file.fileno())


def dtype_named(name: str) -> np.dtype:
    """The numpy dtype of "float32", "bfloat16" or "float16"; raises UserError for another."""
    table = {dtype.name: dtype for dtype in CODES}
    if name not in table:
        raise UserError(f"dtype {name!r} is unknown", f"Choose one of {', '.join(table)}.")
    return table[name]
