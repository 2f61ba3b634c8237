"""Fields of a recipe that are given as Python objects."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camelid import recipes
from camelid.errors import UserError
from camelid.inputs import expand_home
from camelid.model.presets import ALIASES, PRESETS
from camelid.runs.recipe import Recipe, laid_over, read_table, write_recipe


def as_table(argument: str, given: object) -> dict[str, Any]:
    """The fields that an argument gives, as tables."""
    if given is None:
        return {}
    if isinstance(given, Recipe) and argument == "args":
        return tomllib.loads(write_recipe(given))
    if isinstance(given, str | Path) and argument == "args":
        return read_table(recipes.find(Path(expand_home(given))))
    if not isinstance(given, Mapping):
        raise UserError(
            f"{argument} = {given!r:.60} is not a dictionary",
            "Give a dictionary of fields, such as args={'train.steps': 100}; docs/recipes.md lists them.",
        )
    table: dict[str, Any] = {}
    for name, value in given.items():
        value = _plain(value)
        for word in reversed(str(name).split(".")):
            value = {word: value}
        table = laid_over(table, value)
    return table


def with_model(table: dict[str, Any], model: object, complete: bool) -> dict[str, Any]:
    """The table with a model that is given apart from it; of a `complete` recipe, it replaces the model."""
    if not isinstance(model, str | Path):
        raise UserError(f"model = {model!r:.60} is no model", "Give a preset, the path of a checkpoint, or a Model.")
    name = str(model)
    if complete:
        table = {field: value for field, value in table.items() if field not in ("init", "init_ignore", "model")}
    if table.get("init", name) != name:
        raise UserError(f"model = {name!r}, and args has init = {table['init']!r}", "Leave out one of them.")
    if name not in (*PRESETS, *ALIASES) or Path(name).exists():
        return {**table, "init": name}
    return laid_over({"model": {"preset": name}}, table)


def without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table without fields that are None, also in the tables in it."""
    present = {name: value for name, value in table.items() if value is not None}
    return {name: without_none(value) if isinstance(value, Mapping) else value for name, value in present.items()}


def _plain(value: Any) -> Any:
    """A value as TOML has it."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
