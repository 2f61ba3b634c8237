"""PyTorch files (`pytorch_model.bin`, Meta's `.pth`), read and written without torch, running nothing they ask for.

Their pickles can call nothing but the functions in GLOBALS (pickles.py). The formats (torch/serialization.py, _save
and _legacy_save), where R is any folder:

    zip, since torch 1.6    R/data.pkl, R/byteorder, and R/data/<key> for each storage, not compressed; a CRC-32 of 0
                            is that of an entry without one (torch.serialization.set_crc32_options)
    before                  pickles of MAGIC, PROTOCOL, the system, the object and the keys of its storages;
                            then for each key a count of 8 bytes and the storage
"""

import functools
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from camelid.checkpoint.containers.pickles import OpaqueObject, printable, run_pickle
from camelid.checkpoint.files import DeferredBytes, PlannedFile, TensorPayload
from camelid.checkpoint.tensors import CHUNK, PlannedTensor, Tensor, cast, files_holding, unverified_note
from camelid.errors import UserError
from camelid.inputs import refuse_stand_in

CRC_BYTES = 2**30  # of a file whose checksums are verified when it is opened; larger ones would take seconds
DISTRIBUTED = ".distcp"  # the files of dcp.py, each of many archives
MAX_PICKLE = 16 * 2**20  # bytes; a checkpoint of a thousand tensors needs a tenth of a megabyte
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
AGAIN = "Download or copy the file again."
SAVE = "Save the weights alone, torch.save(model.state_dict(), path), or as safetensors."

