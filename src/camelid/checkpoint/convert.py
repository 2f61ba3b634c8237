"""Converts a checkpoint to another format, a slice at a time: memory does not grow with the model."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from camelid.checkpoint.adapters.added import with_adapters
from camelid.checkpoint.adapters.lora import AdaptedCheckpoint
from camelid.checkpoint.adapters.peft import adapter_files, base_name
from camelid.checkpoint.checkpoint import AdamExport, Checkpoint, ExportSpec, copy_companions
from camelid.checkpoint.files import json_file, write_files
from camelid.checkpoint.folder import new_folder
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.integrity import count_not_finite, describe_counts
from camelid.checkpoint.layout import Index, SliceReader, slice_reader
from camelid.checkpoint.registry import TRAIN_STATE, open_checkpoint, write_checkpoint
from camelid.checkpoint.replacing import refuse_sources
from camelid.checkpoint.tensors import dtype_named
from camelid.errors import UserError
from camelid.model.config import ModelConfig


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "hf",
    format: str | None = None,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    adapters: Sequence[str] = (),
    lora_alpha: float | None = None,
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
    """Writes `source` in the format `to`, and returns notes on what was assumed or left out.

    Args:
        source: a path or a Hugging Face Hub name, see `registry.open_checkpoint`.
        destination: a folder, or a file for formats that are one file.
        to: the format to write; "peft" writes the only adapter of `source` or `adapters`, without its base.
        format: the format of `source`; None detects it from the files.
        config: describes the model if the files of `source` do not.
        ignore: fields of config.json that are treated as absent.
        adapters: LoRA adapters that are added to `source`, see `with_adapters`.
        lora_alpha: of MindFormers' LoRA factors, in `adapters` if there are any, and otherwise in `source`.
        dtype: dtype of all tensors in the destination; None keeps that of each tensor.
        tensor_parallel: number of shards of each matrix.
        pipeline_parallel: number of pipeline stages.
        shards: number of files; None is the format's default.
        overwrite: replace a checkpoint in `destination`.
        resume: resume the conversion of a process that was killed and was called with the same arguments.
        with_tokenizer: whether the tokenizer is among the companions.
        companions: maps the files that accompany the source's weights to those that are written.
        progress: called with the bytes done and the bytes in total.

    Infinite and NaN values are written as they are, and noted. Raises UserError if `source` cannot be opened, if the
    format cannot hold the model, or if `destination` may not be replaced or would replace `source`.
    """
    checkpoint = open_source(source, format, config, ignore, adapters, lora_alpha)
    if overwrite:
        refuse_sources(destination, checkpoint.source_paths)
    if to == "peft":
        given = dtype is not None or (tensor_parallel, pipeline_parallel, shards, resume) != (1, 1, None, False)
        return _write_adapter(Path(destination), checkpoint, source, given, with_tokenizer, overwrite, companions)
    dtypes = checkpoint.dtypes
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, dtype_named(dtype))
    not_finite: dict[tuple, int] = {}
    export = ExportSpec(
        checkpoint.config,
        dtypes,
        _counting(checkpoint.read_slice, not_finite),
        companions(checkpoint.companions if with_tokenizer else checkpoint.other_companions),
        tensor_parallel,
        pipeline_parallel,
        shards,
        _training(checkpoint),
    )
    format_notes = write_checkpoint(
        Path(destination),
        export,
        to,
        overwrite=overwrite,
        resume=resume,
        source=_fingerprint(checkpoint, adapters, lora_alpha),
        progress=progress,
    )
    notes = [*checkpoint.notes, *format_notes]
    if export.training is not None and to != TRAIN_STATE:
        notes.append(f"the step and the optimizer's moments are left out; --to {TRAIN_STATE} keeps them")
    if not_finite:
        counts = Counter[str]()
        # Threads have added them in any order.
        for (path, *_), count in sorted(not_finite.items(), key=lambda item: item[0][0]):
            counts[path] += count
        notes.append(f"infinite or NaN values are written as they are: {describe_counts(counts)}")
    return tuple(notes)


def open_source(
    source: str | Path,
    format: str | None,
    config: ModelConfig | None,
    ignore: Sequence[str],
    adapters: Sequence[str],
    lora_alpha: float | None,
) -> Checkpoint:
    """Opens a checkpoint and adds adapters to it; the arguments are those of `convert`."""
    opened = open_checkpoint(source, format, config, ignore, None if adapters else lora_alpha)
    return with_adapters(opened, adapters, lora_alpha)


def _write_adapter(
    destination: Path,
    checkpoint: Checkpoint,
    source: str | Path,
    given: bool,
    with_tokenizer: bool,
    overwrite: bool,
    companions: Callable[[Sequence[Path]], Sequence[Path]],
) -> tuple[str, ...]:
    """Writes the adapter of a checkpoint in PEFT's form; `given` is whether options were given that do not apply."""
    if not isinstance(checkpoint, AdaptedCheckpoint):
        raise UserError(f"{source} has no adapter to write in PEFT's form", "Name one with --adapter.")
    if isinstance(checkpoint.base, AdaptedCheckpoint):
        raise UserError(
            "PEFT's form holds one adapter, and here are several",
            "Write each of them by itself, or merge them all with --to hf.",
        )
    if given:
        raise UserError(
            "an adapter is written as it is: dtype, numbers of shards and resume do not apply to it", "Leave them out."
        )
    adapter = checkpoint.adapter
    if adapter.base is None and checkpoint.base.format == "hf":
        adapter = replace(adapter, base=base_name(source))
    # config.json describes the adapted model, and lets `overwrite` recognize the folder as a checkpoint.
    about = json_file("config.json", config_to_hf(adapter.config, checkpoint.dtypes["embed"].name))
    files = [*adapter_files(adapter), about]
    others = companions(checkpoint.companions if with_tokenizer else checkpoint.other_companions)
    expected = {file.name: None for file in files} | {file.name: file for file in others}
    with new_folder(destination, sum(file.size for file in files), overwrite, expected=expected) as folder:
        write_files(folder, files)
        copy_companions(others, folder)
    return checkpoint.notes


def _counting(read_slice: SliceReader, counts: dict[tuple, int]) -> SliceReader:
    """Reads the same values, and stores in `counts` how many values of each slice are infinite or NaN."""

    def read(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        values = read_slice(path, layer, index, dtype)
        if count := count_not_finite(values):
            counts[path, layer, repr(index)] = count  # a slice that several shards hold is counted once
        return values

    return read


def _training(checkpoint: Checkpoint) -> AdamExport | None:
    """The state of AdamW; None if there is none, or if it lacks the moments of parameters that were not trained."""
    state = checkpoint.training
    if state is None or not checkpoint.table.tensors.keys() <= state.mu.keys():
        return None
    return AdamExport(state.step, *(slice_reader(checkpoint.table, moments) for moments in (state.mu, state.nu)))


def _fingerprint(checkpoint: Checkpoint, adapters: Sequence[str], lora_alpha: float | None) -> str:
    """A hash that changes when one of the files with tensors does, or the way in which they are read."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    entries = [(path, entry.rule, entry.start) for path, entry in checkpoint.table.entries.items()]
    how = (*adapters, *filter(None, [lora_alpha]))
    return hashlib.sha256(repr((checkpoint.config, stats, entries, *how)).encode(errors="surrogateescape")).hexdigest()
