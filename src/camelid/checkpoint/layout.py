"""Moves tensors between a file's layout and ours, as told by a table of rows.

    Row("layers.attn.q_proj", "model.layers.{layer}.self_attn.q_proj.weight", "(heads head_dim) embed")

says that our parameter's layers are the tensors of that name, whose axes are ours, the first two laid together. Where
the file cuts an axis finer than we do, both sides say how; here its rotary pairs are neighbours, and ours are halves:

    Row("layers.attn.q_proj", "...attention.wq.weight", "(heads freq pair) embed", "heads (pair freq) embed")

A file that holds all layers in one tensor has `layers` among its axes. Rows of one name lie end to end in that tensor,
in the order of the table: along its first axis, or along the one that they name. Every row is read both ways. A tensor
that no row reads and a row that no tensor fills are errors.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import numpy as np

from camelid.checkpoint.tensors import CODES, ColumnCache, Index, PlannedTensor, Tensor
from camelid.errors import UserError
from camelid.model.params import Spec

ALIGNMENT = 64  # bytes; XLA takes such a buffer on a CPU as it is, without a copy
READERS = 4  # threads; enough to keep a disk busy while others cast
CHUNK_BYTES = 8 * 2**20  # bytes of a tensor that are written at once
BLOCK = (256, 64)  # numbers along the fast axes of a source and of its target; such a block stays in a core's cache

Groups = tuple[tuple[str, ...], ...]
"""axes, each of words that are laid together"""


@dataclass(frozen=True)
class TensorRule:
    path: str
    """ours: layers.attn.q_proj"""
    name: str
    """theirs, with {layer}: model.layers.{layer}.self_attn.q_proj.weight"""
    axes: str
    """theirs, in the file's order; words in brackets are one axis of the file"""
    ours: str = ""
    """our axes, where one is cut finer; words in brackets are one axis of ours"""
    along: str = ""
    """the word along which rows of this name lie end to end; without one, the first axis of the file"""


@dataclass(frozen=True)
class ParameterEntry:
    """One parameter, and where its layers lie in the tensors of a file."""

    rule: TensorRule
    spec: Spec
    theirs: Groups
    ours: Groups
    sizes: Mapping[str, int]
    """of every word"""
    start: int = 0
    """where it begins along row.along or the first axis"""
    length: int = 0
    """of what lies end to end there in all"""

    def layers(self) -> Sequence[int | None]:
        """The layers that have tensors of their own; None is all of them, or a parameter without."""
        own = self.spec.stacked and ("layers",) not in self.theirs
        return range(self.spec.shape[0]) if own else [None]

    def name(self, layer: int | None) -> str:
        return self.rule.name.format(layer=layer)

    def held(self, word: str) -> int:
        """How many of a word the file's tensor has."""
        return self.length if word == self.rule.along else self.sizes[word]

    def shape(self) -> tuple[int, ...]:
        """The shape of the file's tensor."""
        first, *rest = (math.prod(map(self.held, group)) for group in self.theirs)
        return (first if self.rule.along else self.length, *rest)


