"""The defaults that follow from other fields of a recipe, as comments where the recipe is printed."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from camelid.runs.recipe import Recipe
from camelid.runs.recipe_differences import in_toml

HEADER = re.compile(r"\[+([\w.]+)\]+")
ABOUT = "# Lines that begin with # are defaults that follow from other fields."


def with_defaults(text: str, table: Mapping[str, Any], recipe: Recipe) -> str:
    """`text`, the TOML of `table`, with a comment for each default that follows from other fields.

    `recipe` is the recipe of the table. Its sections get the comments at their ends.
    """
    comments: dict[str, list[str]] = {}
    for name, value, reason in _defaults(recipe):
        section, _, field = name.rpartition(".")
        there = table.get(section, {}) if section else table
        if field not in there and (not section or section in table):
            shown = in_toml(list(value) if isinstance(value, tuple) else value)
            comments.setdefault(section, []).append(f"# {field} = {shown}  # {reason}")
    if not comments:
        return text
    lines, section = [ABOUT], ""
    for line in text.splitlines():
        if header := HEADER.fullmatch(line):
            _add(lines, comments.pop(section, []))
            section = header[1]
        lines.append(line)
    _add(lines, comments.pop(section, []))
    return "\n".join(lines) + "\n"


def _add(lines: list[str], comments: list[str]) -> None:
    """Adds comments in front of the empty lines at the end."""
    end = len(lines)
    while end and not lines[end - 1]:
        end -= 1
    lines[end:end] = comments


def _defaults(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """Dotted name, value and reason of each field whose default is known from the others."""
    steps, optimizer = recipe.train.steps, recipe.optimizer
    if recipe.tokenizer is None:
        yield "tokenizer", recipe.init, "init"
    yield "data.packing", recipe.data.packing_method, "the kinds of the sources"
    for field in dataclasses.fields(optimizer):
        value = getattr(optimizer, field.name)
        if field.default is None and value is not None:
            yield f"optimizer.{field.name}", value, f"{optimizer.name}, {optimizer.schedule}"
    if optimizer.decay_steps is None and optimizer.has_end:
        yield "optimizer.decay_steps", steps, "train.steps"
    if optimizer.warmup_steps is None:
        yield "optimizer.warmup_steps", optimizer.warmup(steps), "warmup_ratio x decay_steps"
    if recipe.samples is not None and recipe.samples.every is None:
        every = recipe.train.evaluate_every
        yield "samples.every", every or steps, "train.steps" if every is None else "train.evaluate_every"
    if recipe.lora is not None:
        if recipe.lora.alpha is None:
            yield "lora.alpha", recipe.lora.usual_alpha, "2 x rank"
        if recipe.lora.base is None:
            yield "lora.base", recipe.compute.dtype, "compute.dtype"
