"""Moves tensors between a file's layout and ours, as told by a table of rows.

    Row("layers.attn.q_proj", "model.layers.{layer}.self_attn.q_proj.weight", "(heads head_dim) embed")

says that our parameter's layers are the tensors of that name, whose axes are ours, the first two laid together.
Rows of one name lie end to end along that tensor's first axis, in the order of the table. Every row is read both ways.
A tensor that no row reads and a row that no tensor fills are errors.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from camelid.checkpoint.tensors import CHUNK, CODES, Planned, Tensor
from camelid.errors import UserError
from camelid.model.params import Spec

ALIGNMENT = 64  # bytes; XLA takes such a buffer on a CPU as it is, without a copy
READERS = 4  # threads; enough to keep a disk busy while others cast


@dataclass(frozen=True)
class Row:
    path: str
    """ours: layers.attn.q_proj"""
    name: str
    """theirs, with {layer}: model.layers.{layer}.self_attn.q_proj.weight"""
    axes: str
    """theirs, in our order; axes in brackets are one axis of the file"""

    def names(self, spec: Spec) -> list[str]:
        """The file's tensors that hold the parameter, one a layer."""
        return [self.name.format(layer=layer) for layer in range(spec.shape[0])] if spec.stacked else [self.name]

    def groups(self, spec: Spec) -> list[tuple[int, ...]]:
        """Sizes of our axes, by axis of the file."""
        words = [tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", self.axes)]
        assert [word for group in words for word in group] == list(spec.outputs + spec.inputs), f"{self} is not {spec}"
        sizes = iter(spec.shape[len(spec.stacked) :])
        return [tuple(next(sizes) for _ in group) for group in words]

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """The shape that one layer has in the file."""
        return tuple(int(np.prod(group)) for group in self.groups(spec))


@dataclass(frozen=True)
class Part:
    """The layers of one parameter, as they lie in the tensors of a file."""

    row: Row
    spec: Spec
    start: int
    """where it begins along the first axis of its tensor"""


@dataclass(frozen=True)
class Table:
    """Every parameter of a model, and where it lies."""

    parts: Mapping[str, Part]
    """by path of ours"""

    @functools.cached_property
    def tensors(self) -> dict[str, list[tuple[Part, int]]]:
        """By name in the file: the parameters' layers that lie in it, end to end."""
        tensors: dict[str, list[tuple[Part, int]]] = {}
        for part in self.parts.values():
            for layer, name in enumerate(part.row.names(part.spec)):
                tensors.setdefault(name, []).append((part, layer))
        return tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the file."""
        first, *rest = (part.row.shape(part.spec) for part, _ in self.tensors[name])
        return first[0] + sum(shape[0] for shape in rest), *first[1:]


def table(rows: Sequence[Row], specs: Mapping[str, Spec]) -> Table:
    """The table of the parameters that a model has; rows of others are left out."""
    ends: dict[str, int] = {}
    parts = {}
    for row in rows:
        if row.path in specs:
            start = ends.get(row.name, 0)
            parts[row.path] = Part(row, specs[row.path], start)
            ends[row.name] = start + row.shape(specs[row.path])[0]
    assert parts.keys() == specs.keys(), f"no row for {specs.keys() - parts.keys()}"
    return Table(parts)


def check(table: Table, tensors: Mapping[str, Tensor], known: str) -> None:
    """Raises UserError for missing tensors, wrong shapes, and tensors that no row reads and `known` does not match."""
    if missing := [name for name in table.tensors if name not in tensors]:
        raise UserError(
            f"the checkpoint lacks {_some(missing)}",
            "The files are incomplete, or config.json describes another model.",
        )
    if extra := [name for name in tensors if name not in table.tensors and not re.fullmatch(known, name)]:
        raise UserError(
            f"the checkpoint holds tensors that this model has no place for: {_some(extra)}",
            "config.json describes another model, or the checkpoint has parts that camelid does not know.",
        )
    for name in table.tensors:
        if tensors[name].shape != (shape := table.shape(name)):
            raise UserError(
                f"{name} has shape {tensors[name].shape}, and config.json asks for {shape}",
                "The files and config.json belong to different models.",
            )
        if tensors[name].dtype not in CODES:
            raise UserError(
                f"{name} is {tensors[name].dtype}; parameters are {', '.join(dtype.name for dtype in CODES)}",
                "Save the checkpoint in one of these dtypes first.",
            )


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load(
    table: Table, tensors: Mapping[str, Tensor], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Parameters by path, of the dtypes and on the devices of `targets`; each device's slice is read for it."""
    with ThreadPoolExecutor(READERS) as pool:
        return {path: _load(part, tensors, targets[path], pool) for path, part in table.parts.items()}


def _load(
    part: Part, tensors: Mapping[str, Tensor], target: jax.ShapeDtypeStruct, pool: ThreadPoolExecutor
) -> jax.Array:
    slices: dict[tuple, np.ndarray] = {}
    shape = part.spec.shape

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        whole = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        key = tuple((s.start, s.stop) for s in whole)
        if key not in slices:
            slices[key] = _read(part, tensors, whole, np.dtype(target.dtype), pool)
        return slices[key]

    return jax.make_array_from_callback(shape, target.sharding, read)


def _read(part, tensors, index, dtype, pool) -> np.ndarray:
    """Our slice `index` of a parameter, stacked in one aligned buffer."""
    out = aligned([s.stop - s.start for s in index], dtype)
    first, rest = index[0], index[1:]
    names = part.row.names(part.spec)
    if part.spec.stacked:
        blocks = [(name, rest, layer) for name, layer in zip(names[first], out, strict=True)]
    else:
        step = -(-len(out) // READERS)
        rows = [slice(i, min(i + step, len(out))) for i in range(0, len(out), step)]
        blocks = [(names[0], (slice(first.start + r.start, first.start + r.stop), *rest), out[r]) for r in rows]
    list(pool.map(lambda block: read_slice(part, tensors[block[0]], *block[1:]), blocks))
    return out


def read_slice(part: Part, tensor: Tensor, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Fills `out` with our slice `index` of one layer; of axes in one bracket, only the first may be cut."""
    cuts, axes = [], iter(zip(index, part.spec.shape[len(part.spec.stacked) :], strict=True))
    for group in part.row.groups(part.spec):
        (outer, _), *inner = [next(axes) for _ in group]
        assert all(s == slice(0, n) for s, n in inner), f"{part.row.path}: an inner axis is cut"
        width, start = int(np.prod(group[1:])), 0 if cuts else part.start
        cuts.append(slice(start + outer.start * width, start + outer.stop * width))
    tensor.read_into(out.reshape([cut.stop - cut.start for cut in cuts]), tuple(cuts))


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array whose first byte lies on a multiple of ALIGNMENT."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def plan(table: Table, dtypes: Mapping[str, np.dtype]) -> list[Planned]:
    """The file's tensors in the order in which they are written; `dtypes` are those of our parameters, by path."""
    return [Planned(name, table.shape(name), dtypes[parts[0][0].row.path]) for name, parts in table.tensors.items()]


def pieces(part: Part, tensor: Tensor, dtype: np.dtype) -> Iterator[np.ndarray]:
    """One layer of a parameter, from a file, in slices of at most CHUNK bytes or one row."""
    shape = part.spec.shape[len(part.spec.stacked) :]
    step = max(1, CHUNK * shape[0] // (int(np.prod(shape)) * dtype.itemsize))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        out = np.empty((stop - start, *shape[1:]), dtype)
        read_slice(part, tensor, (slice(start, stop), *(slice(0, n) for n in shape[1:])), out)
        yield out
