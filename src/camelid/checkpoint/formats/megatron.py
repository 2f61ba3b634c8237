"""Megatron-LM's checkpoints: iter_0000001/mp_rank_00/model_optim_rng.pt, one file per model-parallel rank.

The folder of tensor-parallel rank TT and pipeline stage PPP is mp_rank_TT_PPP, or mp_rank_TT without pipeline
parallelism; layers are numbered within a stage. megatron_distributed.py reads distributed checkpoints (torch_dist).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint import layout
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec, table_for
from camelid.checkpoint.containers import dcp
from camelid.checkpoint.containers.pickles import printable
from camelid.checkpoint.containers.torch_files import unverified_note_for
from camelid.checkpoint.containers.torch_tensors import Namespace, StridedTensor
from camelid.checkpoint.containers.torch_zip import torch_file
from camelid.checkpoint.files import PlannedFile
from camelid.checkpoint.formats import megatron_distributed as distributed
from camelid.checkpoint.formats.megatron_args import (
    WHAT,
    args_from_config,
    check_plain,
    describe_value,
    same,
    vocab_step,
)
from camelid.checkpoint.formats.megatron_files import (
    AGAIN,
    FILE,
    RANK,
    TRACKER,
    Shard,
    described,
    find_ranks,
    rank_files,
)
from camelid.checkpoint.formats.megatron_rows import (
    BUFFERS,
    CUT,
    ENGINE,
    GATE,
    KEY,
    LEGACY,
    MCORE,
    NAMES,
    PADDING,
    QUERY,
    STATES,
    UP,
    VALUE,
    rows,
)
from camelid.checkpoint.tensor_parallel import check_divides, shard_reader, shard_spec, sharded_axis
from camelid.checkpoint.tensors import Tensor, concatenate, same_values
from camelid.checkpoint.tied_head import without_tied_head
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

# Reading --------------------------------------------------------------------------------


def matches(path: Path) -> bool:
    """Whether a folder has a tracker file or ranks, or is a rank, or a file is the file of a rank."""
    return (
        (path / TRACKER).is_file()
        or distributed.matches_megatron(path)
        or (path.name == FILE and path.is_file())
        or (RANK.fullmatch(path.name) is not None and (path / FILE).is_file())
        or any((path / f"mp_rank_00{stage}" / FILE).is_file() for stage in ("", "_000"))
    )


def open_checkpoint(path: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens the folder of a checkpoint, of an iteration or of a rank, or the file of a rank.

    The model is described by `config`, by a config.json in the folder or its parent, or by the settings in the files.
    Raises UserError for files that are missing or damaged, and for models that are not Llamas.
    """
    folder = find_ranks(path)
    if dcp.matches(folder):
        return distributed.open_checkpoint(folder, config)
    stages = [[Shard(file) for file in files] for files in rank_files(folder)]
    shards = [shard for stage in stages for shard in stage]
    args, version, tensor_parallel = shards[0].args, shards[0].version, len(stages[0])
    _check_ranks(shards, len(stages), tensor_parallel)
    check_plain(shards[0].file, args)
    parts = _by_name(stages)
    names = LEGACY if LEGACY["embed"] in parts else ENGINE if ENGINE["attn_norm"].format(layer=0) in parts else MCORE
    config, notes, source, root = described(folder, shards[0].file, args, config)
    if version < 2 and config.num_heads != config.num_kv_heads:
        raise UserError(f"{shards[0].file} is of version {version}, which has no grouped queries", AGAIN)
    if config.num_layers > len(parts):  # before a table is made of them
        raise UserError(f"{folder} has too few tensors for {config.num_layers} layers", "Ranks are missing.")
    tensors = _joined_all(parts, names, config, version, vocab_step(args) * tensor_parallel)
    table = table_for(WHAT, rows(names, version, split=True), config, _sizes(config))
    if config.tie_embeddings:
        tensors = without_tied_head(tensors, names["embed"], names["lm_head"], source)
    layout.check_tensors(table, tensors, BUFFERS, source)
    notes = (*notes, *unverified_note_for(tensors.values()))
    return Checkpoint("megatron", root, config, tensors, table, notes)


