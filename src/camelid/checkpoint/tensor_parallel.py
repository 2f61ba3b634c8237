"""The part of a model that one rank holds, in formats that cut matrices among ranks, and layers into stages."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from camelid.checkpoint.checkpoint import ExportSpec
from camelid.checkpoint.layout import Index, SliceReader, Table, TensorRule, make_table, parse_axes
from camelid.errors import UserError
from camelid.model.decoder import declare_decoder
from camelid.model.params import Spec, named


def check_divides(export: ExportSpec, cut: Collection[str]) -> None:
    """Raises UserError where axes of these words do not divide over the ranks, or layers over the stages."""
    for option, words in (("tensor_parallel", sorted(cut)), ("pipeline_parallel", ["layers"])):
        ways = getattr(export, option)
        for word in words:
            if (size := export.config.axis_sizes[word]) % ways:
                raise UserError(f"{word} = {size} is not divisible by {option} = {ways}", f"Choose another {option}.")


def shard_export(
    export: ExportSpec, rows: Sequence[TensorRule], sizes: Mapping[str, int], cut: Collection[str]
) -> tuple[Table, list[ExportSpec]]:
    """The table of a part of a model, and the part of each rank, where axes of these words are cut among them."""
    check_divides(export, cut)
    over = dict.fromkeys(cut, export.tensor_parallel)
    specs = {path: shard_spec(spec, over) for path, spec in named(declare_decoder(export.config)).items()}
    sources = (shard_reader(export.source, specs, dict.fromkeys(cut, way)) for way in range(export.tensor_parallel))
    return make_table(rows, specs, sizes), [replace(export, source=source) for source in sources]


def shard_spec(spec: Spec, ways: Mapping[str, int]) -> Spec:
    """The parameter of one rank; `ways` says into how many parts axes are cut, by word."""
    sizes = zip(spec.axes, spec.shape, strict=True)
    return replace(spec, shape=tuple(size // ways.get(word, 1) for word, size in sizes))


def shard_reader(source: SliceReader, specs: Mapping[str, Spec], place: Mapping[str, int]) -> SliceReader:
    """The values of one rank, out of those of the model; `specs` are the rank's, `place` says which part, by word."""

    def values(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        spec = specs[path]
        sizes = zip(spec.outputs + spec.inputs, spec.shape[len(spec.stacked) :], strict=True)
        starts = [place.get(word, 0) * size for word, size in sizes]
        whole = tuple(slice(s.start + start, s.stop + start) for s, start in zip(index, starts, strict=True))
        own = None if layer is None else layer + place.get("layers", 0) * spec.shape[0]
        return source(path, own, whole, dtype)

    return values


def sharded_axis(row: TensorRule | None, cut: Collection[str]) -> int | None:
    """The axis along which the parts of a row's tensor lie end to end; None where each rank has all of it."""
    groups = () if row is None else parse_axes(row.axes)
    return next((axis for axis, group in enumerate(groups) if not set(group).isdisjoint(cut)), None)
