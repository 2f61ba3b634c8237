"""Maps tensors between the layout of a file and camelid's, as specified by a table of rules.

    TensorRule("layers.attn.q_proj", "model.layers.{layer}.self_attn.q_proj.weight", "(heads head_dim) embed")

means that the layers of this parameter are the tensors of that name; their axes are camelid's, and the first two are
flattened into one. If the file splits an axis more finely than we do, the rule lists the axes of both sides. Here the
elements of a rotary pair are neighbors in the file, and in separate halves of the axis in our layout:

    TensorRule("layers.attn.q_proj", "...attention.wq.weight", "(heads freq pair) embed", "heads (pair freq) embed")

A file that stacks all layers in one tensor has `layers` among its axes. Parameters whose rules have the same tensor
name are concatenated in that tensor, in the order of the table: along its first axis, or along the axis that the rules
name. Every rule is used for both reading and writing. A tensor without a rule and a rule without a tensor are errors.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import numpy as np

from camelid.checkpoint.tensors import CODES, ColumnCache, Index, PlannedTensor, Tensor, summarize
from camelid.errors import UserError
from camelid.model.params import Spec

ALIGNMENT = 64  # bytes; XLA takes such a buffer on a CPU as it is, without a copy
READERS = 4  # threads; enough to keep a disk busy while others cast
CHUNK_BYTES = 8 * 2**20  # of a tensor are written at once
BLOCK = (256, 64)  # elements along the fastest axes of a source and of its target; such a block stays in a core's cache

Groups = tuple[tuple[str, ...], ...]
"""axes, each a group of axis names that are flattened into it"""


@dataclass(frozen=True)
class TensorRule:
    """Where a file stores a parameter."""

    path: str
    """of the parameter, such as layers.attn.q_proj"""
    name: str
    """of the tensor, with {layer}: model.layers.{layer}.self_attn.q_proj.weight"""
    axes: str
    """of the tensor, in the file's order; words in parentheses are flattened into one axis of the file"""
    ours: str = ""
    """camelid's axes, if the file splits one; words in parentheses are flattened into one of them"""
    along: str = ""
    """the axis name along which parameters are concatenated in the tensor; "" is the first axis of the file"""


@dataclass(frozen=True)
class ParameterEntry:
    """A parameter of one model, and where its layers are in the tensors of a file."""

    rule: TensorRule
    spec: Spec
    file_axes: Groups
    our_axes: Groups
    sizes: Mapping[str, int]
    """of every axis name"""
    start: int = 0
    """offset of the parameter along rule.along, or along the first axis"""
    length: int = 0
    """size of the tensor along that axis"""

    def layers(self) -> Sequence[int | None]:
        """The layers that have a tensor of their own; [None] if one tensor holds the entire parameter."""
        separate = self.spec.stacked and ("layers",) not in self.file_axes
        return range(self.spec.shape[0]) if separate else [None]

    def name(self, layer: int | None) -> str:
        """The name of the tensor that holds a layer."""
        return self.rule.name.format(layer=layer)

    def file_size(self, word: str) -> int:
        """The size of an axis name in the file's tensor."""
        return self.length if word == self.rule.along else self.sizes[word]

    def shape(self) -> tuple[int, ...]:
        """The shape of the file's tensor."""
        first, *rest = (math.prod(map(self.file_size, group)) for group in self.file_axes)
        return (first if self.rule.along else self.length, *rest)


