"""Meta's checkpoints: a folder with params.json and consolidated.00.pth, .01, ..., each with a shard of every matrix.

Names, shards and params.json are those of meta-llama/llama and meta-llama/llama-models. Every shard contains the
unsharded norms. The embedding table is sharded over columns up to Llama 2, and over rows since Llama 3.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camelid.checkpoint import layout
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec, table_for
from camelid.checkpoint.containers.torch_files import open_torch, unverified_note_for
from camelid.checkpoint.containers.torch_zip import torch_file
from camelid.checkpoint.files import PlannedFile, json_file
from camelid.checkpoint.formats.config_source import CONFIG_JSON, find_config
from camelid.checkpoint.formats.hf_prefixes import unwrapped
from camelid.checkpoint.formats.meta_params import (
    KEYS,
    LLAMA3_THETA,
    PARAMS,
    WHAT,
    config_from_params,
    params_from_config,
    read_params,
)
from camelid.checkpoint.layout import TensorRule
from camelid.checkpoint.tensor_parallel import shard_export, sharded_axis
from camelid.checkpoint.tensors import Tensor, concatenate, same_values
from camelid.checkpoint.tied_head import without_tied_head
from camelid.errors import UserError
from camelid.model.config import Llama3Scaling, ModelConfig

# Rotary pairs are adjacent. The order is that of Meta's modules, and of the tensors in llama2.c's files.
RULES = (
    TensorRule("embed", "tok_embeddings.weight", "vocab_in embed_in"),
    TensorRule("layers.attn_norm.scale", "layers.{layer}.attention_norm.weight", "embed"),
    TensorRule(
        "layers.attn.q_proj", "layers.{layer}.attention.wq.weight", "(heads freq pair) embed", "heads (pair freq) embed"
    ),
    TensorRule(
        "layers.attn.k_proj",
        "layers.{layer}.attention.wk.weight",
        "(kv_heads freq pair) embed",
        "kv_heads (pair freq) embed",
    ),
    TensorRule("layers.attn.v_proj", "layers.{layer}.attention.wv.weight", "(kv_heads head_dim) embed"),
    TensorRule("layers.attn.o_proj", "layers.{layer}.attention.wo.weight", "embed (heads head_dim)"),
    TensorRule("layers.mlp_norm.scale", "layers.{layer}.ffn_norm.weight", "embed"),
    TensorRule("layers.mlp.gate_proj", "layers.{layer}.feed_forward.w1.weight", "mlp embed"),
    TensorRule("layers.mlp.down_proj", "layers.{layer}.feed_forward.w2.weight", "embed mlp"),
    TensorRule("layers.mlp.up_proj", "layers.{layer}.feed_forward.w3.weight", "mlp embed"),
    TensorRule("final_norm.scale", "norm.weight", "embed"),
    TensorRule("lm_head", "output.weight", "vocab embed"),
)
SIZES = {"pair": 2}
NORM = "norm.weight"
TABLE, HEAD, GATE = "tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight"
BUFFERS = r"rope\.freqs"
BY_NAME = {row.name: row for row in RULES}
# The sharded axes, in addition to one axis of the embedding table; a parameter has at most one of them.
CUT = frozenset({"heads", "kv_heads", "mlp", "vocab"})
BY_ROWS, BY_COLUMNS = CUT | {"vocab_in"}, CUT | {"embed_in"}


# Reading --------------------------------------------------------------------------------


def matches(path: Path) -> bool:
    """Whether a folder contains a first shard, or a file is a shard."""
    return (path / "consolidated.00.pth").is_file() or _is_shard(path)


def _is_shard(path: Path) -> bool:
    return re.fullmatch(r"consolidated\.\d\d+\.pth", path.name) is not None and path.is_file()


def open_checkpoint(path: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens a folder, or the folder of a shard.

    The model is described by `config`, by a config.json in the folder, or by params.json, whose gaps are filled with
    the values of released models and noted. Raises UserError if shards are missing or do not match the model.
    """
    folder = path.parent if _is_shard(path) else path
    shards, renamed = _open_shards(folder)
    params = read_params(folder / PARAMS) if (folder / PARAMS).is_file() else {}
    source = find_config(config, folder)
    if source is None and not params:
        raise UserError(f"{folder} has no {PARAMS}", "Copy it to the folder, or give --config PRESET_OR_JSON.")
    tensors = _joined_all(folder, shards, params["dim"] if source is None else source.config.embed_dim)
    notes: tuple[str, ...] = ()
    if source is None:
        (config, notes), described_by = _config(folder, params, tensors), PARAMS
    else:
        config, described_by = source
        _check_agree(folder, params, config, described_by)
    if config.num_layers > len(tensors):  # before a table is made of them
        raise UserError(
            f"{folder} holds {len(tensors)} tensors, too few for {config.num_layers} layers",
            f"The shards and {described_by} belong to different models.",
        )
    table = table_for(WHAT, RULES, config, SIZES)
    if config.tie_embeddings:
        tensors = without_tied_head(tensors, TABLE, HEAD, described_by)
    layout.check_tensors(table, tensors, BUFFERS, described_by)
    _check_copies(shards, [name for name in table.tensors if _axis(name, BY_ROWS) is None])
    notes = (*notes, *renamed, *unverified_note_for(tensors.values()))
    return Checkpoint("meta", folder, config, tensors, table, notes)


