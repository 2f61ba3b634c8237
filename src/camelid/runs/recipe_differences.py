"""How two recipes differ, as a message lists it: causes first, with values as they are written in TOML."""

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

CAUSES = ("optimizer.name", "optimizer.schedule")
"""fields that decide the defaults of others; they are listed before those, and after init, model and entire tables"""


def recipe_differences(before: str, now: str) -> dict[str, str]:
    """Describes how two recipes in TOML differ, by field: its values "there", in `before`, and "here", in `now`.

    A table that only one of them has is one difference, and so is a list. Causes come before consequences.
    """
    return table_differences(tomllib.loads(before), tomllib.loads(now))


def table_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """As `recipe_differences`, of two tables with the fields that are to be compared."""
    return {name: text for _, name, text in sorted(_differences(before, now, ""))}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[tuple[int, str, str]]:
    """Yields the rank in the list, the name, and the description of each difference."""
    for key in before.keys() | now.keys():
        name, there, here = f"{prefix}{key}", before.get(key), now.get(key)
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{name}.")
        elif _are_tables(there) and _are_tables(here) and len(there) == len(here):
            for number, (item, other) in enumerate(zip(there, here, strict=True)):
                yield from _differences(item, other, f"{name}[{number}].")
        elif isinstance(there, dict) and here is None:
            yield _rank(name, True), name, f"[{name}] there, no [{name}] here"
        elif isinstance(here, dict) and there is None:
            yield _rank(name, True), name, f"no [{name}] there, [{name}] here"
        else:
            yield _rank(name, False), name, f"{name} = {in_toml(there)} there, {in_toml(here)} here"


def _rank(name: str, is_table: bool) -> int:
    if name.partition(".")[0] in ("init", "model"):
        return 0
    if is_table:
        return 1
    return 2 + (CAUSES.index(name) if name in CAUSES else len(CAUSES))


def _are_tables(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def in_toml(value: Any) -> str:
    """A value in one line of TOML, and "nothing" for a field that is not there."""
    import tomli_w

    if value is None:
        return "nothing"
    if isinstance(value, list):
        return f"[{', '.join(map(in_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {in_toml(item)}' for key, item in value.items())} }}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")
