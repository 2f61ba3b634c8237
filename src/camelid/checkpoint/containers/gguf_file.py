"""Reads and writes the container of GGUF files: metadata and tensors by name.

A file (ggml, docs/gguf.md, versions 2 and 3, little-endian; text is its length in 8 bytes, and UTF-8):

    "GGUF", version (4 bytes), count of tensors (8), count of metadata (8)
    metadata    key (text), type (4), value; an array's value is a type (4), a count (8) and the values
    tensors     name (text), count of axes (4), sizes (8 each, the last axis first), type (4), offset (8)
    data        at the next multiple of general.alignment (32), every tensor padded to one
"""

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from camelid.checkpoint.containers.ggml import GGML_TYPES, PLAIN, QUANTIZATIONS, QuantizedTensor, bytes_of
from camelid.checkpoint.files import PlannedFile, TensorPayload
from camelid.checkpoint.tensors import DTYPES, PlannedTensor, Tensor
from camelid.errors import UserError
from camelid.inputs import refuse_stand_in

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32
MAX_HEADER = 256 * 2**20  # bytes; the vocabulary of Llama 3 needs 8 million
AGAIN = "Download or copy the file again."

# By code (gguf.md, gguf_metadata_value_type).
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, INT32, FLOAT32, BOOL, TEXT, ARRAY = 4, 5, 6, 7, 8, 9

# Reading --------------------------------------------------------------------------------


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Opens a file: its metadata, and its tensors by name; raises UserError if it is damaged or not supported."""
    refuse_stand_in(path)
    with path.open("rb") as file:
        header = HeaderReader(path, file)
        if header.end < 24 or header.take(4) != MAGIC:
            raise UserError(f"{path} is not a GGUF file, or is cut short", AGAIN)
        version = header.number("I")
        if version not in VERSIONS:
            big = " (big-endian)" if version & 0xFFFF == 0 else ""
            raise UserError(f"{path} is GGUF of version {version}{big}; camelid reads 2 and 3", "Convert it again.")
        counts = header.number("Q"), header.number("Q")
        held: dict[str, Any] = {}
        for _ in range(counts[1]):
            key = header.name()
            if key in held:
                raise header.damaged(f"{key} is there twice")
            held[key] = header.value(header.number("I"))
        _check_architecture(path, held)
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(counts[0]):
            name = header.name()
            rank = header.number("I")
            if name in entries or not 1 <= rank <= 4:
                raise header.damaged(f"{name} is there twice" if name in entries else f"{name} has {rank} axes")
            shape = tuple(header.number("Q") for _ in range(rank))[::-1]
            entries[name] = shape, header.number("I"), header.number("Q")
        alignment = held.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise header.damaged(f"general.alignment = {describe_value(alignment)}")
        return held, _tensors(header, entries, alignment)


@dataclass(frozen=True)
class LazyArray:
    """An array of the metadata, which is read on demand."""

    count: int
    item: int
    """the type code of each item"""
    at: int
    """the offset of the first item in the file, in bytes"""

    def read(self, path: Path) -> list[Any]:
        """Reads the values; raises UserError for text that is not UTF-8."""
        with path.open("rb") as file:
            header = HeaderReader(path, file)
            header.skip(self.at)
            if self.item in NUMBERS:
                packed = header.take(self.count * struct.calcsize(f"<{NUMBERS[self.item]}"))
                return list(struct.unpack(f"<{self.count}{NUMBERS[self.item]}", packed))
            try:
                return [header.take(header.number("Q")).decode() for _ in range(self.count)]
            except UnicodeDecodeError as error:
                raise header.damaged(f"a text of its metadata is not UTF-8 before {header.at:,}") from error


class HeaderReader:
    """Reads the header of a file, and never more bytes than there are."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.at, self.end = 0, min(os.fstat(file.fileno()).st_size, MAX_HEADER)

    def damaged(self, how: str) -> UserError:
        return UserError(f"{self.path} is cut short or damaged: {how}", AGAIN)

    def skip(self, count: int) -> None:
        if count > self.end - self.at:
            raise self.damaged(f"its header needs {count:,} bytes at {self.at:,}")
        self.at = self.file.seek(self.at + count)

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise self.damaged(f"its header needs {count:,} bytes at {self.at:,}")
        self.at += count
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def name(self) -> str:
        raw = self.take(self.number("Q"))
        if not raw.isascii() or not raw.decode("ascii").isprintable() or not 0 < len(raw) < 2**16:
            raise self.damaged("a name is not plain text")
        return raw.decode("ascii")

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.take(self.number("Q")).decode("utf-8", "replace")
        if kind != ARRAY:
            raise self.damaged(f"its metadata has a value of type {kind}")
        item, count = self.number("I"), self.number("Q")
        items = LazyArray(count, item, self.at)
        if item in NUMBERS:
            self.skip(count * struct.calcsize(f"<{NUMBERS[item]}"))
        elif item == TEXT:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise self.damaged(f"its metadata has an array of type {item}")
        return items


