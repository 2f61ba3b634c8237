"""Reads PyTorch's distributed checkpoints (torch.distributed.checkpoint, DCP) without torch, and without running code.

    .metadata        a pickle: the shape, dtype and chunks of each tensor, and the file, offset and length of each chunk
    __R_S.distcp     what rank R wrote in its thread S: for each chunk an archive of torch.save, concatenated

The classes are those of torch/distributed/checkpoint/metadata.py and filesystem.py, as of torch 2.0 to 2.13.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from camelid.checkpoint.containers.pickles import OpaqueKey, OpaqueObject, printable, run_pickle
from camelid.checkpoint.containers.torch_files import CRC_BYTES, DISTRIBUTED, open_embedded_tensor
from camelid.checkpoint.containers.torch_tensors import DTYPES
from camelid.checkpoint.tensors import Index, Tensor
from camelid.errors import UserError

METADATA = ".metadata"
MAX_METADATA = 2**29  # bytes; a model of 400 billion parameters from thousands of ranks needs a tenth
MAX_CELLS = 2**20  # of the grid that the chunk boundaries of one tensor form
AGAIN = "Copy all files of the folder again."
MODULE = "torch.distributed.checkpoint"
INERT = re.compile(
    rf"{re.escape(MODULE)}\.(metadata|filesystem|planner|storage) \w+|torch\.serialization _get_layout|torch \w+"
    r"|torch\.distributed\.tensor(\.\w+)* \w+|pathlib \w+|collections OrderedDict"
)

Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""the offset of a chunk along each axis of its tensor, and its shape"""


@dataclass(frozen=True)
class ByteRange:
    """The location of a chunk in a file."""

    file: Path
    start: int
    count: int


@dataclass(frozen=True)
class TensorMetadata:
    """The description of a tensor in .metadata."""

    shape: tuple[int, ...]
    dtype: Any
    """a numpy dtype; another object for dtypes that parameters never have"""
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Assembled(Tensor):
    """A tensor of several chunks, in one file or in several."""

    chunks: tuple[tuple[tuple[int, ...], Tensor], ...]
    """the offset of each chunk along each axis, and its values"""

    @property
    def files(self) -> frozenset[Path]:
        """The files of all chunks."""
        return frozenset(chunk.file for _, chunk in self.chunks)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """As Tensor.read_into; reads the part of each chunk that is within the slice."""
        for offsets, chunk in self.chunks:
            ends = (start + size for start, size in zip(offsets, chunk.shape, strict=True))
            common = [
                (max(cut.start, start), min(cut.stop, end))
                for cut, start, end in zip(index, offsets, ends, strict=True)
            ]
            if any(first >= last for first, last in common):
                continue
            theirs = tuple(slice(a - start, b - start) for (a, b), start in zip(common, offsets, strict=True))
            ours = tuple(slice(a - cut.start, b - cut.start) for (a, b), cut in zip(common, index, strict=True))
            at = out[ours]
            if at.shape == out.shape:
                chunk.read_into(out, theirs)
            else:
                held = np.empty(at.shape, out.dtype)
                chunk.read_into(held, theirs)
                at[...] = held


