"""Where the configuration of a checkpoint comes from, and which formats can be written."""

import json
from pathlib import Path

from camelid.checkpoint.formats.config_source import CONFIG_JSON, GIVEN, find_config
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.registry import FORMATS, READABLE, WRITABLE
from tiny import tiny_config


def described(folder: Path, **changes: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_JSON).write_text(json.dumps(config_to_hf(tiny_config(**changes), "float32")))


def test_a_given_config_wins_and_the_first_folder_with_a_config_json_is_next(tmp_path: Path):
    outer, inner = tmp_path, tmp_path / "inner"
    inner.mkdir()
    assert find_config(None, inner, outer) is None
    described(outer, mlp_dim=40)
    assert find_config(None, inner, outer) == (tiny_config(mlp_dim=40), CONFIG_JSON)
    described(inner, mlp_dim=48)
    assert find_config(None, inner, outer) == (tiny_config(mlp_dim=48), CONFIG_JSON)
    (inner / CONFIG_JSON).write_text("not read, because a config is given")
    assert find_config(tiny_config(), inner, outer) == (tiny_config(), GIVEN)


def test_formats_that_are_only_read_are_not_offered_for_writing():
    assert set(FORMATS) - set(WRITABLE) == {"dcp", "run", "peft"}
    assert set(WRITABLE) < set(READABLE)
