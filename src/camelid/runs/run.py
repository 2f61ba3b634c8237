"""Training by a recipe: what is built, the loop over batches, and what happens every N steps."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from camelid import interrupts
from camelid.api import Model
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.data.rows.batch import Batch
from camelid.data.rows.loader import Loader
from camelid.data.rows.prefetch import prefetched
from camelid.errors import UserError
from camelid.model.flops import peak_flops, training_flops
from camelid.parallel.batch_sharding import BatchSharding, data_parallel_size
from camelid.parallel.hosts import broadcast_from_main, is_main
from camelid.parallel.mesh import make_mesh
from camelid.parallel.stop_signal import StopSignal
from camelid.runs.best import BestCheckpoint
from camelid.runs.components import Components, build_components
from camelid.runs.file_names import METRICS, PROFILE, STEPS
from camelid.runs.program import abstract_batch, trace_step
from camelid.runs.recipe import Recipe, completed
from camelid.runs.reference import with_reference
from camelid.runs.results import Results
from camelid.runs.run_folder import (
    check_folder,
    claimed,
    is_finished,
    kept_recipe,
    mark_finished,
    mark_unfinished,
    record,
)
from camelid.runs.samples import Samples
from camelid.runs.start import Start, find_start
from camelid.runs.summary import start_summary
from camelid.runs.validation import Validate, is_validated, mean_losses, validate_step
from camelid.runs.versions import record_versions
from camelid.train.callbacks import Callback
from camelid.train.config import TrainConfig
from camelid.train.loggers import MetricsFile, Speed, Terminal, draw_losses, read_metrics
from camelid.train.metrics_log import MetricsLog
from camelid.train.objective import Arrays
from camelid.train.profile import Profiled
from camelid.train.save_schedule import SaveSchedule
from camelid.train.state import TrainState
from camelid.train.step import TrainStep
from camelid.train.trackers import Tracker, make_tracker
from camelid.train.trainable import combine


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    folder: Path
    steps: int
    """number of updates, including those of earlier starts"""
    finished: bool
    """False if a signal stopped the run, which the same command resumes"""
    model: Model
    saved: tuple[Path, ...] = ()
    """the folders that were written for use elsewhere: model/ or adapter/"""


def run(recipe: Recipe, from_step: int | None = None, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Trains by a recipe, from the newest checkpoint in the folder of the run if there is one.

    With `from_step`, training resumes from this older checkpoint. Checkpoints of later steps are moved to a new
    folder in that of the run, `set_aside_1` or the next free number, together with milestones of later steps and copies
    of metrics.jsonl and samples.jsonl. Every process calls the `callbacks`, and ends with an exception that one of them
    raises.

    Raises UserError as `open_run`, for a damaged checkpoint, and when losses or gradients of more than
    `train.max_skipped` steps in a row are infinite or NaN. Nothing is written before training can start.
    """
    opened = open_run(recipe)
    recipe, folder, mesh = opened.recipe, opened.folder, opened.mesh
    components, results = opened.components, opened.results
    with (
        jax.set_mesh(mesh),
        claimed(folder, recipe, components.data),
        contextlib.closing(_checkpoints(folder, recipe)) as checkpoints,
    ):
        start = find_start(recipe, opened.previous, from_step, components, checkpoints, mesh)
        terminal = Terminal(int(start.state.step), recipe.train.steps)
        if is_main():
            for line in start_summary(recipe, components, mesh, start):
                terminal.print(line)
        if start.resumed == recipe.train.steps and is_finished(folder, recipe.train.steps, results.names):
            if is_main():
                terminal.print(finished_line(recipe))
            model = results.model(combine(start.state.trainable, start.frozen))
            return Outcome(folder, recipe.train.steps, True, model, tuple(folder / name for name in results.names))
        state, finished = _train(recipe, components, folder, checkpoints, mesh, start, terminal, results, callbacks)
        return _finish(results, start, state, finished)


@dataclass(frozen=True)
class OpenedRun:
    """A run before its state is read."""

    recipe: Recipe
    """with the fields that depend on how the run was started"""
    folder: Path
    previous: Recipe | None
    """the recipe of the run so far; None for a new run"""
    mesh: Mesh
    components: Components

    @property
    def results(self) -> Results:
        return Results(self.components, self.folder, self.mesh)


def open_run(recipe: Recipe) -> OpenedRun:
    """Opens and checks what a run consists of; writes nothing but prepared text in the cache.

    Raises UserError for a recipe that does not fit the data, the model, the machine or the folder.
    """
    folder = Path(recipe.run).resolve()
    previous = kept_recipe(folder)
    if previous is None:
        interrupts.set_advice("no step was saved; run the same command again to start from the beginning")
        recipe.optimizer.check_decay()
        recipe.checkpoint.check_new()
    recipe = completed(recipe, previous)
    broadcast_from_main(lambda: check_folder(folder, recipe))
    mesh = make_mesh(recipe.mesh)
    _check_rows(recipe, mesh)
    with jax.set_mesh(mesh):
        components = build_components(recipe, mesh, started=previous is not None)
    opened = OpenedRun(recipe, folder, previous, mesh, components)
    opened.results.check()
    return opened


