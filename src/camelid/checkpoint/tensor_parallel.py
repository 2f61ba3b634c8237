"""The shard of a model that one rank holds, in formats with tensor parallelism and pipeline stages."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from camelid.checkpoint.checkpoint import ExportSpec
from camelid.checkpoint.layout import Index, SliceReader, Table, TensorRule, make_table, parse_axes
from camelid.errors import UserError
from camelid.model.decoder import declare_decoder
from camelid.model.params import Spec, named


def check_divides(export: ExportSpec, sharded: Collection[str]) -> None:
    """Raises UserError if a sharded axis is not divisible by the number of ranks, or the layers by that of stages."""
    for option, words in (("tensor_parallel", sorted(sharded)), ("pipeline_parallel", ["layers"])):
        count = getattr(export, option)
        for word in words:
            if (size := export.config.axis_sizes[word]) % count:
                raise UserError(f"{word} = {size} is not divisible by {option} = {count}", f"Choose another {option}.")


def shard_export(
    export: ExportSpec, rules: Sequence[TensorRule], sizes: Mapping[str, int], sharded: Collection[str]
) -> tuple[Table, list[ExportSpec]]:
    """The table of one shard of a model, and the export of each rank; axes named in `sharded` are split over ranks."""
    check_divides(export, sharded)
    counts = dict.fromkeys(sharded, export.tensor_parallel)
    specs = {path: shard_spec(spec, counts) for path, spec in named(declare_decoder(export.config)).items()}
    ranks = range(export.tensor_parallel)
    readers = [shard_reader(export.read_slice, specs, dict.fromkeys(sharded, rank)) for rank in ranks]
    return make_table(rules, specs, sizes), [replace(export, read_slice=reader) for reader in readers]


def shard_spec(spec: Spec, counts: Mapping[str, int]) -> Spec:
    """The parameter of one rank; `counts` is the number of shards of each axis name."""
    sizes = zip(spec.axes, spec.shape, strict=True)
    return replace(spec, shape=tuple(size // counts.get(word, 1) for word, size in sizes))


def shard_reader(read_slice: SliceReader, specs: Mapping[str, Spec], shard: Mapping[str, int]) -> SliceReader:
    """Reads slices of one rank's shard out of those of the model.

    `specs` are those of the rank, by path; `shard` is the index of its shard along each axis name.
    """

    def read(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        spec = specs[path]
        sizes = zip(spec.outputs + spec.inputs, spec.shape[len(spec.stacked) :], strict=True)
        starts = [shard.get(word, 0) * size for word, size in sizes]
        in_model = tuple(slice(s.start + start, s.stop + start) for s, start in zip(index, starts, strict=True))
        model_layer = None if layer is None else layer + shard.get("layers", 0) * spec.shape[0]
        return read_slice(path, model_layer, in_model, dtype)

    return read


def sharded_axis(rule: TensorRule | None, sharded: Collection[str]) -> int | None:
    """The axis of a rule's tensor along which its shards are concatenated; None if each rank holds all of it."""
    groups = () if rule is None else parse_axes(rule.axes)
    return next((axis for axis, group in enumerate(groups) if not set(group).isdisjoint(sharded)), None)
