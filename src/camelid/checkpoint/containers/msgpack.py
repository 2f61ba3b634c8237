"""Reads and writes the subset of msgpack that flax uses, without loading arrays.

Every value is a head of 1 to 9 bytes, followed by its contents (github.com/msgpack/msgpack, spec.md).
flax.serialization packs

    an array          ext 1 of [shape, dtype name, bin of little-endian elements in C order]; ext 3 is a scalar
    one above LIMIT   {"__msgpack_chunked_array__": true, "shape": {"0": n, ..}, "chunks": {"0": flat array, ..}}
    a tree            maps of them; a file is one tree

EasyLM's streams (EasyLM/checkpoint.py) are consecutive records: [key, bin], an array of names and a value in a bin.
"""

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from camelid.checkpoint.files import Chunks, PlannedFile, TensorPayload
from camelid.checkpoint.tensors import CHUNK, PlannedTensor, Tensor, cast
from camelid.errors import UserError
from camelid.inputs import refuse_stand_in

LIMIT = 2**30  # bytes; flax splits larger arrays
MAX_RECORD = 2**32 - 1  # bytes; the maximum size of a bin
MAX_TEXT = 1000  # bytes of a name
MAX_DEPTH = 32  # nesting of maps, and names in a key; the train state of a Llama has 11
MARK = "__msgpack_chunked_array__"
AGAIN = "Download or copy the file again."

DTYPES: Mapping[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{
        name: np.dtype(name)
        for name in "float16 float32 float64 bool int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
    },
}
Leaf = Tensor | int | float | str | None

# Heads by first byte: the type of the value, and the struct format of its size or, for a number, of its value.
CONSTANTS: Mapping[int, Any] = {0xC0: None, 0xC2: False, 0xC3: True}
COUNTED: Mapping[int, tuple[str, str]] = {
    **{0xC4 + i: ("bin", form) for i, form in enumerate((">B", ">H", ">I"))},
    **{0xC7 + i: ("ext", form) for i, form in enumerate((">B", ">H", ">I"))},
    **{0xCA + i: ("value", f">{form}") for i, form in enumerate("fdBHIQbhiq")},
    **{0xD9 + i: ("str", form) for i, form in enumerate((">B", ">H", ">I"))},
    **{0xDC + i: ("array", form) for i, form in enumerate((">H", ">I"))},
    **{0xDE + i: ("map", form) for i, form in enumerate((">H", ">I"))},
}


