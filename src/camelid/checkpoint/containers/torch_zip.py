"""The zip archives that torch.save writes, read and written without torch.

An archive (torch/serialization.py, _save) holds R/data.pkl, R/byteorder, and R/data/<key> for each storage, where R is
any folder. Entries are not compressed. A CRC-32 of 0 means that the entry has no checksum
(torch.serialization.set_crc32_options).
"""

import functools
import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.containers.torch_tensors import MAX_PICKLE, Storage, check_byte_order, dump_pickle, load_pickle
from camelid.checkpoint.files import DeferredBytes, PlannedFile, TensorPayload
from camelid.checkpoint.tensors import CHUNK
from camelid.errors import UserError

# Reading ----------------------------------------------------------------------------------


class FileSection(io.RawIOBase):
    """A section of an open file, as a file object."""

    def __init__(self, file: io.BufferedReader, start: int, count: int) -> None:
        self.start, self.count = start, count
        self._file, self._at = file, 0
        if not 0 <= start <= start + count <= os.fstat(file.fileno()).st_size:
            raise ValueError(f"bytes {start:,} to {start + count:,} are not inside the file")

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.count}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.count - self._at)
        self._file.seek(self.start + self._at)
        held = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(held)
        return held


def read_archive(path: Path, file: FileSection, inert: re.Pattern[str] | None, verify: bool) -> Any:
    size = file.count
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise UserError(f"{path} is a zip archive without a PyTorch checkpoint", "Unpack it and give the file inside.")

    @functools.cache
    def place(name: str) -> tuple[int, int]:
        """The offset and size of an entry, whose checksum is verified with `verify`."""
        entry = entries[roots[0] + name]
        if _is_packed(entry):
            raise UserError(f"{path} is compressed or encrypted", "Save it again with torch.save.")
        start = _start(file, entry)
        if entry.compress_size != entry.file_size or start + entry.file_size > size:
            raise ValueError(f"{name} is not inside the file")
        if verify and entry.CRC and _crc(file, start, entry.file_size) != entry.CRC:
            raise ValueError(f"{name} does not match its checksum")
        return start, entry.file_size

    def content(name: str) -> bytes:
        start, count = place(name)
        if count > MAX_PICKLE:
            raise ValueError(f"{name} has {count:,} bytes")
        file.seek(start)
        return file.read(count)

    def storage(dtype: np.dtype, key: str, count: int) -> Storage:
        start, held = place(f"data/{key}")
        if held != count * dtype.itemsize:
            raise ValueError(f"storage {key} has {held:,} bytes for {count:,} {dtype}")
        return Storage(path, key, file.start + start, dtype, count)

    if roots[0] + "byteorder" in entries:
        check_byte_order(path, content("byteorder") == b"little")
    return load_pickle(path, io.BytesIO(content("data.pkl")), storage, inert)


