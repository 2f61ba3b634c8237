"""The reports of `camelid inspect`, as JSON-compatible values and as tables. No array is allocated."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from camelid import tables
from camelid.checkpoint.adapters.lora import AdaptedCheckpoint
from camelid.checkpoint.registry import open_checkpoint
from camelid.disk.space import format_bytes
from camelid.errors import UserError
from camelid.inputs import expand_home
from camelid.model.adapters import declare_adapters, freeze
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.flops import (
    LLAMA_FORMULA,
    LLAMA_LETTERS,
    cache_bytes,
    count_parameters,
    forward_flops,
    llama_formula,
    training_flops,
)
from camelid.model.params import Spec, named
from camelid.model.presets import ALIASES, PRESETS, preset
from camelid.model.quantize import held_shapes
from camelid.runs.lora_targets import plan_adapters
from camelid.train.lora_config import LoRAConfig

ITEMSIZE = {"float32": 4, "bfloat16": 2}
TRAINING = {"parameters": 4, "gradients": 4, "adamw_moments": 8}
"""Bytes per trained parameter that training keeps: all are float32, also if products are bfloat16."""
ADAPTER_BASES = {"lora": "bfloat16", "qlora": "nf4"}
"""The form of the frozen matrices, `lora.base`, of which the report gives the memory of training adapters."""
ADAPTER_NAMES = {"lora": "LoRA", "qlora": "QLoRA"}


def report(model: str, config: ModelConfig | None = None, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The report on a preset or a checkpoint, as `of_config` with what else is known.

    Args:
      model: The name of a preset, a checkpoint folder or file, or the name of a Hugging Face Hub repository. A path
        that exists takes precedence over a preset of that name.
      config: The architecture, for checkpoints that do not contain it.
      ignore: Fields of config.json to treat as absent.

    Returns:
      The report; for a preset also its name, for a checkpoint the notes of opening it, the total number of bytes of its
      parameters, and the dtype and bytes of each; for an adapter, which is merged into its base, also what it is.

    Raises:
      UserError: If there is no such preset or checkpoint, or the checkpoint cannot be opened.
    """
    if "/" not in model and not Path(expand_home(model)).exists():
        return {"preset": ALIASES.get(model, model)} | of_config(_preset(model))
    checkpoint = open_checkpoint(model, config=config, ignore=ignore)
    result = of_config(checkpoint.config)
    for path, dtype in checkpoint.dtypes.items():
        entry = result["tree"][path]
        entry |= {"dtype": dtype.name, "bytes": entry["parameters"] * dtype.itemsize}
    total = sum(entry["bytes"] for entry in result["tree"].values())
    adapter = {"adapter": _of_adapter(checkpoint)} if isinstance(checkpoint, AdaptedCheckpoint) else {}
    return {"notes": list(checkpoint.notes), "bytes": total} | adapter | result


def _of_adapter(checkpoint: AdaptedCheckpoint) -> dict[str, Any]:
    adapter = checkpoint.adapter
    arrays = [array for pair in adapter.pairs.values() for array in (pair.a, pair.b, pair.magnitude)]
    parameters = sum(array.size for array in arrays if array is not None)
    return {
        "kind": "DoRA" if adapter.dora else "LoRA",
        "ranks": sorted({pair.rank for pair in adapter.pairs.values()}),
        "alphas": sorted({pair.alpha for pair in adapter.pairs.values()}),
        "rank_stabilized": adapter.rslora,
        "parameters": parameters + sum(math.prod(tensor.shape) for tensor in adapter.saved.values()),
        "base": adapter.base or str(checkpoint.base.folder),
    }


def of_config(config: ModelConfig) -> dict[str, Any]:
    """The report that needs only the config: parameters, bytes, FLOPs per token, and the shape of every parameter."""
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
        "training_bytes": {name: parameters * size for name, size in TRAINING.items()},
        "adapter_training_bytes": _of_adapter_training(config),
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


def _of_adapter_training(config: ModelConfig) -> dict[str, dict[str, int]]:
    """What LoRA and QLoRA keep, with the defaults of [lora]; without those that a very small model cannot have."""
    found = {}
    for name, form in ADAPTER_BASES.items():
        with contextlib.suppress(UserError):
            plan = plan_adapters(LoRAConfig(), config)
            arrays = jax.tree.leaves(freeze(held_shapes(config, form), plan, config))
            frozen = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
            trained = sum(spec.size for spec in jax.tree.leaves(declare_adapters(plan, config)))
            found[name] = {"frozen_parameters": frozen} | {key: trained * size for key, size in TRAINING.items()}
    return found


def presets() -> dict[str, Any]:
    """The size and the aliases of every preset, by its name."""
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


# Tables --------------------------------------------------------------------------------