# Reading --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkedTensor(Tensor):
    """A tensor whose elements are stored in consecutive flat arrays; a row may span two of them."""

    parts: tuple[Tensor, ...]

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """As Tensor.read_into."""
        rows = range(*index[0].indices(self.shape[0]))
        width = math.prod(self.shape[1:])
        if all(range(n) == range(*s.indices(n)) for s, n in zip(index[1:], self.shape[1:], strict=True)):
            return self._read_flat(out.reshape(-1), rows.start * width)
        step = max(1, CHUNK // max(width * self.dtype.itemsize, 1))
        for start in range(0, len(rows), step):
            held = np.empty((min(step, len(rows) - start), *self.shape[1:]), self.dtype)
            self._read_flat(held.reshape(-1), (rows.start + start) * width)
            cast(self, held[:, *index[1:]], out[start : start + step])

    def _read_flat(self, out: np.ndarray, first: int) -> None:
        start = 0
        for part in self.parts:
            stop = start + part.shape[0]
            low, high = max(first, start), min(first + len(out), stop)
            if low < high:
                part.read_into(out[low - first : high - first], (slice(low - start, high - start),))
            start = stop


def open_stream(path: Path) -> dict[str, Leaf]:
    """Opens the leaves of a stream of records, by their names joined with "/"; raises UserError if it is damaged."""
    return _read(path, _records)


def open_tree(path: Path) -> dict[str, Leaf]:
    """Opens the leaves of a file with one tree, by their names joined with "/"; raises UserError if it is damaged."""
    return _read(path, _tree)


class _Cursor:
    """A position in a file, from which heads are read; the contents of arrays are skipped."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size
        self.at = 0
        self.key: tuple[str, ...] = ()
        """the key that is being read, for messages"""

    def need(self, count: int) -> None:
        if count > self.size - self.at:
            raise ValueError(f"{count:,} bytes should follow, and {self.size - self.at:,} do")

    def take(self, count: int) -> bytes:
        self.need(count)
        taken = self.file.read(count)
        self.at += len(taken)
        if len(taken) != count:
            raise ValueError("the file ended while it was read")
        return taken

    def skip(self, count: int) -> None:
        self.need(count)
        self.at += count
        self.file.seek(self.at)

    def head(self) -> tuple[str, Any]:
        """Reads the type of the next value, and its value or size; the code of an ext is not read."""
        byte = self.take(1)[0]
        if byte < 0x80 or byte >= 0xE0:
            return "value", byte if byte < 0x80 else byte - 256
        if byte < 0xC0:
            kind, mask = ("map", 15) if byte < 0x90 else ("array", 15) if byte < 0xA0 else ("str", 31)
            return kind, byte & mask
        if 0xD4 <= byte <= 0xD8:
            return "ext", 1 << (byte - 0xD4)
        if byte in CONSTANTS:
            return "value", CONSTANTS[byte]
        if byte not in COUNTED:
            raise ValueError("a byte that msgpack does not use")
        kind, form = COUNTED[byte]
        return kind, struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, kind: str, most: int = MAX_RECORD) -> int:
        """The count of what must be of a kind."""
        found, count = self.head()
        if found != kind or count > most:
            raise ValueError(f"no {kind} where one should be, or an absurd one")
        return count

    def integer(self) -> int:
        kind, value = self.head()
        return _integer(value if kind == "value" else None)

    def text(self) -> str:
        text = self.take(self.count("str", MAX_TEXT)).decode()
        if not text.isprintable():
            raise ValueError("a name that cannot be printed")
        return text


def _read(path: Path, parse: Callable[[_Cursor], dict[str, Leaf]]) -> dict[str, Leaf]:
    refuse_stand_in(path)
    with path.open("rb") as file:
        cursor = _Cursor(path, file)
        try:
            return parse(cursor)
        except UserError:
            raise
        except ValueError as error:
            key = "/".join(cursor.key) or "the first key"
            problem = f"{path} is cut short or damaged: at {key}, byte {cursor.at:,}, {error}"
            raise UserError(problem, AGAIN) from error


def _records(cursor: _Cursor) -> dict[str, Leaf]:
    leaves: dict[str, Leaf] = {}
    while cursor.at < cursor.size:
        if cursor.count("array") != 2:
            raise ValueError("a record is not a key and a value")
        key = tuple(cursor.text() for _ in range(cursor.count("array", MAX_DEPTH)))
        cursor.key = key
        end = cursor.count("bin") + cursor.at
        _add(leaves, key, _value(cursor, key))
        if cursor.at != end:
            raise ValueError("the length of the record differs from its header")
    return leaves


def _tree(cursor: _Cursor) -> dict[str, Leaf]:
    leaves: dict[str, Leaf] = {}
    _add(leaves, (), _value(cursor, ()))
    if cursor.at != cursor.size:
        raise ValueError("more follows after the tree's end")
    return leaves


def _add(leaves: dict[str, Leaf], key: tuple[str, ...], value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _add(leaves, (*key, name), inner)
    elif (name := "/".join(key)) in leaves:
        raise ValueError("the key occurs twice")
    else:
        leaves[name] = value


def _value(cursor: _Cursor, key: tuple[str, ...]) -> Any:
    """A leaf, or a dict of values."""
    kind, count = cursor.head()
    match kind:
        case "value":
            return count
        case "map":
            return _map(cursor, key, count)
        case "ext":
            return _array(cursor, key, count)
    raise ValueError(f"msgpack's {kind}, which is neither an array of numbers nor a number")


def _map(cursor: _Cursor, key: tuple[str, ...], count: int) -> Any:
    if len(key) >= MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} nested maps")
    held: dict[str, Any] = {}
    for _ in range(count):
        cursor.key = key
        name = cursor.text()
        cursor.key = (*key, name)
        if name in held:
            raise ValueError("the key occurs twice")
        held[name] = _value(cursor, cursor.key)
    return _chunked(cursor, key, held) if MARK in held else held


def _array(cursor: _Cursor, key: tuple[str, ...], length: int) -> Tensor | int | float:
    code = cursor.take(1)[0]
    cursor.need(length)
    end = cursor.at + length
    if code not in (1, 3):
        raise ValueError(f"an extension of type {code} where an array of numbers should be")
    if cursor.count("array") != 3:
        raise ValueError("an array of numbers without its three parts")
    shape = tuple(cursor.integer() for _ in range(cursor.count("array", MAX_DEPTH)))
    dtype = DTYPES.get(name := cursor.text())
    if dtype is None:
        raise UserError(
            f"{'/'.join(key)} in {cursor.path} is {name}; camelid reads {', '.join(DTYPES)}",
            "Save the checkpoint in one of these dtypes first.",
        )
    count = cursor.count("bin")
    if count != math.prod(shape) * dtype.itemsize or cursor.at + count != end:
        raise ValueError(f"{count:,} bytes are not a {dtype} array of shape {shape}")
    if not shape:
        number = np.frombuffer(cursor.take(count), dtype)[0]
        return float(number) if dtype.name in ("bfloat16", "float16", "float32", "float64") else int(number)
    tensor = Tensor(cursor.path, "/".join(key), cursor.at, shape, dtype)
    cursor.skip(count)
    return tensor


def _chunked(cursor: _Cursor, key: tuple[str, ...], held: Mapping[str, Any]) -> Tensor:
    if held.keys() != {MARK, "shape", "chunks"}:
        raise ValueError("a chunked array with other entries than a shape and chunks")
    shape = tuple(map(_integer, _listed(held["shape"])))
    parts = tuple(_listed(held["chunks"]))
    same = all(isinstance(part, Tensor) and len(part.shape) == 1 and part.dtype == parts[0].dtype for part in parts)
    if not (shape and same) or sum(part.shape[0] for part in parts) != math.prod(shape):
        raise ValueError(f"its chunks do not form an array of shape {shape}")
    return ChunkedTensor(cursor.path, "/".join(key), parts[0].offset, shape, parts[0].dtype, parts)


def _listed(held: Any) -> list[Any]:
    """The values of {"0": .., "1": ..}, in that order."""
    if not isinstance(held, dict) or not held or held.keys() != {str(i) for i in range(len(held))}:
        raise ValueError("a chunked array whose shape or chunks are not numbered from 0")
    return [held[str(i)] for i in range(len(held))]


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a shape that does not consist of integers")
    return value


# Writing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scalar:
    """An integer that is written as an int32 array without axes, as jit returns it."""

    name: str
    value: int


def stream_file(name: str, records: Sequence[TensorPayload | Scalar]) -> PlannedFile:
    """Plans a file of records in this order."""
    parts: list[bytes | TensorPayload] = []
    for record in records:
        if isinstance(record, Scalar):
            head, _ = _ext((), np.dtype(np.int32))
            assert isinstance(head, bytes)
            value = head + struct.pack("<i", record.value)
            parts.append(_key(record.name) + _counted("bin", len(value)) + value)
            continue
        tensor = record.tensor
        value = _leaf(tensor)
        if (length := _length(value)) > MAX_RECORD:
            raise UserError(
                f"{tensor.name} has {length:,} bytes, and a record of EasyLM's streams holds {MAX_RECORD:,}",
                "Save in bfloat16, or in another format.",
            )
        parts += [_key(tensor.name) + _counted("bin", length), _with_heads(record, value)]
    return PlannedFile(name, parts)


def _key(name: str) -> bytes:
    """The bytes before a record's value."""
    words = name.split("/")
    return _counted("array", 2) + _counted("array", len(words)) + b"".join(map(_text, words))


def tree_file(name: str, payloads: Sequence[TensorPayload]) -> PlannedFile:
    """Plans a file of one tree, with maps in the order in which names first appear, and tensors in this order."""
    tree: dict[str, Any] = {}
    for payload in payloads:
        *outer, last = payload.tensor.name.split("/")
        inner = tree
        for word in outer:
            inner = inner.setdefault(word, {})
        inner[last] = payload

    def parts(held: Any) -> Iterator[bytes | TensorPayload]:
        if isinstance(held, TensorPayload):
            yield _with_heads(held, _leaf(held.tensor))
            return
        yield _counted("map", len(held))
        for word, inner in held.items():
            yield _text(word)
            yield from parts(inner)

    assert list(payloads) == list(_leaves(tree)), "tensors of one branch are not adjacent"
    return PlannedFile(name, list(parts(tree)))


def _leaves(tree: Mapping[str, Any]) -> Iterator[TensorPayload]:
    for held in tree.values():
        yield from (held,) if isinstance(held, TensorPayload) else _leaves(held)


Parts = list[bytes | int]
"""bytes, and the number of bytes of a tensor's elements that follow them"""


def _leaf(tensor: PlannedTensor) -> Parts:
    if tensor.bytes <= LIMIT:
        return _ext(tensor.shape, tensor.dtype)
    count, most = math.prod(tensor.shape), max(1, LIMIT // tensor.dtype.itemsize)
    starts = range(0, count, most)
    head = _counted("map", 3) + _text(MARK) + b"\xc3"
    head += _text("shape") + _counted("map", len(tensor.shape))
    head += b"".join(_text(str(i)) + _number(n) for i, n in enumerate(tensor.shape))
    parts: Parts = [head + _text("chunks") + _counted("map", len(starts))]
    for i, start in enumerate(starts):
        parts += [_text(str(i)), *_ext((min(most, count - start),), tensor.dtype)]
    return parts


def _ext(shape: tuple[int, ...], dtype: np.dtype) -> Parts:
    count = math.prod(shape) * dtype.itemsize
    inner = _counted("array", 3) + _counted("array", len(shape)) + b"".join(map(_number, shape))
    inner += _text(dtype.name) + _counted("bin", count)
    length = len(inner) + count
    fixed = (1, 2, 4, 8, 16)
    head = bytes([0xD4 + fixed.index(length)]) if length in fixed else _counted("ext", length)
    return [head + b"\x01" + inner, count]


def _length(parts: Parts) -> int:
    return sum(len(part) if isinstance(part, bytes) else part for part in parts)


def _with_heads(payload: TensorPayload, parts: Parts) -> TensorPayload:
    """A tensor with the bytes before and between its elements."""

    def chunks() -> Chunks:
        numbers, left = iter(payload.chunks()), np.empty(0, np.uint8)
        for part in parts:
            if isinstance(part, bytes):
                yield part
                continue
            while part:
                if not left.size:
                    chunk = next(numbers)
                    assert isinstance(chunk, np.ndarray)
                    left = chunk.reshape(-1).view(np.uint8)
                now, left = left[:part], left[part:]
                yield now
                part -= now.size
        assert not left.size, "more values than the plan has"
        assert next(numbers, None) is None, "more values than the plan has"

    return TensorPayload(payload.tensor, _length(parts), chunks)


SMALL = {"map": (0x80, 15), "array": (0x90, 15), "str": (0xA0, 31)}
"""the first byte of a head that includes the size, and the largest such size"""


def _counted(kind: str, count: int) -> bytes:
    """The shortest head for a size, as all writers of msgpack use it."""
    first, most = SMALL.get(kind, (0, -1))
    if count <= most:
        return bytes([first + count])
    return _shortest(kind, count)


def _number(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else _shortest("value", value)


def _shortest(kind: str, count: int) -> bytes:
    for byte, (found, form) in COUNTED.items():
        if found == kind and form in (">B", ">H", ">I", ">Q") and count < 1 << 8 * struct.calcsize(form):
            return bytes([byte]) + struct.pack(form, count)
    raise ValueError(f"{count} is too much for a {kind}")


def _text(text: str) -> bytes:
    return _counted("str", len(text.encode())) + text.encode()