def _check_architecture(path: Path, held: Mapping[str, Any]) -> None:
    architecture, kind = held.get("general.architecture"), held.get("general.type", "model")
    if architecture != "llama":
        raise UserError(
            f"{path} has general.architecture = {describe_value(architecture)}; camelid reads 'llama'",
            "Use the original checkpoint; camelid opens most families from Hugging Face folders.",
        )
    if kind != "model":
        raise UserError(
            f"{path} has general.type = {describe_value(kind)}, and is not a model", "Give the file of the model."
        )
    if held.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{path} is one of {describe_value(held['split.count'])} parts",
            "Join them first: llama-gguf-split --merge FIRST OUT.",
        )


def _tensors(header: HeaderReader, entries: Mapping[str, tuple], alignment: int) -> dict[str, Tensor]:
    path, size = header.path, os.fstat(header.file.fileno()).st_size
    start, end, next_offset = _padded(header.at, alignment), 0, 0
    tensors: dict[str, Tensor] = {}
    for name, (shape, code, offset) in entries.items():
        if code not in PLAIN and (code not in QUANTIZATIONS or len(shape) < 2):
            kind = GGML_TYPES[code] if code < len(GGML_TYPES) else f"of type {code}"
            readable = ", ".join(
                [dtype.name for dtype in PLAIN.values()] + [kind.name for kind in QUANTIZATIONS.values()]
            )
            raise UserError(
                f"tensor {name} in {path} is {kind} with {len(shape)} axes; camelid reads {readable}",
                "Quantize it as Q8_0 or convert it again as F16, or use the original checkpoint.",
            )
        if math.prod(shape) == 0 or (code in QUANTIZATIONS and shape[-1] % QUANTIZATIONS[code].block):
            raise header.damaged(f"{name} has shape {shape}")
        if offset != next_offset:  # llama.cpp requires the same
            raise header.damaged(f"{name} is at {offset:,} and not at {next_offset:,}")
        if code in PLAIN:
            tensors[name] = Tensor(path, name, start + offset, shape, PLAIN[code])
        else:
            tensors[name] = QuantizedTensor(path, name, start + offset, shape, DTYPES["F32"], QUANTIZATIONS[code].name)
        end = offset + bytes_of(shape, code)
        next_offset = _padded(end, alignment)
    if not start + end <= size <= start + next_offset:
        raise header.damaged(f"its header describes {start + end:,} bytes and it has {size:,}")
    return tensors


def _padded(count: int, alignment: int = ALIGNMENT) -> int:
    return -(-count // alignment) * alignment


def describe_value(value: Any) -> str:
    """A value of the metadata, for messages."""
    return f"a list of {value.count}" if isinstance(value, LazyArray) else ascii(value)[:80]


# Writing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    code: int

    @property
    def bytes(self) -> int:
        return bytes_of(self.shape, self.code)

    @property
    def planned(self) -> PlannedTensor:
        """The tensor before quantization: float32 if it is to be quantized."""
        return PlannedTensor(self.name, self.shape, PLAIN.get(self.code, DTYPES["F32"]))


def gguf_file(
    name: str,
    held: Mapping[str, tuple[int, Any]],
    entries: Sequence[TensorInfo],
    payloads: Sequence[TensorPayload],
    notes: tuple[str, ...] = (),
) -> PlannedFile:
    """Plans a file; `held` maps metadata keys to a type code and a value, which for arrays is (item type, items)."""
    header = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(entries), len(held))]
    for key, (kind, value) in held.items():
        header += [_packed(TEXT, key), struct.pack("<I", kind), _packed(kind, value)]
    offset = 0
    for entry in entries:
        shape = entry.shape[::-1]
        place = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, entry.code, offset)
        header += [_packed(TEXT, entry.name), place]
        offset += _padded(entry.bytes)
    front = b"".join(header)
    parts: list[bytes | TensorPayload] = [front.ljust(_padded(len(front)), b"\0")]
    for payload in payloads:
        parts += [payload, bytes(_padded(payload.size) - payload.size)]
    return PlannedFile(name, parts, notes=notes)


def _packed(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return struct.pack("<Q", len(value.encode())) + value.encode()
    if kind == ARRAY:
        item, items = value
        return struct.pack("<IQ", item, len(items)) + b"".join(_packed(item, each) for each in items)
    return struct.pack(f"<{NUMBERS[kind]}", value)
