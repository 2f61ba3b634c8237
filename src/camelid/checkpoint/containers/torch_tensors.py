"""The pickles in PyTorch's files: which tensors they describe. No code in a pickle is executed.

A pickle may name only the globals in GLOBALS, and is run by the restricted machine in pickles.py.
"""

import io
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from camelid.checkpoint.containers.pickles import OpaqueObject, run_pickle
from camelid.checkpoint.tensors import PlannedTensor, Tensor, cast
from camelid.errors import UserError

MAX_PICKLE = 16 * 2**20  # bytes; a checkpoint of a thousand tensors needs a tenth of a megabyte

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
    """A tensor that is not contiguous, such as a transposed or expanded view, or a scalar."""

    strides: tuple[int, ...]
    """in elements, not bytes"""

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """As Tensor.read_into, through a memory map."""
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        try:
            held = np.memmap(self.file, self.dtype, "r", self.offset, (reach,))
        except ValueError as error:
            raise UserError(f"{self.file} ended while it was read", "Download or copy the file again.") from error
        byte_strides = [s * self.dtype.itemsize for s in self.strides]
        cast(self, np.lib.stride_tricks.as_strided(held, self.shape, byte_strides)[index], out)


@dataclass(frozen=True)
class Storage:
    """The contiguous elements in a file that tensors are views of."""

    file: Path
    key: str
    start: int
    """bytes from the start of the file"""
    dtype: np.dtype
    count: int


# Reading ----------------------------------------------------------------------------------


def load_pickle(
    path: Path,
    program: io.BytesIO,
    storage: Callable[[np.dtype, str, int], Storage],
    inert: re.Pattern[str] | None = None,
) -> Any:
    """Runs the next pickle in `program`, see run_pickle; `storage` returns the storage of a dtype, key and count."""
    calls = {
        "BINPERSID": lambda reference: storage(*_parse_storage(reference)),
        "BUILD": _set_state,
    }
    if inert is not None:
        calls["NEWOBJ"] = lambda kind, arguments: kind(
            *arguments
        )  # an opaque object, which REDUCE could create as well
    return run_pickle(path, program, GLOBALS, calls, "torch.save", inert=inert)


def _set_state(thing: Any, state: Any) -> Any:
    """Sets the attributes of an opaque object; those of dictionaries, such as state_dict()'s _metadata, are ignored."""
    if isinstance(thing, OpaqueObject) and isinstance(state, dict):
        thing.state = state
    return thing


def _parse_storage(reference: Any) -> tuple[np.dtype, str, int]:
    """The dtype, key and element count of a storage; its device is ignored, and views of storages are not supported."""
    match reference:
        case ("storage", np.dtype() as dtype, str(key), _, int(count)) if len(key) < 100:
            return dtype, key, count
        case ("storage", np.dtype() as dtype, str(key), _, int(count), None) if len(key) < 100:
            return dtype, key, count
    raise ValueError("a persistent id that is not a storage")


def check_byte_order(path: Path, little: bool) -> None:
    """Raises UserError if a file is not little-endian."""
    if not little:
        raise UserError(f"{path} is big-endian", "Save it again on a little-endian machine.")


def _ordered_dict() -> dict:
    return {}  # dict itself could also copy another dictionary, any number of times


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> Tensor:
    sound = isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    # The length comes first: a file may give one long tuple to a million tensors.
    if not sound or not len(shape) == len(strides) <= 64 or metadata:
        raise ValueError("a tensor with unsupported fields")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor with a negative or too large size")
    empty = 0 in shape
    reach = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if offset + reach > storage.count:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {storage.count:,} elements")
    start = storage.start + offset * storage.dtype.itemsize
    tensor = Tensor(storage.file, f"storage {storage.key}", start, shape, storage.dtype)
    dense = (math.prod(shape[i + 1 :]) for i in range(len(shape)))
    contiguous = all(n == 1 or s == d for n, s, d in zip(shape, strides, dense, strict=True))
    return tensor if empty or (shape and contiguous) else StridedTensor(**vars(tensor), strides=strides)


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


# Writing ----------------------------------------------------------------------------------

CODES = {dtype: name for name, dtype in DTYPES.items()}
REBUILD, TABLE = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R"


@dataclass(frozen=True)
class Namespace:
    """An argparse.Namespace that is to be pickled."""

    values: Mapping[str, Any]


def dump_pickle(tensors: Sequence[PlannedTensor], tree: Any = None) -> bytes:
    """A pickle (protocol 2) of a dictionary of tensors, or of `tree`; storage keys are indices into `tensors`."""
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
    """The operations that push a value onto the stack."""
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
