"""Hugging Face folders: config.json, the tensors, and the files that go with them."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.families import BUFFERS, FAMILIES, TIED_HEAD
from camelid.checkpoint.folder import new_folder
from camelid.checkpoint.hf_config import config_from_hf, config_to_hf
from camelid.checkpoint.hub import find
from camelid.checkpoint.layout import Part, Table, check, pieces, plan, table
from camelid.checkpoint.tensors import CODES, Planned, Tensor, open_safetensors, write_safetensors
from camelid.checkpoint.torch_files import open_torch
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

SHARD_BYTES = 5 * 10**9
COMPANIONS = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template.*|vocab\.json|merges\.txt"
    r"|generation_config\.json|preprocessor_config\.json|LICEN[SC]E.*|NOTICE.*|USE_POLICY.*|README.*"
)


def table_of(config: ModelConfig) -> Table:
    """Where each parameter of a model lies in the files of its family; raises UserError where no family has it."""
    name = config_to_hf(config, "float32")["model_type"]
    return table(FAMILIES[name].rows, named(declare_decoder(config)))


# Reading --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: everything but the tensors' bytes."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    table: Table

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """By path: the dtype of each parameter in the files."""
        return {path: self.tensors[part.row.names(part.spec)[0]].dtype for path, part in self.table.parts.items()}

    @property
    def companions(self) -> list[Path]:
        """The files that go wherever the weights go: tokenizer, generation settings, licence."""
        return sorted(file for file in self.folder.iterdir() if COMPANIONS.fullmatch(file.name) and file.is_file())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder, or the name of a repository on the Hugging Face Hub, and checks it against its config.json."""
    folder = find(path)
    config = config_from_hf(read_json(folder / "config.json"))
    assert config.family is not None  # config.json has named it
    rows = table(FAMILIES[config.family].rows, named(declare_decoder(config)))
    tensors = _open_files(folder)
    known = BUFFERS
    if config.tie_embeddings and TIED_HEAD in tensors:
        _check_tied(tensors[rows.parts["embed"].row.name], tensors[TIED_HEAD])
        known += "|" + re.escape(TIED_HEAD)
    check(rows, tensors, known)
    return Checkpoint(folder, config, tensors, rows)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError with the place of the fault."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", "Download or copy the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", "Download or copy the file again.")
    return value


FORMATS: Mapping[str, Callable[[Path], dict[str, Tensor]]] = {
    "model.safetensors": open_safetensors,
    "pytorch_model.bin": open_torch,
}


def _open_files(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name; with an index file, exactly those that it lists."""
    for single, open_file in FORMATS.items():
        if (index := folder / f"{single}.index.json").is_file():
            return _open_shards(index, open_file)
        if (folder / single).is_file():
            return open_file(folder / single)
    raise UserError(
        f"{folder} has neither {' nor '.join(FORMATS)}, whole or with an index",
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


def _check_tied(table: Tensor, head: Tensor) -> None:
    if table.shape == head.shape and table.dtype == head.dtype:
        rows = max(1, 2**24 // table.shape[1])
        for start in range(0, table.shape[0], rows):
            index = (slice(start, min(start + rows, table.shape[0])), slice(None))
            a, b = (np.empty((index[0].stop - start, table.shape[1]), table.dtype) for _ in range(2))
            table.read_into(a, index)
            head.read_into(b, index)
            if a.tobytes() != b.tobytes():
                break
        else:
            return
    raise UserError(
        f"config.json ties the head to the embedding table, and {TIED_HEAD} differs from it",
        "Set tie_word_embeddings to false in config.json if the head is to be used.",
    )


# Writing --------------------------------------------------------------------------------

Source = Callable[[Part, int, np.dtype], Iterator[np.ndarray]]
"""from a parameter, a layer and a dtype to that layer's values, in arrays that lie end to end"""


def from_checkpoint(checkpoint: Checkpoint) -> Source:
    """The values of an opened checkpoint, a slice at a time."""

    def source(part: Part, layer: int, dtype: np.dtype) -> Iterator[np.ndarray]:
        return pieces(part, checkpoint.tensors[part.row.names(part.spec)[layer]], dtype)

    return source


def write_checkpoint(
    destination: Path,
    config: ModelConfig,
    dtypes: Mapping[str, np.dtype],
    source: Source,
    companions: Sequence[Path],
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a folder that transformers opens: one tensor at a time, under a temporary name until it is whole.

    `dtypes` are those of the tensors, by path of ours; `progress` hears of bytes done and bytes in all.
    """
    rows = table_of(config)
    planned = plan(rows, dtypes)
    total = sum(tensor.bytes for tensor in planned)
    with new_folder(destination, total, overwrite) as folder:
        shards, done = _shards(planned, shard_bytes), 0
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):

            def counted(tensor: Planned) -> Iterator[np.ndarray]:
                nonlocal done
                for part, layer in rows.tensors[tensor.name]:
                    for piece in source(part, layer, tensor.dtype):
                        yield piece
                        done += piece.nbytes
                        progress(done, total)

            write_safetensors(folder / name, shard, (counted(tensor) for tensor in shard))
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            write_json(
                folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        for file in companions:
            shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", config_to_hf(config, dtypes["embed"].name))


def _shards(planned: Sequence[Planned], most: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def write_json(path: Path, value: Any) -> None:
    """JSON as Hugging Face writes it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


def dtype_named(name: str) -> np.dtype:
    """The numpy dtype of "float32", "bfloat16" or "float16"; raises UserError for another."""
    table = {dtype.name: dtype for dtype in CODES}
    if name not in table:
        raise UserError(f"dtype {name!r} is unknown", f"Choose one of {', '.join(table)}.")
    return table[name]
