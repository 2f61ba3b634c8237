"""Writes a format's files into a folder, as checkpoint/registry.py does, for tests of one format."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.checkpoint import Saving
from camelid.checkpoint.files import File, Segment, json_file, segment, write_files
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.tensors import Planned


def put(folder: Path, files: Callable[..., list[File]], saving: Saving, *args: Any, **how: Any) -> None:
    """What `files(saving, *args, **how)` plans, config.json, and the companions."""
    planned = files(saving, *args, **how)
    config = json_file("config.json", config_to_hf(saving.config, saving.dtypes["embed"].name))
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, [*planned, config])
    for file in saving.companions:
        shutil.copyfile(file, folder / file.name)


def in_pieces(tensor: Planned, numbers: np.ndarray, step: int) -> Segment:
    """A segment of a flat array, a few numbers at a time."""

    def chunks() -> Iterator[np.ndarray]:
        return (numbers[i : i + step] for i in range(0, len(numbers), step))

    return segment(tensor, chunks)
