"""What every format has in common: a checkpoint that is opened, and a model that is to be written."""

import functools
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from camelid.checkpoint.layout import Index, Row, Source, Table, from_tensors, pieces, table
from camelid.checkpoint.tensors import Planned, Tensor
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

COMPANIONS = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template.*|vocab\.json|merges\.txt"
    r"|generation_config\.json|preprocessor_config\.json|LICEN[SC]E.*|NOTICE.*|USE_POLICY.*|README.*"
)


@dataclass(frozen=True)
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

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """By path: the dtype of each parameter in the files."""
        return {path: self.tensors[part.name(part.layers()[0])].dtype for path, part in self.table.parts.items()}

    @property
    def source(self) -> Source:
        """The values, read as they are asked for."""
        return from_tensors(self.table, self.tensors)

    @property
    def companions(self) -> list[Path]:
        """The files that go wherever the weights go: tokenizer, generation settings, licence."""
        return sorted(file for file in self.folder.iterdir() if COMPANIONS.fullmatch(file.name) and file.is_file())


@dataclass(frozen=True)
class Saving:
    """A model that is to be written, in any format."""

    config: ModelConfig
    dtypes: Mapping[str, np.dtype]
    """of the tensors, by path of ours"""
    source: Source
    companions: Sequence[Path] = ()
    progress: Callable[[int, int], None] = lambda done, total: None
    """hears of bytes done and bytes in all"""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    _done: list[int] = field(default_factory=lambda: [0])

    @functools.cached_property
    def total(self) -> int:
        """Bytes of all parameters."""
        specs = named(declare_decoder(self.config))
        return sum(spec.size * self.dtypes[path].itemsize for path, spec in specs.items())

    def pieces(self, table: Table, tensor: Planned) -> Iterator[np.ndarray]:
        """One of the file's tensors, in arrays that lie end to end in it."""
        for piece in pieces(table, tensor.name, tensor.dtype, self.source):
            yield piece
            self._done[0] += piece.nbytes
            self.progress(min(self._done[0], self.total), self.total)

    def untied(self) -> "Saving":
        """The same model with a head of its own, for systems that tie none: the table is written as the head too."""
        if not self.config.tie_embeddings:
            return self

        def source(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
            return self.source("embed" if path == "lm_head" else path, layer, index, dtype)

        config = replace(self.config, tie_embeddings=False)
        return replace(self, config=config, dtypes={**self.dtypes, "lm_head": self.dtypes["embed"]}, source=source)

    def carry_companions(self, folder: Path) -> None:
        """Copies the files that go wherever the weights go."""
        for file in self.companions:
            shutil.copyfile(file, folder / file.name)


def table_for(what: str, rows: Sequence[Row], config: ModelConfig, sizes: Mapping[str, int]) -> Table:
    """The table of a format for one model; raises UserError where the format has no place for a parameter."""
    specs = named(declare_decoder(config))
    if missing := sorted(specs.keys() - {row.path for row in rows}):
        raise UserError(
            f"{what} has no place for {', '.join(missing[:3])}", "Use the format hf, which holds every model."
        )
    return table(rows, specs, {**config.axis_sizes, **sizes})


def refuse_beyond(what: str, config: ModelConfig, can_say: Collection[str]) -> None:
    """Raises UserError where a model differs from a plain Llama in something that a format's own system cannot compute.

    `can_say` are the fields of ModelConfig that the format can hold beside sizes.
    """
    for f in fields(ModelConfig):
        plain = f.default is MISSING or f.name in ("family", "init_std", "bos_id", "eos_ids", "pad_id", *can_say)
        if not plain and (value := getattr(config, f.name)) != f.default:
            raise UserError(f"{what} cannot hold {f.name} = {value!r}", "Use the format hf, which holds every model.")
