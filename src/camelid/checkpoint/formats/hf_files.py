"""Selects the weight files of a Hugging Face folder in the same way as transformers.

The first that exists of model.safetensors, model.safetensors.index.json, pytorch_model.bin and
pytorch_model.bin.index.json is used (transformers' `_get_resolved_checkpoint_files`). All tensors of the files that an
index names are read. If several of these files contain a tensor of the same name, the file in the index is used.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from camelid.checkpoint.containers.safetensors import open_safetensors
from camelid.checkpoint.containers.torch_files import open_torch
from camelid.checkpoint.layout import summarize
from camelid.checkpoint.tensors import Tensor, same_values
from camelid.disk.json_files import read_json
from camelid.errors import UserError

Opener = Callable[[Path], dict[str, Tensor]]
FILES: Mapping[str, Opener] = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_torch}
"""the preferred one first; each may instead be sharded over several files that are listed in an index"""
WEIGHTS = re.compile(
    r"(.+\.(safetensors|gguf|pth|h5|msgpack|onnx)|(pytorch|adapter)_model.*\.bin)(\.index\.json)?", re.IGNORECASE
)
"""names of weight files and of their indexes"""
OPTIONAL = re.compile(r"(lm_head\.weight|.*rotary_emb(_local)?\.\w+)$")
"""tensors that an index may list although no file contains them: a tied head, and buffers that old versions saved"""


def matches(folder: Path) -> bool:
    """Whether a folder contains weights or their index."""
    return any((folder / name).is_file() for file in FILES for name in (file, f"{file}.index.json"))


def open_files(folder: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns all tensors of a folder by name, and notes on duplicate tensors and on files that are not read."""
    for single, open_file in FILES.items():
        if (folder / single).is_file():
            return open_file(folder / single), _unread(folder, single, {single})
        if (index := folder / f"{single}.index.json").is_file():
            tensors, notes, names = _open_shards(index, open_file)
            return tensors, (*notes, *_unread(folder, index.name, {index.name, *names}))
    found = weights_in(folder)
    raise UserError(
        f"{folder} has neither {' nor '.join(FILES)}, nor an index of one"
        + (f"; it contains {summarize(found)}" if found else ""),
        "Rename the weight file, or download the index of the shards."
        if found
        else "Give the folder that contains the weights.",
    )


def weights_in(folder: Path) -> list[str]:
    """Returns the names of the files in a folder that look like weights."""
    return sorted(file.name for file in folder.iterdir() if file.is_file() and WEIGHTS.fullmatch(file.name))


def _unread(folder: Path, read: str, names: Collection[str]) -> tuple[str, ...]:
    if not (others := [name for name in weights_in(folder) if name not in names]):
        return ()
    return (f"the parameters are read from {read}; these files are not read: {summarize(others)}",)


def _open_shards(index: Path, open_file: Opener) -> tuple[dict[str, Tensor], tuple[str, ...], list[str]]:
    """Returns the tensors of the files that an index names, notes, and the names of the files."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map", "Download the file again.")
    names = sorted(set(weight_map.values()))
    missing = [n for n in names if (index.parent / n).parent != index.parent or not (index.parent / n).is_file()]
    if missing:
        raise UserError(
            f"{index} names {summarize(missing)}, which {'are' if missing[1:] else 'is'} not in the folder",
            "Download the missing files, or remove the index if it belongs to other files.",
        )
    shards = {name: open_file(index.parent / name) for name in names}
    tensors: dict[str, Tensor] = {}
    for shard in shards.values():
        tensors |= shard
    last = dict(tensors)  # which transformers would read
    tensors |= {tensor: shards[name][tensor] for tensor, name in weight_map.items() if tensor in shards[name]}
    notes = []
    if copied := [name for name, tensor in tensors.items() if _differs(name, tensor, shards)]:
        chosen, other = (from_[copied[0]].file.name for from_ in (tensors, last))
        notes.append(
            f"{summarize(copied)}: several files contain different values; the file in the index is used ({chosen})"
            + (f", whereas transformers uses the last file ({other})" if chosen != other else "")
        )
    if absent := [name for name in weight_map if name not in tensors and not OPTIONAL.match(name)]:
        notes.append(f"{index.name} lists {summarize(absent)}, which none of its files contains")
    if extra := [name for name in tensors if name not in weight_map and not OPTIONAL.match(name)]:
        notes.append(f"{index.name} does not list {summarize(extra)}, which its files contain; it is read anyway")
    return tensors, tuple(notes), names


def _differs(name: str, chosen: Tensor, shards: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a file contains another tensor of the same name with different values."""
    copies = [shard[name] for shard in shards.values() if name in shard and shard[name] is not chosen]
    return not all(same_values(chosen, copy) for copy in copies)
