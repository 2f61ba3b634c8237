"""Reads and writes MindSpore's .ckpt files: tensors by name. Safetensors files may take their place.

A file has no magic and no header; it is protobuf (MindSpore's checkpoint.proto) of one repeated field:

    Checkpoint   repeated Value = 1
    Value        string tag = 1, TensorProto tensor = 2, MapTensorProto maptensor = 3
    TensorProto  repeated int64 dims = 1 (not packed), string tensor_type = 2, bytes tensor_content = 3

Contents are little-endian, in C order. A tensor larger than SLICE bytes is split into several consecutive Values of one
tag, each with the dims of the entire tensor. A file may end with `crc_num` and zlib.crc32 of everything before it.
"""

import functools
import io
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from camelid.checkpoint.containers import protobuf
from camelid.checkpoint.containers.safetensors import open_safetensors
from camelid.checkpoint.files import Chunks, PlannedFile, TensorPayload
from camelid.checkpoint.tensors import CHUNK, ConcatenatedTensor, PlannedTensor, Tensor, cast
from camelid.errors import UserError
from camelid.inputs import refuse_stand_in

AGAIN = "Download or copy the file again."
SLICE = 2**29  # bytes; the maximum size of the content of a Value
CRC_BYTES = 2**30  # checksums of files up to this size are verified when they are opened
MAX_VALUES = 2**17  # a model of 80 layers with its optimizer's states has three thousand
TRAILER = b"crc_num"  # and 10 bytes, big-endian

