"""What every format shares: an opened checkpoint, and the specification of one that is to be written."""

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
"""patterns of the names of files that accompany the weights"""
USE_HF = "Use the format hf, which holds every model."


@dataclass(frozen=True)
class AdamState:
    """The state of AdamW in a checkpoint of a training run; moments are named as the parameters are."""

    step: int
    """number of parameter updates"""
    mu: Mapping[str, Tensor]
    """first moments, by the tensor names of the checkpoint's table; none of a parameter that was not trained"""
    nu: Mapping[str, Tensor]
    """second moments, by the same names"""


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """An opened checkpoint: everything except the values of its tensors."""

    format: str
    folder: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    """by the names in `table`"""
    table: Table
    notes: tuple[str, ...] = ()
    """what was assumed, and what was left out, for the user"""
    training: AdamState | None = None
    """if the checkpoint holds the state of its optimizer"""
    assumed_layout: str | None = None
    """a memory layout of some tensors that no file specifies, so that comparing copies cannot confirm it"""
    unpack_tokenizer: Callable[[], Path] | None = None
    """writes the tokenizer's files to a folder, if the file with the weights contains the tokenizer"""

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}: {self.format}, {len(self.tensors)} tensors)"

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """The dtype of each parameter, by path; float32, which holds all values, if the layers have several."""
        found = self._layer_dtypes.items()
        return {path: next(iter(dtypes)) if len(dtypes) == 1 else np.dtype(np.float32) for path, dtypes in found}

    @property
    def mixed(self) -> tuple[str, ...]:
        """Notes on the parameters whose layers have different dtypes in the files."""
        found = {path: sorted(dtype.name for dtype in dtypes) for path, dtypes in self._layer_dtypes.items()}
        return tuple(
            f"layers of {path} are {' and '.join(names)}; it is read as float32"
            for path, names in found.items()
            if len(names) > 1
        )

    @functools.cached_property
    def _layer_dtypes(self) -> dict[str, set[np.dtype]]:
        """The dtypes of the layers of each parameter, by path."""
        entries = self.table.entries.items()
        return {path: {self.tensors[entry.name(layer)].dtype for layer in entry.layers()} for path, entry in entries}

    @property
    def files(self) -> list[Path]:
        """The files that hold its tensors, sorted."""
        return files_holding(self.tensors.values())

    @property
    def source_paths(self) -> list[Path]:
        """What a destination must not replace: the checkpoint's folder, and the files that hold its tensors."""
        return [self.folder, *self.files]

    @property
    def read_slice(self) -> SliceReader:
        """A function that reads slices of parameters; each one returned keeps a cache of its own."""
        return slice_reader(self.table, self.tensors)

    @property
    def companions(self) -> list[Path]:
        """The files that accompany the weights: tokenizer, generation settings, license."""
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
        """The folder with the tokenizer's files; raises UserError if there is a tokenizer that cannot be read."""
        return self.folder if self.unpack_tokenizer is None else self.unpack_tokenizer()


def companions_in(folder: Path) -> list[Path]:
    """The files in a folder that accompany its weights."""
    names = (name for pattern in COMPANIONS for name in fnmatch.filter(os.listdir(folder), pattern))
    return sorted(folder / name for name in names if (folder / name).is_file())


def copy_companions(companions: Sequence[Path], folder: Path) -> None:
    """Copies files into a folder, under the names that they have."""
    for file in companions:
        shutil.copyfile(file, folder / file.name)


@dataclass(frozen=True)
class AdamExport:
    """The state of AdamW that is to be written."""

    step: int
    mu: SliceReader
    nu: SliceReader


@dataclass(frozen=True)
class ExportSpec:
    """A model that is to be written, in any format."""

    config: ModelConfig
    dtypes: Mapping[str, np.dtype]
    """of the tensors, by parameter path"""
    read_slice: SliceReader
    companions: Sequence[Path] = ()
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    shards: int | None = None
    """number of files; None is the format's default"""
    training: AdamExport | None = None

    def payload(self, table: Table, tensor: PlannedTensor) -> TensorPayload:
        """One tensor of the file, stored without an encoding."""
        return raw_payload(tensor, lambda: tensor_chunks(table, tensor.name, tensor.dtype, self.read_slice))

    def payloads(self, table: Table) -> list[TensorPayload]:
        """All tensors of the file, in the order of `table`."""
        return [self.payload(table, tensor) for tensor in plan_tensors(table, self.dtypes)]

    def untied(self) -> "ExportSpec":
        """The same model with a head of its own, for systems without tied embeddings: the table is written twice."""
        if not self.config.tie_embeddings:
            return self

        def read_slice(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
            return self.read_slice("embed" if path == "lm_head" else path, layer, index, dtype)

        config, dtypes = replace(self.config, tie_embeddings=False), {**self.dtypes, "lm_head": self.dtypes["embed"]}
        return replace(self, config=config, dtypes=dtypes, read_slice=read_slice)


def table_for(what: str, rules: Sequence[TensorRule], config: ModelConfig, sizes: Mapping[str, int]) -> Table:
    """The table of a format for one model; raises UserError if no rule covers one of its parameters.

    `what` names the format in the message; `sizes` are those of axis names that a model does not have.
    """
    specs = named(declare_decoder(config))
    if missing := sorted(specs.keys() - {rule.path for rule in rules}):
        raise UserError(f"{what} has no place for {', '.join(missing[:3])}", USE_HF)
    return make_table(rules, specs, {**config.axis_sizes, **sizes})


def shown(value: object) -> str:
    """The value of a field of a model, for messages."""
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else repr(value)


def assumption_note(what: str, config: ModelConfig, *names: str) -> str:
    """The note that files called `what` do not specify some fields of a model."""
    values = ", ".join(f"{name} = {shown(getattr(config, name))}" for name in names)
    return f"{what} does not specify every field of the model; assumed: {values}"


def refuse_wide_heads(what: str, config: ModelConfig) -> None:
    """Raises UserError if num_heads * head_dim differs from embed_dim, for systems that derive head_dim from it."""
    if config.head_dim * config.num_heads != config.embed_dim:
        raise UserError(
            f"{what} cannot hold head_dim = {config.head_dim}: it is embed_dim / num_heads there, "
            f"{config.embed_dim} / {config.num_heads}",
            USE_HF,
        )


def refuse_unsupported(what: str, config: ModelConfig, supported: Collection[str]) -> None:
    """Raises UserError if a model differs from a plain Llama in a field that a format's own system does not support.

    `supported` are the fields of ModelConfig that the format can express, in addition to the sizes.
    """
    for f in fields(ModelConfig):
        plain = f.default is MISSING or f.name in ("family", "init_std", "bos_id", "eos_ids", "pad_id", *supported)
        if not plain and (value := getattr(config, f.name)) != f.default:
            raise UserError(f"{what} cannot hold {f.name} = {value!r}", USE_HF)
