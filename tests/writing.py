"""Writes a format's files into a folder, as checkpoint/registry.py does, for tests of one format."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.checkpoint import ExportSpec
from camelid.checkpoint.files import PlannedFile, TensorPayload, json_file, raw_payload, write_files
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.tensors import PlannedTensor


def put(folder: Path, files: Callable[..., list[PlannedFile]], export: ExportSpec, *args: Any, **how: Any) -> None:
    """What `files(saving, *args, **how)` plans, config.json, and the companions."""
    planned = files(export, *args, **how)
    config = json_file("config.json", config_to_hf(export.config, export.dtypes["embed"].name))
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, [*planned, config])
    for file in export.companions:
        shutil.copyfile(file, folder / file.name)


def in_pieces(tensor: PlannedTensor, numbers: np.ndarray, step: int) -> TensorPayload:
    """A segment of a flat array, a few numbers at a time."""

    def chunks() -> Iterator[np.ndarray]:
        return (numbers[i : i + step] for i in range(0, len(numbers), step))

    return raw_payload(tensor, chunks)