@dataclass(frozen=True)
class Table:
    """Where a file stores every parameter of a model."""

    entries: Mapping[str, ParameterEntry]
    """by parameter path"""

    @functools.cached_property
    def tensors(self) -> dict[str, list[tuple[ParameterEntry, int | None]]]:
        """The layers of parameters that are concatenated in each tensor, by the tensor's name."""
        tensors: dict[str, list[tuple[ParameterEntry, int | None]]] = {}
        for entry in self.entries.values():
            for layer in entry.layers():
                tensors.setdefault(entry.name(layer), []).append((entry, layer))
        return tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the file."""
        return self.tensors[name][0][0].shape()


def make_table(rules: Sequence[TensorRule], specs: Mapping[str, Spec], sizes: Mapping[str, int]) -> Table:
    """The table of the parameters `specs`, by path; rules of other parameters are ignored.

    `sizes` are those of axis names that are not among the parameters' own; of each group, one may be left out.
    """
    ends: dict[str, int] = {}
    entries = {}
    for rule in rules:
        if rule.path in specs:
            entry = _entry(rule, specs[rule.path], sizes)
            start = ends.get(rule.name, 0)
            words = [rule.along] if rule.along else entry.file_axes[0]
            ends[rule.name] = start + math.prod(entry.sizes[word] for word in words)
            entries[rule.path] = replace(entry, start=start)
    assert entries.keys() == specs.keys(), f"no rule for {specs.keys() - entries.keys()}"
    return Table({path: replace(entry, length=ends[entry.rule.name]) for path, entry in entries.items()})


def parse_axes(axes: str) -> Groups:
    """Splits a rule's axes into groups of words: "(heads head_dim) embed" is (("heads", "head_dim"), ("embed",))."""
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", axes))


def _entry(rule: TensorRule, spec: Spec, sizes: Mapping[str, int]) -> ParameterEntry:
    file_axes, our_axes = parse_axes(rule.axes), parse_axes(rule.ours or " ".join(spec.outputs + spec.inputs))
    known = {**sizes, **dict(zip(spec.axes, spec.shape, strict=True))}
    for group, axis in zip(our_axes, spec.outputs + spec.inputs, strict=True):
        size, missing = known[axis], [word for word in group if word not in known]
        assert len(missing) <= 1, f"{rule}: {missing} have no size"
        rest = math.prod(known[word] for word in group if word in known)
        if missing:
            known[missing[0]] = size // rest
        assert math.prod(known[word] for word in group) == size, f"{rule}: {group} is not {axis}"
    assert {*sum(file_axes, ())} - {"layers"} == {*sum(our_axes, ())}, f"{rule} is not {spec}"
    return ParameterEntry(rule, spec, file_axes, our_axes, known)


# Slices --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SliceMapping:
    """A slice of a file's tensor, and the position of a slice of a parameter in it."""

    index: Index
    words: tuple[int, ...]
    """its shape, with one axis for each axis name"""
    picks: Index
    """our slice of these axes"""
    order: tuple[int, ...]
    """the file's axis of each of our axis names"""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.index)

    @property
    def plain(self) -> bool:
        """Whether the two slices have the same elements in the same order."""
        complete = all(s == slice(0, n) for s, n in zip(self.picks, self.words, strict=True))
        return complete and self.order == tuple(sorted(self.order))

    def ours(self, held: np.ndarray) -> np.ndarray:
        """Our slice as a view of the file's, with one axis for each axis name, in our order."""
        return held.reshape(self.words)[self.picks].transpose(self.order)


