"""PyTorch files (`pytorch_model.bin`, Meta's `.pth`) as tensors by name.

Since torch 1.6 they are zip archives (torch_zip.py). Older ones (torch/serialization.py, _legacy_save) are pickles of
MAGIC, PROTOCOL, the system, the object and the keys of its storages, followed for each key by the number of elements
(8 bytes) and the storage.
"""

import io
import os
import re
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.containers.pickles import printable
from camelid.checkpoint.containers.torch_tensors import MAX_PICKLE, Storage, check_byte_order, load_pickle
from camelid.checkpoint.containers.torch_zip import FileSection, read_archive
from camelid.checkpoint.tensors import Tensor, files_holding, unverified_note
from camelid.errors import UserError
from camelid.inputs import refuse_stand_in

CRC_BYTES = 2**30  # checksums of files up to this size are verified when they are opened; larger ones take seconds
DISTRIBUTED = ".distcp"  # the files of dcp.py, each of many archives
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
AGAIN = "Download or copy the file again."
SAVE = "Save the weights alone, torch.save(model.state_dict(), path), or as safetensors."


def open_torch(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """Opens the tensors of a saved state dict by name.

    If the saved object is a dictionary with the single key `inside`, its value is the state dict. Raises UserError if
    the file is truncated, damaged, or holds anything else.
    """
    held = unpickle(path)
    if inside is not None and isinstance(held, dict) and list(held) == [inside] and isinstance(held[inside], dict):
        held = held[inside]
    if not isinstance(held, dict):
        raise UserError(f"{path} holds a {type(held).__name__} and not tensors by name", SAVE)
    odd = {k: type(v).__name__ for k, v in held.items() if not (isinstance(k, str) and isinstance(v, Tensor))}
    if odd:
        names = (printable(key) if isinstance(key, str) else "a number" for key in odd)
        some = ", ".join(f"{name} (a {kind})" for name, kind in [*zip(names, odd.values(), strict=True)][:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        advice = f"One of them may contain the weights. {SAVE}" if "dict" in odd.values() else SAVE
        raise UserError(f"{path} holds more than tensors by name: {some}{more}", advice)
    return {name: replace(tensor, name=name) for name, tensor in held.items()}


def unpickle(path: Path, inert: re.Pattern[str] | None = None) -> Any:
    """The object in a file: dictionaries, lists, tuples, plain values, and tensors named after their storages.

    Objects of globals that `inert` matches, as "module name", become OpaqueObjects; all others are refused (UserError).
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file", "Give the path of a file that torch.save wrote.")
    refuse_stand_in(path)
    try:
        with path.open("rb") as file:
            start = file.read(262)
            if start.startswith(b"PK\x03\x04"):
                size = os.fstat(file.fileno()).st_size
                return read_archive(path, FileSection(file, 0, size), inert, verify=size <= CRC_BYTES)
            if start.endswith(b"ustar"):
                raise UserError(f"{path} is a tar file, as the first versions of torch wrote", "Save it again.")
            return _unpickle_legacy(path, file, inert)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails anywhere in zipfile, in pickletools and below
        reason = f"{type(error).__name__}: {printable(error)}"
        raise UserError(f"{path} is damaged, or is not a PyTorch checkpoint ({reason})", AGAIN) from error


def open_embedded_tensor(path: Path, start: int, count: int, verify: bool) -> Tensor:
    """The tensor that torch.save wrote into `count` bytes of a file that holds several archives.

    With `verify`, all of it is read and its checksums are verified.
    """
    try:
        with path.open("rb") as file:
            held = read_archive(path, FileSection(file, start, count), None, verify)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails anywhere in zipfile, in pickletools and below
        raise UserError(f"{path} is damaged ({type(error).__name__}: {printable(error)})", AGAIN) from error
    if not isinstance(held, Tensor):
        raise UserError(f"{path} holds a {type(held).__name__} where a tensor is expected", AGAIN)
    return held


def unverified_note_for(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """The note on zip files that are too large for their checksums to be verified when opened."""
    sizes = {file: file.stat().st_size for file in files_holding(tensors)}
    # The files of a distributed checkpoint, one for each rank, count together.
    together = sum(size for file, size in sizes.items() if file.suffix == DISTRIBUTED)
    large = [file for file, size in sizes.items() if (together if file.suffix == DISTRIBUTED else size) > CRC_BYTES]
    large = [file for file in large if zipfile.is_zipfile(file)]
    return unverified_note(large, Path(os.path.commonpath([file.parent for file in large])) if large else Path())


def _unpickle_legacy(path: Path, file: io.BufferedReader, inert: re.Pattern[str] | None) -> Any:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    program = io.BytesIO(file.read(min(size, MAX_PICKLE)))
    storages: dict[str, Storage] = {}

    def noted(dtype: np.dtype, key: str, count: int) -> Storage:
        return storages.setdefault(key, Storage(path, key, 0, dtype, count))

    if (load_pickle(path, program, noted), load_pickle(path, program, noted)) != (MAGIC, PROTOCOL):
        raise ValueError("it has another magic number")
    check_byte_order(path, load_pickle(path, program, noted)["little_endian"] is True)
    # The object precedes its storages: the first run finds their sizes, and the second their offsets.
    body = program.tell()
    load_pickle(path, program, noted, inert)
    keys = load_pickle(path, program, noted)
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    end = program.tell()
    placed: dict[str, Storage] = {}
    for key in keys:
        storage = storages[key]
        file.seek(end)
        (count,) = struct.unpack("<q", file.read(8))
        placed[key] = replace(storage, start=end + 8)
        end += 8 + count * storage.dtype.itemsize
        if not count == storage.count >= 0 or end > size:
            raise ValueError(f"storage {key} should have {storage.count:,} elements and ends after {size:,} bytes")
    program.seek(body)
    return load_pickle(path, program, lambda dtype, key, count: placed[key], inert)