ENCRYPTED = {0x7F3A5ED8: "AES-GCM", 0x7F3A5ED9: "AES-CBC", 0x7F3A5EDA: "SM4-CBC"}  # the first four bytes
DTYPES: Mapping[str, np.dtype] = {
    **{np.dtype(name).name.capitalize(): np.dtype(name) for name in ("int8", "int16", "int32", "int64", "bool")},
    **{f"UInt{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"Float{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
}
TYPES = {dtype: name for name, dtype in DTYPES.items()}
TRAINING = (  # names of training state in a file that is not part of the model
    r"epoch_num|step_num|global_step|learning_rate|loss_scale|scale_sense|current_iterator_step"
    r"|last_overflow_iterator_step|beta[12]_power|(adam_[mv]|moment[12]|accu_grads)\..+"
)

# Reading --------------------------------------------------------------------------------


def ckpts(folder: Path) -> list[Path]:
    """The .ckpt files in a folder that hold tensors."""
    return sorted(file for file in folder.glob("*.ckpt") if "strategy" not in file.name and file.is_file())


def open_tensor_file(path: Path) -> dict[str, Tensor]:
    """Opens the tensors of a .ckpt or safetensors file, by name."""
    return open_safetensors(path) if path.suffix == ".safetensors" else open_ckpt(path)


def tensor_files(folder: Path) -> list[Path]:
    """The files in a folder that hold tensors: .ckpt files, or if there are none, safetensors."""
    return ckpts(folder) or sorted(folder.glob("*.safetensors"))


def single(folder: Path) -> Path:
    """The only file with tensors in a folder; raises UserError if there is none, or more than one."""
    files = tensor_files(folder)
    if not files:
        raise UserError(f"{folder} has no .ckpt file", "Give the folder or the file of a MindSpore checkpoint.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise UserError(f"{folder} has {len(files)} checkpoints: {names}", "Give one file, or keep one in each folder.")
    return files[0]


def open_ckpt(path: Path) -> dict[str, Tensor]:
    """Opens the tensors of a .ckpt file, by name; raises UserError if it is damaged, encrypted or of another format.

    The checksum, if there is one, is verified for files up to CRC_BYTES; see verify_checksum for larger files.
    """
    refuse_stand_in(path)
    size = path.stat().st_size
    if size <= CRC_BYTES and verify_checksum(path) is False:
        raise UserError(f"{path} does not have the checksum at its end", AGAIN)
    with path.open("rb") as file:
        if how := cipher(file.read(4)):
            raise UserError(f"{path} is encrypted ({how})", "Load it in MindSpore with its key, and save it again.")
        try:
            values = list(_values(file, range(size - 17 if _trailer(file, size) is not None else size)))
            if not values:
                raise ValueError("it is empty")
            return _tensors(path, values)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{path} is cut short, damaged, or no MindSpore checkpoint ({error})", AGAIN) from error


def cipher(head: bytes) -> str | None:
    """The cipher that encrypts a file with these first bytes; None if it is not encrypted."""
    return ENCRYPTED.get(int.from_bytes(head[:4], "little"))


def unverified(path: Path) -> bool:
    """Whether a file has a checksum that open_ckpt did not verify."""
    with path.open("rb") as file:
        return (size := path.stat().st_size) > CRC_BYTES and _trailer(file, size) is not None


def verify_checksum(path: Path) -> bool | None:
    """Whether a file matches its checksum; None if it has none. Reads the entire file."""
    size, crc = path.stat().st_size, 0
    with path.open("rb") as file:
        if (expected := _trailer(file, size)) is None:
            return None
        file.seek(0)
        for start in range(0, size - 17, CHUNK):
            crc = zlib.crc32(file.read(min(CHUNK, size - 17 - start)), crc)
    return crc == expected


def _trailer(file: io.BufferedReader, size: int) -> int | None:
    file.seek(max(0, size - 17))
    last = file.read(17)
    return int.from_bytes(last[7:], "big") if len(last) == 17 and last.startswith(TRAILER) else None


@dataclass(frozen=True)
class Value:
    """A Value message of a file."""

    tag: str
    type: str
    dims: tuple[int, ...]
    content: range


def _values(file: io.BufferedReader, span: range) -> Iterator[Value]:
    for count, (number, value) in enumerate(protobuf.fields(file, span)):
        if number != 1 or not isinstance(value, range) or count == MAX_VALUES:
            raise ValueError(f"another kind of record after {count:,}")
        held = protobuf.once(file, value, ("tag", "tensor", "maptensor"))
        tag, tensor = protobuf.text(file, held.get("tag")), held.get("tensor")
        if not isinstance(tensor, range):
            raise ValueError(f"{tag} is not a plain tensor")
        dims, last = [], {}
        for number, part in protobuf.fields(file, tensor):
            if number == 1 and isinstance(part, int) and len(dims) < 32:
                dims.append(protobuf.signed(part))
            elif number in (2, 3) and isinstance(part, range) and number not in last:
                last[number] = part
            else:
                raise ValueError(f"{tag} has an unexpected field {number}")
        if min(dims, default=0) < 0:
            raise ValueError(f"{tag} has the shape {tuple(dims)}")
        content = last.get(3, range(tensor.stop, tensor.stop))
        yield Value(tag, protobuf.text(file, last.get(2)), tuple(dims), content)


def _tensors(path: Path, values: Sequence[Value]) -> dict[str, Tensor]:
    """The tensors by tag; consecutive Values of one tag are one tensor."""
    tensors: dict[str, Tensor] = {}
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop].tag != values[start].tag:
            if values[start].tag in tensors:
                raise ValueError(f"{values[start].tag} is there twice")
            tensors[values[start].tag] = _tensor(path, values[start:stop])
            start = stop
    return tensors


def _tensor(path: Path, values: Sequence[Value]) -> Tensor:
    first, count = values[0], sum(len(value.content) for value in values)
    tag, shape = first.tag, first.dims
    if any((value.type, value.dims) != (first.type, first.dims) for value in values):
        raise ValueError(f"the parts of {tag} disagree")
    if first.type == "str":
        if shape not in ((), (0,)) or len(values) > 1 or count % 4 or count > 2**20:
            raise ValueError(f"{tag} is not text")
        shape, dtype = (), np.dtype(f"<U{count // 4}")
    elif first.type in DTYPES:
        dtype = DTYPES[first.type]
        shape = () if shape == (0,) and count == dtype.itemsize else shape  # as older versions wrote scalars
    else:
        known = ", ".join([*DTYPES, "str"])
        raise UserError(f"{tag} in {path} is {first.type}; camelid reads {known}", "Save it in one of these first.")
    if count != math.prod(shape) * dtype.itemsize or any(len(v.content) % max(dtype.itemsize, 1) for v in values):
        raise ValueError(f"{tag} has {count:,} bytes for {shape} {dtype}")
    if shape and len(values) == 1:
        return Tensor(path, tag, first.content.start, shape, dtype)
    parts = [Tensor(path, tag, v.content.start, (len(v.content) // max(dtype.itemsize, 1),), dtype) for v in values]
    elements = ConcatenatedTensor(path, tag, 0, (math.prod(shape),), dtype, tuple(parts), 0)
    return FlatTensor(path, tag, first.content.start, shape, dtype, elements)


@dataclass(frozen=True)
class FlatTensor(Tensor):
    """A tensor whose elements are stored in a tensor of one axis: a scalar, or one that is split within rows."""

    elements: Tensor

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """As Tensor.read_into."""
        if not self.shape:
            return self.elements.read_into(out.reshape(1), (slice(0, 1),))
        rows = range(*index[0].indices(self.shape[0]))
        width = math.prod(self.shape[1:])
        step = max(1, CHUNK // max(width * self.dtype.itemsize, 1))
        held = np.empty((min(step, len(rows)), *self.shape[1:]), self.dtype)
        for start in range(0, len(rows), step):
            chunk, first = held[: len(rows) - start], (rows.start + start) * width
            self.elements.read_into(chunk.reshape(-1), (slice(first, first + chunk.size),))
            cast(self, chunk[:, *index[1:]], out[start : start + step])


# Writing --------------------------------------------------------------------------------


def ckpt_file(name: str, payloads: Sequence[TensorPayload]) -> PlannedFile:
    """Plans a file, readable only by its owner and without a checksum, as MindSpore writes it by default."""
    parts = []
    for payload in payloads:
        size = payload.size + sum(len(_head(payload.tensor, count)) for count in _counts(payload.size))
        parts.append(TensorPayload(payload.tensor, size, functools.partial(_slices, payload)))
    return PlannedFile(name, parts, mode=0o600)


def _counts(size: int) -> Iterator[int]:
    """The sizes in bytes of the Values of a tensor."""
    return (min(SLICE, size - start) for start in range(0, size, SLICE))


def _slices(payload: TensorPayload) -> Chunks:
    """Yields the bytes of a tensor, with a header before each SLICE of them."""
    written = 0
    for chunk in payload.chunks():
        assert isinstance(chunk, np.ndarray)
        rest = chunk.reshape(-1).view(np.uint8)
        while rest.size:
            if written % SLICE == 0:
                yield _head(payload.tensor, min(SLICE, payload.size - written))
            count = min(rest.size, SLICE - written % SLICE)
            yield rest[:count]
            written, rest = written + count, rest[count:]


def _head(tensor: PlannedTensor, count: int) -> bytes:
    """The header of a Value with `count` bytes of a tensor's content."""
    field, begin = protobuf.field_bytes, protobuf.begin_bytes
    dims = b"".join(field(1, n) for n in tensor.shape)
    proto = dims + field(2, TYPES[tensor.dtype].encode()) + begin(3, count)
    value = field(1, tensor.name.encode()) + begin(2, len(proto) + count) + proto
    return begin(1, len(value) + count) + value
