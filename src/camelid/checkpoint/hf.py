"""Hugging Face folders: config.json, the tensors, and the files that go with them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from camelid.checkpoint.families import BUFFERS, FAMILIES, TIED_HEAD
from camelid.checkpoint.files import File, Segment, json_file
from camelid.checkpoint.folder import read_json
from camelid.checkpoint.hf_config import config_from_hf, config_to_hf
from camelid.checkpoint.layout import Table, check, table
from camelid.checkpoint.opened import Checkpoint, Saving
from camelid.checkpoint.safetensors import open_safetensors, safetensors_file
from camelid.checkpoint.tensors import Tensor
from camelid.checkpoint.torch_files import open_torch, unverified
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

SHARD_BYTES = 5 * 10**9
GIVEN = "the given config"
"""what describes a model in messages, where config.json does not"""


def table_of(config: ModelConfig) -> Table:
    """Where each parameter of a model lies in the files of its family; raises UserError where no family has it."""
    name = config_to_hf(config, "float32")["model_type"]
    return table(FAMILIES[name].rows, named(declare_decoder(config)), config.axis_sizes)


# Reading --------------------------------------------------------------------------------


def looks(path: Path) -> bool:
    """Whether a folder has config.json and one of the forms of weights."""
    return (path / "config.json").is_file() and any(
        (path / name).is_file() for file in FILES for name in (file, f"{file}.index.json")
    )


def understood(folder: Path) -> ModelConfig:
    """The model that a folder's config.json describes."""
    return config_from_hf(read_json(folder / "config.json"))


def open_folder(folder: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens a folder and checks it against its config.json, or against `config` where that is given."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json", "Give the folder of a Hugging Face checkpoint.")
    described_by = "config.json" if config is None else GIVEN
    config = config or understood(folder)
    rows = table_of(config)
    tensors = _open_files(folder)
    known = BUFFERS
    if config.tie_embeddings and TIED_HEAD in tensors:
        _check_tied(tensors[rows.parts["embed"].row.name], tensors[TIED_HEAD], described_by)
        known += "|" + re.escape(TIED_HEAD)
    check(rows, tensors, known, described_by)
    return Checkpoint("hf", folder, config, tensors, rows, unverified(tensors.values()))


FILES: Mapping[str, Callable[[Path], dict[str, Tensor]]] = {
    "model.safetensors": open_safetensors,
    "pytorch_model.bin": open_torch,
}


def _open_files(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name; with an index file, exactly those that it lists."""
    for single, open_file in FILES.items():
        if (index := folder / f"{single}.index.json").is_file():
            return _open_shards(index, open_file)
        if (folder / single).is_file():
            return open_file(folder / single)
    raise UserError(
        f"{folder} has neither {' nor '.join(FILES)}, whole or with an index",
        "Give the folder of a Hugging Face checkpoint.",
    )


def _open_shards(index: Path, open_file: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map", "Download the file again.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if file.parent != index.parent or not file.is_file():
            raise UserError(f"{index} names {name}, which is not in the folder", "Download the missing file.")
        tensors |= open_file(file)
    if odd := sorted(set(weight_map) ^ set(tensors)):
        raise UserError(f"{index} and the files disagree about {', '.join(odd[:3])}", "Download the checkpoint again.")
    return tensors


def _check_tied(table: Tensor, head: Tensor, described_by: str) -> None:
    if not same_values(table, head):
        raise UserError(
            f"{described_by} ties the head to the embedding table, and {TIED_HEAD} differs from it",
            "Set tie_word_embeddings to false there if the head is to be used.",
        )


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bit for bit; they are read as far as they are."""
    if (one.shape, one.dtype) != (other.shape, other.dtype) or not one.shape:
        return False
    length, *rest = one.shape
    rows = max(1, 2**24 // max(1, math.prod(rest)))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        index = (slice(start, stop), *(slice(0, n) for n in rest))
        a, b = (np.empty((stop - start, *rest), one.dtype) for _ in range(2))
        one.read_into(a, index)
        other.read_into(b, index)
        if a.tobytes() != b.tobytes():
            return False
    return True


# Writing --------------------------------------------------------------------------------


def files(saving: Saving) -> list[File]:
    """What transformers opens: one file, or several with an index."""
    segments = saving.segments(table_of(saving.config))
    total = sum(segment.size for segment in segments)
    shards = _shards(segments, SHARD_BYTES) if saving.shards is None else _so_many(segments, saving.shards)
    if len(shards) == 1:
        return [safetensors_file("model.safetensors", segments)]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    pairs = list(zip(names, shards, strict=True))
    weight_map = {segment.tensor.name: name for name, shard in pairs for segment in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return [*(safetensors_file(*pair) for pair in pairs), json_file("model.safetensors.index.json", index)]


def _shards(segments: Sequence[Segment], most: int) -> list[list[Segment]]:
    shards: list[list[Segment]] = [[]]
    size = 0
    for segment in segments:
        if shards[-1] and size + segment.size > most:
            shards.append([])
            size = 0
        shards[-1].append(segment)
        size += segment.size
    return shards


def _so_many(segments: Sequence[Segment], count: int) -> list[list[Segment]]:
    """About equal; fewer, where a tensor is larger than a share."""
    total, before, count = sum(segment.size for segment in segments), 0, min(count, len(segments))
    shards: list[list[Segment]] = [[] for _ in range(count)]
    for segment in segments:
        shards[(before + segment.size // 2) * count // total].append(segment)
        before += segment.size
    return [shard for shard in shards if shard]