@dataclass(frozen=True)
class Table:
    """Every parameter of a model, and where it lies."""

    entries: Mapping[str, ParameterEntry]
    """by path of ours"""

    @functools.cached_property
    def tensors(self) -> dict[str, list[tuple[ParameterEntry, int | None]]]:
        """By name in the file: the parameters' layers that lie in it, end to end."""
        tensors: dict[str, list[tuple[ParameterEntry, int | None]]] = {}
        for part in self.entries.values():
            for layer in part.layers():
                tensors.setdefault(part.name(layer), []).append((part, layer))
        return tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the file."""
        return self.tensors[name][0][0].shape()


def make_table(rows: Sequence[TensorRule], specs: Mapping[str, Spec], sizes: Mapping[str, int]) -> Table:
    """The table of the parameters that a model has; rows of others are left out.

    `sizes` are those of the words that are no axes of ours; of each bracket, one may be missing.
    """
    ends: dict[str, int] = {}
    parts = {}
    for row in rows:
        if row.path in specs:
            part = _part(row, specs[row.path], sizes)
            start = ends.get(row.name, 0)
            along = part.sizes[row.along] if row.along else math.prod(part.sizes[word] for word in part.theirs[0])
            ends[row.name] = start + along
            parts[row.path] = replace(part, start=start)
    assert parts.keys() == specs.keys(), f"no row for {specs.keys() - parts.keys()}"
    return Table({path: replace(part, length=ends[part.rule.name]) for path, part in parts.items()})


def parse_axes(axes: str) -> Groups:
    """Axes as they are written in a row, apart."""
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", axes))


def _part(row: TensorRule, spec: Spec, sizes: Mapping[str, int]) -> ParameterEntry:
    theirs, ours = parse_axes(row.axes), parse_axes(row.ours or " ".join(spec.outputs + spec.inputs))
    known = {**sizes, **dict(zip(spec.axes, spec.shape, strict=True))}
    for group, axis in zip(ours, spec.outputs + spec.inputs, strict=True):
        whole, missing = known[axis], [word for word in group if word not in known]
        assert len(missing) <= 1, f"{row}: {missing} have no size"
        rest = math.prod(known[word] for word in group if word in known)
        if missing:
            known[missing[0]] = whole // rest
        assert math.prod(known[word] for word in group) == whole, f"{row}: {group} is not {axis}"
    assert {*sum(theirs, ())} - {"layers"} == {*sum(ours, ())}, f"{row} is not {spec}"
    return ParameterEntry(row, spec, theirs, ours, known)


# Where a slice lies ---------------------------------------------------------------------


@dataclass(frozen=True)
class SliceMapping:
    """A slice of a file's tensor, and how a slice of ours stands in it."""

    index: Index
    words: tuple[int, ...]
    """its shape, brackets opened"""
    picks: Index
    """of these, what is ours"""
    order: tuple[int, ...]
    """our words, among theirs"""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.index)

    @property
    def plain(self) -> bool:
        """Whether both hold the same numbers in the same order."""
        whole = all(s == slice(0, n) for s, n in zip(self.picks, self.words, strict=True))
        return whole and self.order == tuple(sorted(self.order))

    def ours(self, held: np.ndarray) -> np.ndarray:
        """A view of the slice, in the order of our words."""
        return held.reshape(self.words)[self.picks].transpose(self.order)