def finished_line(recipe: Recipe) -> str:
    """What is printed of a run that has made all steps and written its results."""
    return f"this run is finished: it has made all {recipe.train.steps} steps; a larger train.steps continues it"


def _train(
    recipe: Recipe,
    components: Components,
    folder: Path,
    checkpoints: RunCheckpoints,
    mesh: Mesh,
    start: Start,
    terminal: Terminal,
    results: Results,
    callbacks: Sequence[Callback],
) -> tuple[TrainState, bool]:
    """The state after the last step, and whether all steps were made."""
    config, state, first = recipe.train, start.state, int(start.state.step)
    kind = components.batch_kind
    step, starting = components.step, first < config.steps
    if starting:
        step = compile_step(step, state, recipe, mesh, terminal, start.frozen, kind)
    # Kernels may refuse the model when they are compiled, so nothing is written before this line.
    base_files = {} if start.base is None else start.base.files
    record(folder, recipe, components.files | base_files, components.data)
    record_versions(folder, start.resumed or 0)
    mark_unfinished(folder)
    results.make_up(state, start)
    if components.precomputes_reference and (starting or components.validation is not None):
        components = with_reference(components, start, folder, mesh, terminal)
    flops = training_flops(components.config, recipe.data.sequence_length, frozen=recipe.lora is not None)
    speed = Speed(first, config.steps, flops, _peak_flops())
    trackers = [make_tracker(name, folder, asdict(recipe)) for name in recipe.train.trackers] if is_main() else []
    log = _metrics_log(
        recipe, components, folder, checkpoints, terminal, speed, start.resumed or 0, trackers, callbacks
    )
    validate = samples = None
    if components.validation is not None:
        about = components.step.objective, components.validation, recipe, mesh, start.frozen, terminal
        validate = partial(mean_losses, *about)
    with log, contextlib.ExitStack() as stack:
        if recipe.samples is not None:
            places = folder, terminal, trackers
            samples = Samples(
                recipe, results.model, components.prompts, start.frozen, *places, resume_from=start.resumed or 0
            )
            stack.enter_context(contextlib.closing(samples))
        best = BestCheckpoint(folder, checkpoints) if config.keep_best else None
        if validate is not None and start.resumed is None:
            with log.paused():
                means = validate(state)
            log.validation(first, means)
        elif validate is not None and is_validated(first, config) and not _has_validation(folder, first):
            validate_step(validate, state, first, log, checkpoints, best)
        if samples is not None and (start.resumed is None or samples.is_due(first)):
            with log.paused():
                samples.write(state, first)
        with contextlib.ExitStack() as loop:
            stop = loop.enter_context(StopSignal(first, config.steps))
            loop.enter_context(contextlib.closing(terminal))
            if recipe.profile is not None:
                step = loop.enter_context(Profiled(step, recipe.profile, folder / PROFILE, first))
            batches = _batches(recipe, components.loader, mesh, first, speed)
            export = partial(results.save_at_checkpoint, start=start)
            state = train_steps(step, state, batches, config, log, validate, checkpoints, stop, export, best, samples)
            checkpoints.wait()
    return state, int(state.step) == config.steps and not stop.requested


def _metrics_log(
    recipe: Recipe,
    components: Components,
    folder: Path,
    checkpoints: RunCheckpoints,
    terminal: Terminal,
    speed: Speed,
    resume_from: int,
    trackers: Sequence[Tracker],
    callbacks: Sequence[Callback],
) -> MetricsLog:
    """The log of the run, in which metrics.jsonl goes on after the step `resume_from`."""
    sinks = [MetricsFile(folder / METRICS, resume_from), *trackers] if is_main() else []
    tokens_per_step = recipe.data.batch_size * recipe.data.sequence_length
    steps_per_epoch = sum(packing.rows_per_epoch for packing in components.loader.packings) / recipe.data.batch_size
    advice, of_tokens = checkpoints.recovery_advice, recipe.loss.average == "tokens"
    about = tokens_per_step, advice, steps_per_epoch, of_tokens
    return MetricsLog(recipe.train, terminal, speed, sinks, *about, callbacks, folder)


