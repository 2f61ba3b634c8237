"""Hugging Face folders: config.json, safetensors or PyTorch weights, and the tokenizer and other companion files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from camelid.checkpoint.checkpoint import Checkpoint, Saving
from camelid.checkpoint.containers.safetensors import safetensors_file
from camelid.checkpoint.containers.torch_files import unverified
from camelid.checkpoint.files import File, Segment, json_file
from camelid.checkpoint.folder import read_json
from camelid.checkpoint.formats import hf_files
from camelid.checkpoint.formats.hf_config import config_from_hf, config_to_hf
from camelid.checkpoint.formats.hf_families import FAMILIES
from camelid.checkpoint.formats.hf_ignored_fields import remarks, without
from camelid.checkpoint.formats.hf_prefixes import unwrapped
from camelid.checkpoint.formats.hf_rows import BUFFERS, TIED_HEAD
from camelid.checkpoint.layout import Table, check, table
from camelid.checkpoint.tensors import Tensor, same_values
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

SHARD_BYTES = 5 * 10**9
GIVEN = "the given config"
"""what describes a model in messages, where config.json does not"""


def table_of(config: ModelConfig) -> Table:
    """Returns the tensor of each parameter in the files of the model's family.

    Raises UserError if no supported model_type can express the config.
    """
    name = config_to_hf(config, "float32")["model_type"]
    return table(FAMILIES[name].rows, named(declare_decoder(config)), config.axis_sizes)


# Reading --------------------------------------------------------------------------------


def looks(path: Path) -> bool:
    """Whether a folder has config.json and one of the forms of weights."""
    return (path / "config.json").is_file() and hf_files.looks(path)


def described_in(folder: Path) -> Path | None:
    """The folder that has a config.json: this one, or the one around it."""
    return next((place for place in (folder, folder.parent) if (place / "config.json").is_file()), None)


def understood(folder: Path, ignore: Sequence[str] = ()) -> ModelConfig:
    """The model that a folder's config.json describes; the fields in `ignore` are as if they were absent."""
    return config_from_hf(read_config(folder, ignore)[0])


def read_config(folder: Path, ignore: Sequence[str] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns a folder's config.json without the fields in `ignore`, and notes on which of them it has."""
    fields = read_json(folder / "config.json")
    present = [name for name in ignore if without(fields, [name]) != fields]
    absent = [name for name in ignore if name not in present]
    notes = (f"config.json is read without {', '.join(present)}, as requested",) if present else ()
    notes += (f"config.json has no {', '.join(absent)} to ignore",) if absent else ()
    return without(fields, present), notes


def open_folder(folder: Path, config: ModelConfig | None = None, ignore: Sequence[str] = ()) -> Checkpoint:
    """Opens a folder and checks it against its config.json, or against `config` where that is given.

    The fields in `ignore` are as if config.json did not have them.
    """
    if config is None and not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json", "Copy it there, or describe the model with --config.")
    held, notes = hf_files.open_files(folder)
    return open_tensors("hf", folder, held, config, ignore, notes)


def open_tensors(
    format: str,
    folder: Path,
    held: Mapping[str, Tensor],
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    """The checkpoint that tensors with Hugging Face's names make with the config.json in `folder`, or with `config`."""
    said, described_by = {}, GIVEN
    if config is None:
        (said, ignored), described_by = read_config(folder, ignore), "config.json"
        config, notes = config_from_hf(said), (*ignored, *remarks(said), *notes)
    rows = table_of(config)
    tensors, from_names = unwrapped(held, rows.parts["final_norm.scale"].row.name, rows.tensors)
    if described_by != GIVEN and "tie_word_embeddings" not in said:
        config, from_head = _tied_or_not(config, tensors)
        notes += from_head
    rows = table_of(config)
    if config.tie_embeddings:
        tensors = tied(tensors, rows.parts["embed"].row.name, TIED_HEAD, described_by)
    check(rows, tensors, BUFFERS, described_by)
    notes += (*from_names, *unverified(tensors.values()))
    return Checkpoint(format, folder, config, tensors, rows, notes)


def _tied_or_not(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model, where config.json leaves out tie_word_embeddings, as its files ask for it, and a note on a change."""
    table = tensors.get(table_of(config).parts["embed"].row.name)
    head = tensors.get(TIED_HEAD)
    if not config.tie_embeddings and (table is None or head is None) and not config.head_bias:
        what = f"the files hold {'no ' + TIED_HEAD if head is None else TIED_HEAD + ' and no table of embeddings'}"
        note = f"{what}, and config.json no tie_word_embeddings: the head is taken to be the embedding table"
        return replace(config, tie_embeddings=True), (note,)
    if config.tie_embeddings and table is not None and head is not None and not same_values(table, head):
        note = f"{TIED_HEAD} differs from the embedding table, and config.json has no tie_word_embeddings: it is used"
        return replace(config, tie_embeddings=False), (note,)
    return config, ()


def tied(tensors: Mapping[str, Tensor], table: str, head: str, described_by: str) -> dict[str, Tensor]:
    """The tensors of a model whose head is its embedding table, of which a file may hold either or both; without head.

    `table` and `head` are their names. Raises UserError where both are there and differ.
    """
    others = {name: tensor for name, tensor in tensors.items() if name not in (table, head)}
    if head in tensors and table in tensors and not same_values(tensors[table], tensors[head]):
        raise UserError(
            f"{described_by} ties the head to the embedding table, and {head} differs from it",
            "If the head is to be used, set tie_word_embeddings to false there, or leave it out: "
            "--ignore-config-field tie_word_embeddings.",
        )
    one = tensors.get(table, tensors.get(head))
    return others if one is None else {table: one, **others}


# Writing --------------------------------------------------------------------------------


def files(saving: Saving) -> list[File]:
    """Plans the safetensors files that transformers opens: one file, or several with an index."""
    segments = saving.segments(table_of(saving.config))
    total = sum(segment.size for segment in segments)
    shards = _by_size(segments, SHARD_BYTES) if saving.shards is None else _by_count(segments, saving.shards)
    if len(shards) == 1:
        return [safetensors_file("model.safetensors", segments)]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    pairs = list(zip(names, shards, strict=True))
    weight_map = {segment.tensor.name: name for name, shard in pairs for segment in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return [*(safetensors_file(*pair) for pair in pairs), json_file("model.safetensors.index.json", index)]


def _by_size(segments: Sequence[Segment], limit: int) -> list[list[Segment]]:
    """Returns shards of at most `limit` bytes, except for tensors that are larger."""
    shards: list[list[Segment]] = [[]]
    size = 0
    for segment in segments:
        if shards[-1] and size + segment.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(segment)
        size += segment.size
    return shards


def _by_count(segments: Sequence[Segment], count: int) -> list[list[Segment]]:
    """Returns `count` shards of about equal size; fewer if a tensor is larger than that."""
    total, before, count = sum(segment.size for segment in segments), 0, min(count, len(segments))
    shards: list[list[Segment]] = [[] for _ in range(count)]
    for segment in segments:
        shards[(before + segment.size // 2) * count // total].append(segment)
        before += segment.size
    return [shard for shard in shards if shard]
