"""Exact deltas: the bits of a tuned checkpoint minus those of its base.

    delta.json           kind and version, dtypes of both, and checksums of the values of both
    delta.safetensors    bits of tuned - bits of base, as unsigned integers modulo their size

The tensors are the layers of each parameter, named by camelid's paths.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.adapters.lora import ParameterKey, plain_table
from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.containers.safetensors import open_safetensors, safetensors_file
from camelid.checkpoint.files import PlannedFile, TensorPayload, json_file, raw_payload
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.layout import Index, SliceReader, chunk_indices
from camelid.checkpoint.tensors import PlannedTensor, Tensor, dtype_named, rounded
from camelid.disk.json_files import read_json
from camelid.errors import UserError
from camelid.model.config import ModelConfig

NAME, TENSORS = "delta.json", "delta.safetensors"
VERSION = 1
AGAIN = "Download or copy the delta again, or create it again."


def plan_exact(base: Checkpoint, tuned: Checkpoint) -> tuple[list[PlannedFile], dict[str, Any]]:
    """Returns the files of an exact delta, and the content of delta.json, which is complete once they are written."""
    rows, base_rows = plain_table(tuned.config), plain_table(base.config)
    readers = base.read_slice, tuned.read_slice
    entries: dict[str, dict[str, Any]] = {}
    payloads = []
    for name, [(part, layer)] in rows.tensors.items():
        shared = name in base_rows.tensors and base_rows.shape(name) == rows.shape(name)
        dtype = tuned.dtypes[part.rule.path]
        dtypes = [base.dtypes[part.rule.path].name if shared else None, dtype.name]
        entries[name] = entry = {"dtypes": dtypes, "base": None, "tuned": None}
        parameter, planned = (part.rule.path, layer), PlannedTensor(name, rows.shape(name), _bits(dtype))
        payloads.append(_difference(planned, parameter, dtype, readers if shared else readers[1:], entry))
    config = json_file("config.json", config_to_hf(tuned.config, tuned.dtypes["embed"].name))
    return [safetensors_file(TENSORS, payloads), config], {"kind": "exact", "version": VERSION, "tensors": entries}


def _difference(
    tensor: PlannedTensor,
    parameter: ParameterKey,
    dtype: np.dtype,
    readers: tuple[SliceReader, ...],
    entry: dict[str, Any],
) -> TensorPayload:
    """Plans the bits that the last reader returns minus those of the first, and stores checksums of both in `entry`."""

    def chunks() -> Iterator[np.ndarray]:
        sums = [hashlib.sha256() for _ in readers]
        for index in chunk_indices(tensor.shape):
            values = [np.ascontiguousarray(reader(*parameter, index, dtype)).view(tensor.dtype) for reader in readers]
            for digest, value in zip(sums, values, strict=True):
                digest.update(value.reshape(-1).data)
            yield values[-1] - values[0] if len(values) == 2 else values[0]
        entry["tuned"] = sums[-1].hexdigest()
        entry["base"] = sums[0].hexdigest() if len(sums) == 2 else None

    return raw_payload(tensor, chunks)


@dataclass(frozen=True)
class ExactDelta:
    """An exact delta applied to a base."""

    folder: Path
    base: Checkpoint
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    """the differences, by the names of plain_table"""
    entries: Mapping[str, Mapping[str, Any]]
    """by the same names: dtypes of base and tuned, and checksums of their values; None if the base lacks the tensor"""

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        parts = plain_table(self.config).entries
        return {path: self._dtype(part.name(part.layers()[0])) for path, part in parts.items()}

    def _dtype(self, name: str) -> np.dtype:
        return dtype_named(self.entries[name]["dtypes"][1])

    def read_slice(self, path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        """Returns the exact values of the tuned checkpoint, cast to `dtype`."""
        name = path if layer is None else f"{path}.{layer}"
        return rounded(name, self._values(name, (path, layer), index, self.base.read_slice)[-1], dtype)

    def _values(self, name: str, parameter: ParameterKey, index: Index, read_base: SliceReader) -> list[np.ndarray]:
        """Returns a slice of the base, if the delta requires it, and the same slice of the tuned checkpoint."""
        dtype, bits = self._dtype(name), self.tensors[name].dtype
        stored = self.tensors[name].read(index, bits)
        if self.entries[name]["base"] is None:
            return [stored.view(dtype)]
        base = np.ascontiguousarray(read_base(*parameter, index, dtype))
        return [base, (stored + base.view(bits)).view(dtype)]

    def check(self, progress: Callable[[int, int], None]) -> int:
        """Verifies all checksums and returns the bytes read; raises UserError for another base or a damaged delta."""
        read_base, done = self.base.read_slice, 0
        total = 2 * sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())
        for name, [(part, layer)] in plain_table(self.config).tensors.items():
            sums = {"base": hashlib.sha256(), "tuned": hashlib.sha256()}
            for index in chunk_indices(self.tensors[name].shape):
                values = self._values(name, (part.rule.path, layer), index, read_base)
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


def open_exact(folder: Path, base: Checkpoint) -> ExactDelta:
    """Opens an exact delta for a base; raises UserError if its files are damaged or need another base."""
    for name in (TENSORS, "config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}", AGAIN)
    config, entries = read_model_config(folder), read_json(folder / NAME).get("tensors")
    rows, base_rows = plain_table(config), plain_table(base.config)
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
        if base_sum is not None and (name not in base_rows.tensors or base_rows.shape(name) != rows.shape(name)):
            raise UserError(
                f"{base.folder} has no {name} of shape {rows.shape(name)}, and {folder} was created from one",
                "Give the base from which the delta was created.",
            )
    return ExactDelta(folder, base, config, tensors, entries)


def _bits(dtype: np.dtype) -> np.dtype:
    """Returns the unsigned integer dtype of the same width."""
    return np.dtype(f"u{dtype.itemsize}")
