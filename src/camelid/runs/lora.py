"""A run that trains an adapter: its frozen base, its first state, and the folder adapter/ in PEFT's form."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from camelid.checkpoint.adapters.lora import AdaptedCheckpoint
from camelid.checkpoint.adapters.peft import adapter_files
from camelid.checkpoint.adapters.trained import NAME, RunAdapter, plan_of, read_run_adapter, to_adapter, to_arrays
from camelid.checkpoint.checkpoint import Checkpoint, copy_companions
from camelid.checkpoint.compare import config_differences
from camelid.checkpoint.files import write_files
from camelid.checkpoint.folder import new_folder
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.integrity import checksum_arrays, describe_counts
from camelid.checkpoint.registry import split_prefix
from camelid.checkpoint.state import saved_state
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.checkpoint.tensors import dtype_named, rounded
from camelid.errors import UserError
from camelid.model.adapters import LoRAPlan, freeze, initialize_adapters
from camelid.model.config import ModelConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import Spec, build, named, shardings
from camelid.model.pytree import path_name
from camelid.model.quantize import dtype_of, held_dtype, held_shapes, quantize_parameter
from camelid.parallel.hosts import is_main, to_host, wait_for_all
from camelid.parallel.rules import placement
from camelid.runs.file_names import STEPS
from camelid.runs.recipe import Recipe
from camelid.train.state import TrainState

MERGE = (
    "`camelid convert ADAPTER MODEL` writes a model with the adapter merged into it, from which a new one can start."
)


@dataclass(frozen=True)
class Base:
    """The frozen parameters of a run that trains an adapter."""

    source: Checkpoint
    """the checkpoint `init`: the base, or an adapter of it that is continued"""
    checkpoint: Checkpoint
    """the base"""
    params: Decoder
    """its parameters"""
    frozen: Decoder
    """what the step receives beside the state: the parameters, with the scales of the adapters"""
    about: RunAdapter
    """what the folder of the run says about them and about the adapter"""

    @property
    def files(self) -> dict[str, bytes]:
        """The files about the adapter in the folder of the run, by name."""
        return {NAME: (json.dumps(self.about.to_json(), indent=1) + "\n").encode()}


def base_of(source: Checkpoint) -> Checkpoint:
    """The checkpoint whose parameters are frozen: `init`, or its base if it is an adapter."""
    return source.base if isinstance(source, AdaptedCheckpoint) else source


def is_gone(base: str) -> bool:
    """Whether a base, as lora.json names it, is a path at which there is nothing now."""
    path = Path(split_prefix(base)[1])
    return path.is_absolute() and not path.exists()


def base_form(recipe: Recipe) -> str:
    """The form in which the frozen matrices are held: `lora.base`, or its default."""
    return (recipe.lora and recipe.lora.base) or recipe.compute.dtype


def base_dtype(recipe: Recipe) -> str:
    """The dtype in which the frozen matrices are held, or from which they are quantized."""
    return dtype_of(base_form(recipe))


def abstract_frozen(recipe: Recipe, config: ModelConfig, plan: LoRAPlan, mesh: Mesh) -> Decoder:
    """Shapes, dtypes and shardings of `Base.frozen`; nothing is read or allocated."""
    shapes = held_shapes(config, base_form(recipe))
    places = shardings(declare_decoder(config), shapes, mesh, recipe.compute.replicate)
    frozen, everywhere = freeze(jax.tree.map(_placed, shapes, places), plan, config), placement((), mesh)
    return jax.tree.map(lambda x: _placed(x, everywhere) if isinstance(x, np.ndarray) else x, frozen)


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def not_finite_error(recipe: Recipe, counts: Mapping[str, int]) -> UserError:
    """The error for a checkpoint `init` with infinite or NaN values; `counts` is their number by path."""
    return UserError(
        f"init = {recipe.init!r} has infinite or NaN values in {describe_counts(counts)}",
        "Every loss would be NaN: use another checkpoint.",
    )


def load_base(recipe: Recipe, source: Checkpoint, plan: LoRAPlan, mesh: Mesh) -> Base:
    """Reads the frozen parameters: matrices in the form `lora.base`, and norms and biases in float32.

    They are read and quantized one after another, so that the devices never hold two that are yet to be quantized.

    Raises UserError if they are infinite or NaN, or if they are not those with which the run was started.
    """
    assert recipe.lora is not None
    base, folder = base_of(source), Path(recipe.run).resolve()
    specs, arrays = declare_decoder(base.config), []
    checksums: dict[str, int] = {}
    not_finite: dict[str, int] = {}
    for path, spec in named(specs).items():
        array = _load(base, path, spec, recipe, mesh)
        sums, counts = checksum_arrays({path: array})
        checksums, not_finite = checksums | sums, not_finite | counts
        if (bits := recipe.lora.base) == "int8" or bits == "nf4":
            array = quantize_parameter(path, array, spec, bits, mesh, recipe.compute.replicate)
        arrays.append(array)
    if not_finite:
        raise not_finite_error(recipe, not_finite)
    kept = read_run_adapter(folder) if saved_state.steps_in(folder / STEPS) else None
    if kept is not None:
        odd = list(config_differences(read_model_config(folder), base.config))
        odd += [path for path, found in checksums.items() if kept.checksums.get(path) != found]
        if odd:
            raise UserError(
                f"init = {recipe.init!r} is not the base that the run in {folder} was started with: {odd[0]} differs",
                "Restore it: the adapter was trained on the values that it had. To train on the new ones, choose "
                "another --run.",
            )
    params = build(specs, arrays)
    name = _name_of_base(recipe, source) if kept is None or is_gone(kept.base) else kept.base
    about = RunAdapter(name, recipe.init_ignore, checksums, plan, recipe.lora.dropout)
    frozen, everywhere = freeze(params, plan, base.config), placement((), mesh)
    frozen = jax.tree.map(lambda x: jax.device_put(x, everywhere) if isinstance(x, np.ndarray) else x, frozen)
    return Base(source, base, params, frozen, about)


def _load(base: Checkpoint, path: str, spec: Spec, recipe: Recipe, mesh: Mesh) -> jax.Array:
    place = placement(spec.axes, mesh, recipe.compute.replicate)
    target = jax.ShapeDtypeStruct(spec.shape, held_dtype(spec, base_form(recipe)), sharding=place)
    return saved_state.load(base.table, base.tensors, {path: target})[path]


def _name_of_base(recipe: Recipe, source: Checkpoint) -> str:
    """The name under which the base can be opened from any folder."""
    assert recipe.init is not None
    prefix, path = split_prefix(recipe.init)
    name = path
    if isinstance(source, AdaptedCheckpoint):
        prefix, name = split_prefix(source.adapter.base or str(source.base.folder))
        near = Path(path) / name
        name = str(near) if near.exists() else name
    name = str(Path(name).resolve()) if Path(name).exists() else name
    if (base := base_of(source)).format == "run":  # its step: the run may train on
        name = str(next(iter(base.tensors.values())).file)
    return name if prefix is None else f"{prefix}::{name}"


# The first state ------------------------------------------------------------------------------


def first_state(recipe: Recipe, base: Base, create: Callable[[Decoder], TrainState], target: TrainState) -> TrainState:
    """The state before the first step: new adapters, or those of `init` if it is an adapter.

    `create` is `start_state` with the options of the run.

    With `init_optimizer`, step, adapters and optimizer state are those of a step of another run. Raises UserError if
    that run had another optimizer.
    """
    source, plan, config = base.source, base.about.plan, base.checkpoint.config
    places = jax.tree.map(lambda x: x.sharding, target)
    if isinstance(source, AdaptedCheckpoint):
        if recipe.init_optimizer and source.step is not None:
            wanted, others = replace(target, ema=None, counters={}), ("ema", "counters")
            try:
                found = RunCheckpoints(source.step.parent, 1).restore(int(source.step.name), wanted, ignore=others)
            except UserError as error:
                raise UserError(
                    f"init_optimizer = true: {error.problem}",
                    "Use the [lora] and [optimizer] tables of that run, or leave out init_optimizer.",
                ) from error
            new = jax.jit(create, out_shardings=places)(found.trainable)
            return replace(new, step=found.step, opt_state=found.opt_state)
        arrays = to_arrays(source.adapter, plan, config)
        given = jax.tree.map_with_path(
            lambda path, x: jax.device_put(arrays[path_name(path)], x.sharding), target.trainable
        )
        return jax.jit(create, out_shardings=places)(given)

    def initialized(key: jax.Array, params: Decoder) -> TrainState:
        return create(initialize_adapters(plan, config, key, params))

    return jax.jit(initialized, out_shardings=places)(jax.random.key(recipe.train.seed), base.params)


def check_continues(recipe: Recipe, source: AdaptedCheckpoint, plan: LoRAPlan) -> None:
    """Raises UserError unless the adapter `init` has the parameters, ranks and scales of the recipe."""
    assert recipe.lora is not None
    if source.adapter.saved:
        names = ", ".join(dict.fromkeys(path for path, _ in source.adapter.saved))
        raise UserError(f"init = {recipe.init!r} is an adapter that also replaces {names} of its base", MERGE)
    theirs, advice = plan_of(source.adapter), f"Continue it with the [lora] table that it was trained with. {MERGE}"
    for name in ("dora", "rank_stabilized"):
        if (there := getattr(theirs, name)) != (here := getattr(plan, name)):
            raise UserError(
                f"init = {recipe.init!r} is an adapter with {name} = {there}, and [lora] describes one with {here}",
                advice,
            )
    for path in dict.fromkeys([*theirs.matrices, *plan.matrices]):
        there, here = theirs.matrices.get(path), plan.matrices.get(path)
        if there != here:
            shown = [
                "no adapter" if m is None else f"ranks {_short(m.ranks)}, alphas {_short(m.alphas)}"
                for m in (there, here)
            ]
            raise UserError(
                f"init = {recipe.init!r} is an adapter with {shown[0]} for {path}, and [lora] has {shown[1]}", advice
            )


def _short(values: Sequence[float]) -> str:
    """The values of all layers: one if they are equal."""
    return f"{values[0]:g}" if len(set(values)) == 1 else "(" + ", ".join(f"{value:g}" for value in values) + ")"


# adapter/ ------------------------------------------------------------------------------------


def save_adapter(
    folder: Path, trainable: Decoder, base: Base, companions: Mapping[str, Path], dtype: str | None = None
) -> None:
    """Writes an adapter in PEFT's form, with the tokenizer's files; every process calls this.

    `dtype` is that of its tensors; None: the one that they have. Raises UserError if a value is out of its range.

    The folder is complete at any time: its files are written under other names first. PEFT finds the base by its name
    if it is in Hugging Face's format; otherwise the base has to be given.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(trainable)}
    arrays = to_host(leaves)
    if dtype is not None:
        arrays = {path: rounded(path, array, dtype_named(dtype)) for path, array in arrays.items()}
    if is_main():
        about, name = base.about, split_prefix(base.about.base)[1] if base.checkpoint.format == "hf" else None
        files = adapter_files(to_adapter(about.plan, arrays, base.checkpoint.config, name, about.dropout))
        expected = {file.name: None for file in files} | dict(companions)
        with new_folder(folder, sum(file.size for file in files), overwrite=True, expected=expected) as temporary:
            write_files(temporary, files)
            copy_companions(list(companions.values()), temporary)
    wait_for_all(f"saved {folder}")