class DistributedCheckpoint:
    """The tensors in the folder of a distributed checkpoint, and the locations of their chunks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = _read_metadata(folder / METADATA)
        self.items: Mapping[str, TensorMetadata] = _items(folder, metadata)
        self._places = _places(folder, metadata)
        files = {place.file for place in self._places.values() if place.file.is_file()}
        self._verify = sum(file.stat().st_size for file in files) <= CRC_BYTES

    def tensor(self, name: str) -> Tensor:
        """Opens one of `items`; raises UserError if its chunks are missing or overlap, or are not as described."""
        item = self.items[name]
        _check_covered(self.folder, name, item)
        if not isinstance(item.dtype, np.dtype):
            raise UserError(
                f"{printable(name)} in {self.folder} has a dtype that parameters do not have", "Save it again."
            )
        chunks = []
        for offsets, shape in item.chunks:
            place = self._places.get((name, offsets))
            if place is None:
                raise UserError(f"{self.folder} lacks the chunk of {printable(name)} at {offsets}", AGAIN)
            chunk = open_embedded_tensor(place.file, place.start, place.count, self._verify)
            if (chunk.shape, chunk.dtype) != (shape, item.dtype):
                raise UserError(
                    f"{place.file} holds {chunk.shape} {chunk.dtype} for the chunk of {printable(name)} at {offsets}, "
                    f"and {METADATA} has {shape} {item.dtype}",
                    AGAIN,
                )
            chunks.append((offsets, replace(chunk, name=name)))
        if len(chunks) == 1:
            return chunks[0][1]
        first = chunks[0][1]
        return Assembled(first.file, name, 0, item.shape, first.dtype, tuple(chunks))


def matches(path: Path) -> bool:
    """Whether a folder is a distributed checkpoint."""
    return (path / METADATA).is_file()


def _read_metadata(path: Path) -> Mapping[str, Any]:
    if (size := path.stat().st_size) > MAX_METADATA:
        raise UserError(f"{path} has {size:,} bytes, more than the description of any checkpoint", AGAIN)

    def with_attributes(thing: Any, state: Any) -> Any:
        if isinstance(thing, OpaqueObject):
            thing.state = state
        return thing

    allowed = {
        "torch Size": _size,
        f"{MODULE}.metadata MetadataIndex": lambda *given: OpaqueKey("MetadataIndex", given),
        **{f"torch {dtype.name}": dtype for dtype in DTYPES.values()},
    }
    calls = {"BUILD": with_attributes, "NEWOBJ": lambda kind, arguments: kind(*arguments)}
    try:
        with path.open("rb") as file:
            held = run_pickle(path, file, allowed, calls, "torch.distributed.checkpoint", inert=INERT)
        if not isinstance(held, OpaqueObject) or not isinstance(held.state, dict):
            raise ValueError("it is not an object of the class Metadata")
    except UserError:
        raise
    except Exception as error:  # a damaged pickle fails anywhere in pickletools and below
        raise UserError(f"{path} is damaged ({type(error).__name__}: {printable(error)})", AGAIN) from error
    return held.state


def _size(sizes: Any = ()) -> tuple[int, ...]:
    if not _is_size(sizes):
        raise ValueError("a shape that is not a tuple of sizes")
    return sizes


def _is_size(sizes: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(sizes, tuple) and len(sizes) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in sizes)


def _items(folder: Path, metadata: Mapping[str, Any]) -> dict[str, TensorMetadata]:
    """The tensors in `state_dict_metadata`; entries of other objects, which are bytes, are ignored."""
    found: dict[str, TensorMetadata] = {}
    for name, held in _table(folder, metadata, "state_dict_metadata").items():
        match held:
            case OpaqueObject(
                state={"properties": OpaqueObject(state=properties), "size": tuple(shape), "chunks": list(chunks)}
            ) if _is_size(shape):
                dtype = properties[0] if isinstance(properties, tuple) and properties else None
                if isinstance(properties, dict):
                    dtype = properties.get("dtype")
                found[str(name)] = TensorMetadata(
                    shape, dtype, tuple(_chunk(folder, str(name), shape, held) for held in chunks)
                )
            case OpaqueObject():
                pass
            case _:
                raise _strange(folder, str(name))
    return found


def _chunk(folder: Path, name: str, shape: tuple[int, ...], held: Any) -> Chunk:
    match held:
        case OpaqueObject(state={"offsets": tuple(offsets), "sizes": tuple(sizes)}):
            if len(offsets) == len(sizes) == len(shape) and _is_size(offsets) and _is_size(sizes):
                return offsets, sizes
    raise _strange(folder, name)


def _places(folder: Path, metadata: Mapping[str, Any]) -> dict[tuple[str, tuple[int, ...]], ByteRange]:
    """The byte range of each chunk, by the name of its tensor and its offset."""
    found: dict[tuple[str, tuple[int, ...]], ByteRange] = {}
    for key, held in _table(folder, metadata, "storage_data").items():
        match key, held:
            case OpaqueKey(state={"fqn": str(name), "offset": tuple(offsets)}), OpaqueObject(state=dict(state)):
                if not _is_size(offsets):  # hashing a deeply nested tuple would overflow the stack
                    raise _strange(folder, name)
                file, span = state.get("relative_path"), (state.get("offset"), state.get("length"))
                if state.get("transform_descriptors"):
                    raise UserError(f"{folder} is compressed or transformed", "Save it without transforms.")
                if not isinstance(file, str) or not re.fullmatch(rf"[\w.-]+{re.escape(DISTRIBUTED)}", file):
                    raise _strange(folder, name)
                if not _is_size(span):
                    raise _strange(folder, name)
                found[name, offsets] = ByteRange(folder / file, *span)
    return found


def _table(folder: Path, metadata: Mapping[str, Any], name: str) -> dict[Any, Any]:
    if not isinstance(table := metadata.get(name), dict):
        raise UserError(f"{folder / METADATA} has no {name}", AGAIN)
    return table


def _strange(folder: Path, name: str) -> UserError:
    return UserError(f"{folder / METADATA} describes {printable(name)} in an unsupported way", AGAIN)


def _check_covered(folder: Path, name: str, item: TensorMetadata) -> None:
    """Raises UserError unless every element of the tensor is in exactly one chunk.

    The boundaries of all chunks form a grid, and every cell of it must be in exactly one chunk.
    """
    rank = len(item.shape)
    cuts = [
        sorted(
            {0, item.shape[axis], *(n for start, size in item.chunks for n in (start[axis], start[axis] + size[axis]))}
        )
        for axis in range(rank)
    ]
    if any(cut[-1] > size for cut, size in zip(cuts, item.shape, strict=True)):
        raise UserError(f"a chunk of {printable(name)} in {folder} reaches beyond its shape {item.shape}", AGAIN)
    cells = [len(cut) - 1 for cut in cuts]
    if np.prod([float(n) for n in cells]) > MAX_CELLS:
        raise UserError(f"{printable(name)} in {folder} is split into more than {MAX_CELLS:,} cells", AGAIN)
    places = [{at: i for i, at in enumerate(cut)} for cut in cuts]
    times = np.zeros(cells, np.int32)
    for start, size in item.chunks:
        box = tuple(slice(p[a], p[a + n]) for p, a, n in zip(places, start, size, strict=True))
        times[box] += 1
    if not (times == 1).all():
        missing = "lacks some" if (times == 0).any() else "has some twice"
        raise UserError(f"{folder} {missing} of the elements of {printable(name)}", AGAIN)