def _is_packed(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry is compressed or encrypted."""
    return entry.compress_type != zipfile.ZIP_STORED or bool(entry.flag_bits & 1)


def _start(file: FileSection, entry: zipfile.ZipInfo) -> int:
    """The offset of the content of an entry."""
    if entry.header_offset < 0:
        raise ValueError(f"{entry.filename} is not inside the file")
    file.seek(entry.header_offset)
    # The extra field may differ from that in the directory: torch uses it as padding, and zip64 needs it in both.
    signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise ValueError(f"{entry.filename} is not inside the file")
    return entry.header_offset + 30 + name_bytes + extra_bytes


def _crc(file: FileSection, start: int, count: int) -> int:
    file.seek(start)
    crc = 0
    for at in range(0, count, CHUNK):
        if not (held := file.read(min(CHUNK, count - at))):
            raise ValueError(f"{count:,} bytes are not inside the file")
        crc = zlib.crc32(held, crc)
    return crc


def verify_checksums(path: Path) -> bool | None:
    """Whether the checksums of all uncompressed entries match, of the zip archive or archives in a file.

    Returns None for other files, and False if a directory is damaged. Reads the entire file. Tensors are never
    compressed.
    """
    if not zipfile.is_zipfile(path):
        return None
    end = path.stat().st_size
    try:
        with path.open("rb") as file:
            while end:  # from the last archive to the first: the entries of one start where the previous archive ends
                section = FileSection(file, 0, end)
                with zipfile.ZipFile(section) as archive:
                    entries = archive.infolist()
                stored = [entry for entry in entries if entry.CRC and not _is_packed(entry)]
                if not all(_crc(section, _start(section, entry), entry.file_size) == entry.CRC for entry in stored):
                    return False
                end = min((entry.header_offset for entry in entries), default=0)
        return True
    except (ValueError, struct.error, zipfile.BadZipFile, NotImplementedError):
        return False


# Writing ----------------------------------------------------------------------------------

LIMIT, ELSEWHERE = 2**32 - 1, 2**32 - 1  # sizes from LIMIT on are in a zip64 field, which ELSEWHERE indicates
ALIGNMENT = 64  # bytes; torch aligns storages to it, so that they can be mapped into memory


def torch_file(name: str, payloads: Sequence[TensorPayload], tree: Any = None) -> PlannedFile:
    """Plans a zip file that torch.load opens as a dictionary of tensors, each with a storage of its own.

    With `tree`, it opens as that instead: nested dictionaries of plain values, dtypes, Namespaces, and PlannedTensors
    in the place of the tensors.
    """
    start = f"{Path(name).stem}/"
    parts: list[bytes | TensorPayload | DeferredBytes] = []
    entries: list[_ZipEntry] = []
    offset = 0

    def add(entry: str, content: bytes | TensorPayload) -> None:
        nonlocal offset
        size = len(content) if isinstance(content, bytes) else content.size
        held = content.tensor.name if isinstance(content, TensorPayload) else zlib.crc32(content)
        entries.append(_ZipEntry((start + entry).encode(), size, offset, held))
        head = DeferredBytes(len(entries[-1].head(0)), lambda crcs, one=entries[-1]: one.head(one.crc(crcs)))
        parts.extend([head if isinstance(content, TensorPayload) else head.content({}), content])
        offset += head.size + size

    add("data.pkl", dump_pickle([payload.tensor for payload in payloads], tree))
    add("byteorder", b"little")
    for key, payload in enumerate(payloads):
        add(f"data/{key}", payload)
    add("version", b"3\n")
    end = DeferredBytes(len(_directory(entries, {}, offset)), lambda crcs: _directory(entries, crcs, offset))
    return PlannedFile(name, [*parts, end])


@dataclass(frozen=True)
class _ZipEntry:
    """An uncompressed file within a zip archive (PKWARE, APPNOTE.TXT 4.3)."""

    name: bytes
    size: int
    offset: int
    held: str | int
    """the name of the tensor that determines the CRC-32, or the CRC-32"""

    def crc(self, crcs: Mapping[str, int]) -> int:
        return crcs.get(self.held, 0) if isinstance(self.held, str) else self.held

    def head(self, crc: int) -> bytes:
        """The local header, padded so that the content is aligned to ALIGNMENT."""
        large = struct.pack("<HHQQ", 1, 16, self.size, self.size) if self._is_large else b""
        padding = -(self.offset + 30 + len(self.name) + len(large) + 4) % ALIGNMENT
        extra = large + struct.pack("<2sH", b"FB", padding) + bytes(padding)  # the same field as torch's
        return b"PK\3\4" + self._fields(crc) + struct.pack("<HH", len(self.name), len(extra)) + self.name + extra

    def listed(self, crc: int) -> bytes:
        """The entry in the archive's directory."""
        sizes = (self.size, self.size) if self._is_large else ()
        far = (self.offset,) if self.offset >= LIMIT else ()
        extra = struct.pack(f"<HH{len(sizes + far)}Q", 1, 8 * len(sizes + far), *sizes, *far) if sizes + far else b""
        lengths = struct.pack("<HHHHHII", len(self.name), len(extra), 0, 0, 0, 0, _field(self.offset))
        return b"PK\1\2" + struct.pack("<H", self._version) + self._fields(crc) + lengths + self.name + extra

    @property
    def _is_large(self) -> bool:
        return self.size >= LIMIT

    @property
    def _version(self) -> int:
        return 45 if self._is_large or self.offset >= LIMIT else 20

    def _fields(self, crc: int) -> bytes:
        """Version, flags, no compression, the earliest time of the format, checksum, sizes."""
        size = _field(self.size)
        return struct.pack("<HHHHHIII", self._version, 0, 0, 0, 0x21, crc, size, size)


def _field(number: int) -> int:
    return ELSEWHERE if number >= LIMIT else number


def _directory(entries: Sequence[_ZipEntry], crcs: Mapping[str, int], offset: int) -> bytes:
    """The directory at the end of an archive, which starts at `offset`."""
    listed = b"".join(entry.listed(entry.crc(crcs)) for entry in entries)
    end, count = offset + len(listed), len(entries)
    wide = b""
    if offset >= LIMIT or count >= 2**16 - 1:
        wide = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(listed), offset)
        wide += b"PK\6\7" + struct.pack("<IQI", 0, end, 1)
    few = min(count, 2**16 - 1)
    sizes = struct.pack("<HHHHIIH", 0, 0, few, few, len(listed), _field(offset), 0)
    return listed + wide + b"PK\5\6" + sizes
