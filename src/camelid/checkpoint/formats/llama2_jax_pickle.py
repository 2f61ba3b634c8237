"""Reads the pickles of llama-2-jax without running anything in them; the contents of arrays are left in the file."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from camelid.checkpoint.containers.pickles import printable, run_pickle
from camelid.checkpoint.containers.torch_tensors import StridedTensor
from camelid.checkpoint.tensors import CODES, Tensor
from camelid.errors import UserError
from camelid.inputs import refuse_stand_in

CLASSES: Mapping[str, tuple[str, ...]] = {
    "lib.llama.llama Llama": ("model", "lm_head"),
    "lib.llama.llama_model LlamaModel": ("embedding", "decoder", "norm"),
    "lib.llama.decoder_block DecoderBlock": (
        "input_norm",
        "attention",
        "post_attn_norm",
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
    "lib.llama.attention Attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
MAX_PROGRAM = 2**16  # bytes of a pickle without its arrays; a real one has about 5,000
LARGE = 512  # bytes; a longer read can only be an array, which is left in the file
AGAIN = "Download or copy the file again."
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Span:
    """Bytes that are left in the file."""

    start: int
    count: int

    def __len__(self) -> int:
        return self.count


class Program:
    """A file that pickletools reads, which skips long reads: they are the contents of arrays."""

    def __init__(self, file: BinaryIO):
        self.file, self.at, self.left, self.size = file, 0, MAX_PROGRAM, os.fstat(file.fileno()).st_size

    def tell(self) -> int:
        return self.at

    def read(self, count: int) -> Any:
        if count > LARGE:
            if count > self.size - self.at:
                raise ValueError(f"{count:,} bytes are announced at {self.at:,}, and the file has {self.size:,}")
            span = Span(self.at, count)
            self.at = self.file.seek(self.at + count)
            return span
        return self._counted(self.file.read(count))

    def readline(self) -> bytes:
        return self._counted(self.file.readline(LARGE))

    def _counted(self, held: bytes) -> bytes:
        self.at += len(held)
        self.left -= len(held)
        if self.left < 0:
            raise ValueError(f"more than {MAX_PROGRAM:,} bytes besides its arrays")
        return held


@dataclass
class Held:
    """An array that a pickle creates first and fills later."""

    shape: tuple[int, ...] = ()
    dtype: np.dtype | None = None
    fortran: bool = False
    data: Span | None = None


RECONSTRUCT, NDARRAY, JAX_ARRAY = (lambda *args: Held()), object(), object()


def _dtype(name: Any, align: Any, copy: Any) -> np.dtype:
    known = {**{f"{dtype.kind}{dtype.itemsize}": dtype for dtype in CODES if dtype.kind == "f"}, BFLOAT16: BFLOAT16}
    # Tuples are not hashed: the hash of a deeply nested one crashes Python.
    if not isinstance(name, str | np.dtype) or name not in known:
        raise UserError(
            f"an array is {printable(name) if isinstance(name, str) else 'strange'}",
            "Save the parameters as bfloat16, float16 or float32.",
        )
    return known[name]


def _jax_array(fun: Any, args: Any, state: Any, aval: Any) -> Held:
    if fun is not RECONSTRUCT:
        raise ValueError("an array that numpy's _reconstruct does not make")
    return _build(Held(), state)


def _build(thing: Any, state: Any) -> Any:
    """Sets the byte order of a dtype or the content of an array, like their __setstate__."""
    match thing, state:
        case np.dtype(), (int(), str(order), *_):
            if order not in "<=|":
                raise UserError("an array is big-endian", "Save the parameters on a little-endian machine.")
        case Held(data=None), (1, tuple(shape), np.dtype() as dtype, bool(fortran), Span() as data):
            if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
                raise ValueError("an array of a strange shape")
            if math.prod(shape) * dtype.itemsize != data.count:
                raise ValueError(f"an array of shape {shape} and {dtype} with {data.count:,} bytes")
            thing.shape, thing.dtype, thing.fortran, thing.data = shape, dtype, fortran, data
        case _:
            raise ValueError("an object of a strange state")
    return thing


def _named_tuple(fields: tuple[str, ...]) -> Callable[..., dict[str, Any]]:
    return lambda *values: dict(zip(fields, values, strict=True))


GLOBALS: Mapping[str, Any] = {
    **{name: _named_tuple(fields) for name, fields in CLASSES.items()},
    "jax._src.array _reconstruct_array": _jax_array,
    "numpy.core.multiarray _reconstruct": RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": RECONSTRUCT,
    "numpy ndarray": NDARRAY,
    "numpy dtype": _dtype,
    "ml_dtypes bfloat16": BFLOAT16,
}


def read_pickle(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the arrays of a pickle with these names, which are their paths in its tuples, without reading them.

    Raises UserError for a damaged file, and for any class that llama-2-jax does not use.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file", "Give the path of a pickle that llama-2-jax wrote.")
    refuse_stand_in(path)
    try:
        with path.open("rb") as file:
            program = Program(file)
            held = run_pickle(
                path,
                program,
                GLOBALS,
                {"NEWOBJ": lambda cls, args: cls(*args), "BUILD": _build},
                "llama-2-jax",
                lambda value: Span(program.tell() - len(value), len(value)),
            )
            if program.tell() != program.size:
                raise ValueError(f"{program.size - program.tell():,} bytes after its end")
        return {name: _tensor(path, name, held) for name in names}
    except UserError as error:
        raise error if str(path) in error.problem else UserError(f"{path}: {error.problem}", error.advice) from error
    except Exception as error:  # a damaged file fails anywhere in pickletools and below
        reason = f"{type(error).__name__}: {printable(error)}"
        raise UserError(f"{path} is damaged, or is not a checkpoint of llama-2-jax ({reason})", AGAIN) from error


def _tensor(path: Path, name: str, tree: Any) -> Tensor:
    for field in name.split("."):
        tree = tree[field] if isinstance(tree, dict) else None
    if not isinstance(tree, Held) or tree.dtype is None or tree.data is None:
        raise ValueError(f"{name} is not an array")
    shape = tree.shape
    if tree.fortran and len(shape) > 1:
        strides = tuple(math.prod(shape[:i]) for i in range(len(shape)))
        return StridedTensor(path, name, tree.data.start, shape, tree.dtype, strides)
    return Tensor(path, name, tree.data.start, shape, tree.dtype)
