"""LoRA adapters in terms of camelid's parameters, and checkpoints that consist of a base and an adapter.

W + scale * (B @ A)     W (outputs, inputs), B (outputs, rank), A (rank, inputs)
scale                   alpha / rank, or with rsLoRA alpha / sqrt(rank)

DoRA rescales each row (output) of that sum to the length `magnitude`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.layout import Index, SliceReader, Table, TensorRule, make_table
from camelid.checkpoint.tensors import Tensor, rounded
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

TILE = (256, 2048)
"""rows and columns of the tiles in which b @ a is computed"""

ParameterKey = tuple[str, int | None]
"""path and layer of a parameter; the layer is None for parameters that are not per layer"""


@dataclass(frozen=True)
class Pair:
    """The factors of one matrix's update, scale * (b @ a)."""

    a: np.ndarray
    """(rank, inputs), with the matrix's input axes flattened"""
    b: np.ndarray
    """(outputs, rank), with the matrix's output axes flattened"""
    alpha: float
    magnitude: np.ndarray | None = None
    """(outputs,): the length of each row of the adapted matrix, with DoRA"""

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, keyed by camelid's parameters."""

    config: ModelConfig
    """of the adapted model: a tied head becomes untied if the adapter changes the head or the embedding table"""
    pairs: Mapping[ParameterKey, Pair]
    saved: Mapping[ParameterKey, Tensor] = field(default_factory=dict)
    """parameters that replace those of the base, one layer each, with camelid's axes"""
    rslora: bool = False
    dropout: float = 0.0
    """the dropout used in training"""
    base: str | None = None
    """a name on the Hub, with @ and its revision if it has one, or a path"""

    @property
    def dora(self) -> bool:
        """Whether rows are rescaled to magnitudes (DoRA, arXiv:2402.09353)."""
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def scale(self, pair: Pair) -> float:
        """Returns the factor of b @ a."""
        return pair.alpha / (math.sqrt(pair.rank) if self.rslora else pair.rank)


@dataclass(frozen=True)
class ComputedTensor(Tensor):
    """A layer of a parameter whose values are computed on demand."""

    reader: SliceReader
    parameter: ParameterKey
    source_files: frozenset[Path] = frozenset()

    @property
    def files(self) -> frozenset[Path]:
        """All files from which it is computed."""
        return self.source_files

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """Fills `out`, contiguous and of the shape of `index`, with values of its dtype."""
        out[...] = self.reader(*self.parameter, index, out.dtype)


def in_memory(array: np.ndarray) -> Tensor:
    """Returns an array as a tensor, for `Adapter.saved`."""
    return ComputedTensor(
        Path(),
        "",
        0,
        array.shape,
        array.dtype,
        lambda path, layer, index, dtype: rounded("the adapter", array[index], dtype),
        ("", None),
    )


@dataclass(frozen=True, kw_only=True)
class AdaptedCheckpoint(Checkpoint):
    """A base with an adapter, which is merged when a slice is read."""

    adapter: Adapter
    base: Checkpoint
    step: Path | None = None
    """the folder with the state of training, if it is a step of a run that trains the adapter"""

    @property
    def read_slice(self) -> SliceReader:
        """Reads merged values: sums are computed in float32 and rounded once, to the requested dtype."""
        return merged_reader(self.adapter, self.base)


def merged_reader(adapter: Adapter, base: Checkpoint) -> SliceReader:
    """Returns a reader of a base of any format with an adapter; sums are computed in float32 and rounded once."""
    specs, read_base = named(declare_decoder(adapter.config)), base.read_slice

    def values(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        """Those to which a pair of factors is added."""
        if (saved := adapter.saved.get((path, layer))) is not None:
            return saved.read(index, dtype)
        tied = path == "lm_head" and base.config.tie_embeddings
        return read_base("embed" if tied else path, layer, index, dtype)

    def read_slice(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        if (pair := adapter.pairs.get((path, layer))) is None:
            return values(path, layer, index, dtype)
        spec = specs[path]
        shape, outputs = spec.shape[len(spec.stacked) :], len(spec.outputs)
        rows, columns = index[:outputs], index[outputs:]
        if pair.magnitude is not None:  # the length of a row needs all of it
            columns = tuple(slice(0, n) for n in shape[outputs:])
        added = _product(pair, _flat(rows, shape[:outputs]), _flat(columns, shape[outputs:]))
        added = added.reshape(-1, *shape[1:outputs], columns[0].stop - columns[0].start, *shape[outputs + 1 :])
        added = added[:, *rows[1:], :, *columns[1:]]
        merged = values(path, layer, (*rows, *columns), np.dtype(np.float32)) + np.float32(adapter.scale(pair)) * added
        if pair.magnitude is not None:
            merged *= _ratio(pair.magnitude.reshape(shape[:outputs])[rows], merged)
            merged = merged[..., *index[outputs:]]
        return rounded(path, merged, dtype)

    return read_slice


def _ratio(magnitude: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns what DoRA multiplies each row of a matrix by, (outputs..., 1...); the length of a row of zeros is 1."""
    lengths = np.linalg.norm(rows.reshape(*magnitude.shape, -1), axis=-1)
    ratio = magnitude.astype(np.float32) / np.where(lengths > 0, lengths, np.float32(1))
    return ratio.reshape(*magnitude.shape, *[1] * (rows.ndim - magnitude.ndim))


def _flat(index: Index, shape: Sequence[int]) -> slice:
    """Returns the slice of the flattened axes that contains `index`, with all axes but the first complete."""
    width = math.prod(shape[1:])
    return slice(index[0].start * width, index[0].stop * width)


def _product(pair: Pair, rows: slice, columns: slice) -> np.ndarray:
    """Returns a slice of b @ a in float32, computed in tiles of a fixed grid so that no bit depends on the slice."""
    out = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
    for i in range(rows.start // TILE[0] * TILE[0], rows.stop, TILE[0]):
        for j in range(columns.start // TILE[1] * TILE[1], columns.stop, TILE[1]):
            factors = pair.b[i : i + TILE[0]], pair.a[:, j : j + TILE[1]]
            b, a = (np.ascontiguousarray(factor, np.float32) for factor in factors)
            top, left = max(i, rows.start), max(j, columns.start)
            tile = (b @ a)[top - i : rows.stop - i, left - j : columns.stop - j]
            out[top - rows.start :, left - columns.start :][: tile.shape[0], : tile.shape[1]] = tile
    return out


def plain_table(config: ModelConfig) -> Table:
    """Returns a table with one tensor per layer of each parameter, with camelid's path and shape."""
    specs = named(declare_decoder(config))
    rows = [
        TensorRule(path, path + ".{layer}" * bool(spec.stacked), " ".join(spec.outputs + spec.inputs))
        for path, spec in specs.items()
    ]
    return make_table(rows, specs, config.axis_sizes)
