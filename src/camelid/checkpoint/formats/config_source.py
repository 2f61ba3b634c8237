"""The configuration of a checkpoint: given by the caller, or read from a config.json in the checkpoint's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from camelid.checkpoint.formats.hf_config import config_from_hf
from camelid.checkpoint.formats.hf_ignored_fields import without
from camelid.disk.json_files import read_json
from camelid.model.config import ModelConfig

CONFIG_JSON = "config.json"
GIVEN = "the given config"


class ConfigSource(NamedTuple):
    """A model configuration and where it comes from."""

    config: ModelConfig
    described_by: str
    """CONFIG_JSON or GIVEN, for messages"""


def find_config(given: ModelConfig | None, *folders: Path) -> ConfigSource | None:
    """Returns `given`, otherwise the configuration in the first of `folders` that has a config.json, otherwise None.

    Raises UserError if that config.json cannot be read, or describes a model that camelid does not support.
    """
    if given is not None:
        return ConfigSource(given, GIVEN)
    folder = folder_with_config(*folders)
    return None if folder is None else ConfigSource(read_model_config(folder), CONFIG_JSON)


def folder_with_config(*folders: Path) -> Path | None:
    """The first of some folders that has a config.json, or None."""
    return next((folder for folder in folders if (folder / CONFIG_JSON).is_file()), None)


def read_model_config(folder: Path, ignore: Sequence[str] = ()) -> ModelConfig:
    """The model that a folder's config.json describes; the fields in `ignore` are treated as absent.

    Raises UserError if the file cannot be read, or has a field that is not supported.
    """
    return config_from_hf(read_config_json(folder, ignore)[0])


def read_config_json(folder: Path, ignore: Sequence[str] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A folder's config.json without the fields in `ignore`, and notes that name those that it has and lacks."""
    fields = read_json(folder / CONFIG_JSON)
    present = [name for name in ignore if without(fields, [name]) != fields]
    absent = [name for name in ignore if name not in present]
    notes = (f"config.json is read without {', '.join(present)}, as requested",) if present else ()
    notes += (f"config.json has no {', '.join(absent)} to ignore",) if absent else ()
    return without(fields, present), notes
