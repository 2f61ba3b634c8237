"""Compares two checkpoints of any formats value by value, and checks one on its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.containers import mindspore_file, torch_zip
from camelid.checkpoint.layout import Index, chunk_indices
from camelid.checkpoint.state import saved_state
from camelid.checkpoint.tensors import dtype_named
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.params import Spec

FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Difference:
    """A parameter of two checkpoints."""

    path: str
    dtypes: tuple[str, str]
    largest: float
    """largest absolute difference, in float32; NaN if either value of a pair is NaN"""
    equal: bool
    """whether all values are equal"""
    rounded: bool
    """whether all values are equal after rounding to `narrower`"""

    @property
    def narrower(self) -> str:
        """The name of the dtype with fewer bits, that of the second if they have equally many."""
        return _narrower(*map(dtype_named, self.dtypes)).name


def compare(
    a: Checkpoint, b: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Difference]:
    """Yields a Difference for each parameter, read a slice at a time.

    Raises UserError if the two do not have the same parameters, of the same shapes.
    """
    odd = shape_differences(a, b)
    if alone := sorted(path for path, shapes in odd.items() if None in shapes):
        raise UserError(f"only one of the two has {', '.join(alone[:3])}", "They are different models.")
    for path, (ours, theirs) in odd.items():
        raise UserError(f"{path} is {ours} in one and {theirs} in the other", "They are different models.")
    entries, readers = a.table.entries, (a.read_slice, b.read_slice)
    total, done = sum(entry.spec.size for entry in entries.values()), 0
    for path, entry in entries.items():
        dtypes = a.dtypes[path], b.dtypes[path]
        largest, equal, rounded = 0.0, True, True
        for layer, index in slices(entry.spec):
            x, y = (read(path, layer, index, FLOAT32) for read in readers)
            if x.tobytes() != y.tobytes():
                equal, rounded = False, rounded and _rounds_to(x, y, _narrower(*dtypes))
                largest = float(np.maximum(largest, _largest_difference(x, y)))
            done += x.size
            progress(done, total)
        yield Difference(path, (dtypes[0].name, dtypes[1].name), largest, equal, rounded)


def shape_differences(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
    """The shapes in both checkpoints of each parameter whose shapes differ; None if a checkpoint does not have it."""
    shapes = [{path: entry.spec.shape for path, entry in each.table.entries.items()} for each in (a, b)]
    pairs = {path: tuple(each.get(path) for each in shapes) for path in shapes[0] | shapes[1]}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def _narrower(a: np.dtype, b: np.dtype) -> np.dtype:
    return a if a.itemsize < b.itemsize else b


def _rounds_to(x: np.ndarray, y: np.ndarray, dtype: np.dtype) -> bool:
    """Whether two arrays have the same bits in a dtype."""
    with np.errstate(over="ignore"):
        return x.astype(dtype).tobytes() == y.astype(dtype).tobytes()


def _largest_difference(x: np.ndarray, y: np.ndarray) -> float:
    """The largest absolute difference of two float32 arrays; equal infinities do not differ."""
    differ = x.view(np.uint32) != y.view(np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.abs(x[differ] - y[differ]).max())


def slices(spec: Spec) -> Iterator[tuple[int | None, Index]]:
    """Yields the layer and index of slices that cover a parameter, each of about CHUNK_BYTES in float32."""
    for layer in range(spec.shape[0]) if spec.stacked else [None]:
        for index in chunk_indices(spec.shape[len(spec.stacked) :]):
            yield layer, index


@dataclass(frozen=True)
class ParameterSummary:
    """Statistics of one parameter."""

    path: str
    dtype: str
    size: int
    """number of values"""
    largest: float
    """largest finite absolute value"""
    not_finite: int
    """number of values that are infinite or NaN"""


def summarize_parameters(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[ParameterSummary]:
    """Reads every parameter of a checkpoint, a slice at a time."""
    entries = checkpoint.table.entries
    total, done = sum(entry.spec.size for entry in entries.values()), 0
    read_slice, dtypes = checkpoint.read_slice, checkpoint.dtypes
    for path, entry in entries.items():
        largest, not_finite = 0.0, 0
        for layer, index in slices(entry.spec):
            values = np.abs(read_slice(path, layer, index, FLOAT32))
            finite = np.isfinite(values)
            not_finite += values.size - int(np.count_nonzero(finite))
            largest = max(largest, float(values.max(initial=0.0, where=finite)))
            done += values.size
            progress(done, total)
        yield ParameterSummary(path, dtypes[path].name, entry.spec.size, largest, not_finite)


def verify_embedded_checksums(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Path]:
    """Verifies the checksums that some formats store within their files, and returns the files that have them.

    Reads these files completely. Raises UserError for the first file whose contents do not match its checksums.
    """
    verified = [file for file in checkpoint.files if file.is_dir()]  # steps of a run
    for step in verified:
        saved_state.check_step(step)
    files = [file for file in checkpoint.files if file.is_file()]
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        matches = torch_zip.verify_checksums(file)
        matches = mindspore_file.verify_checksum(file) if matches is None else matches
        if matches is False:
            raise UserError(f"{file} does not match its checksums", "Download or copy the file again.")
        if matches:
            verified.append(file)
        done += file.stat().st_size
        progress(done, total)
    return verified


def config_differences(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[object, object]]:
    """The values in both models of each field of ModelConfig in which they differ."""
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(ModelConfig) if f.compare}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
