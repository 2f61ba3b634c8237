"""Creates deltas between two checkpoints of any formats, and applies them to a base.

    exact   delta.json, delta.safetensors: bits of tuned - bits of base, as unsigned integers modulo their size
    sum     delta.json with an ordinary checkpoint of tuned - base, like EasyLM's and other published deltas
    lora    a PEFT adapter: a truncated singular value decomposition of the difference of each matrix

An exact delta contains checksums of its base. Its tensors are the layers of each parameter, named by camelid's paths.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.adapters.peft import (
    Adapter,
    Computed,
    Pair,
    ParameterKey,
    adapter_files,
    matches,
    on_base,
    open_adapter,
    plain_table,
)
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec, companions_in, copy_companions
from camelid.checkpoint.compare import config_differences
from camelid.checkpoint.containers.safetensors import open_safetensors, safetensors_file
from camelid.checkpoint.files import PlannedFile, TensorPayload, json_file, raw_payload, write_files
from camelid.checkpoint.folder import new_folder
from camelid.checkpoint.formats import hf
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.layout import Index, SliceReader, chunk_indices
from camelid.checkpoint.registry import open_checkpoint, plan_files, write_checkpoint
from camelid.checkpoint.replacing import refuse_sources
from camelid.checkpoint.tensors import PlannedTensor, Tensor, dtype_named, rounded
from camelid.disk.json_files import read_json, write_hf_json
from camelid.errors import UserError
from camelid.inputs import expand_home
from camelid.model.config import ModelConfig

KINDS = ("exact", "sum", "lora")
NAME, TENSORS = "delta.json", "delta.safetensors"
VERSION = 1
AGAIN = "Download or copy the delta again, or create it again."
FLOAT32 = np.dtype(np.float32)
UNSAID = {"bos_id", "eos_ids", "pad_id", "init_std"}
"""fields that an adapter does not contain, in which the base may differ from the tuned model"""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Made:
    """The result of `make`."""

    left: float | None = None
    """of an adapter: Frobenius norm of the residual, relative to that of the difference"""
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
) -> Made:
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
    adapter, made = _lora(one, other, rank, progress)
    adapter = replace(adapter, base=_name_of(base) if one.format == "hf" else None)
    # config.json describes the tuned model, and lets --overwrite recognize the folder as a checkpoint.
    about = json_file("config.json", config_to_hf(adapter.config, other.dtypes["embed"].name))
    _write(Path(destination), [*adapter_files(adapter), about], other, overwrite, lambda done, total: None)
    return made


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
        exact = _open_exact(folder, one)
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
    said = read_json(folder / NAME)
    if said.get("version") != VERSION or said.get("kind") not in ("exact", "sum"):
        raise UserError(
            f"{folder / NAME} has version {said.get('version')!r} and kind {said.get('kind')!r}",
            f"This version of camelid supports version {VERSION} of exact and sum.",
        )
    return said["kind"]


def _name_of(base: str | Path) -> str:
    """Returns the name of the base in an adapter: an absolute path, or a name on the Hub."""
    path = Path(expand_home(str(base).removeprefix("hf::")))
    return str(path.resolve()) if path.exists() else str(base).removeprefix("hf::")


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


def _bits(dtype: np.dtype) -> np.dtype:
    """Returns the unsigned integer dtype of the same width."""
    return np.dtype(f"u{dtype.itemsize}")


# Exact ----------------------------------------------------------------------------------


def _make_exact(base: Checkpoint, tuned: Checkpoint, destination: Path, overwrite: bool, progress: Progress) -> Made:
    rows, before, sources = plain_table(tuned.config), plain_table(base.config), (base.read_slice, tuned.read_slice)
    entries: dict[str, dict[str, Any]] = {}
    payloads = []
    for name, [(part, layer)] in rows.tensors.items():
        shared = name in before.tensors and before.shape(name) == rows.shape(name)
        dtype = tuned.dtypes[part.rule.path]
        dtypes = [base.dtypes[part.rule.path].name if shared else None, dtype.name]
        entries[name] = entry = {"dtypes": dtypes, "base": None, "tuned": None}
        place, planned = (part.rule.path, layer), PlannedTensor(name, rows.shape(name), _bits(dtype))
        payloads.append(_difference(planned, place, dtype, sources if shared else sources[1:], entry))
    config = json_file("config.json", config_to_hf(tuned.config, tuned.dtypes["embed"].name))
    about = {"kind": "exact", "version": VERSION, "tensors": entries}  # whose checksums come with the writing
    files = [safetensors_file(TENSORS, payloads), config]
    _write(destination, files, tuned, overwrite, progress, lambda folder: write_hf_json(folder / NAME, about))
    whole = [name for name, entry in entries.items() if entry["base"] is None]
    return Made(notes=(f"stored entirely, because the base has no such tensor: {', '.join(whole)}",) if whole else ())


def _difference(
    tensor: PlannedTensor, place: ParameterKey, dtype: np.dtype, sources: tuple[SliceReader, ...], entry: dict[str, Any]
) -> TensorPayload:
    """Plans the bits of the last source minus those of the first, and stores checksums of both in `entry`."""

    def chunks() -> Iterator[np.ndarray]:
        sums = [hashlib.sha256() for _ in sources]
        for index in chunk_indices(tensor.shape):
            values = [np.ascontiguousarray(source(*place, index, dtype)).view(tensor.dtype) for source in sources]
            for digest, value in zip(sums, values, strict=True):
                digest.update(value.reshape(-1).data)
            yield values[-1] - values[0] if len(values) == 2 else values[0]
        entry["tuned"] = sums[-1].hexdigest()
        entry["base"] = sums[0].hexdigest() if len(sums) == 2 else None

    return raw_payload(tensor, chunks)


@dataclass(frozen=True)
class Exact:
    """An exact delta applied to a base."""

    folder: Path
    base: Checkpoint
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    """the differences, by the names of plain_table"""
    entries: Mapping[str, Mapping[str, Any]]
    """by the same names: dtypes of base and tuned, and checksums of their values; None without such a base tensor"""

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        parts = plain_table(self.config).entries
        return {path: self._dtype(part.name(part.layers()[0])) for path, part in parts.items()}

    def _dtype(self, name: str) -> np.dtype:
        return dtype_named(self.entries[name]["dtypes"][1])

    def read_slice(self, path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        """Returns values of the tuned checkpoint, which are exact, cast to `dtype`."""
        name = path if layer is None else f"{path}.{layer}"
        return rounded(name, self._values(name, (path, layer), index, self.base.read_slice)[-1], dtype)

    def _values(self, name: str, place: ParameterKey, index: Index, source: SliceReader) -> list[np.ndarray]:
        """Returns a slice of the base, if the delta requires it, and the same slice of the tuned checkpoint."""
        dtype, bits = self._dtype(name), self.tensors[name].dtype
        stored = self.tensors[name].read(index, bits)
        if self.entries[name]["base"] is None:
            return [stored.view(dtype)]
        before = np.ascontiguousarray(source(*place, index, dtype))
        return [before, (stored + before.view(bits)).view(dtype)]

    def check(self, progress: Progress) -> int:
        """Verifies all checksums and returns the bytes read; raises UserError for another base or a damaged delta."""
        source, done = self.base.read_slice, 0
        total = 2 * sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())
        for name, [(part, layer)] in plain_table(self.config).tensors.items():
            sums = {"base": hashlib.sha256(), "tuned": hashlib.sha256()}
            for index in chunk_indices(self.tensors[name].shape):
                values = self._values(name, (part.rule.path, layer), index, source)
                for digest, value in zip(list(sums.values())[-len(values) :], values, strict=True):
                    digest.update(value.view(self.tensors[name].dtype).reshape(-1).data)
                done += values[-1].nbytes
                progress(done, total)
            for which, digest in sums.items():
                if self.entries[name][which] not in (None, digest.hexdigest()):
                    if which == "base":
                        raise UserError(
                            f"{name} of {self.base.folder} differs from the base of {self.folder}",
                            "Give the base from which the delta was created.",
                        )
                    raise UserError(f"{name} in {self.folder / TENSORS} is damaged", AGAIN)
        return done


def _open_exact(folder: Path, base: Checkpoint) -> Exact:
    for name in (TENSORS, "config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}", AGAIN)
    config, entries = read_model_config(folder), read_json(folder / NAME).get("tensors")
    rows, before = plain_table(config), plain_table(base.config)
    tensors = open_safetensors(folder / TENSORS)
    if not isinstance(entries, dict) or not rows.tensors.keys() == entries.keys() == tensors.keys():
        raise UserError(f"{NAME}, {TENSORS} and config.json in {folder} describe different models", AGAIN)
    for name in rows.tensors:
        match entries[name]:
            case {"dtypes": [None | str(), str(dtype)], "base": None | str() as base_sum, "tuned": str()}:
                bits = _bits(dtype_named(dtype))
            case _:
                raise UserError(f"the entry of {name} in {folder / NAME} is not valid", AGAIN)
        if (tensors[name].shape, tensors[name].dtype) != (rows.shape(name), bits):
            raise UserError(f"{name} in {folder / TENSORS} is {tensors[name].shape} {tensors[name].dtype}", AGAIN)
        if base_sum is not None and (name not in before.tensors or before.shape(name) != rows.shape(name)):
            raise UserError(
                f"{base.folder} has no {name} of shape {rows.shape(name)}, and {folder} was made from one",
                "Give the base of the delta.",
            )
    return Exact(folder, base, config, tensors, entries)


# Sum ------------------------------------------------------------------------------------


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
    sources = other.read_slice, base.read_slice

    def source(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        return rounded(path, combine(*(source(path, layer, index, FLOAT32) for source in sources)), dtype)

    return source


def _make_sum(base: Checkpoint, tuned: Checkpoint, destination: Path, overwrite: bool, progress: Progress) -> Made:
    export = ExportSpec(tuned.config, tuned.dtypes, _combined(base, tuned, np.subtract))
    files = [*plan_files(export, "hf"), json_file(NAME, {"kind": "sum", "version": VERSION})]
    _write(destination, files, tuned, overwrite, progress)
    return Made(notes=("a sum restores the tuned model up to rounding; the kind exact restores it bit for bit",))


# An adapter -----------------------------------------------------------------------------


def _lora(base: Checkpoint, tuned: Checkpoint, rank: int, progress: Progress) -> tuple[Adapter, Made]:
    """Returns the best low-rank approximation of each difference; norms and a tied table are saved entirely."""
    if odd := sorted(config_differences(base.config, tuned.config).keys() - UNSAID):
        raise UserError(f"the two differ in {', '.join(odd)}, which an adapter cannot express", "Use the kind exact.")
    pairs: dict[ParameterKey, Pair] = {}
    saved: dict[ParameterKey, Tensor] = {}
    alone, change_of, lost = _alone(tuned.config), _combined(base, tuned, np.subtract), []
    tensors = plain_table(tuned.config).tensors
    total = left = 0.0
    for done, (name, [(part, layer)]) in enumerate(tensors.items(), start=1):
        place, spec = (part.rule.path, layer), part.spec
        shape = spec.shape[len(spec.stacked) :]
        change = change_of(*place, tuple(slice(0, n) for n in shape), FLOAT32)
        size = _square(change)
        if not math.isfinite(size):
            raise UserError(f"{name} has infinite or NaN values", "Use the kind exact.")
        total += size
        if size > 0 and place == ("embed", None) and tuned.config.tie_embeddings:
            # When PEFT merges a pair of factors of the tied table, it changes the head too.
            saved[place] = saved["lm_head", None] = _of(tuned, place, shape)
        elif size > 0 and spec.is_matrix:
            pairs[place] = pair = _nearest(change.reshape(math.prod(shape[: len(spec.outputs)]), -1), rank)
            left += _square(change - (pair.b @ pair.a).reshape(shape))
        elif size > 0 and place in alone:
            saved |= {other: _of(tuned, other, shape) for other in alone[place]}
        elif size > 0:
            left += size
            lost.append(name)
        progress(done, len(tensors))
    if not pairs:
        raise UserError(f"all matrices of {base.folder} and {tuned.folder} are equal", "There is nothing to adapt.")
    config = replace(base.config, tie_embeddings=base.config.tie_embeddings and ("embed", None) not in saved)
    notes = (f"an adapter cannot express the difference of {', '.join(lost)}",) if lost else ()
    return Adapter(config, pairs, saved), Made(math.sqrt(left / total), notes)


def _alone(config: ModelConfig) -> dict[ParameterKey, list[ParameterKey]]:
    """Maps each parameter of a module without matrices, such as a norm, to all parameters of that module."""
    rows = hf.table_of(config)
    modules: dict[str, list[str]] = {}
    for name in rows.tensors:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    places = {name: [(part.rule.path, layer) for part, layer in members] for name, members in rows.tensors.items()}
    alone = [names for names in modules.values() if all(len(rows.shape(name)) == 1 for name in names)]
    return {place: [p for name in names for p in places[name]] for names in alone for n in names for place in places[n]}


def _of(checkpoint: Checkpoint, place: ParameterKey, shape: tuple[int, ...]) -> Tensor:
    """Returns a parameter of a checkpoint as a tensor that is read on demand."""
    dtype = checkpoint.dtypes[place[0]]
    return Computed(checkpoint.folder, place[0], 0, shape, dtype, checkpoint.read_slice, place)


def _nearest(change: np.ndarray, rank: int) -> Pair:
    """Returns the best approximation of a matrix by this rank in the Frobenius norm (Eckart-Young), with scale 1."""
    wide = change if change.shape[0] <= change.shape[1] else change.T
    gram = np.zeros((len(wide), len(wide)))
    for start in range(0, wide.shape[1], 1024):
        part = wide[:, start : start + 1024].astype(np.float64)
        gram += part @ part.T
    # The eigenvectors of the Gram matrix are the singular vectors, and are much faster to compute than an SVD; float64
    # compensates for the squared condition number.
    u = np.linalg.eigh(gram).eigenvectors[:, ::-1][:, :rank].astype(np.float32)
    rest = u.T @ wide
    root = np.sqrt(np.linalg.norm(rest, axis=1))
    b, a = u * root, rest / np.where(root > 0, root, 1)[:, None]
    return Pair(a, b, float(len(a))) if wide is change else Pair(b.T, a.T, float(len(a)))


def _square(x: np.ndarray) -> float:
    """Returns the sum of squares, computed in float64."""
    return float(np.einsum("i,i->", x.reshape(-1), x.reshape(-1), dtype=np.float64))
