"""Creates deltas between two checkpoints of any formats, and applies them to a base.

    exact   delta.json, delta.safetensors: bits of tuned - bits of base, as unsigned integers modulo their size
    sum     delta.json with an ordinary checkpoint of tuned - base, like EasyLM's and other published deltas
    lora    a PEFT adapter: a truncated singular value decomposition of the difference of each matrix

An exact delta contains checksums of its base (exact_delta.py); an adapter is the best of its rank (low_rank.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from camelid.checkpoint.adapters.exact_delta import NAME, VERSION, open_exact, plan_exact
from camelid.checkpoint.adapters.low_rank import approximate
from camelid.checkpoint.adapters.peft import adapter_files, base_name, matches, on_base, open_adapter
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec, companions_in, copy_companions
from camelid.checkpoint.files import PlannedFile, json_file, write_files
from camelid.checkpoint.folder import new_folder
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.layout import Index, SliceReader
from camelid.checkpoint.registry import open_checkpoint, plan_files, write_checkpoint
from camelid.checkpoint.replacing import refuse_sources
from camelid.checkpoint.tensors import rounded
from camelid.disk.json_files import read_json, write_hf_json
from camelid.errors import UserError
from camelid.inputs import expand_home
from camelid.model.config import ModelConfig

KINDS = ("exact", "sum", "lora")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DeltaReport:
    """The result of `make`."""

    residual: float | None = None
    """of an adapter: Frobenius norm of what it does not express, relative to that of the difference"""
    notes: tuple[str, ...] = ()


def make(
    base: str | Path,
    tuned: str | Path,
    destination: str | Path,
    *,
    kind: str = "exact",
    rank: int | None = None,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> DeltaReport:
    """Writes the difference between `base` and `tuned`, and the companion files of `tuned`, to a new folder.

    `rank` is required for the kind lora, which keeps the adapter and one matrix in memory; other kinds work slice by
    slice. `config` describes both models if their files do not, and the fields of config.json in `ignore` are treated
    as absent. Raises UserError if the kind cannot express the difference, or if `destination` would replace a source.
    """
    if kind not in KINDS:
        raise UserError(f"a delta of kind {kind!r} is unknown", f"Choose one of {', '.join(KINDS)}.")
    if (rank is None) == (kind == "lora") or (rank is not None and rank < 1):
        raise UserError(
            f"kind = {kind} with rank = {rank}", "The kind lora takes a rank of 1 or more, others take none."
        )
    one, other = (open_checkpoint(path, config=config, ignore=ignore) for path in (base, tuned))
    if overwrite:
        refuse_sources(destination, (*one.source_paths, *other.source_paths))
    if kind == "exact":
        return _make_exact(one, other, Path(destination), overwrite, progress)
    _check_same(one, other)
    if kind == "sum":
        return _make_sum(one, other, Path(destination), overwrite, progress)
    assert rank is not None
    difference = _combined(one, other, np.subtract)
    adapter, residual, notes = approximate(one, other, difference, rank, progress)
    adapter = replace(adapter, base=base_name(base) if one.format == "hf" else None)
    # config.json describes the tuned model, and lets --overwrite recognize the folder as a checkpoint.
    about = json_file("config.json", config_to_hf(adapter.config, other.dtypes["embed"].name))
    _write(Path(destination), [*adapter_files(adapter), about], other, overwrite, lambda done, total: None)
    return DeltaReport(residual, notes)


def apply(
    base: str | Path,
    delta: str | Path,
    destination: str | Path,
    *,
    to: str = "hf",
    summed: bool = False,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[str, ...]:
    """Applies a delta to a base, writes the result in the format `to`, and returns notes.

    A delta is a folder written by `make`, or an adapter; with `summed`, any checkpoint that contains differences.
    `config` describes the base, and such a checkpoint, if their files do not; the fields of config.json in `ignore` are
    treated as absent. Raises UserError if the delta was created from another base or is damaged, or if `destination`
    would replace the base or the delta.
    """
    one, folder = open_checkpoint(base, config=config, ignore=ignore), Path(expand_home(delta))
    if overwrite:
        refuse_sources(destination, (*one.source_paths, folder))
    notes = one.notes
    if summed or _kind(folder) == "sum":
        other = open_checkpoint(delta, config=config if summed else None, ignore=ignore)
        if overwrite:
            refuse_sources(destination, other.source_paths)  # `delta` may have a prefix, or be a name on the Hub
        _check_same(one, other)
        export = ExportSpec(
            other.config, other.dtypes, _combined(one, other, np.add), other.companions or one.companions
        )
    elif _kind(folder) == "lora":
        other = on_base(open_adapter(folder, one.config), one, folder)
        export, notes = ExportSpec(other.config, other.dtypes, other.read_slice, other.companions), other.notes
    else:
        exact = open_exact(folder, one)
        progress = partial(_after, exact.check(progress), progress)
        export = ExportSpec(exact.config, exact.dtypes, exact.read_slice, companions_in(folder) or one.companions)
    return (*notes, *write_checkpoint(Path(destination), export, to, overwrite=overwrite, progress=progress))


def _after(before: int, progress: Progress, done: int, total: int) -> None:
    """Reports progress of a second pass, after `before` bytes of the first."""
    progress(before + done, before + total)


def _kind(folder: Path) -> str:
    """Returns the kind of delta in a folder: exact, sum or lora."""
    if matches(folder):
        return "lora"
    if not (folder / NAME).is_file():
        raise UserError(
            f"{folder} is not a delta: it has neither {NAME} nor adapter_config.json",
            "If it is a checkpoint that contains differences, add --sum.",
        )
    about = read_json(folder / NAME)
    if about.get("version") != VERSION or about.get("kind") not in ("exact", "sum"):
        raise UserError(
            f"{folder / NAME} has version {about.get('version')!r} and kind {about.get('kind')!r}",
            f"This version of camelid supports version {VERSION} of exact and sum.",
        )
    return about["kind"]


def _write(
    destination: Path,
    files: list[PlannedFile],
    tuned: Checkpoint,
    overwrite: bool,
    progress: Progress,
    then: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a folder with the companion files of `tuned`; `then` adds files that depend on the written tensors."""
    names = {file.name: None for file in files} | {file.name: file for file in tuned.companions}
    with new_folder(destination, sum(file.size for file in files), overwrite, expected=names) as folder:
        write_files(folder, files, progress=progress)
        copy_companions(tuned.companions, folder)
        then(folder)


