"""Hugging Face folders: config.json, the tensors, and the files that go with them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec
from camelid.checkpoint.containers.safetensors import safetensors_file
from camelid.checkpoint.containers.torch_files import unverified_note_for
from camelid.checkpoint.files import PlannedFile, TensorPayload, json_file
from camelid.checkpoint.formats import hf_files
from camelid.checkpoint.formats.config_source import CONFIG_JSON, GIVEN, read_config_json
from camelid.checkpoint.formats.hf_config import config_from_hf, config_to_hf
from camelid.checkpoint.formats.hf_families import BUFFERS, FAMILIES, TIED_HEAD
from camelid.checkpoint.formats.hf_ignored_fields import remarks
from camelid.checkpoint.formats.hf_wrapped import unwrapped
from camelid.checkpoint.layout import Table, check_tensors, make_table
from camelid.checkpoint.tensors import Tensor, same_values
from camelid.checkpoint.tied_head import without_tied_head
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

SHARD_BYTES = 5 * 10**9


def table_of(config: ModelConfig) -> Table:
    """Where each parameter of a model lies in the files of its family; raises UserError where no family has it."""
    name = config_to_hf(config, "float32")["model_type"]
    return make_table(FAMILIES[name].rows, named(declare_decoder(config)), config.axis_sizes)


# Reading --------------------------------------------------------------------------------


def matches(path: Path) -> bool:
    """Whether a folder has config.json and one of the forms of weights."""
    return (path / "config.json").is_file() and hf_files.matches(path)


def open_checkpoint(folder: Path, config: ModelConfig | None = None, ignore: Sequence[str] = ()) -> Checkpoint:
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
        (said, ignored), described_by = read_config_json(folder, ignore), CONFIG_JSON
        config, notes = config_from_hf(said), (*ignored, *remarks(said), *notes)
    rows = table_of(config)
    tensors, from_names = unwrapped(held, rows.entries["final_norm.scale"].rule.name, rows.tensors)
    if described_by != GIVEN and "tie_word_embeddings" not in said:
        config, from_head = _tied_or_not(config, tensors)
        notes += from_head
    rows = table_of(config)
    if config.tie_embeddings:
        tensors = without_tied_head(tensors, rows.entries["embed"].rule.name, TIED_HEAD, described_by)
    check_tensors(rows, tensors, BUFFERS, described_by)
    notes += (*from_names, *unverified_note_for(tensors.values()))
    return Checkpoint(format, folder, config, tensors, rows, notes)


def _tied_or_not(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model, where config.json leaves out tie_word_embeddings, as its files ask for it, and a note on a change."""
    table = tensors.get(table_of(config).entries["embed"].rule.name)
    head = tensors.get(TIED_HEAD)
    if not config.tie_embeddings and (table is None or head is None) and not config.head_bias:
        what = f"the files hold {'no ' + TIED_HEAD if head is None else TIED_HEAD + ' and no table of embeddings'}"
        note = f"{what}, and config.json no tie_word_embeddings: the head is taken to be the embedding table"
        return replace(config, tie_embeddings=True), (note,)
    if config.tie_embeddings and table is not None and head is not None and not same_values(table, head):
        note = f"{TIED_HEAD} differs from the embedding table, and config.json has no tie_word_embeddings: it is used"
        return replace(config, tie_embeddings=False), (note,)
    return config, ()


# Writing --------------------------------------------------------------------------------


def plan_files(export: ExportSpec) -> list[PlannedFile]:
    """What transformers opens: one file, or several with an index."""
    payloads = export.payloads(table_of(export.config))
    total = sum(payload.size for payload in payloads)
    shards = _shards(payloads, SHARD_BYTES) if export.shards is None else _so_many(payloads, export.shards)
    if len(shards) == 1:
        return [safetensors_file("model.safetensors", payloads)]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    pairs = list(zip(names, shards, strict=True))
    weight_map = {payload.tensor.name: name for name, shard in pairs for payload in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return [*(safetensors_file(*pair) for pair in pairs), json_file("model.safetensors.index.json", index)]


def _shards(payloads: Sequence[TensorPayload], most: int) -> list[list[TensorPayload]]:
    shards: list[list[TensorPayload]] = [[]]
    size = 0
    for payload in payloads:
        if shards[-1] and size + payload.size > most:
            shards.append([])
            size = 0
        shards[-1].append(payload)
        size += payload.size
    return shards


def _so_many(payloads: Sequence[TensorPayload], count: int) -> list[list[TensorPayload]]:
    """About equal; fewer, where a tensor is larger than a share."""
    total, before, count = sum(payload.size for payload in payloads), 0, min(count, len(payloads))
    shards: list[list[TensorPayload]] = [[] for _ in range(count)]
    for payload in payloads:
        shards[(before + payload.size // 2) * count // total].append(payload)
        before += payload.size
    return [shard for shard in shards if shard]
