"""What `--dry-run` prints."""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import jax

from camelid.disk.locks import is_locked
from camelid.disk.space import format_bytes
from camelid.model.flops import peak_flops
from camelid.parallel.mesh import device_memory
from camelid.runs.dry_run import Compiled, Disk, DryRun
from camelid.runs.results import result_names
from camelid.runs.run import finished_line
from camelid.runs.summary import start_summary

UTILIZATION = 0.4
"""fraction of the devices' peak that the estimate of the time assumes"""


def report_lines(found: DryRun) -> Iterator[str]:
    """The lines, in order."""
    opened, recipe = found.opened, found.opened.recipe
    folder = _shown(opened.folder)
    yield f"dry run: nothing is trained, and nothing is written to {folder}"
    yield from start_summary(recipe, opened.components, opened.mesh, found.start)
    if found.later:
        later = ", ".join(map(str, found.later))
        yield f"note: the checkpoints of steps {later} would be moved aside, with a copy of metrics.jsonl"
    if is_locked(opened.folder):
        yield f"note: another process is training in {folder}"
    if found.finished:
        yield f"{finished_line(recipe)}. Nothing would be trained"
        return
    if opened.components.precomputes_reference and found.start.resumed is None:
        loader, validation = opened.components.loader, opened.components.validation
        rows = loader.num_rows + (0 if validation is None else validation.num_rows)
        yield f"before the first step, the log-probabilities of the reference are computed, for {rows:,} rows"
    if found.compiled is None:
        results = " and ".join(f"{name}/" for name in result_names(recipe))
        yield f"all {recipe.train.steps:,} steps are made: {results} would be written"
    else:
        yield ""
        yield from _table(_memory(found.compiled))
        yield from _memory_notes(found.compiled)
        yield ""
        yield from _table(_time(found, found.compiled))
    yield ""
    yield from _table(_space(found.disk))
    if found.disk.needed > found.disk.free:
        yield f"note: {format_bytes(found.disk.needed - found.disk.free)} are missing on the disk of {folder}"


def _memory(compiled: Compiled) -> Iterator[tuple[str, str]]:
    yield "memory per device", ""
    for name, size in compiled.held.items():
        if size:
            yield name, format_bytes(size)
    memory, total = compiled.memory, compiled.total
    if total is None:
        yield "gradients, activations and temporaries", "the compiler of this backend does not say"
        return
    yield "gradients, activations and temporaries", format_bytes(memory.temp_size_in_bytes)
    yield "total", format_bytes(total)
    arguments, outputs, reused = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes
    of_outputs = f"{format_bytes(outputs)}, of which {format_bytes(reused)} reuse the memory of arguments"
    yield "by the compiler", f"arguments {format_bytes(arguments)}; outputs {of_outputs}"


def _memory_notes(compiled: Compiled) -> Iterator[str]:
    has = device_memory(jax.local_devices()[0])
    if compiled.total is not None and has is not None and compiled.total > has:
        yield (
            f'note: a device has {format_bytes(has)}: raise train.accumulate, set compute.remat = "layer", train '
            "adapters, or use more devices"
        )


def _time(found: DryRun, compiled: Compiled) -> Iterator[tuple[str, str]]:
    recipe, loader = found.opened.recipe, found.opened.components.loader
    rows, length, steps = recipe.data.batch_size, recipe.data.sequence_length, recipe.train.steps - found.first
    per_epoch = sum(packing.rows_per_epoch for packing in loader.packings) / rows
    yield "steps", f"{found.first + 1:,} to {recipe.train.steps:,}"
    yield "tokens per step", f"{rows * length:,} ({rows:,} rows of {length:,})"
    yield "steps per epoch", f"{per_epoch:,.1f}"
    epochs = [f"{number:.3g}" for number in loader.epochs(recipe.train.steps)]
    each = f" (of each source: {', '.join(epochs)})" if len(epochs) > 1 else ""
    yield "epochs in the run", f"{recipe.train.steps / per_epoch:.3g}{each}"
    yield "compiling", f"{compiled.seconds:.1f} s"
    products = f"{compiled.product_flops:.3g} in the products of the program, with recomputation"
    attention = "" if compiled.all_products else " and without attention"
    yield "FLOPs per step", f"{compiled.flops:.3g} of the model; {products}{attention}"
    yield "training", _duration(compiled.flops * steps, recipe.compute.dtype, steps)


def _duration(flops: float, dtype: str, steps: int) -> str:
    """An estimate of the time for the floating-point operations of all steps."""
    device = jax.devices()[0].device_kind
    peak = None if dtype == "float32" else peak_flops(device)
    if peak is None:
        return f"time not known: no peak of {device} in {dtype} is known; the run prints it after its first steps"
    seconds = flops / (UTILIZATION * peak * jax.device_count())
    return (
        f"about {timedelta(seconds=round(seconds))} ({seconds / steps:.2g} s per step) at an assumed {UTILIZATION:.0%} "
        f"of {peak / 1e12:,.0f} TFLOP/s per device, without validation and checkpoints"
    )


def _space(disk: Disk) -> Iterator[tuple[str, str]]:
    yield "checkpoints", f"{format_bytes(disk.checkpoint)} each, at most {disk.checkpoints} at once"
    for name, size in disk.results.items():
        yield f"{name}/", format_bytes(size)
    if disk.milestones:
        yield "milestones/", f"{format_bytes(disk.milestone)} each, {disk.milestones:,} in the run"
    yield "disk", f"{format_bytes(disk.needed)} are needed, {format_bytes(disk.free)} are free"


def _table(rows: Iterator[tuple[str, str]]) -> Iterator[str]:
    """Rows of two columns."""
    found = list(rows)
    width = max(len(name) for name, _ in found)
    return (f"{name:{width}}  {value}".rstrip() for name, value in found)


def _shown(folder: Path) -> str:
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