def _check_same(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raises UserError if the two have different parameters, or parameters of different shapes."""
    ours, theirs = base.table.entries, tuned.table.entries
    advice = "Use the kind exact, which supports this."
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise UserError(f"only one of {base.folder} and {tuned.folder} has {odd[0]}", advice)
    for path, part in ours.items():
        if part.spec.shape != theirs[path].spec.shape:
            raise UserError(
                f"{path} is {part.spec.shape} in {base.folder} and {theirs[path].spec.shape} in {tuned.folder}", advice
            )


def _combined(base: Checkpoint, other: Checkpoint, combine: np.ufunc) -> SliceReader:
    """Returns a reader of combine(other, base), computed in float32 and rounded once."""
    readers, float32 = (other.read_slice, base.read_slice), np.dtype(np.float32)

    def read_slice(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        return rounded(path, combine(*(reader(path, layer, index, float32) for reader in readers)), dtype)

    return read_slice


def _make_exact(
    base: Checkpoint, tuned: Checkpoint, destination: Path, overwrite: bool, progress: Progress
) -> DeltaReport:
    files, about = plan_exact(base, tuned)
    # The checksums in delta.json are known once the tensors are written.
    _write(destination, files, tuned, overwrite, progress, lambda folder: write_hf_json(folder / NAME, about))
    new = [name for name, entry in about["tensors"].items() if entry["base"] is None]
    return DeltaReport(
        notes=(f"stored entirely, because the base has no such tensor: {', '.join(new)}",) if new else ()
    )


def _make_sum(
    base: Checkpoint, tuned: Checkpoint, destination: Path, overwrite: bool, progress: Progress
) -> DeltaReport:
    export = ExportSpec(tuned.config, tuned.dtypes, _combined(base, tuned, np.subtract))
    files = [*plan_files(export, "hf"), json_file(NAME, {"kind": "sum", "version": VERSION})]
    _write(destination, files, tuned, overwrite, progress)
    return DeltaReport(notes=("a sum restores the tuned model up to rounding; the kind exact restores it bit for bit",))