def map_slice(entry: ParameterEntry, index: Index, layer: int | None) -> SliceMapping:
    """Maps our slice `index` of a layer to its tensor; within a group, `index` may restrict only the first word."""
    cuts = {word: slice(0, entry.sizes[word]) for word in sum(entry.file_axes, ())}
    for group, s in zip(entry.our_axes, index, strict=True):
        width = math.prod(entry.sizes[word] for word in group[1:])
        assert s.start % width == s.stop % width == 0, f"{entry.rule.path}: {group} is restricted to {s}"
        cuts[group[0]] = slice(s.start // width, s.stop // width)
    if ("layers",) in entry.file_axes and layer is not None:
        cuts["layers"] = slice(layer, layer + 1)
    if along := entry.rule.along:
        cuts[along] = slice(cuts[along].start + entry.start, cuts[along].stop + entry.start)
    file_index, words, picks = [], [], []
    for axis, (outer, *inner) in enumerate(entry.file_axes):
        width, cut = math.prod(map(entry.file_size, inner)), cuts[outer]
        first = entry.start if axis == 0 and not along else 0
        file_index.append(slice(first + cut.start * width, first + cut.stop * width))
        words += [cut.stop - cut.start, *map(entry.file_size, inner)]
        picks += [slice(0, cut.stop - cut.start), *(cuts[word] for word in inner)]
    theirs, ours = sum(entry.file_axes, ()), sum(entry.our_axes, ())
    order = [theirs.index(word) for word in (("layers",) if "layers" in theirs else ()) + ours]
    return SliceMapping(tuple(file_index), tuple(words), tuple(picks), tuple(order))


def move(source: np.ndarray, target: np.ndarray) -> None:
    """Assigns target[...] = source, of one dtype; block by block if their fastest axes differ."""
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
    """The axis with the smallest stride."""
    return min(range(x.ndim), key=lambda axis: x.strides[axis] if x.shape[axis] > 1 else 2**62)


# Reading --------------------------------------------------------------------------------


def check_tensors(table: Table, tensors: Mapping[str, Tensor], known: str, described_by: str = "config.json") -> None:
    """Raises UserError if tensors are missing, have another shape or dtype, or are not in the table.

    Tensors whose names match the regular expression `known` may be absent from the table. `described_by` names the
    source of the model's configuration, for messages.
    """
    # Before all names are created: a damaged number of layers may be huge.
    if any(len(entry.layers()) > len(tensors) for entry in table.entries.values()):
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


def load(
    table: Table, tensors: Mapping[str, Tensor], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads the parameters of `targets` by path, in its dtypes and shardings, separately for each device."""
    with ThreadPoolExecutor(READERS) as pool:
        return {path: _load(table.entries[path], tensors, target, pool) for path, target in targets.items()}


def _load(
    entry: ParameterEntry, tensors: Mapping[str, Tensor], target: jax.ShapeDtypeStruct, pool: ThreadPoolExecutor
) -> jax.Array:
    slices: dict[tuple, np.ndarray] = {}
    shape = entry.spec.shape

    def read(index: Index | None) -> np.ndarray:
        assert index is not None
        full = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        key = tuple((s.start, s.stop) for s in full)
        if key not in slices:
            slices[key] = _read(entry, tensors, full, np.dtype(target.dtype), pool)
        return slices[key]

    return jax.make_array_from_callback(shape, target.sharding, read)


def _read(entry, tensors, index, dtype, pool) -> np.ndarray:
    """Our slice `index` of a parameter, in one aligned buffer."""
    out = aligned([s.stop - s.start for s in index], dtype)
    first, *rest = index
    if entry.spec.stacked:
        blocks = [(layer, rest, block) for layer, block in zip(range(first.start, first.stop), out, strict=True)]
    else:
        step = -(-len(out) // READERS)
        starts = range(first.start, first.stop, step)
        cuts = [slice(start, min(start + step, first.stop)) for start in starts]
        blocks = [(None, (cut, *rest), out[cut.start - first.start :][: cut.stop - cut.start]) for cut in cuts]

    def one_block(block: tuple) -> None:
        layer, cut, values = block
        read_parameter_slice(entry, tensors[entry.name(layer)], tuple(cut), layer, values)

    list(pool.map(one_block, blocks))
    return out


def read_parameter_slice(
    entry: ParameterEntry, tensor: Tensor, index: Index, layer: int | None, out: np.ndarray
) -> None:
    """Fills `out`, a contiguous array, with our slice `index` of one layer."""
    if (widened := _widened(entry, index)) != index:
        held = np.empty([s.stop - s.start for s in widened], out.dtype)
        read_parameter_slice(entry, tensor, widened, layer, held)
        wanted = (slice(s.start - w.start, s.stop - w.start) for s, w in zip(index, widened, strict=True))
        out[...] = held[*wanted]
        return
    at = map_slice(entry, index, layer)
    if at.plain:
        return tensor.read_into(out.reshape(at.shape), at.index)
    held = np.empty(at.shape, out.dtype)
    tensor.read_into(held, at.index)
    view = at.ours(held)
    move(view, out.reshape(view.shape))


def _widened(entry: ParameterEntry, index: Index) -> Index:
    """The smallest slice around `index` that restricts only the first word of each group, as `map_slice` needs it."""

    def one(group: tuple[str, ...], s: slice) -> slice:
        width = math.prod(entry.sizes[word] for word in group[1:])
        return slice(s.start // width * width, -(-s.stop // width) * width)

    return tuple(map(one, entry.our_axes, index))


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array whose address is a multiple of ALIGNMENT."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


# Writing --------------------------------------------------------------------------------

SliceReader = Callable[[str, int | None, Index, np.dtype], np.ndarray]
"""reads a slice: (path, layer or None, index within the layer, dtype) -> values, which must not be modified"""


def plan_tensors(table: Table, dtypes: Mapping[str, np.dtype]) -> list[PlannedTensor]:
    """The file's tensors in the order of the table; `dtypes` are those of the parameters, by path."""
    return [
        PlannedTensor(name, table.shape(name), dtypes[parts[0][0].rule.path]) for name, parts in table.tensors.items()
    ]


def tensor_chunks(table: Table, name: str, dtype: np.dtype, source: SliceReader) -> Iterator[np.ndarray]:
    """Yields one of the file's tensors as consecutive arrays of about CHUNK_BYTES."""
    members = table.tensors[name]
    for together in [members] if members[0][0].rule.along else [[member] for member in members]:
        entry, layer = together[0]
        lead = entry.file_axes[0][0]
        width = math.prod(entry.shape()) // entry.shape()[0] * math.prod(map(entry.file_size, entry.file_axes[0][1:]))
        step = 1 if lead == "layers" else max(1, CHUNK_BYTES // (width * dtype.itemsize))
        for start in range(0, entry.sizes[lead], step):
            cut = slice(start, min(start + step, entry.sizes[lead]))
            held = None
            for entry, own in together:
                layer = start if lead == "layers" else own
                index = parameter_index(entry, {} if lead == "layers" else {lead: cut})
                at, values = map_slice(entry, index, layer), source(entry.rule.path, layer, index, dtype)
                if at.plain and values.flags.c_contiguous:
                    held = values.reshape(at.shape)
                    continue
                held = np.empty(at.shape, dtype) if held is None else held
                view = at.ours(held)
                move(values.reshape(view.shape), view)
            assert held is not None
            yield held


def chunk_indices(shape: Sequence[int]) -> Iterator[Index]:
    """Yields indices of consecutive slices along the first axis, each of about CHUNK_BYTES in float32."""
    step = max(1, CHUNK_BYTES // (4 * max(1, math.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0])), *(slice(0, n) for n in shape[1:])


def parameter_index(entry: ParameterEntry, cuts: Mapping[str, slice]) -> Index:
    """Our slice that has these slices of the first words of groups, and all of every other."""

    def one(group: tuple[str, ...]) -> slice:
        width = math.prod(entry.sizes[word] for word in group[1:])
        cut = cuts.get(group[0], slice(0, entry.sizes[group[0]]))
        return slice(cut.start * width, cut.stop * width)

    return tuple(map(one, entry.our_axes))


def slice_reader(table: Table, tensors: Mapping[str, Tensor]) -> SliceReader:
    """Returns a function that reads slices of the parameters in `table` out of `tensors`."""
    bands = ColumnCache()

    def source(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        entry = table.entries[path]
        tensor = tensors[entry.name(layer)]
        widened = _widened(entry, index)
        at = map_slice(entry, widened, layer)
        view = at.ours(bands.read(tensor, at.index, dtype))
        shape = [s.stop - s.start for s in widened]
        if all(len(group) == 1 for group in entry.our_axes):
            return view.reshape(shape)  # without the axis of layers: still a view
        out = np.empty(shape, dtype)
        move(view, out.reshape(view.shape))
        return out[*(slice(s.start - w.start, s.stop - w.start) for s, w in zip(index, widened, strict=True))]

    return source
