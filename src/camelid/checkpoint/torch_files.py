"""PyTorch files (`pytorch_model.bin`, Meta's `.pth`), read without torch and without running what they ask for.

A pickle is a program for a small stack machine. Python's own machine trusts it: nine bytes can ask for gigabytes, and
a deep tuple as a key ends the process. The machine here knows what torch.save writes, and can call nothing but the
functions in GLOBALS. The formats (torch/serialization.py, _save and _legacy_save), where R is any folder:

    zip, since torch 1.6    R/data.pkl, R/byteorder, and R/data/<key> for each storage, not compressed
    before                  pickles of MAGIC, PROTOCOL, the system, the object and the keys of its storages;
                            then for each key a count of 8 bytes and the storage
"""

import io
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from camelid.checkpoint.tensors import Tensor
from camelid.errors import UserError

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
class Strided(Tensor):
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
        out[...] = np.lib.stride_tricks.as_strided(held, self.shape, byte_strides)[index]


@dataclass(frozen=True)
class Storage:
    """Numbers that lie end to end in a file; tensors are views of them."""

    file: Path
    key: str
    start: int
    """bytes from the start of the file"""
    dtype: np.dtype
    count: int


def open_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a saved state dict, checked against the file's size; raises UserError for anything else."""
    held = unpickle(path)
    if not isinstance(held, dict):
        raise UserError(f"{path} holds a {type(held).__name__} and not tensors by name", SAVE)
    odd = {k: type(v).__name__ for k, v in held.items() if not (isinstance(k, str) and isinstance(v, Tensor))}
    if odd:
        names = (_shown(key) if isinstance(key, str) else "a number" for key in odd)
        some = ", ".join(f"{name} (a {kind})" for name, kind in [*zip(names, odd.values(), strict=True)][:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        advice = f"The weights may lie inside one of them. {SAVE}" if "dict" in odd.values() else SAVE
        raise UserError(f"{path} holds more than tensors by name: {some}{more}", advice)
    return {name: replace(tensor, name=name) for name, tensor in held.items()}


def unpickle(path: Path) -> Any:
    """The object in a file, of dicts, lists, tuples, plain values, and tensors that are named after their storages."""
    if not path.is_file():
        raise UserError(f"{path} is not a file", "Give the path of a file that torch.save wrote.")
    try:
        with path.open("rb") as file:
            start = file.read(262)
            if start.startswith(b"PK\x03\x04"):
                return _unpickle_zip(path, file)
            if start.endswith(b"ustar"):
                raise UserError(f"{path} is a tar file, as the first versions of torch wrote", "Save it again.")
            return _unpickle_legacy(path, file)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails anywhere in zipfile, in pickletools and below
        reason = f"{type(error).__name__}: {_shown(error)}"
        raise UserError(f"{path} is damaged, or is not a PyTorch checkpoint ({reason})", AGAIN) from error


def _unpickle_zip(path: Path, file: io.BufferedReader) -> Any:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise UserError(f"{path} is a zip archive without a PyTorch checkpoint", "Unpack it and give the file inside.")

    def place(name: str) -> tuple[int, int]:
        """Where an entry starts, and its bytes."""
        entry = entries[roots[0] + name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise UserError(f"{path} is compressed or encrypted", "Save it again with torch.save.")
        file.seek(entry.header_offset)
        # The extra field may differ from the directory's: torch pads with it, and zip64 needs it in either place.
        signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
        start = entry.header_offset + 30 + name_bytes + extra_bytes
        if signature != b"PK\x03\x04" or entry.compress_size != entry.file_size or start + entry.file_size > size:
            raise ValueError(f"{name} does not lie inside the file")
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
        return Storage(path, key, start, dtype, count)

    if roots[0] + "byteorder" in entries:
        _check_order(path, content("byteorder") == b"little")
    return _run(path, io.BytesIO(content("data.pkl")), storage)


def _unpickle_legacy(path: Path, file: io.BufferedReader) -> Any:
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
    _run(path, program, noted)
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
    return _run(path, program, lambda dtype, key, count: placed[key])


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
    return tensor if empty or (shape and end_to_end) else Strided(**vars(tensor), strides=strides)


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

LITERALS = frozenset(
    """
    BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8
    """.split()
)
CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# How much of the stack an operation uses up: all above the last mark, or so many values.
TO_MARK = ("TUPLE", "APPENDS", "SETITEMS")
COUNTS = ("TUPLE1 APPEND BUILD BINPERSID", "TUPLE2 SETITEM STACK_GLOBAL REDUCE", "TUPLE3")
TAKES: Mapping[str, int] = {name: count for count, names in enumerate(COUNTS, 1) for name in names.split()}


def _run(path: Path, program: io.BytesIO, storage: Callable[[np.dtype, str, int], Storage]) -> Any:
    """What the next pickle of `program` makes; `storage` finds the storages that it speaks of."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for operation, value, _ in pickletools.genops(program):
        name = operation.name
        base = marks.pop() if name in TO_MARK else len(stack) - TAKES.get(name, 0)
        if not 0 <= base <= len(stack):
            raise IndexError(f"{name} finds too little on the stack")
        items = stack[base:]
        del stack[base:]
        match name:
            case "PROTO" | "FRAME" | "STOP" | "BUILD":
                pass  # BUILD sets attributes, such as state_dict()'s _metadata
            case _ if name in LITERALS:
                stack.append(value)
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                stack[-1].extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                _fill(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if name == "MEMOIZE" else value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL" | "STACK_GLOBAL":
                stack.append(_allowed(path, value if name == "GLOBAL" else " ".join(items)))
            case "REDUCE":
                stack.append(items[0](*items[1]))  # whatever can be called here came out of GLOBALS
            case "BINPERSID":
                stack.append(storage(*_storage(items[0])))
            case _:  # INST, NEWOBJ and their like, which would call something as well
                raise ValueError(f"{name} {value}, which torch.save does not write")
    return stack.pop()


def _storage(reference: Any) -> tuple[np.dtype, str, int]:
    """Dtype, key and count of a storage; its device does not matter, and one within another is not supported."""
    match reference:
        case ("storage", np.dtype() as dtype, str(key), _, int(count)) if len(key) < 100:
            return dtype, key, count
        case ("storage", np.dtype() as dtype, str(key), _, int(count), None) if len(key) < 100:
            return dtype, key, count
    raise ValueError("a reference to something else than a storage")


def _fill(table: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Other keys may be traps: the hash of a deep tuple ends Python, and large numbers can be made to collide.
        named = isinstance(key, str) or (isinstance(key, int) and 0 <= key < 2**32)
        if not isinstance(table, dict) or not named or key in table:
            raise ValueError("a table with a strange key, or with one key twice")
        table[key] = value


def _allowed(path: Path, name: Any) -> Any:
    if name not in GLOBALS:
        raise UserError(
            f"{path} would call {_shown(name.replace(' ', '.'))} when it is opened; it is refused",
            "Convert it to safetensors where you trust it, or get the weights from another source.",
        )
    return GLOBALS[name]


def _shown(value: object) -> str:
    """Text of a file, safe for a terminal."""
    return ascii(str(value))[1:-1][:200]
