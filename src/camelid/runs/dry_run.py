"""What a run would do and take: everything is opened, checked and compiled, and nothing is allocated or trained."""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.checkpoint.state.saved_state import steps_in
from camelid.model.flops import count_parameters, product_flops, training_flops
from camelid.parallel.hosts import broadcast_from_main
from camelid.runs.components import step_of_init
from camelid.runs.file_names import ADAPTER, ADAPTER_EMA, STEPS
from camelid.runs.lora import abstract_frozen
from camelid.runs.program import abstract_batch, trace_step
from camelid.runs.recipe import Recipe
from camelid.runs.reference import check_reference
from camelid.runs.results import result_names
from camelid.runs.run import OpenedRun, open_run
from camelid.runs.run_folder import check_data, is_finished
from camelid.runs.start import Start, abstract_first_state, restarts_optimizer, step_to_resume
from camelid.train.state import TrainState


@dataclass(frozen=True)
class Compiled:
    """The compiled training step; bytes are those of one device."""

    seconds: float
    """how long compiling took"""
    held: Mapping[str, int]
    """bytes of what the step receives, by what it is; 0 for what the run does not have"""
    memory: Any
    """the compiler's own analysis, a `CompiledMemoryStats`; None if it gives none"""
    flops: float
    """of one step of the model on all devices, by `training_flops`"""
    product_flops: float
    """of all products of the program, recomputation included"""
    all_products: bool
    """False if `product_flops` leaves out attention"""

    @property
    def total(self) -> int | None:
        """Bytes in use at the end of the step: arguments, results that do not reuse their memory, and temporaries."""
        if self.memory is None:
            return None
        kept = self.memory.argument_size_in_bytes + self.memory.output_size_in_bytes - self.memory.alias_size_in_bytes
        return kept + self.memory.temp_size_in_bytes


@dataclass(frozen=True)
class Disk:
    """What a run writes, in bytes."""

    checkpoint: int
    """size of one checkpoint"""
    checkpoints: int
    """number of checkpoints that exist at once, at most"""
    results: Mapping[str, int]
    """sizes of the folders that are written for use elsewhere"""
    milestones: int
    """number of milestones, each of which has all of these folders; 0 if none is exported"""
    free: int
    """free space, and what the folder of the run takes already"""

    @property
    def needed(self) -> int:
        """All of it."""
        return self.checkpoint * self.checkpoints + self.milestone * (1 + self.milestones)

    @property
    def milestone(self) -> int:
        """The size of one exported milestone."""
        return sum(self.results.values())


@dataclass(frozen=True)
class DryRun:
    """What a run would do and take."""

    opened: OpenedRun
    start: Start
    """where it would start; its state holds shapes, apart from the step"""
    later: Sequence[int]
    """steps whose checkpoints would be moved aside"""
    finished: bool
    """whether nothing would be trained or written"""
    compiled: Compiled | None
    """None if all steps are made"""
    disk: Disk

    @property
    def first(self) -> int:
        """The number of steps that are made already."""
        return int(self.start.state.step)


def dry_run(recipe: Recipe, from_step: int | None = None) -> DryRun:
    """Finds out what `run` would do with the same arguments; every process calls this.

    Nothing is written but prepared text in the cache. Raises UserError as `run`, except for what only the values of
    parameters can show: damage, and infinite or NaN values.
    """
    opened = open_run(recipe)
    recipe, folder, mesh, components = opened.recipe, opened.folder, opened.mesh, opened.components
    with jax.set_mesh(mesh):
        broadcast_from_main(lambda: check_data(folder, components.data))
        resumed = step_to_resume(folder, recipe, opened.previous is not None, from_step)
        source, first = components.source, resumed or 0
        if resumed is None and source is not None and recipe.init_optimizer:
            first = step_of_init(source, recipe) or 0
        if resumed is not None:
            restarts_optimizer(recipe, RunCheckpoints(folder / STEPS, recipe.train.keep_checkpoints), resumed)
        if resumed is not None and components.precomputes_reference:
            check_reference(components, folder)
        state = abstract_first_state(recipe, components, mesh)
        start = Start(replace(state, step=np.int32(first)), resumed, opened.previous, base=None, aside=None)
        steps = recipe.train.steps
        finished = resumed == steps and is_finished(folder, steps, result_names(recipe))
        compiled = None if first == steps else _compile(opened, state)
        later = [] if from_step is None else [step for step in steps_in(folder / STEPS) if step > from_step]
        return DryRun(opened, start, later, finished, compiled, _disk(opened, state))


def _compile(opened: OpenedRun, state: TrainState) -> Compiled:
    recipe, mesh, components = opened.recipe, opened.mesh, opened.components
    plan = components.lora
    frozen = None if plan is None else abstract_frozen(recipe, components.config, plan, mesh)
    batch = abstract_batch(recipe, mesh, components.batch_kind)
    start = time.perf_counter()
    traced = trace_step(components.step, state, frozen, batch)
    compiled = traced.lower().compile()
    seconds, memory = time.perf_counter() - start, None
    with contextlib.suppress(NotImplementedError, jax.errors.JaxRuntimeError):  # backends need not have an analysis
        memory = compiled.memory_analysis()
    held = {
        "frozen parameters": frozen,
        "trained parameters": state.trainable,
        "optimizer state": (state.opt_state, state.counters, state.step),
        "moving average": state.ema,
        "batch": batch,
    }
    tokens, length = recipe.data.batch_size * recipe.data.sequence_length, recipe.data.sequence_length
    return Compiled(
        seconds,
        {name: bytes_per_device(tree) for name, tree in held.items()},
        memory,
        training_flops(components.config, length, frozen=plan is not None) * tokens,
        *product_flops(traced.jaxpr.jaxpr),
    )


def bytes_per_device(tree: Any) -> int:
    """The bytes of the arrays of a tree that one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _allocated(folder: Path) -> int:
    """The bytes on the disk of all files in a folder, from which a run may remove some meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += 512 * os.lstat(os.path.join(root, name)).st_blocks
    return total


def _bytes(tree: Any, dtype: str | None = None) -> int:
    """The bytes of the arrays of a tree, on all devices together: in their own dtypes, or all in `dtype`."""
    return sum(math.prod(x.shape) * np.dtype(dtype or x.dtype).itemsize for x in jax.tree.leaves(tree))


def _disk(opened: OpenedRun, state: TrainState) -> Disk:
    recipe, config = opened.recipe, opened.recipe.train
    milestones = 0 if config.milestones_every is None else config.steps // config.milestones_every
    kept = config.keep_checkpoints + 1 + config.keep_best + milestones  # one more while a new one is written
    irregular = config.checkpoint_minutes is not None or config.keep_best
    saved = config.steps if irregular else -(-config.steps // config.checkpoint_every) + milestones
    dtype = opened.results.dtype or recipe.compute.param_dtype
    model = count_parameters(opened.components.config) * np.dtype(dtype).itemsize
    adapter = _bytes(state.trainable, recipe.checkpoint.dtype)
    sizes = {name: adapter if name in (ADAPTER, ADAPTER_EMA) else model for name in result_names(recipe)}
    place = next(path for path in (opened.folder, *opened.folder.parents) if path.exists())
    free = shutil.disk_usage(place).free + _allocated(opened.folder)
    checkpoint = state if recipe.checkpoint.optimizer else replace(state, opt_state=None)
    exported = 0 if recipe.checkpoint.export is None else milestones
    return Disk(_bytes(checkpoint), min(kept, saved), sizes, exported, free)
