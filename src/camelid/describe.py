"""What `camelid inspect` tells: a report as plain values, and how it looks in a terminal. No array is allocated."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from camelid.inputs import expand_home
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.flops import (
    LLAMA_FORMULA,
    cache_bytes,
    count_parameters,
    forward_flops,
    llama_formula,
    training_flops,
)
from camelid.model.params import Spec, named
from camelid.model.presets import ALIASES, PRESETS, preset
from camelid.tables import console as _console
from camelid.tables import grid as _grid

ITEMSIZE = {"float32": 4, "bfloat16": 2}


def report(model: str, config: ModelConfig | None = None, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """What a preset is, or what a checkpoint holds: its folder, or its name on the Hub.

    `config` describes a model whose files do not; the fields in `ignore` are as if config.json did not have them.
    """
    if "/" not in model and not Path(expand_home(model)).exists():
        return {"preset": ALIASES.get(model, model)} | of_config(_preset(model))
    checkpoint = open_checkpoint(model, config=config, ignore=ignore)
    whole = of_config(checkpoint.config)
    for path, dtype in checkpoint.dtypes.items():
        entry = whole["tree"][path]
        entry |= {"dtype": dtype.name, "bytes": entry["parameters"] * dtype.itemsize}
    total = sum(entry["bytes"] for entry in whole["tree"].values())
    return {"notes": list(checkpoint.notes), "bytes": total} | whole


def of_config(config: ModelConfig) -> dict[str, Any]:
    """All that follows from the config alone."""
    specs: dict[str, Spec] = named(declare_decoder(config))
    tree = {
        path: {"axes": list(spec.axes), "shape": list(spec.shape), "parameters": spec.size}
        for path, spec in specs.items()
    }
    parameters, length = sum(spec.size for spec in specs.values()), config.context_length
    formula = llama_formula(config)
    return {
        "parameters": parameters,
        "formula": None if formula is None else {"text": LLAMA_FORMULA, "parameters": formula},
        "bytes_in": {dtype: parameters * size for dtype, size in ITEMSIZE.items()},
        "cache_bytes_per_token": {dtype: cache_bytes(config, dtype) for dtype in ITEMSIZE},
        "cache_bytes": {dtype: cache_bytes(config, dtype) * length for dtype in ITEMSIZE},
        "flops_per_token": {
            "length": length,
            "forward": forward_flops(config, length),
            "training": training_flops(config, length),
        },
        "config": dataclasses.asdict(config),
        "tree": tree,
    }


def presets() -> dict[str, Any]:
    """Every preset: its sizes and its other names."""
    return {
        name: {
            "family": config.family,
            "parameters": count_parameters(config),
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            "aliases": [alias for alias, known in ALIASES.items() if known == name],
        }
        for name, config in PRESETS.items()
    }


def _preset(name: str) -> ModelConfig:
    try:
        return preset(name)
    except UserError as error:
        raise UserError(f"{name} does not exist, and {error.problem}", error.advice) from None


# In a terminal --------------------------------------------------------------------------------


def show(whole: Mapping[str, Any]) -> None:
    """A report for people: what differs from Llama's defaults, the parameters, and what they cost."""
    console = _console()
    if "preset" in whole:
        console.print(f"{whole['preset']}\n", style="bold")
    for part in (_fields, _tree, _bytes, _flops):
        console.print(part(whole))
        console.print()
    if (formula := whole["formula"]) is not None:
        console.print(f"{formula['text']} = {formula['parameters']:,}")
    held = f", {whole['bytes']:,} bytes" if "bytes" in whole else ""
    console.print(f"{whole['parameters']:,} parameters{held}")


def show_presets(table: Mapping[str, Any]) -> None:
    """The presets for people."""
    console = _console()
    grid = _grid("preset", "family", ">parameters", ">context", ">vocabulary")
    for name, entry in table.items():
        grid.add_row(
            name, entry["family"], *_numbers(entry[key] for key in ("parameters", "context_length", "vocab_size"))
        )
    console.print(grid)
    console.print("\nOther systems' names work too: docs/migrating/index.md.")


def _numbers(values: Iterable[int | float]) -> list[str]:
    return [f"{value:,.0f}" for value in values]


def _fields(whole: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for field in dataclasses.fields(ModelConfig):
        value = whole["config"][field.name]
        if field.default is dataclasses.MISSING or value != field.default:
            grid.add_row(field.name, _value(value))
    return grid


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        given = {name: item for name, item in value.items() if item is not None and name != "kind"}
        return f"{value['kind']}: " + ", ".join(f"{name} {_value(item)}" for name, item in given.items())
    if isinstance(value, tuple):
        return " ".join(map(str, value)) if len(value) <= 8 else f"({len(value)} numbers)"
    return str(value)


def _tree(whole: Mapping[str, Any]) -> Table:
    dtype = ["dtype"] if "bytes" in whole else []
    grid = _grid("parameter", "axes", "shape", *dtype, ">count")
    for path, entry in whole["tree"].items():
        shape, held = "x".join(map(str, entry["shape"])), [entry[name] for name in dtype]
        grid.add_row(path, " ".join(entry["axes"]), shape, *held, f"{entry['parameters']:,}")
    return grid


def _bytes(whole: Mapping[str, Any]) -> Table:
    grid = _grid("bytes", *(f">{dtype}" for dtype in ITEMSIZE))
    grid.add_row("parameters", *_numbers(whole["bytes_in"].values()))
    grid.add_row("cache, one token", *_numbers(whole["cache_bytes_per_token"].values()))
    grid.add_row(f"cache, {whole['config']['context_length']:,} tokens", *_numbers(whole["cache_bytes"].values()))
    return grid


def _flops(whole: Mapping[str, Any]) -> Table:
    flops = whole["flops_per_token"]
    grid = _grid("FLOPs", ">forward", ">training")
    grid.add_row(f"a token, in rows of {flops['length']:,}", *_numbers((flops["forward"], flops["training"])))
    return grid