def train_steps(
    step: Callable[[TrainState, Arrays], tuple[TrainState, Arrays]],
    state: TrainState,
    batches: Iterable[Arrays],
    config: TrainConfig,
    log: MetricsLog,
    validate: Validate | None,
    checkpoints: RunCheckpoints,
    stop: StopSignal,
    export: Callable[..., None] | None = None,
    best: BestCheckpoint | None = None,
    samples: Samples | None = None,
) -> TrainState:
    """Trains until step `config.steps` or a signal to stop; every process runs the same loop in step.

    `export(state, step=made)` writes the state in another form too, whenever a checkpoint is saved.
    """
    made, due = int(state.step), False
    schedule = SaveSchedule(config, made)
    for batch in batches:
        state, metrics = step(state, batch)
        made += 1
        # Those of the previous step: reading this step's would leave the devices idle until the next one is sent.
        log.flush()
        log.add(made, metrics)
        stopping, ending = stop.should_stop(made), made == config.steps

        # A run that is asked to stop ends soon: when it is resumed, it makes up for the validation and the samples.
        validates = validate is not None and is_validated(made, config) and not stopping
        generates = samples is not None and samples.is_due(made) and not stopping
        due = due or schedule.due(made)
        if validates or generates or due or ending or stopping:
            log.flush()  # whoever ends the process after a checkpoint must find its step in metrics.jsonl
        # The parameters may be the reason that updates are skipped: good checkpoints are not replaced until it is over.
        saves = (due and not log.skipping) or ending or stopping
        if saves:  # before the validation, which may take long, or fail
            with log.paused():
                checkpoints.save(made, state)
            log.saved(made)
            schedule.saved(made)
            interrupts.set_advice(interrupts.RESUME)
            due = False
        if validate is not None and validates:
            validate_step(validate, state, made, log, checkpoints, best)
        if saves and export is not None:  # a state whose validation loss is not finite has ended the run
            with log.paused():
                export(state, step=made)
        if samples is not None and generates:
            with log.paused():
                samples.write(state, made)
        if stopping:
            break
    log.flush()
    return jax.block_until_ready(state)


def _finish(results: Results, start: Start, state: TrainState, finished: bool) -> Outcome:
    """Saves the results of a finished run: models and adapters of the last step; and draws the losses."""
    folder, model = results.folder, results.model(combine(state.trainable, start.frozen))
    if finished:
        results.save(state, start, folder)
        mark_finished(folder, int(state.step))
    if is_main():
        draw_losses({folder.name: read_metrics(folder / METRICS)}, folder / "loss.png")
    written = tuple(folder / name for name in results.names if (folder / name).is_dir())
    return Outcome(folder, int(state.step), finished, model, written)


def compile_step(
    step: TrainStep,
    state: TrainState,
    recipe: Recipe,
    mesh: Mesh,
    terminal: Terminal,
    frozen: Any = None,
    kind: type[Batch] = Batch,
) -> Callable[[TrainState, Arrays], tuple[TrainState, Arrays]]:
    """The compiled step for batches of this kind, as `step(state, batch)`. The memory of the state that it is given is
    reused for the state that it returns; `frozen`, the parameters that are not trained, stays."""
    if is_main():
        terminal.print("compiling the training step ...")
    start = time.perf_counter()
    compiled = trace_step(step, state, frozen, abstract_batch(recipe, mesh, kind)).lower().compile()
    if is_main():
        terminal.print(f"compiled in {time.perf_counter() - start:.1f} s")
    return lambda state, batch: compiled(state, batch, frozen)


def _batches(recipe: Recipe, loader: Loader, mesh: Mesh, first: int, speed: Speed) -> Iterator[Arrays]:
    """The batches of the steps after step `first`, on the devices; a process reads the rows of its own devices."""
    sharding = BatchSharding(recipe.data.batch_size, mesh)
    own = sharding.own
    for batch in speed.timed(prefetched(loader, first, recipe.train.steps, own.start, own.stop)):
        yield sharding.place_own(vars(batch))


def _checkpoints(folder: Path, recipe: Recipe) -> RunCheckpoints:
    without = () if recipe.checkpoint.optimizer else ("opt_state",)
    return RunCheckpoints(folder / STEPS, recipe.train.keep_checkpoints, recipe.train.milestones_every, without)


def _has_validation(folder: Path, step: int) -> bool:
    """Whether a validation after this step is in metrics.jsonl; every process calls this."""

    def found() -> bool:
        return any(row["step"] == step and "validation_loss" in row for row in read_metrics(folder / METRICS))

    return broadcast_from_main(found)


def _check_rows(recipe: Recipe, mesh: Mesh) -> None:
    """Raises UserError if the rows of a batch cannot be divided into microbatches and over devices."""
    size = data_parallel_size(mesh)
    if recipe.data.batch_size % (parts := recipe.train.accumulate * size):
        raise UserError(
            f"data.batch_size = {recipe.data.batch_size} is not divisible by train.accumulate x data-parallel size = "
            f"{recipe.train.accumulate} x {size}",
            f"Use a multiple of {parts}.",
        )


def _peak_flops() -> float | None:
    """The peak of all devices together, in floating-point operations per second; None if it is not known."""
    device = peak_flops(jax.devices()[0].device_kind)
    return None if device is None else device * jax.device_count()
