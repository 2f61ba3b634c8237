"""The files of a Hugging Face folder that hold its tensors, chosen as transformers chooses them.

The first that exists of model.safetensors, model.safetensors.index.json, pytorch_model.bin and
pytorch_model.bin.index.json (transformers' `_get_resolved_checkpoint_files`). An index names the files of the tensors;
all tensors of those files are read. Where two of them hold a tensor of the same name, the index decides.
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
"""the preferred form first; each may also be several files that an index names"""
WEIGHTS = re.compile(
    r"(.+\.(safetensors|gguf|pth|h5|msgpack|onnx)|(pytorch|adapter)_model.*\.bin)(\.index\.json)?", re.IGNORECASE
)
"""names of files that hold parameters, or say which file holds which"""
NOT_MISSED = re.compile(r"(lm_head\.weight|.*rotary_emb(_local)?\.\w+)$")
"""what an index may list although no file holds it: a tied head, and buffers that old versions saved"""


def matches(folder: Path) -> bool:
    """Whether a folder has one of the forms of weights."""
    return any((folder / name).is_file() for file in FILES for name in (file, f"{file}.index.json"))


def open_files(folder: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """All tensors of a folder by name, with notes on copies and on files that were not read."""
    for single, open_file in FILES.items():
        if (folder / single).is_file():
            return open_file(folder / single), _unread(folder, single, {single})
        if (index := folder / f"{single}.index.json").is_file():
            tensors, notes, names = _open_shards(index, open_file)
            return tensors, (*notes, *_unread(folder, index.name, {index.name, *names}))
    held = weights_in(folder)
    raise UserError(
        f"{folder} has neither {' nor '.join(FILES)}, nor an index of one"
        + (f"; it holds {summarize(held)}" if held else ""),
        "Rename the file of weights, or download the index of its parts, as the case may be."
        if held
        else "Give the folder that holds the weights.",
    )


def weights_in(folder: Path) -> list[str]:
    """The names of the files in a folder that look like weights."""
    return sorted(file.name for file in folder.iterdir() if file.is_file() and WEIGHTS.fullmatch(file.name))


def _unread(folder: Path, read: str, names: Collection[str]) -> tuple[str, ...]:
    if not (others := [name for name in weights_in(folder) if name not in names]):
        return ()
    return (f"the parameters are those of {read}; not read: {summarize(others)}",)


def _open_shards(index: Path, open_file: Opener) -> tuple[dict[str, Tensor], tuple[str, ...], list[str]]:
    """The tensors of the files that an index names, notes, and the names of the files."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map", "Download the file again.")
    names = sorted(set(weight_map.values()))
    if gone := [n for n in names if (index.parent / n).parent != index.parent or not (index.parent / n).is_file()]:
        raise UserError(
            f"{index} names {summarize(gone)}, which {'are' if gone[1:] else 'is'} not in the folder",
            "Download what is missing; if the index belongs to other files, remove it.",
        )
    shards = {name: open_file(index.parent / name) for name in names}
    tensors: dict[str, Tensor] = {}
    for shard in shards.values():
        tensors |= shard
    last = dict(tensors)  # what transformers reads
    tensors |= {tensor: shards[name][tensor] for tensor, name in weight_map.items() if tensor in shards[name]}
    notes = []
    if copied := [name for name, tensor in tensors.items() if _differs(name, tensor, shards)]:
        chosen, other = (from_[copied[0]].file.name for from_ in (tensors, last))
        notes.append(
            f"{summarize(copied)}: several files hold different values; those of the file that the index names are "
            f"taken ({chosen})" + (f", where transformers takes the last file's ({other})" if chosen != other else "")
        )
    if absent := [name for name in weight_map if name not in tensors and not NOT_MISSED.match(name)]:
        notes.append(f"{index.name} lists {summarize(absent)}, which none of its files holds")
    if extra := [name for name in tensors if name not in weight_map and not NOT_MISSED.match(name)]:
        notes.append(f"{index.name} does not list {summarize(extra)}; its files hold it, so it is read all the same")
    return tensors, tuple(notes), names


def _differs(name: str, chosen: Tensor, shards: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a file holds other values than the chosen ones under the same name."""
    copies = [shard[name] for shard in shards.values() if name in shard and shard[name] is not chosen]
    return not all(same_values(chosen, copy) for copy in copies)