def _sizes(config: ModelConfig, tensor_parallel: int = 1) -> dict[str, int]:
    return {"kv_heads": config.num_kv_heads // tensor_parallel}


def _check_ranks(shards: Sequence[Shard], stages: int, tensor_parallel: int) -> None:
    """Raises UserError if the number of ranks differs from the settings, or if files belong to another checkpoint."""
    first = shards[0]
    for key, count in (("tensor_model_parallel_size", tensor_parallel), ("pipeline_model_parallel_size", stages)):
        if not same(first.args.get(key, count), count):
            raise UserError(
                f"{first.file} has {key} = {describe_value(first.args[key])}, and there are folders for {count}",
                "Copy all ranks.",
            )
    for shard in shards[1:]:
        if (shard.version, len(shard.chunks)) != (first.version, len(first.chunks)):
            raise UserError(f"{shard.file} is of another checkpoint than {first.file}", AGAIN)


def _by_name(stages: Sequence[Sequence[Shard]]) -> dict[str, list[Tensor]]:
    """Returns the shards of every tensor by name, with layers numbered over the entire model."""
    parts: dict[str, list[Tensor]] = {}
    before = 0
    for chunk in range(len(stages[0][0].chunks)):
        for stage in stages:
            tables = [shard.chunks[chunk] for shard in stage]
            for shard, table in zip(stage, tables, strict=True):
                if odd := sorted(table.keys() ^ tables[0].keys()):
                    raise UserError(f"{shard.file} and {stage[0].file} disagree about {printable(odd[0])}", AGAIN)
            layers: set[int] = set()
            for name in tables[0]:
                if match := re.fullmatch(r"(.*\.layers\.)(\d{1,9})(\..*)", name):
                    layers.add(int(match[2]))
                own = f"{match[1]}{before + int(match[2])}{match[3]}" if match else name
                if own in parts:
                    raise UserError(f"{stage[0].file} has {printable(name)}, as a stage before it has", AGAIN)
                parts[own] = [replace(table[name], name=own) for table in tables]
            if layers != {*range(len(layers))}:
                raise UserError(f"{stage[0].file} lacks some of its layers", AGAIN)
            before += len(layers)
    return parts


def _joined_all(
    parts: Mapping[str, list[Tensor]], names: Mapping[str, str], config: ModelConfig, version: float, step: int
) -> dict[str, Tensor]:
    by_name = {row.name: row for row in rows(names)}
    tensors: dict[str, Tensor] = {}
    for name, shards in parts.items():
        general = re.sub(r"\.layers\.\d+\.", ".layers.{layer}.", name)
        axis, matrix = sharded_axis(by_name.get(general), CUT), all(len(shard.shape) == 2 for shard in shards)
        if axis is None or not matrix:  # tensors of other forms are refused by name in layout.check
            _check_copies(shards)
            tensors[name] = shards[0]
        elif general == names["fc1"] or (general == names["qkv"] and version < 1):
            words = (GATE, UP) if general == names["fc1"] else (QUERY, KEY, VALUE)
            for i, word in enumerate(words):
                cuts = [_cut_rows(shard, i, len(words)) for shard in shards]
                tensors[f"{name} ({word})"] = concatenate(cuts, 0)
        elif general in (names["embed"], names["lm_head"]):
            tensors[name] = concatenate(_unpadded(shards, config.vocab_size, step), 0)
        else:
            tensors[name] = concatenate(shards, axis)
    return tensors


def _check_copies(shards: Sequence[Tensor]) -> None:
    for shard in shards[1:]:
        if not same_values(shard, shards[0]):
            raise UserError(f"{printable(shard.name)} in {shard.file} differs from that in {shards[0].file}", AGAIN)


def _rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Returns the rows `start` to `stop` of a matrix, without reading them."""
    stride = tensor.strides[0] if isinstance(tensor, StridedTensor) else tensor.shape[1]
    offset = tensor.offset + start * stride * tensor.dtype.itemsize
    return replace(tensor, offset=offset, shape=(stop - start, *tensor.shape[1:]))


def _cut_rows(tensor: Tensor, part: int, count: int) -> Tensor:
    height = tensor.shape[0] // count
    if height * count != tensor.shape[0]:
        raise UserError(f"{tensor.name} in {tensor.file} has {tensor.shape[0]} rows, of {count} equal parts", AGAIN)
    return _rows_of(tensor, part * height, (part + 1) * height)


def _unpadded(shards: Sequence[Tensor], vocab_size: int, step: int) -> list[Tensor]:
    """Returns the shards without the rows that pad the vocabulary to a multiple of `step`."""
    if not vocab_size <= sum(shard.shape[0] for shard in shards) < vocab_size + step:
        return list(shards)  # layout.check_tensors reports the wrong size
    start, cuts = 0, []
    for shard in shards:
        if (height := min(shard.shape[0], vocab_size - start)) > 0:
            cuts.append(_rows_of(shard, 0, height))
        start += shard.shape[0]
    return cuts


# Writing --------------------------------------------------------------------------------


def plan_files(export: ExportSpec, names: str = "mcore") -> list[PlannedFile]:
    """Plans iter_0000001 with a file for each rank, and the tracker file.

    `names`: "mcore" for the local layers of Megatron core, or "legacy" for the names before Megatron core.
    """
    export, vocab_size = _padded(export), export.config.vocab_size
    config, tensor_parallel, stages = export.config, export.tensor_parallel, export.pipeline_parallel
    args = args_from_config(config, export.dtypes["embed"], tensor_parallel, stages) | {
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": 1 if vocab_size == config.vocab_size else PADDING,
        "use_mcore_models": names == "mcore",
        "use_legacy_models": names == "legacy",
    }
    check_divides(export, CUT)
    places = [(tensor_rank, stage) for stage in range(stages) for tensor_rank in range(tensor_parallel)]
    ranks = [
        _rank_file(export, NAMES[names], args | {"rank": rank}, tensor_rank, stage)
        for rank, (tensor_rank, stage) in enumerate(places)
    ]
    return [*ranks, PlannedFile(TRACKER, [b"1"])]


def _padded(export: ExportSpec) -> ExportSpec:
    """Pads the vocabulary to a multiple of the ranks, if necessary; like Megatron, by repeating the last row."""
    size, step = export.config.vocab_size, PADDING * export.tensor_parallel
    if size % export.tensor_parallel == 0:
        return export

    def read_slice(path: str, layer: int | None, index: layout.Index, dtype: np.dtype) -> np.ndarray:
        rows, *rest = index
        if path not in ("embed", "lm_head") or rows.stop <= size:
            return export.read_slice(path, layer, index, dtype)
        held = export.read_slice(path, layer, (slice(min(rows.start, size - 1), size), *rest), dtype)
        return held[np.minimum(np.arange(rows.stop - rows.start), len(held) - 1)]

    return replace(export, config=replace(export.config, vocab_size=-(-size // step) * step), read_slice=read_slice)


def _rank_file(
    export: ExportSpec, names: Mapping[str, str], args: Mapping[str, Any], tensor_rank: int, stage: int
) -> PlannedFile:
    name = f"iter_0000001/mp_rank_{tensor_rank:02}" + f"_{stage:03}" * (export.pipeline_parallel > 1)
    config, tensor_parallel, stages = export.config, export.tensor_parallel, export.pipeline_parallel
    last, tied = stage == stages - 1, config.tie_embeddings
    if stages > 1:  # the last one has a copy of a tied table
        export = export.untied()
    over = dict.fromkeys(CUT, tensor_parallel) | {"layers": stages}
    specs = {
        path: shard_spec(spec, over)
        for path, spec in named(declare_decoder(export.config)).items()
        if spec.stacked or (stage == 0 if path == "embed" else last)
    }
    table = layout.make_table(rows(names), specs, _sizes(config, tensor_parallel))
    read_slice = shard_reader(export.read_slice, specs, dict.fromkeys(CUT, tensor_rank) | {"layers": stage})
    payloads = replace(export, read_slice=read_slice).payloads(table)
    tree = {
        "args": Namespace(args),
        "checkpoint_version": 3.0,
        "iteration": 1,
        "model": _tree({payload.tensor.name: payload.tensor for payload in payloads}, names, tied, last),
        "num_floating_point_operations_so_far": 0,
    }
    return torch_file(f"{name}/{FILE}", payloads, tree)


def _tree(tensors: Mapping[str, Any], names: Mapping[str, str], tied: bool, last: bool) -> dict[str, Any]:
    """Returns the content of `model` in a file, flat or nested as in older versions, with the empty extra states."""
    general = {names[key] for key in STATES}
    entries: dict[str, Any] = {}
    for name, tensor in tensors.items():
        entries[name] = tensor
        if re.sub(r"\.layers\.\d+\.", ".layers.{layer}.", name) in general:
            entries[name.removesuffix("weight") + "_extra_state"] = None
    if names is MCORE:  # whose last stage has a head even where it is the table
        return entries | ({"output_layer._extra_state": None} if last else {})
    tree: dict[str, Any] = {"language_model": {}}
    for name, value in entries.items():
        _, module, rest = name.split(".", 2)
        if module == "output_layer" and tied:
            if rest == "weight":
                tree["word_embeddings_for_head"] = {rest: value}
        elif module == "embedding":
            word, weight = rest.split(".")
            tree["language_model"][module] = {word: {weight: value}}
        else:
            tree["language_model"].setdefault(module, {})[rest] = value
    return tree