DTYPES: Mapping[str, np.dtype] = {
    "Float": np.dtype(np.float32),
    "Half": np.dtype(np.float16),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Double": np.dtype(np.float64),
    "Long": np.dtype(np.int64),
    "Int": np.dtype(np.int32),
    "Short": np.dtype(np.int16),
    "Char": np.dtype(np.int8),
    "Byte": np.dtype(np.uint8),
    "Bool": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class StridedTensor(Tensor):
    """A tensor whose numbers do not lie end to end: a transposed or expanded view, or a single number."""

    strides: tuple[int, ...]
    """in numbers, not bytes"""

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fills `out`, of the shape that `index` cuts, casting to its dtype."""
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        try:
            held = np.memmap(self.file, self.dtype, "r", self.offset, (reach,))
        except ValueError as error:
            raise UserError(f"{self.file} ended while it was read", AGAIN) from error
        byte_strides = [s * self.dtype.itemsize for s in self.strides]
        cast(self, np.lib.stride_tricks.as_strided(held, self.shape, byte_strides)[index], out)


@dataclass(frozen=True)
class Storage:
    """Numbers that lie end to end in a file; tensors are views of them."""

    file: Path
    key: str
    start: int
    """bytes from the start of the file"""
    dtype: np.dtype
    count: int


def open_torch(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a saved state dict, checked against the file's size; raises UserError for anything else.

    A table that has nothing but `inside`, a table itself, stands for that one.
    """
    held = unpickle(path)
    if inside is not None and isinstance(held, dict) and list(held) == [inside] and isinstance(held[inside], dict):
        held = held[inside]
    if not isinstance(held, dict):
        raise UserError(f"{path} holds a {type(held).__name__} and not tensors by name", SAVE)
    odd = {k: type(v).__name__ for k, v in held.items() if not (isinstance(k, str) and isinstance(v, Tensor))}
    if odd:
        names = (printable(key) if isinstance(key, str) else "a number" for key in odd)
        some = ", ".join(f"{name} (a {kind})" for name, kind in [*zip(names, odd.values(), strict=True)][:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        advice = f"The weights may lie inside one of them. {SAVE}" if "dict" in odd.values() else SAVE
        raise UserError(f"{path} holds more than tensors by name: {some}{more}", advice)
    return {name: replace(tensor, name=name) for name, tensor in held.items()}


def unpickle(path: Path, inert: re.Pattern[str] | None = None) -> Any:
    """The object in a file, of dicts, lists, tuples, plain values, and tensors that are named after their storages.

    Objects of globals that `inert` matches, as "module name", become records; of all others, they are refused.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file", "Give the path of a file that torch.save wrote.")
    refuse_stand_in(path)
    try:
        with path.open("rb") as file:
            start = file.read(262)
            if start.startswith(b"PK\x03\x04"):
                size = os.fstat(file.fileno()).st_size
                return _unpickle_zip(path, FileSection(file, 0, size), inert, verify=size <= CRC_BYTES)
            if start.endswith(b"ustar"):
                raise UserError(f"{path} is a tar file, as the first versions of torch wrote", "Save it again.")
            return _unpickle_legacy(path, file, inert)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails anywhere in zipfile, in pickletools and below
        reason = f"{type(error).__name__}: {printable(error)}"
        raise UserError(f"{path} is damaged, or is not a PyTorch checkpoint ({reason})", AGAIN) from error


def open_embedded_tensor(path: Path, start: int, count: int, verify: bool) -> Tensor:
    """The tensor that torch.save wrote into `count` bytes of a file that holds several such archives.

    `verify` reads it all and compares its checksums.
    """
    try:
        with path.open("rb") as file:
            held = _unpickle_zip(path, FileSection(file, start, count), None, verify)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails anywhere in zipfile, in pickletools and below
        raise UserError(f"{path} is damaged ({type(error).__name__}: {printable(error)})", AGAIN) from error
    if not isinstance(held, Tensor):
        raise UserError(f"{path} holds a {type(held).__name__} where a tensor is expected", AGAIN)
    return held


class FileSection(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, count: int) -> None:
        self.start, self.count = start, count
        self._file, self._at = file, 0
        if not 0 <= start <= start + count <= os.fstat(file.fileno()).st_size:
            raise ValueError(f"bytes {start:,} to {start + count:,} do not lie inside the file")

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


def _unpickle_zip(path: Path, file: FileSection, inert: re.Pattern[str] | None, verify: bool) -> Any:
    size = file.count
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise UserError(f"{path} is a zip archive without a PyTorch checkpoint", "Unpack it and give the file inside.")

    @functools.cache
    def place(name: str) -> tuple[int, int]:
        """Where an entry starts, and its bytes, which are what they were when its checksum was made."""
        entry = entries[roots[0] + name]
        if _is_packed(entry):
            raise UserError(f"{path} is compressed or encrypted", "Save it again with torch.save.")
        start = _start(file, entry)
        if entry.compress_size != entry.file_size or start + entry.file_size > size:
            raise ValueError(f"{name} does not lie inside the file")
        if verify and entry.CRC and _crc(file, start, entry.file_size) != entry.CRC:
            raise ValueError(f"{name} does not have its checksum")
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
        _check_order(path, content("byteorder") == b"little")
    return _run(path, io.BytesIO(content("data.pkl")), storage, inert)


def _is_packed(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry is compressed or encrypted."""
    return entry.compress_type != zipfile.ZIP_STORED or bool(entry.flag_bits & 1)


def _start(file: FileSection, entry: zipfile.ZipInfo) -> int:
    """Where the content of an entry begins."""
    if entry.header_offset < 0:
        raise ValueError(f"{entry.filename} does not lie inside the file")
    file.seek(entry.header_offset)
    # The extra field may differ from the directory's: torch pads with it, and zip64 needs it in either place.
    signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise ValueError(f"{entry.filename} does not lie inside the file")
    return entry.header_offset + 30 + name_bytes + extra_bytes


def _crc(file: FileSection, start: int, count: int) -> int:
    file.seek(start)
    crc = 0
    for at in range(0, count, CHUNK):
        if not (held := file.read(min(CHUNK, count - at))):
            raise ValueError(f"{count:,} bytes do not lie inside the file")
        crc = zlib.crc32(held, crc)
    return crc


def unverified_note_for(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """The note on zip files that are too large for their checksums to be verified when they are opened."""
    sizes = {file: file.stat().st_size for file in files_holding(tensors)}
    # A distributed checkpoint has a file for each rank: together they would take seconds, too.
    together = sum(size for file, size in sizes.items() if file.suffix == DISTRIBUTED)
    large = [file for file, size in sizes.items() if (together if file.suffix == DISTRIBUTED else size) > CRC_BYTES]
    large = [file for file in large if zipfile.is_zipfile(file)]
    return unverified_note(large, Path(os.path.commonpath([file.parent for file in large])) if large else Path())


def verify_checksums(path: Path) -> bool | None:
    """Whether every uncompressed entry of a zip archive, or of several in one file, has its checksum.

    None for other files. Reads all of it. Tensors are never compressed, and a damaged directory is a checksum that does
    not hold.
    """
    if not zipfile.is_zipfile(path):
        return None
    end = path.stat().st_size
    try:
        with path.open("rb") as file:
            while end:  # from the last archive to the first: what a directory lists begins where the one before ends
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


def _unpickle_legacy(path: Path, file: io.BufferedReader, inert: re.Pattern[str] | None) -> Any:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    program = io.BytesIO(file.read(min(size, MAX_PICKLE)))
    storages: dict[str, Storage] = {}

    def noted(dtype: np.dtype, key: str, count: int) -> Storage:
        return storages.setdefault(key, Storage(path, key, 0, dtype, count))

    if (_run(path, program, noted), _run(path, program, noted)) != (MAGIC, PROTOCOL):
        raise ValueError("the magic number is another")
    _check_order(path, _run(path, program, noted)["little_endian"] is True)
    # The object comes before its storages: a first run finds their sizes, a second one knows where they are.
    body = program.tell()
    _run(path, program, noted, inert)
    keys = _run(path, program, noted)
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    end = program.tell()
    placed: dict[str, Storage] = {}
    for key in keys:
        storage = storages[key]
        file.seek(end)
        (count,) = struct.unpack("<q", file.read(8))
        placed[key] = replace(storage, start=end + 8)
        end += 8 + count * storage.dtype.itemsize
        if not count == storage.count >= 0 or end > size:
            raise ValueError(f"storage {key} should have {storage.count:,} numbers and ends after {size:,} bytes")
    program.seek(body)
    return _run(path, program, lambda dtype, key, count: placed[key], inert)


def _check_order(path: Path, little: bool) -> None:
    if not little:
        raise UserError(f"{path} is big-endian", "Save it again on a little-endian machine.")


# What a program may call ------------------------------------------------------------------


def _ordered_dict() -> dict:
    return {}  # dict itself would also copy another one, any number of times


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> Tensor:
    sound = isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    # The length comes first: a file may give one long tuple to a million tensors.
    if not sound or not len(shape) == len(strides) <= 64 or metadata:
        raise ValueError("a tensor with strange parts")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor with a negative or absurd size")
    empty = 0 in shape
    reach = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if offset + reach > storage.count:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {storage.count:,} numbers")
    start = storage.start + offset * storage.dtype.itemsize
    tensor = Tensor(storage.file, f"storage {storage.key}", start, shape, storage.dtype)
    dense = (math.prod(shape[i + 1 :]) for i in range(len(shape)))
    end_to_end = all(n == 1 or s == d for n, s, d in zip(shape, strides, dense, strict=True))
    return tensor if empty or (shape and end_to_end) else StridedTensor(**vars(tensor), strides=strides)


def _rebuild_parameter(data: Any, grad: Any, hooks: Any, state: Any = None) -> Any:
    return data


GLOBALS: Mapping[str, Any] = {
    "collections OrderedDict": _ordered_dict,
    "torch Size": lambda sizes: sizes,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_parameter_with_state": _rebuild_parameter,
    **{f"torch {name}Storage": dtype for name, dtype in DTYPES.items()},
    **{f"torch {dtype.name}": dtype for dtype in DTYPES.values()},
}

# The machine --------------------------------------------------------------------------------


def _run(
    path: Path,
    program: io.BytesIO,
    storage: Callable[[np.dtype, str, int], Storage],
    inert: re.Pattern[str] | None = None,
) -> Any:
    """What the next pickle of `program` makes; `storage` finds the storages that it speaks of."""
    calls = {
        "BINPERSID": lambda reference: storage(*_storage(reference)),
        "BUILD": _with_attributes,
    }
    if inert is not None:
        calls["NEWOBJ"] = lambda kind, arguments: kind(*arguments)  # a record: REDUCE could call it as well
    return run_pickle(path, program, GLOBALS, calls, "torch.save", inert=inert)


def _with_attributes(thing: Any, state: Any) -> Any:
    """Sets attributes; those of tables, such as state_dict()'s _metadata, are left out."""
    if isinstance(thing, OpaqueObject) and isinstance(state, dict):
        thing.state = state
    return thing


def _storage(reference: Any) -> tuple[np.dtype, str, int]:
    """Dtype, key and count of a storage; its device does not matter, and one within another is not supported."""
    match reference:
        case ("storage", np.dtype() as dtype, str(key), _, int(count)) if len(key) < 100:
            return dtype, key, count
        case ("storage", np.dtype() as dtype, str(key), _, int(count), None) if len(key) < 100:
            return dtype, key, count
    raise ValueError("a reference to something else than a storage")


# Writing ------------------------------------------------------------------------------------

LIMIT, ELSEWHERE = 2**32 - 1, 2**32 - 1  # sizes from LIMIT on stand in a field of their own, and ELSEWHERE says so
ALIGNMENT = 64  # bytes; torch lets storages begin on a multiple of it, so that they can be mapped into memory
CODES = {dtype: name for name, dtype in DTYPES.items()}
REBUILD, TABLE = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R"


@dataclass(frozen=True)
class Namespace:
    """An argparse.Namespace that is to be written."""

    values: Mapping[str, Any]


def torch_file(name: str, payloads: Sequence[TensorPayload], tree: Any = None) -> PlannedFile:
    """A zip file that torch.load opens as tensors by name, each with a storage of its own.

    Or as `tree`, of dicts, plain values, dtypes, Attributes, and each planned tensor in its place.
    """
    start = f"{Path(name).stem}/"
    parts: list[bytes | TensorPayload | DeferredBytes] = []
    entries: list[_Entry] = []
    offset = 0

    def add(entry: str, content: bytes | TensorPayload) -> None:
        nonlocal offset
        size = len(content) if isinstance(content, bytes) else content.size
        held = content.tensor.name if isinstance(content, TensorPayload) else zlib.crc32(content)
        entries.append(_Entry((start + entry).encode(), size, offset, held))
        head = DeferredBytes(len(entries[-1].head(0)), lambda crcs, one=entries[-1]: one.head(one.crc(crcs)))
        parts.extend([head if isinstance(content, TensorPayload) else head.content({}), content])
        offset += head.size + size

    add("data.pkl", _program([payload.tensor for payload in payloads], tree))
    add("byteorder", b"little")
    for key, payload in enumerate(payloads):
        add(f"data/{key}", payload)
    add("version", b"3\n")
    end = DeferredBytes(len(_directory(entries, {}, offset)), lambda crcs: _directory(entries, crcs, offset))
    return PlannedFile(name, [*parts, end])


@dataclass(frozen=True)
class _Entry:
    """A file within a zip, not compressed (PKWARE, APPNOTE.TXT 4.3)."""

    name: bytes
    size: int
    offset: int
    held: str | int
    """the tensor whose CRC-32 it has, or the CRC-32"""

    def crc(self, crcs: Mapping[str, int]) -> int:
        return crcs.get(self.held, 0) if isinstance(self.held, str) else self.held

    def head(self, crc: int) -> bytes:
        """So long that the content begins on a multiple of ALIGNMENT."""
        large = struct.pack("<HHQQ", 1, 16, self.size, self.size) if self._is_large else b""
        padding = -(self.offset + 30 + len(self.name) + len(large) + 4) % ALIGNMENT
        extra = large + struct.pack("<2sH", b"FB", padding) + bytes(padding)  # the same field as torch's
        return b"PK\3\4" + self._fields(crc) + struct.pack("<HH", len(self.name), len(extra)) + self.name + extra

    def listed(self, crc: int) -> bytes:
        """The entry in the zip's directory."""
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
        """Version, flags, no compression, the first moment that a zip can say, checksum, sizes."""
        size = _field(self.size)
        return struct.pack("<HHHHHIII", self._version, 0, 0, 0, 0x21, crc, size, size)


def _field(number: int) -> int:
    return ELSEWHERE if number >= LIMIT else number


def _directory(entries: Sequence[_Entry], crcs: Mapping[str, int], offset: int) -> bytes:
    """What stands at the end of a zip, from `offset` on."""
    listed = b"".join(entry.listed(entry.crc(crcs)) for entry in entries)
    end, count = offset + len(listed), len(entries)
    wide = b""
    if offset >= LIMIT or count >= 2**16 - 1:
        wide = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(listed), offset)
        wide += b"PK\6\7" + struct.pack("<IQI", 0, end, 1)
    few = min(count, 2**16 - 1)
    sizes = struct.pack("<HHHHIIH", 0, 0, few, few, len(listed), _field(offset), 0)
    return listed + wide + b"PK\5\6" + sizes


def _program(tensors: Sequence[PlannedTensor], tree: Any = None) -> bytes:
    """The pickle, of protocol 2, that makes a dict of tensors or a tree; storages are named by number."""
    keys = {tensor: key for key, tensor in enumerate(tensors)}
    return b"\x80\x02" + _tree({tensor.name: tensor for tensor in tensors} if tree is None else tree, keys) + b"."


def _tree(value: Any, keys: Mapping[PlannedTensor, int]) -> bytes:
    match value:
        case PlannedTensor():
            return _tensor(value, keys[value])
        case Namespace():
            return b"cargparse\nNamespace\n)\x81" + _tree(value.values, keys) + b"b"
        case Mapping():
            return b"}(" + b"".join(_pickled(key) + _tree(item, keys) for key, item in value.items()) + b"u"
    return _pickled(value)


def _tensor(tensor: PlannedTensor, key: int) -> bytes:
    strides = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    kind = f"ctorch\n{CODES[tensor.dtype]}Storage\n".encode()
    program = REBUILD + b"((" + _pickled("storage") + kind + _pickled(str(key)) + _pickled("cpu")
    program += _pickled(math.prod(tensor.shape)) + b"tQ"
    # Offset, shape, strides, no gradient, no hooks.
    return program + _pickled(0) + _pickled(tensor.shape) + _pickled(strides) + b"\x89" + TABLE + b"tR"


def _pickled(value: str | int | float | tuple[int, ...] | np.dtype | None) -> bytes:
    """Operations that put a value on the stack."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case float():
            return b"G" + struct.pack(">d", value)
        case np.dtype():
            return f"ctorch\n{value.name}\n".encode()
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(_pickled, value)) + b"t"
        case _ if value < 2**31:
            return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
