"""Reads and writes safetensors files.

The format (huggingface/safetensors, README "Format"): the length N of the header (8 bytes), N bytes of JSON with each
tensor's dtype, shape and byte range, and the bytes of all tensors without gaps.
"""

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from camelid.checkpoint.files import PlannedFile, TensorPayload
from camelid.checkpoint.tensors import DTYPES, Tensor
from camelid.errors import UserError
from camelid.inputs import refuse_stand_in

HELD = {**DTYPES, "U16": np.dtype(np.uint16), "U32": np.dtype(np.uint32)}  # for the bits of exact deltas
MAX_HEADER = 100 * 2**20  # bytes; the reference implementation refuses longer ones


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Opens the tensors of a file by name; raises UserError if it is truncated, damaged or of another format."""
    refuse_stand_in(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UserError(f"{path} is not a safetensors file, or is cut short", "Download or copy the file again.")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} has an unreadable header ({error})", "Download or copy the file again.") from error
    try:
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for first, last in sorted(entry["data_offsets"] for entry in header.values()):
            if 8 + length + first != end:
                raise ValueError("gaps, or overlapping tensors")
            end += last - first
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a header of another format", "Download or copy the file again.") from error
    if end != size:
        raise UserError(
            f"{path} is cut short: its header describes {end:,} bytes and it has {size:,}"
            if size < end
            else f"{path} has {size - end:,} bytes after its last tensor",
            "Download or copy the file again.",
        )
    return tensors


def _tensor(path: Path, name: str, entry: dict, start: int) -> Tensor:
    if entry["dtype"] not in HELD:
        raise UserError(
            f"tensor {name} in {path} is {entry['dtype']}; camelid reads {', '.join(DTYPES)}",
            "Save the checkpoint in one of these dtypes first.",
        )
    dtype, shape = HELD[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise UserError(f"tensor {name} in {path} has {last - first} bytes for {shape} {dtype}", "The file is damaged.")
    return Tensor(path, name, start + first, shape, dtype)


def safetensors_file(name: str, payloads: Sequence[TensorPayload], framework: str = "pt") -> PlannedFile:
    """Plans a file with these tensors, in this order; `framework` is the value of "format" in its metadata."""
    codes = {dtype: code for code, dtype in HELD.items()}
    header: dict[str, dict] = {"__metadata__": {"format": framework}}
    offset = 0
    for payload in payloads:
        tensor = payload.tensor
        header[tensor.name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return PlannedFile(name, [struct.pack("<Q", len(text)) + text, *payloads])
