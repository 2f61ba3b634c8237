"""What every format has in common: a checkpoint that is opened, and a model that is to be written."""

import fnmatch
import functools
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import numpy as np

from camelid.checkpoint.files import TensorPayload, raw_payload
from camelid.checkpoint.layout import (
    Index,
    SliceReader,
    Table,
    TensorRule,
    make_table,
    plan_tensors,
    slice_reader,
    tensor_chunks,
)
from camelid.checkpoint.tensors import PlannedTensor, Tensor, files_holding
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named
from camelid.text.tokenizer import TOKENIZER_FILES

COMPANIONS = """
    tokenizer* special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template*
    generation_config.json preprocessor_config.json LICEN[SC]E* NOTICE* USE_POLICY* README*
""".split()
"""names, as patterns, of the files that go wherever the weights go"""


@dataclass(frozen=True)
class AdamState:
    """What AdamW goes on from, beside the parameters."""

    step: int
    """updates of the parameters that were made"""
    mu: Mapping[str, Tensor]
    """the averages of gradients, by the names of the checkpoint's table"""
    nu: Mapping[str, Tensor]
    """and of their squares"""


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """An opened checkpoint: everything but the numbers."""

    format: str
    folder: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    """by the name that the table has for them"""
    table: Table
    notes: tuple[str, ...] = ()
    """what was guessed, and what was left out"""
    training: AdamState | None = None
    """of a checkpoint that was made to go on training from"""
    assumed_layout: str | None = None
    """the order of numbers in some tensors, where no file tells it; other copies of them cannot show if it is right"""
    unpack_tokenizer: Callable[[], Path] | None = None
    """makes a folder of tokenizer files, where the tokenizer is within the file that holds the weights"""

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}: {self.format}, {len(self.tensors)} tensors)"

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """By path: the dtype of each parameter in the files; float32 where its layers differ, which loses nothing."""
        found = self._layer_dtypes.items()
        return {path: next(iter(dtypes)) if len(dtypes) == 1 else np.dtype(np.float32) for path, dtypes in found}

    @property
    def mixed(self) -> tuple[str, ...]:
        """Notes on the parameters whose layers have different dtypes in the files."""
        found = {path: sorted(dtype.name for dtype in dtypes) for path, dtypes in self._layer_dtypes.items()}
        return tuple(
            f"layers of {path} are {' and '.join(names)}; it is taken as float32"
            for path, names in found.items()
            if len(names) > 1
        )

    @functools.cached_property
    def _layer_dtypes(self) -> dict[str, set[np.dtype]]:
        """By path: the dtypes of its layers."""
        parts = self.table.entries
        return {path: {self.tensors[part.name(layer)].dtype for layer in part.layers()} for path, part in parts.items()}

    @property
    def files(self) -> list[Path]:
        """The files that hold its tensors, in order."""
        return files_holding(self.tensors.values())

    @property
    def source_paths(self) -> list[Path]:
        """What a destination must not replace: its folder, and the files that hold its tensors."""
        return [self.folder, *self.files]

    @property
    def source(self) -> SliceReader:
        """The values, read as they are asked for."""
        return slice_reader(self.table, self.tensors)

    @property
    def companions(self) -> list[Path]:
        """The files that go wherever the weights go: tokenizer, generation settings, licence."""
        if self.unpack_tokenizer is None:
            return companions_in(self.folder)
        files = [*self.other_companions, *companions_in(self.tokenizer_folder)]
        return list({file.name: file for file in files}.values())

    @property
    def other_companions(self) -> list[Path]:
        """The companions without the tokenizer."""
        tokenizer = set(TOKENIZER_FILES) - {"generation_config.json"}
        return [file for file in companions_in(self.folder) if file.name not in tokenizer]

    @functools.cached_property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer's files; raises UserError where a tokenizer is there and cannot be read."""
        return self.folder if self.unpack_tokenizer is None else self.unpack_tokenizer()


def companions_in(folder: Path) -> list[Path]:
    """The files of a folder that go wherever its weights go."""
    names = (name for pattern in COMPANIONS for name in fnmatch.filter(os.listdir(folder), pattern))
    return sorted(folder / name for name in names if (folder / name).is_file())


def copy_companions(companions: Sequence[Path], folder: Path) -> None:
    """Puts them beside the weights."""
    for file in companions:
        shutil.copyfile(file, folder / file.name)


@dataclass(frozen=True)
class AdamExport:
    """Training, as it is to be written."""

    step: int
    mu: SliceReader
    nu: SliceReader


@dataclass(frozen=True)
class ExportSpec:
    """A model that is to be written, in any format."""

    config: ModelConfig
    dtypes: Mapping[str, np.dtype]
    """of the tensors, by path of ours"""
    source: SliceReader
    companions: Sequence[Path] = ()
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    shards: int | None = None
    """files; None is as many as the format likes"""
    training: AdamExport | None = None

    def payload(self, table: Table, tensor: PlannedTensor) -> TensorPayload:
        """One of the file's tensors, as its numbers are."""
        return raw_payload(tensor, lambda: tensor_chunks(table, tensor.name, tensor.dtype, self.source))

    def payloads(self, table: Table) -> list[TensorPayload]:
        """All of the file's tensors."""
        return [self.payload(table, tensor) for tensor in plan_tensors(table, self.dtypes)]

    def untied(self) -> "ExportSpec":
        """The same model with a head of its own, for systems that tie none: the table is written as the head too."""
        if not self.config.tie_embeddings:
            return self

        def source(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
            return self.source("embed" if path == "lm_head" else path, layer, index, dtype)

        config = replace(self.config, tie_embeddings=False)
        return replace(self, config=config, dtypes={**self.dtypes, "lm_head": self.dtypes["embed"]}, source=source)


def table_for(what: str, rows: Sequence[TensorRule], config: ModelConfig, sizes: Mapping[str, int]) -> Table:
    """The table of a format for one model; raises UserError where the format has no place for a parameter."""
    specs = named(declare_decoder(config))
    if missing := sorted(specs.keys() - {row.path for row in rows}):
        raise UserError(
            f"{what} has no place for {', '.join(missing[:3])}", "Use the format hf, which holds every model."
        )
    return make_table(rows, specs, {**config.axis_sizes, **sizes})


def assumption_note(what: str, config: ModelConfig, *names: str) -> str:
    """The note of a reader whose files do not say some fields of a model; `what` is their name."""
    values = ", ".join(f"{name} = {getattr(config, name)!r}" for name in names)
    return f"{what} does not say everything of a model, and these are assumed: {values}"


def refuse_wide_heads(what: str, config: ModelConfig) -> None:
    """Raises UserError where heads are not as wide as the embedding together, for systems that know no other width."""
    if config.head_dim * config.num_heads != config.embed_dim:
        raise UserError(
            f"{what} cannot hold head_dim = {config.head_dim}: it is embed_dim / num_heads there, "
            f"{config.embed_dim} / {config.num_heads}",
            "Use the format hf, which holds every model.",
        )


def refuse_unsupported(what: str, config: ModelConfig, can_say: Collection[str]) -> None:
    """Raises UserError where a model differs from a plain Llama in something that a format's own system cannot compute.

    `can_say` are the fields of ModelConfig that the format can hold beside sizes.
    """
    for f in fields(ModelConfig):
        plain = f.default is MISSING or f.name in ("family", "init_std", "bos_id", "eos_ids", "pad_id", *can_say)
        if not plain and (value := getattr(config, f.name)) != f.default:
            raise UserError(f"{what} cannot hold {f.name} = {value!r}", "Use the format hf, which holds every model.")