def map_slice(part: ParameterEntry, index: Index, layer: int | None) -> SliceMapping:
    """Where our slice `index` of a layer lies in its tensor; of words in one bracket, only the first may be cut."""
    cuts = {word: slice(0, part.sizes[word]) for word in sum(part.theirs, ())}
    for group, s in zip(part.ours, index, strict=True):
        width = math.prod(part.sizes[word] for word in group[1:])
        assert s.start % width == s.stop % width == 0, f"{part.rule.path}: {group} is cut at {s}"
        cuts[group[0]] = slice(s.start // width, s.stop // width)
    if ("layers",) in part.theirs and layer is not None:
        cuts["layers"] = slice(layer, layer + 1)
    if along := part.rule.along:
        cuts[along] = slice(cuts[along].start + part.start, cuts[along].stop + part.start)
    file_index, words, picks = [], [], []
    for axis, (outer, *inner) in enumerate(part.theirs):
        width, cut = math.prod(map(part.held, inner)), cuts[outer]
        first = part.start if axis == 0 and not along else 0
        file_index.append(slice(first + cut.start * width, first + cut.stop * width))
        words += [cut.stop - cut.start, *map(part.held, inner)]
        picks += [slice(0, cut.stop - cut.start), *(cuts[word] for word in inner)]
    theirs, ours = sum(part.theirs, ()), sum(part.ours, ())
    order = [theirs.index(word) for word in (("layers",) if "layers" in theirs else ()) + ours]
    return SliceMapping(tuple(file_index), tuple(words), tuple(picks), tuple(order))


def move(source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source, of one dtype; where they run along different axes, block by block."""
    bits = np.dtype(f"u{source.itemsize}")  # numpy copies its own integers faster than bfloat16
    source, target = source.view(bits), target.view(bits)
    near = [_fastest(x) for x in (source, target)]
    if near[0] == near[1]:
        target[...] = source
        return
    for i in range(0, source.shape[near[0]], BLOCK[0]):
        for j in range(0, source.shape[near[1]], BLOCK[1]):
            at = [slice(None)] * source.ndim
            at[near[0]], at[near[1]] = slice(i, i + BLOCK[0]), slice(j, j + BLOCK[1])
            target[*at] = source[*at]


def _fastest(x: np.ndarray) -> int:
    """The axis along which neighbours lie closest."""
    return min(range(x.ndim), key=lambda axis: x.strides[axis] if x.shape[axis] > 1 else 2**62)


# Reading --------------------------------------------------------------------------------


def check_tensors(table: Table, tensors: Mapping[str, Tensor], known: str, described_by: str = "config.json") -> None:
    """Raises UserError for missing tensors, wrong shapes, and tensors that no row reads and `known` does not match.

    `described_by` is what said of which model the table is, for messages.
    """
    # Before all names are made: of a damaged number of layers there are too many.
    if any(len(part.layers()) > len(tensors) for part in table.entries.values()):
        raise UserError(
            f"the checkpoint holds {len(tensors)} tensors, too few for its layers: {summarize([*tensors])}",
            f"The files are incomplete, or {described_by} describes another model.",
        )
    extra = [name for name in tensors if name not in table.tensors and not re.fullmatch(known, name)]
    if missing := [name for name in table.tensors if name not in tensors]:
        raise UserError(
            f"the checkpoint lacks {summarize(missing)}" + (f"; instead it holds {summarize(extra)}" if extra else ""),
            f"The files are incomplete, or {described_by} describes another model.",
        )
    if extra:
        raise UserError(
            f"the checkpoint holds tensors that this model has no place for: {summarize(extra)}",
            f"They are of another model than {described_by} describes, or are parts that camelid does not know.",
        )
    for name in table.tensors:
        if tensors[name].shape != (shape := table.shape(name)):
            raise UserError(
                f"{name} has shape {tensors[name].shape}, and {described_by} asks for {shape}",
                f"The files and {described_by} belong to different models.",
            )
        if tensors[name].dtype not in CODES:
            raise UserError(
                f"{name} is {tensors[name].dtype}; parameters are {', '.join(dtype.name for dtype in CODES)}",
                "Save the checkpoint in one of these dtypes first.",
            )


def summarize(names: Sequence[str], most: int = 3) -> str:
    """Some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load(
    table: Table, tensors: Mapping[str, Tensor], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Parameters by path, of the dtypes and on the devices of `targets`; each device's slice is read for it."""
    with ThreadPoolExecutor(READERS) as pool:
        return {path: _load(part, tensors, targets[path], pool) for path, part in table.entries.items()}


def _load(
    part: ParameterEntry, tensors: Mapping[str, Tensor], target: jax.ShapeDtypeStruct, pool: ThreadPoolExecutor
) -> jax.Array:
    slices: dict[tuple, np.ndarray] = {}
    shape = part.spec.shape

    def read(index: Index | None) -> np.ndarray:
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
    first, *rest = index
    if part.spec.stacked:
        blocks = [(layer, rest, block) for layer, block in zip(range(first.start, first.stop), out, strict=True)]
    else:
        step = -(-len(out) // READERS)
        starts = range(first.start, first.stop, step)
        cuts = [slice(start, min(start + step, first.stop)) for start in starts]
        blocks = [(None, (cut, *rest), out[cut.start - first.start :][: cut.stop - cut.start]) for cut in cuts]

    def one_block(block: tuple) -> None:
        layer, cut, values = block
        read_parameter_slice(part, tensors[part.name(layer)], tuple(cut), layer, values)

    list(pool.map(one_block, blocks))
    return out


def read_parameter_slice(
    part: ParameterEntry, tensor: Tensor, index: Index, layer: int | None, out: np.ndarray
) -> None:
    """Fills `out`, contiguous, with our slice `index` of one layer."""
    if (whole := _widened(part, index)) != index:
        held = np.empty([s.stop - s.start for s in whole], out.dtype)
        read_parameter_slice(part, tensor, whole, layer, held)
        wanted = (slice(s.start - w.start, s.stop - w.start) for s, w in zip(index, whole, strict=True))
        out[...] = held[*wanted]
        return
    at = map_slice(part, index, layer)
    if at.plain:
        return tensor.read_into(out.reshape(at.shape), at.index)
    held = np.empty(at.shape, out.dtype)
    tensor.read_into(held, at.index)
    view = at.ours(held)
    move(view, out.reshape(view.shape))


def _widened(part: ParameterEntry, index: Index) -> Index:
    """The least slice around `index` that cuts only the first word of each bracket: query heads of whole groups."""

    def one(group: tuple[str, ...], s: slice) -> slice:
        width = math.prod(part.sizes[word] for word in group[1:])
        return slice(s.start // width * width, -(-s.stop // width) * width)

    return tuple(map(one, part.ours, index))


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array whose first byte lies on a multiple of ALIGNMENT."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


# Writing --------------------------------------------------------------------------------

SliceReader = Callable[[str, int | None, Index, np.dtype], np.ndarray]
"""from a path, a layer, a slice of it and a dtype to its values, which are not to be changed"""


def plan_tensors(table: Table, dtypes: Mapping[str, np.dtype]) -> list[PlannedTensor]:
    """The file's tensors in the order in which they are written; `dtypes` are those of our parameters, by path."""
    return [
        PlannedTensor(name, table.shape(name), dtypes[parts[0][0].rule.path]) for name, parts in table.tensors.items()
    ]


def tensor_chunks(table: Table, name: str, dtype: np.dtype, source: SliceReader) -> Iterator[np.ndarray]:
    """One of the file's tensors, in arrays of about PIECE bytes that lie end to end in it."""
    members = table.tensors[name]
    for together in [members] if members[0][0].rule.along else [[member] for member in members]:
        part, layer = together[0]
        lead = part.theirs[0][0]
        width = math.prod(part.shape()) // part.shape()[0] * math.prod(map(part.held, part.theirs[0][1:]))
        step = 1 if lead == "layers" else max(1, CHUNK_BYTES // (width * dtype.itemsize))
        for start in range(0, part.sizes[lead], step):
            cut = slice(start, min(start + step, part.sizes[lead]))
            held = None
            for part, own in together:
                layer = start if lead == "layers" else own
                index = parameter_index(part, {} if lead == "layers" else {lead: cut})
                at, values = map_slice(part, index, layer), source(part.rule.path, layer, index, dtype)
                if at.plain and values.flags.c_contiguous:
                    held = values.reshape(at.shape)
                    continue
                held = np.empty(at.shape, dtype) if held is None else held
                view = at.ours(held)
                move(values.reshape(view.shape), view)
            assert held is not None
            yield held


def chunk_indices(shape: Sequence[int]) -> Iterator[Index]:
    """Slices of an array that lie end to end, of about PIECE bytes in float32."""
    step = max(1, CHUNK_BYTES // (4 * max(1, math.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0])), *(slice(0, n) for n in shape[1:])


def parameter_index(part: ParameterEntry, cuts: Mapping[str, slice]) -> Index:
    """The slice of ours that holds these slices of words, and all of every other."""

    def one(group: tuple[str, ...]) -> slice:
        width = math.prod(part.sizes[word] for word in group[1:])
        cut = cuts.get(group[0], slice(0, part.sizes[group[0]]))
        return slice(cut.start * width, cut.stop * width)

    return tuple(map(one, part.ours))


def slice_reader(table: Table, tensors: Mapping[str, Tensor]) -> SliceReader:
    """The values of an opened checkpoint, read as they are asked for."""
    bands = ColumnCache()

    def source(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        part = table.entries[path]
        tensor = tensors[part.name(layer)]
        whole = _widened(part, index)
        at = map_slice(part, whole, layer)
        view = at.ours(bands.read(tensor, at.index, dtype))
        shape = [s.stop - s.start for s in whole]
        if all(len(group) == 1 for group in part.ours):
            return view.reshape(shape)  # without the axis of layers: still a view
        out = np.empty(shape, dtype)
        move(view, out.reshape(view.shape))
        return out[*(slice(s.start - w.start, s.stop - w.start) for s, w in zip(index, whole, strict=True))]

    return source
