"""Recipe fields that were renamed: refused in a new recipe, and moved in one that an older run has kept."""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "train.embedding_dropout": "dropout.embedding",
    "train.attention_dropout": "dropout.attention",
    "train.residual_dropout": "dropout.residual",
}


def renamed_advice(field: str) -> str | None:
    """Advice that names the present field, for a field that was renamed; None for any other."""
    new = RENAMED.get(field)
    return None if new is None else f"Did you mean {new!r}? The field was renamed."


def with_new_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a recipe, in which fields with old names have the new ones."""
    moved = {name: dict(value) if isinstance(value, Mapping) else value for name, value in table.items()}
    for old, new in RENAMED.items():
        (old_table, old_field), (new_table, new_field) = old.split("."), new.split(".")
        if old_field in moved.get(old_table, {}):
            moved.setdefault(new_table, {})[new_field] = moved[old_table].pop(old_field)
    return moved
