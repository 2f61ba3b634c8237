"""From one checkpoint to another, a slice at a time: memory is what is in flight, not the model."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from camelid.checkpoint.checkpoint import AdamExport, Checkpoint, ExportSpec
from camelid.checkpoint.integrity import count_not_finite, describe_counts
from camelid.checkpoint.layout import Index, SliceReader, slice_reader
from camelid.checkpoint.registry import TRAIN_STATE, open_checkpoint, write_checkpoint
from camelid.checkpoint.replacing import refuse_sources
from camelid.checkpoint.tensors import dtype_named
from camelid.model.config import ModelConfig


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "hf",
    format: str | None = None,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    dtype: str | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    shards: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    with_tokenizer: bool = True,
    companions: Callable[[Sequence[Path]], Sequence[Path]] = list,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, ...]:
    """Writes `source` in the format `to`; `dtype` None keeps each tensor's own.

    `format` is that of the source, None asks its files; `config` describes a model whose files do not; the fields in
    `ignore` are as if config.json did not have them. With `resume`, goes on where an earlier process was killed that
    was called with the same arguments. `with_tokenizer` False leaves the tokenizer out; `companions` gives the files
    that are written beside the weights (tokenizer, license, ...), from those of the source. Returns what was guessed or
    left out, and where infinite or NaN values are, which are written as they are. Raises UserError where `destination`
    would replace `source`.
    """
    checkpoint = open_checkpoint(source, format, config, ignore)
    if overwrite:
        refuse_sources(destination, checkpoint.source_paths)
    dtypes = checkpoint.dtypes
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, dtype_named(dtype))
    not_finite: dict[tuple, int] = {}
    export = ExportSpec(
        checkpoint.config,
        dtypes,
        _counting(checkpoint.source, not_finite),
        companions(checkpoint.companions if with_tokenizer else checkpoint.other_companions),
        tensor_parallel,
        pipeline_parallel,
        shards,
        _training(checkpoint),
    )
    told = write_checkpoint(
        Path(destination),
        export,
        to,
        overwrite=overwrite,
        resume=resume,
        source=_fingerprint(checkpoint),
        progress=progress,
    )
    notes = [*checkpoint.notes, *told]
    if export.training is not None and to != TRAIN_STATE:
        notes.append(f"its step and the moments of its optimizer are left out; --to {TRAIN_STATE} keeps them")
    if not_finite:
        counts = Counter[str]()
        for (path, *_), count in not_finite.items():
            counts[path] += count
        notes.append(f"infinite or NaN values are written as they are: {describe_counts(counts)}")
    return tuple(notes)


def _counting(source: SliceReader, found: dict[tuple, int]) -> SliceReader:
    """The same values; `found` gets how many of each slice are infinite or NaN."""

    def counted(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        values = source(path, layer, index, dtype)
        if count := count_not_finite(values):
            found[path, layer, repr(index)] = count  # a slice that several shards hold is one slice
        return values

    return counted


def _training(checkpoint: Checkpoint) -> AdamExport | None:
    if (held := checkpoint.training) is None:
        return None
    return AdamExport(held.step, *(slice_reader(checkpoint.table, moments) for moments in (held.mu, held.nu)))


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Of the files that hold the tensors, and of how they are read: it changes when one of them does."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    rows = [(path, part.rule, part.start) for path, part in checkpoint.table.entries.items()]
    return hashlib.sha256(repr((checkpoint.config, stats, rows)).encode(errors="surrogateescape")).hexdigest()