def _open_shards(folder: Path) -> tuple[list[dict[str, Tensor]], tuple[str, ...]]:
    """Returns the tensors of each shard, and a note if their names are not Meta's own."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files or [file.name for file in files] != [_shard_name(i) for i in range(len(files))]:
        raise UserError(
            f"{folder} has {', '.join(file.name for file in files[:9]) or 'no ' + _shard_name(0)}: shards are missing",
            "Copy all of them.",
        )
    named_alike = [unwrapped(open_torch(file, "model"), NORM) for file in files]
    shards, notes = [tensors for tensors, _ in named_alike], named_alike[0][1]
    for file, shard in zip(files, shards, strict=True):
        if odd := sorted(shard.keys() ^ shards[0].keys()):
            raise UserError(f"{file} and {files[0].name} disagree about {odd[0]}", "Copy the files again.")
        for name, tensor in shard.items():
            if math.prod(tensor.shape) * tensor.dtype.itemsize > file.stat().st_size:  # of one number, over and over
                raise UserError(f"{name} in {file} is larger than the file", "Save the checkpoint again.")
    return shards, notes


def _shard_name(rank: int) -> str:
    return f"consolidated.{rank:02}.pth"


def _axis(name: str, cut: frozenset[str]) -> int | None:
    """Returns the axis over which a tensor is sharded, None if every shard contains all of it."""
    return sharded_axis(BY_NAME.get(re.sub(r"^layers\.\d+\.", "layers.{layer}.", name)), cut)


def _joined_all(folder: Path, shards: Sequence[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    first = shards[0].get(TABLE)
    if first is None or len(first.shape) != 2:
        held = layout.summarize([*shards[0]])
        raise UserError(f"{folder} has no matrix {TABLE}; it contains {held}", "Give a folder of Meta's Llama.")
    widths = {first.shape[1]: BY_ROWS, first.shape[1] * len(shards): BY_COLUMNS}
    if dim not in widths:
        raise UserError(
            f"{TABLE} has {first.shape[1]} columns in each of {len(shards)} shards, and dim is {dim}",
            "Shards are missing, or they belong to another model.",
        )
    return {name: _joined(name, [shard[name] for shard in shards], widths[dim]) for name in shards[0]}


def _joined(name: str, parts: list[Tensor], cut: frozenset[str]) -> Tensor:
    axis = _axis(name, cut)
    # Tensors of other forms are refused by name in layout.check.
    return parts[0] if axis is None or len(parts[0].shape) != 2 else concatenate(parts, axis)


def _config(
    folder: Path, params: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Returns the model that params.json describes, and notes on what is assumed."""
    # Meta's code does not tie the head, so its files of Llama 3.2, whose head is tied, contain the table twice.
    tied = HEAD not in tensors or (params.get("use_scaled_rope", False) and same_values(tensors[TABLE], tensors[HEAD]))
    try:
        config, notes = config_from_params(params, tensors[TABLE].shape[0], tied)
    except ValueError as error:
        raise UserError(f"{folder / PARAMS} describes no model: {error}", "Download or copy it again.") from error
    if GATE in tensors and tensors[GATE].shape[:1] != (config.mlp_dim,):
        raise UserError(
            f"{folder / PARAMS} describes an MLP of width {config.mlp_dim}, and {GATE} has shape {tensors[GATE].shape}",
            "Correct multiple_of and ffn_dim_multiplier, or give --config PRESET_OR_JSON.",
        )
    return config, notes


def _check_copies(shards: Sequence[dict[str, Tensor]], names: Sequence[str]) -> None:
    for shard in shards[1:]:
        for name in names:
            if not same_values(shard[name], shards[0][name]):
                raise UserError(
                    f"{name} in {shard[name].file} differs from that in {shards[0][name].file.name}",
                    "The shards belong to different checkpoints; copy them again.",
                )


def _check_agree(folder: Path, params: Mapping[str, Any], config: ModelConfig, described_by: str) -> None:
    """Raises UserError if params.json contradicts the config; a given config may differ in all but the sizes."""
    pairs = [(key, params[key], getattr(config, ours)) for key, (_, ours) in KEYS.items() if ours and key in params]
    if "use_scaled_rope" in params:
        pairs.append(("use_scaled_rope", params["use_scaled_rope"], isinstance(config.rope_scaling, Llama3Scaling)))
    for key, theirs, ours in pairs:
        if theirs != ours and (described_by == CONFIG_JSON or KEYS[key][0] is int):
            raise UserError(
                f"{folder / PARAMS} has {key} = {theirs!r}, and {described_by} {ours!r}", "Remove the wrong one."
            )


# Writing --------------------------------------------------------------------------------


def plan_files(export: ExportSpec) -> list[PlannedFile]:
    """Plans `tensor_parallel` shards and params.json."""
    params = params_from_config(export.config)
    if export.pipeline_parallel != 1:
        raise UserError(f"{WHAT} has no pipeline stages", "Leave pipeline_parallel at 1.")
    cut = BY_ROWS if export.config.rope_theta == LLAMA3_THETA else BY_COLUMNS
    table, parts = shard_export(export.untied(), RULES, SIZES, cut)
    shards = [torch_file(_shard_name(rank), part.payloads(table)) for rank, part in enumerate(parts)]
    return [*shards, json_file(PARAMS, params)]
