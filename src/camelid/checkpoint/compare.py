"""Checkpoints of any formats, number by number: two beside each other, or one alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.containers import mindspore_file, torch_files
from camelid.checkpoint.layout import Index, chunk_indices
from camelid.checkpoint.state import saved_state
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.params import Spec


@dataclass(frozen=True)
class Difference:
    """One parameter in both."""

    path: str
    dtypes: tuple[str, str]
    largest: float
    """of the differences, in float32; NaN where one of them is none"""
    equal: bool
    """whether they hold the same numbers"""
    rounded: bool
    """whether the first, in the dtype of the second, holds the same numbers"""


def compare(
    a: Checkpoint, b: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Difference]:
    """Every parameter of two checkpoints, a slice at a time; raises UserError where they are not of one shape."""
    odd = shape_differences(a, b)
    if alone := sorted(path for path, shapes in odd.items() if None in shapes):
        raise UserError(f"only one of the two has {', '.join(alone[:3])}", "They are different models.")
    for path, (ours, theirs) in odd.items():
        raise UserError(f"{path} is {ours} in one and {theirs} in the other", "They are different models.")
    parts, sources = a.table.entries, (a.source, b.source)
    total, done = sum(part.spec.size for part in parts.values()), 0
    for path, part in parts.items():
        dtypes = a.dtypes[path], b.dtypes[path]
        largest, equal, rounded = 0.0, True, True
        for layer, index in slices(part.spec):
            x, y = (source(path, layer, index, np.dtype(np.float32)) for source in sources)
            if x.tobytes() != y.tobytes():
                equal, rounded = False, rounded and _rounds_to(x, y, dtypes[1])
                largest = float(np.maximum(largest, _apart(x, y)))
            done += x.size
            progress(done, total)
        yield Difference(path, (dtypes[0].name, dtypes[1].name), largest, equal, rounded)


def shape_differences(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
    """The parameters that only one of two models has, or that are of two shapes: both, or None."""
    shapes = [{path: part.spec.shape for path, part in each.table.entries.items()} for each in (a, b)]
    pairs = {path: tuple(each.get(path) for each in shapes) for path in shapes[0] | shapes[1]}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def _rounds_to(x: np.ndarray, y: np.ndarray, dtype: np.dtype) -> bool:
    """Whether two arrays are one in a dtype."""
    with np.errstate(over="ignore"):
        return x.astype(dtype).tobytes() == y.astype(dtype).tobytes()


def _apart(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference of the numbers that are not the same."""
    differ = x.view(np.uint32) != y.view(np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.abs(x[differ] - y[differ]).max())


def slices(spec: Spec) -> Iterator[tuple[int | None, Index]]:
    """All of a parameter, in slices of about PIECE bytes of float32: their layers and places."""
    for layer in range(spec.shape[0]) if spec.stacked else [None]:
        for index in chunk_indices(spec.shape[len(spec.stacked) :]):
            yield layer, index


@dataclass(frozen=True)
class ParameterSummary:
    """One parameter, read whole."""

    path: str
    dtype: str
    size: int
    """numbers"""
    largest: float
    """of the finite ones, without sign"""
    not_finite: int
    """infinities and NaN"""


def summarize_parameters(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[ParameterSummary]:
    """Reads every parameter of a checkpoint, a slice at a time."""
    parts = checkpoint.table.entries
    total, done = sum(part.spec.size for part in parts.values()), 0
    source, dtypes = checkpoint.source, checkpoint.dtypes
    for path, part in parts.items():
        largest, not_finite = 0.0, 0
        for layer, index in slices(part.spec):
            values = np.abs(source(path, layer, index, np.dtype(np.float32)))
            finite = np.isfinite(values)
            not_finite += values.size - int(np.count_nonzero(finite))
            largest = max(largest, float(values.max(initial=0.0, where=finite)))
            done += values.size
            progress(done, total)
        yield ParameterSummary(path, dtypes[path].name, part.spec.size, largest, not_finite)


def verify_embedded_checksums(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Path]:
    """The files of a checkpoint that hold checksums of themselves; raises UserError for one that is not as they say."""
    for step in (file for file in checkpoint.files if file.is_dir()):  # of a run
        saved_state.check_step(step)
    files = [file for file in checkpoint.files if file.is_file()]
    total, done = sum(file.stat().st_size for file in files), 0
    having = [file for file in checkpoint.files if file.is_dir()]
    for file in files:
        held = torch_files.verify_checksums(file)
        held = mindspore_file.checksum_holds(file) if held is None else held
        if held is False:
            raise UserError(f"{file} is not what its checksums were made of", "Download or copy the file again.")
        if held:
            having.append(file)
        done += file.stat().st_size
        progress(done, total)
    return having


def config_differences(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[object, object]]:
    """The fields in which two models differ."""
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(ModelConfig) if f.compare}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