def show(report: Mapping[str, Any]) -> None:
    """Prints a report as tables: fields that differ from the defaults, parameters, bytes and FLOPs."""
    console = tables.console()
    if "preset" in report:
        console.print(f"{report['preset']}\n", style="bold")
    for table in (_fields, _tree, _bytes, _training, _flops):
        console.print(table(report))
        console.print()
    if (formula := report["formula"]) is not None:
        console.print(f"parameters by the formula of Llama: {formula['text']} = {formula['parameters']:,}")
        console.print(f"({LLAMA_LETTERS})")
    stored = f", {report['bytes']:,} bytes ({format_bytes(report['bytes'])})" if "bytes" in report else ""
    console.print(f"{report['parameters']:,} parameters{stored}")
    if "adapter" in report:
        console.print(_adapter(report["adapter"]), soft_wrap=True)


def _adapter(about: Mapping[str, Any]) -> str:
    """What an adapter is, in one line."""
    ranks, alphas = (
        f"{name} {values[0]:g}" if len(values) == 1 else f"{name}s {', '.join(f'{value:g}' for value in values)}"
        for name, values in (("rank", about["ranks"]), ("alpha", about["alphas"]))
    )
    scaled = ", rank-stabilized" if about["rank_stabilized"] else ""
    return f"{about['kind']}, {ranks}, {alphas}{scaled}, {about['parameters']:,} parameters, on {about['base']}"


def show_presets(table: Mapping[str, Any]) -> None:
    """Prints the presets as a table."""
    console = tables.console()
    grid = tables.grid("preset", "family", ">parameters", ">context", ">vocabulary")
    for name, entry in table.items():
        grid.add_row(
            name, entry["family"], *_grouped(entry[key] for key in ("parameters", "context_length", "vocab_size"))
        )
    console.print(grid)
    console.print("\nNames used by other systems are accepted too; docs/migrating/index.md lists them.")


def _grouped(values: Iterable[int | float]) -> list[str]:
    return [f"{value:,.0f}" for value in values]


def _fields(report: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for field in dataclasses.fields(ModelConfig):
        value = report["config"][field.name]
        if field.default is dataclasses.MISSING or value != field.default:
            grid.add_row(field.name, _value(value))
    return grid


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        given = {name: item for name, item in value.items() if item is not None and name != "kind"}
        return f"{value['kind']}: " + ", ".join(f"{name} {_value(item)}" for name, item in given.items())
    if isinstance(value, tuple):
        return " ".join(map(str, value)) if len(value) <= 8 else f"({len(value)} values)"
    return str(value)


def _tree(report: Mapping[str, Any]) -> Table:
    dtype = ["dtype"] if "bytes" in report else []
    grid = tables.grid("parameter", "axes", "shape", *dtype, ">count")
    for path, entry in report["tree"].items():
        shape, held = "x".join(map(str, entry["shape"])), [entry[name] for name in dtype]
        grid.add_row(path, " ".join(entry["axes"]), shape, *held, f"{entry['parameters']:,}")
    return grid


def _bytes(report: Mapping[str, Any]) -> Table:
    grid = tables.grid("memory", *(f">{dtype}" for dtype in ITEMSIZE))
    for label, sizes in (
        ("parameters", report["bytes_in"]),
        ("cache, per token", report["cache_bytes_per_token"]),
        (f"cache, {report['config']['context_length']:,} tokens", report["cache_bytes"]),
    ):
        grid.add_row(label, *map(format_bytes, sizes.values()))
    return grid


def _training(report: Mapping[str, Any]) -> Table:
    adapters = report["adapter_training_bytes"]
    forms = [f">{ADAPTER_NAMES[name]}, {ADAPTER_BASES[name]} base" for name in adapters]
    grid = tables.grid("training memory", ">all parameters", *forms)
    columns = [{"frozen_parameters": 0} | report["training_bytes"], *adapters.values()]
    labels = ("frozen parameters", "trained parameters", "gradients", "AdamW moments")
    for label, sizes in zip(labels, zip(*(column.values() for column in columns), strict=True), strict=True):
        grid.add_row(label, *map(format_bytes, sizes))
    grid.add_row("total without activations", *(format_bytes(sum(column.values())) for column in columns))
    if adapters:
        lora = LoRAConfig()
        grid.caption = (
            f"{' and '.join(ADAPTER_NAMES[name] for name in adapters)}: rank {lora.rank}, all matrices of "
            f"{' and '.join(lora.targets)}. For a recipe of your own: camelid train RECIPE --dry-run"
        )
        grid.caption_justify = "left"
    return grid


def _flops(report: Mapping[str, Any]) -> Table:
    flops = report["flops_per_token"]
    grid = tables.grid("FLOPs", ">forward", ">training")
    grid.add_row(f"per token, rows of {flops['length']:,}", *_grouped((flops["forward"], flops["training"])))
    return grid
