"""Reads (memory-mapped) and writes the indexed data sets of Megatron-LM.

PREFIX.bin holds the ids, PREFIX.idx the locations of the documents:

    .idx   magic, uint64 version 1, uint8 code of the dtype, uint64 sequences, uint64 length of `documents`,
           int32 length of each sequence, int64 offset of each in .bin, in bytes,
           int64 documents: the first sequence of each, and the number of sequences; [int8 mode of each sequence]

All values are little-endian and unaligned. A document is one sequence, or several if it was split into sentences.
"""

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer

from camelid.errors import UserError

MAGIC = b"MMIDIDX\0\0"
OLD_MAGIC = b"TNTIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_TOKENS = 2**31 - 1  # per sequence
AGAIN = "Copy both files again, or create them again with tools/preprocess_data.py."


@dataclass(frozen=True, eq=False)
class IndexedData:
    """An open data set; only the header is read before a document is requested."""

    prefix: Path
    tokens: np.ndarray
    """The bytes of .bin."""
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents) - 1

    def document(self, index: int) -> Int32[np.ndarray, " n"]:
        """Returns the ids of a document; raises UserError if the files are inconsistent."""
        first, last = int(self.documents[index]), int(self.documents[index + 1])
        if not 0 <= first <= last <= len(self.lengths):
            raise UserError(f"{self.prefix}.idx: document {index + 1} is sequences {first} to {last}", AGAIN)
        parts = [self._sequence(number) for number in range(first, last)]
        ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
        if len(ids) and not 0 <= ids.min() <= ids.max() <= MAX_TOKENS:
            wrong = ids[(ids < 0) | (ids > MAX_TOKENS)][0]
            raise UserError(f"{self.prefix}.bin: document {index + 1} holds {wrong}, which is not a token id", AGAIN)
        return ids.astype(np.int32)

    def _sequence(self, number: int) -> np.ndarray:
        begin, length = int(self.pointers[number]), int(self.lengths[number])
        end = begin + length * self.dtype.itemsize
        if length < 0 or not 0 <= begin <= end <= len(self.tokens):
            raise UserError(
                f"{self.prefix}.idx: sequence {number + 1} is bytes {begin} to {end} of {len(self.tokens)}", AGAIN
            )
        return self.tokens[begin:end].view(self.dtype)


def pair(prefix: Path) -> tuple[Path, Path]:
    """Returns the paths of the two files of a data set, .bin and .idx."""
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


def is_indexed(prefix: Path) -> bool:
    """Whether one of the two files exists."""
    return any(file.is_file() for file in pair(prefix))


def open_indexed(prefix: Path) -> IndexedData:
    """Opens PREFIX.bin and PREFIX.idx; raises UserError if one of them is missing, damaged or of another type."""
    bin_file, idx_file = pair(prefix)
    for file in (bin_file, idx_file):
        if not file.is_file():
            raise UserError(f"{file} is missing", f"Megatron's data is two files, {bin_file.name} and {idx_file.name}.")
    try:
        index, tokens = _mapped(idx_file), _mapped(bin_file)
    except OSError as error:
        raise UserError(f"{prefix} cannot be read: {error}", "Check the files and their permissions.") from error
    head = index[: HEADER.size].tobytes()
    if head.startswith(OLD_MAGIC):
        raise UserError(
            f"{idx_file} is of an older format (TNTIDX)",
            "Create it again with tools/preprocess_data.py --dataset-impl mmap.",
        )
    if not head.startswith(MAGIC) or len(head) < HEADER.size:
        raise UserError(f"{idx_file} is not a Megatron index, or is truncated", AGAIN)
    _, version, code, sequences, num_borders = HEADER.unpack(head)
    if version != 1:
        raise UserError(f"{idx_file} is of version {version}; only 1 is supported", AGAIN)
    if code not in DTYPES or DTYPES[code].kind == "f":
        found = DTYPES[code].name if code in DTYPES else f"an unknown type, {code}"
        raise UserError(f"according to {idx_file}, {bin_file.name} holds {found}, which are not token ids", AGAIN)
    sizes = (4 * sequences, 8 * sequences, 8 * num_borders)
    ends = [HEADER.size + sum(sizes[:count]) for count in range(4)]
    modes = index[ends[3] :] if len(index) == ends[3] + sequences else index[:0]
    if len(index) - len(modes) != ends[3]:
        raise UserError(
            f"{idx_file} has {len(index)} bytes; {sequences} sequences of {num_borders - 1} documents need {ends[3]}",
            AGAIN,
        )
    if modes.any():
        raise UserError(f"{idx_file} has sequences that are not text (modes)", "Only text can be read.")
    lengths, pointers, documents = (
        index[begin:end].view(dtype) for begin, end, dtype in zip(ends, ends[1:], ("<i4", "<i8", "<i8"), strict=False)
    )
    if not num_borders or documents[0] != 0 or documents[-1] != sequences:
        raise UserError(f"{idx_file}: its documents do not cover all sequences", AGAIN)
    return IndexedData(prefix, tokens, DTYPES[code], lengths, pointers, documents)


def index_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype in which Megatron stores ids of a vocabulary of this size."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def write_indexed(
    prefix: Path, documents: Iterable[Integer[np.ndarray, " _"]], dtype: np.dtype, overwrite: bool = False
) -> None:
    """Writes PREFIX.bin and PREFIX.idx with one sequence per document, byte for byte as Megatron's own builder does.

    Raises UserError if the files exist already, or an id does not fit the dtype.
    """
    bin_file, idx_file = pair(prefix)
    dtype = np.dtype(dtype).newbyteorder("<")
    if dtype not in CODES or dtype.kind == "f":
        known = ", ".join(known.name for known in CODES if known.kind != "f")
        raise UserError(f"Megatron's data cannot hold {dtype.name}", f"Choose one of {known}.")
    for file in (bin_file, idx_file):
        if file.exists() and not overwrite:
            raise UserError(f"{file} exists already", "Choose another name, or allow overwriting.")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = [file.with_name(f".{file.name}.incomplete") for file in (bin_file, idx_file)]
    try:
        lengths = array("i")
        with temporary[0].open("wb") as file:
            for ids in documents:
                file.write(_fitting(ids, dtype, f"{prefix}: document {len(lengths) + 1}").tobytes())
                lengths.append(len(ids))
        temporary[1].write_bytes(_index(np.frombuffer(lengths, np.int32), dtype))
        # If this process is killed here, an old index must not be left with new tokens.
        idx_file.unlink(missing_ok=True)
        temporary[0].replace(bin_file)
        temporary[1].replace(idx_file)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


def _index(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    count = len(lengths)
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    pointers = np.concatenate([np.zeros(1, "<i8"), ends])[:count]
    head = HEADER.pack(MAGIC, 1, CODES[dtype], count, count + 1)
    return head + lengths.astype("<i4").tobytes() + pointers.tobytes() + np.arange(count + 1, dtype="<i8").tobytes()


def _fitting(ids: np.ndarray, dtype: np.dtype, location: str) -> np.ndarray:
    limits = np.iinfo(dtype)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= limits.max:
        wrong = ids[(ids < 0) | (ids > limits.max)][0]
        raise UserError(
            f"{location} holds id {wrong}, but {dtype.name} goes from 0 to {limits.max}", "Choose a larger dtype."
        )
    if len(ids) > MAX_TOKENS:
        raise UserError(f"{location} has {len(ids)} tokens; the maximum is {MAX_TOKENS}", "Split it.")
    return ids.astype(dtype)


def _mapped(file: Path) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
