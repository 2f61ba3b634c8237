"""The files of Megatron-LM's checkpoints: their locations, and the tensors in each."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from camelid.checkpoint.containers.dcp import METADATA
from camelid.checkpoint.containers.pickles import OpaqueObject, printable
from camelid.checkpoint.containers.torch_files import unpickle
from camelid.checkpoint.formats.config_source import find_config, folder_with_config
from camelid.checkpoint.formats.megatron_args import WHAT, check_agree, config_from_args, describe_value
from camelid.checkpoint.tensors import Tensor
from camelid.errors import UserError
from camelid.model.config import ModelConfig

TRACKER, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
# Classes of settings, random states and optimizer states in the files, which are not instantiated.
INERT = re.compile(
    r"(argparse Namespace|_codecs encode|_io BytesIO|signal Signals|(__builtin__|builtins|numpy)"
    r" (set|slice|complex|bytearray|ndarray|dtype)|numpy\.(_?core)\.(multiarray|numeric) \w+|pathlib \w+"
    r"|megatron(\.\w+)+ \w+)"
)
MAX_ENTRIES = 10**6  # of a model; a stage has some tens per layer
AGAIN = "Copy the checkpoint again."
# Parts of names in older versions, and in later ones.
OLDER = {
    "language_model.transformer.": "language_model.encoder.",
    ".attention.": ".self_attention.",
    ".input_layernorm.": ".input_norm.",
    ".post_attention_layernorm.": ".post_attention_norm.",
    ".final_layernorm.": ".final_norm.",
}
# The copy of the embedding table in the last stage of a tied model.
TIED_HEADS = {"word_embeddings_for_head.weight": "language_model.output_layer.weight"}


def find_ranks(path: Path) -> Path:
    """Returns the folder that contains the ranks, given it, its parent, a rank, or the file of a rank."""
    if path.name == FILE and path.is_file():
        path = path.parent
    if RANK.fullmatch(path.name) and path.is_dir():
        path = path.absolute().parent
    if not (path / TRACKER).is_file():
        return path
    with (path / TRACKER).open("rb") as file:
        word = file.read(64).decode("ascii", "replace").strip()
    if word == "release":
        return path / "release"
    if not re.fullmatch(r"\d{1,18}", word):
        raise UserError(f"{path / TRACKER} holds {printable(word)!r} and no number of an iteration", AGAIN)
    return path / f"iter_{int(word):07}"


def rank_files(folder: Path) -> list[list[Path]]:
    """Returns the files by pipeline stage and tensor-parallel rank."""
    if (folder / "metadata.json").is_file():
        raise UserError(
            f"{folder} is a distributed checkpoint of Megatron without {METADATA}, as --ckpt-format zarr writes it",
            "Save it with --ckpt-format torch_dist, or copy all files of the folder.",
        )
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    places = {}
    for name in sorted(name for name in found if name.startswith("mp_rank_")):
        if (match := RANK.fullmatch(name)) is None:
            raise UserError(f"{folder / name} is a rank of experts, or of something unknown", f"{WHAT} has no experts.")
        places[int(match[2] or 0), int(match[1])] = folder / name / FILE
    stages, ranks = (1 + max((place[i] for place in places), default=-1) for i in range(2))
    if not places or len(places) != stages * ranks:
        raise UserError(f"{folder} has {len(places)} folders mp_rank_*: ranks are missing", "Copy all of them.")
    return [[places[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def described(
    folder: Path, file: Path, args: Mapping[str, Any], config: ModelConfig | None
) -> tuple[ModelConfig, tuple[str, ...], str, Path]:
    """Returns the model of a checkpoint, notes on what is assumed, what describes it, and the folder of the checkpoint.

    `config` takes precedence, then a config.json in the folder of the iteration or its parent, then the settings `args`
    in `file`, whose sizes must agree with the former two.
    """
    home = folder_with_config(folder, folder.parent)
    root = home or (folder.parent if (folder.parent / TRACKER).is_file() else folder)
    source = find_config(config, folder, folder.parent)
    if source is None:
        if not args:
            raise UserError(f"{folder} holds no args, as Megatron-LM writes them", "Give --config PRESET_OR_JSON.")
        config, notes = config_from_args(file, args)
        return config, notes, f"args in {file}", root
    check_agree(file, args, *source)
    return source.config, (), source.described_by, root


class Shard:
    """The content of the file of one rank."""

    def __init__(self, file: Path) -> None:
        held = unpickle(file, INERT)
        if not isinstance(held, dict) or not isinstance(args := held.get("args"), OpaqueObject):
            raise UserError(f"{file} holds no args, as Megatron's files do", "Give a checkpoint of Megatron-LM.")
        version = held.get("checkpoint_version", 0)
        if type(version) not in (int, float) or version not in (0, 1, 2, 3):
            raise UserError(
                f"{file} is of the unknown version {describe_value(version)}", "camelid reads versions 0 to 3."
            )
        self.file, self.args, self.version = file, args.state, float(version)
        chunks = sorted(key for key in held if isinstance(key, str) and re.fullmatch(r"model\d{0,3}", key))
        if chunks != ["model"]:
            chunks = [f"model{i}" for i in range(len(chunks))]
        if not chunks or not all(isinstance(held.get(chunk), dict) for chunk in chunks):
            raise UserError(f"{file} holds no model", "Give a checkpoint of Megatron-LM.")
        self.chunks = [self._tensors(held[chunk]) for chunk in chunks]
        """one, or several with a virtual pipeline"""

    def _tensors(self, tree: dict) -> dict[str, Tensor]:
        size, tensors = self.file.stat().st_size, {}
        for count, (name, value) in enumerate(_flat(tree)):
            if count > MAX_ENTRIES:
                raise UserError(f"{self.file} has more than {MAX_ENTRIES:,} entries in its model", AGAIN)
            if name.endswith("_extra_state"):
                continue
            if not isinstance(value, Tensor):
                raise UserError(
                    f"{printable(name)} in {self.file} is not a tensor", "Give a checkpoint of Megatron-LM."
                )
            if math.prod(value.shape) * value.dtype.itemsize > size:  # of one number, over and over
                raise UserError(
                    f"{printable(name)} in {self.file} is larger than the file", "Save the checkpoint again."
                )
            if name.startswith("language_model."):
                for old, new in OLDER.items():
                    name = name.replace(old, new)
            name = TIED_HEADS.get(name, name)
            if name in tensors:
                raise UserError(f"{self.file} has {printable(name)} twice", AGAIN)
            tensors[name] = replace(value, name=name)
        return tensors


def _flat(tree: dict, start: str = "", depth: int = 4) -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dicts by path; dicts deeper than `depth` are values."""
    for key, value in tree.items():
        name = f"{start}{key}"
        if isinstance(value, dict) and depth > 1:
            yield f"{name}._extra_state", None  # so that empty ones are counted
            yield from _flat(value, f"{name}.", depth - 1)
        else:
            yield name, value
