"""Wires a run together: recipe -> model, data, optimizer, loop -> a folder."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from camelid.api import Model, load_params
from camelid.checkpoint.checkpoint import Checkpoint, Training
from camelid.checkpoint.folder import check_free
from camelid.checkpoint.integrity import described, survey
from camelid.checkpoint.state import stored
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.checkpoint.tensors import Tensor
from camelid.data.rows.batch import Batch
from camelid.data.rows.loader import Loader, prefetched
from camelid.errors import UserError
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.flops import count_parameters, peak_flops, training_flops
from camelid.model.params import build, initialize, named
from camelid.parallel.batch_sharding import BatchSharding, data_parallel_size
from camelid.parallel.hosts import StopSignal, broadcast_from_main, is_main, to_host, wait_for_all
from camelid.parallel.mesh import make_mesh
from camelid.parallel.rules import COMPUTE, partition
from camelid.runs.components import Parts, prepare
from camelid.runs.recipe import Recipe, completed
from camelid.runs.resume import MODEL, STEPS, check_folder, claimed, kept_recipe, new_aside, record
from camelid.text.tokenizer import CHAT_TEMPLATE
from camelid.train.loggers import MetricsFile, Speed, Terminal, draw_losses, read_metrics
from camelid.train.loop import Callback, train
from camelid.train.optimizer import learning_rate
from camelid.train.state import TrainState, abstract_state, start_state
from camelid.train.step import Trainer
from camelid.train.trackers import make_tracker


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    folder: Path
    steps: int
    finished: bool
    """False: a signal ended it, and the same command goes on"""
    model: Model


def run(recipe: Recipe, from_step: int | None = None) -> Outcome:
    """Trains as the recipe says, from the newest checkpoint of its folder where there is one.

    `from_step` goes on from an older checkpoint instead. Checkpoints of later steps are moved to a new folder in that
    of the run, set_aside_1 or the next one, together with a copy of metrics.jsonl.

    Raises UserError for recipes that do not fit the data, the model, the machine or the folder, for a checkpoint that
    is damaged, and where a loss or a gradient becomes infinite or NaN. Nothing is written before training can begin.
    """
    folder = Path(recipe.run).resolve()
    kept = kept_recipe(folder)
    recipe = completed(recipe, kept)
    broadcast_from_main(lambda: check_folder(folder, recipe))
    mesh = make_mesh(recipe.mesh)
    _check_rows(recipe, mesh)
    with jax.set_mesh(mesh):
        parts = prepare(recipe, mesh, begun=kept is not None)
        check_free(folder / MODEL, True, {"config.json": None, **parts.companions})
        with (
            claimed(folder, recipe, parts.data),
            contextlib.closing(_checkpoints(folder, recipe)) as checkpoints,
            contextlib.ExitStack() as ending,
        ):
            resumed = broadcast_from_main(lambda: _step_to_resume(folder, recipe, kept is not None, from_step))
            start = Start(_state(recipe, parts, checkpoints, resumed, mesh), resumed, kept)
            if from_step is not None:
                start = replace(start, aside=_set_later_aside(folder, from_step))
            return _run(recipe, parts, folder, checkpoints, mesh, start, ending)


@dataclass(frozen=True)
class Start:
    """Where training begins, or goes on."""

    state: TrainState
    resumed: int | None
    """the step of the run's own checkpoint that it goes on from"""
    kept: Recipe | None
    """the recipe of the run so far"""
    aside: Path | None = None
    """where checkpoints of later steps are now"""


def _step_to_resume(folder: Path, recipe: Recipe, begun: bool, from_step: int | None) -> int | None:
    """The step of the checkpoint that training goes on from; None for a run that begins.

    Raises UserError where it has checkpoints now and had none before, or the other way round: `begun` says.
    """
    steps = stored.steps_in(folder / STEPS)
    if bool(steps) != begun:
        changed = "are gone" if begun else "were made"
        raise UserError(
            f"the checkpoints in {folder / STEPS} {changed} while this process started",
            "Start the same command again when nothing else changes them.",
        )
    if from_step is not None and from_step not in steps:
        have = f"It has checkpoints of steps {', '.join(map(str, steps))}." if steps else "It has no checkpoints yet."
        raise UserError(f"{folder} has no checkpoint of step {from_step}", have)
    if not steps:
        return None
    first = steps[-1] if from_step is None else from_step
    if first > recipe.train.steps:
        raise UserError(
            f"the run has made {first} steps already, the recipe asks for {recipe.train.steps}", "Ask for more steps."
        )
    return first


def _set_later_aside(folder: Path, step: int) -> Path | None:
    """Moves the checkpoints of later steps to a new folder, and returns that; every process calls this."""
    steps = folder / STEPS
    later = [other for other in stored.steps_in(steps) if other > step] if is_main() else []
    aside = new_aside(folder) if later else None
    for other in reversed(later):
        assert aside is not None
        (steps / str(other)).rename(aside / str(other))
    wait_for_all("later checkpoints are set aside")
    return aside


def _run(
    recipe: Recipe,
    parts: Parts,
    folder: Path,
    checkpoints: RunCheckpoints,
    mesh: Mesh,
    start: Start,
    ending: contextlib.ExitStack,
) -> Outcome:
    config, loader, validation, trainer = parts.config, parts.loader, parts.validation, parts.trainer
    state, steps = start.state, recipe.train.steps
    first = int(state.step)

    terminal, sinks = Terminal(first, steps), []
    if is_main():
        _introduce(terminal, recipe, parts, mesh, first, start)
    step = _compile(trainer, state, recipe, mesh, terminal) if first < steps else trainer.step
    # Whatever can be refused was refused: kernels do so when they are compiled.
    record(folder, recipe, parts.files, parts.data)
    if is_main():
        trackers = (make_tracker(name, folder, asdict(recipe)) for name in recipe.train.trackers)
        sinks = [MetricsFile(folder / "metrics.jsonl", start.resumed or 0), *trackers]
        for sink in sinks:
            ending.callback(sink.close)
    speed = Speed(first, steps, training_flops(config, recipe.data.sequence_length), _peak())
    batches = _batches(recipe, loader, mesh, first, speed)
    tokens = recipe.data.batch_size * recipe.data.sequence_length

    def write(row: dict) -> None:
        for sink in sinks:
            sink.write(row)

    def report(made: int, numbers: dict) -> None:
        loss, norm = numbers["loss"], numbers["gradient_norm"]
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and made % recipe.train.log_every and made != steps:
            return
        row = {"step": made} | numbers | speed.read(made, tokens)
        write(row)
        if is_main():
            terminal.show(made, row)
        if not finite:
            raise UserError(f"step {made} has loss {loss} and gradient norm {norm}", checkpoints.way_on())

    def validate(made: int, state: TrainState) -> None:
        assert validation is not None
        with speed.aside():
            loss = _validation_loss(trainer, state.params, validation, recipe, mesh)
        write({"step": made, "validation_loss": loss})
        if not math.isfinite(loss):
            raise UserError(f"after step {made} the validation loss is {loss}", checkpoints.way_on())
        if is_main():
            with np.errstate(over="ignore"):
                terminal.say(f"step {made}: validation loss {loss:.4f}, perplexity {np.exp(loss):.2f}")

    def save(made: int, state: TrainState) -> None:
        with speed.aside():
            checkpoints.save(made, state)

    callbacks = [Callback(recipe.train.checkpoint_every, save, at_end=True, at_stop=True)]
    if validation is not None:
        # Before the checkpoint: what a run resumes from is in metrics.jsonl already.
        callbacks.insert(0, Callback(recipe.train.evaluate_every or steps, validate, at_end=True))
        if start.resumed is None:
            validate(first, state)
    with StopSignal(first, steps) as stop, contextlib.closing(terminal):
        made, state = train(step, state, batches, report, callbacks, stop)
        checkpoints.wait()
    finished = made == steps and not stop.asked
    companions = parts.companions | ({} if parts.chat_template is None else {CHAT_TEMPLATE: folder / CHAT_TEMPLATE})
    model = Model(config, state.params, parts.tokenizer, recipe.compute, mesh, tuple(companions.values()))
    if finished:
        model.save(folder / MODEL, overwrite=True)
    if is_main():
        draw_losses(read_metrics(folder / "metrics.jsonl"), folder / "loss.png")
    return Outcome(folder, made, finished, model)


def _check_rows(recipe: Recipe, mesh: Mesh) -> None:
    rows, parts = recipe.data.batch_size, recipe.train.accumulate * data_parallel_size(mesh)
    if rows % parts:
        raise UserError(
            f"data.batch_size = {rows} does not divide over {recipe.train.accumulate} microbatches of "
            f"{data_parallel_size(mesh)} devices' rows",
            f"Use a multiple of {parts}.",
        )


def _checkpoints(folder: Path, recipe: Recipe) -> RunCheckpoints:
    return RunCheckpoints(folder / STEPS, recipe.train.keep_checkpoints)


def _state(recipe: Recipe, parts: Parts, checkpoints: RunCheckpoints, resumed: int | None, mesh: Mesh) -> TrainState:
    """The state of a checkpoint, or a first one; made where it lives, never whole on one device."""
    config, trainer = parts.config, parts.trainer
    specs = declare_decoder(config)
    target = abstract_state(specs, trainer.optimizer, recipe.compute, mesh)
    if resumed is not None:
        return checkpoints.restore(resumed, target)
    if parts.source is not None:
        state = from_checkpoint(parts.source, parts.source.training if recipe.init_optimizer else None, trainer, mesh)
        if not_finite := survey(state)[1]:
            raise UserError(
                f"init = {recipe.init!r} has infinite or NaN values in {described(not_finite)}",
                "Every loss would be NaN: take another checkpoint.",
            )
        return state

    def fresh(key: jax.Array) -> TrainState:
        params = initialize(specs, config, key, jnp.dtype(recipe.compute.param_dtype))
        return start_state(params, trainer.optimizer)

    shardings = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(fresh, out_shardings=shardings)(jax.random.key(recipe.train.seed))


def from_checkpoint(source: Checkpoint, training: Training | None, trainer: Trainer, mesh: Mesh) -> TrainState:
    """The state that goes on from a checkpoint: with `training` its step and moments, without, none made.

    Each device's part is read for that device; moments become float32.
    """
    specs = declare_decoder(source.config)
    target = abstract_state(specs, trainer.optimizer, trainer.compute, mesh)
    params = load_params(source, trainer.compute, mesh)
    if training is None:
        shardings = jax.tree.map(lambda x: x.sharding, target)
        return jax.jit(lambda p: start_state(p, trainer.optimizer), out_shardings=shardings)(params)

    step, mu, nu = training.step, training.mu, training.nu

    def moments(tensors: Mapping[str, Tensor], like: Any) -> Any:
        arrays = stored.load(source.table, tensors, named(like))
        return build(specs, [arrays[path] for path in named(specs)])

    def taken(part: Any) -> Any:
        if isinstance(part, optax.ScaleByAdamState):
            return optax.ScaleByAdamState(taken(part.count), moments(mu, part.mu), moments(nu, part.nu))
        assert part.shape == (), "beside its moments AdamW holds counters, which count the same steps"
        return jax.device_put(np.asarray(step, part.dtype), part.sharding)

    opt_state = jax.tree.map(taken, target.opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState))
    return TrainState(taken(target.step), params, opt_state)


def _batches(recipe: Recipe, loader: Loader, mesh: Mesh, first: int, speed: Speed) -> Iterator[dict[str, jax.Array]]:
    sharding = BatchSharding(recipe.data.batch_size, mesh)
    own = sharding.own
    for batch in speed.timed(prefetched(loader, first, recipe.train.steps, own.start, own.stop)):
        yield sharding.place_own(vars(batch))


def _compile(trainer: Trainer, state: TrainState, recipe: Recipe, mesh: Mesh, terminal: Terminal):
    """The compiled step; the state is given up to it, so that its memory is used again."""
    if is_main():
        terminal.say("compiling the training step ...")
    began = time.perf_counter()
    shape = (recipe.data.batch_size, recipe.data.sequence_length)
    sharding = NamedSharding(mesh, partition(("batch", "seq"), COMPUTE))
    dtypes = {field.name: jnp.float32 if field.name == "weights" else jnp.int32 for field in fields(Batch)}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
    compiled = jax.jit(trainer.step, donate_argnums=0).lower(state, batch).compile()
    if is_main():
        terminal.say(f"compiled in {time.perf_counter() - began:.1f} s")
    return compiled


def _peak() -> float | None:
    device = peak_flops(jax.devices()[0].device_kind)
    return None if device is None else device * jax.device_count()


def _introduce(terminal: Terminal, recipe: Recipe, parts: Parts, mesh: Mesh, first: int, start: Start) -> None:
    for note in parts.notes:
        terminal.say(f"note: {note}")
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    tokens = recipe.data.batch_size * recipe.data.sequence_length
    terminal.say(
        f"{count_parameters(parts.config):,} parameters on {sizes} ({jax.devices()[0].device_kind}); "
        f"{parts.loader.num_tokens:,} tokens of text, {tokens:,} a step"
    )
    if start.resumed is not None:
        terminal.say(f"resuming after step {first}")
    elif first:
        rate = np.asarray(parts.trainer.schedule(first))
        terminal.say(f"going on after step {first} of init, with a learning rate of {rate:.3g}")
    elif parts.source is not None and (training := parts.source.training) is not None:
        terminal.say(
            f"note: the {training.step} steps of init and its moments of AdamW are left out; "
            "init_optimizer = true takes them"
        )
    if start.aside is not None:
        terminal.say(f"note: checkpoints of later steps and a copy of metrics.jsonl were moved to {start.aside}")
    if start.kept is not None and (change := _schedule_change(recipe, start.kept, first)) is not None:
        terminal.say(f"note: {change}")


def _schedule_change(recipe: Recipe, kept: Recipe, made: int) -> str | None:
    """What becomes of the learning rate of a run that goes on, where its length or its schedule is another now."""
    before, now = (each.optimizer.decay_steps or each.train.steps for each in (kept, recipe))
    was, rate = (
        np.asarray(learning_rate(replace(recipe.optimizer, decay_steps=steps), steps)(made)) for steps in (before, now)
    )
    if now != before:
        return (
            f"optimizer.decay_steps changes from {before} to {now}: the learning rate of step {made + 1} is "
            f"{rate:.3g} instead of {was:.3g}"
        )
    if recipe.train.steps in (kept.train.steps, now):
        return None
    final = recipe.optimizer.learning_rate * recipe.optimizer.final_fraction
    return (
        f"train.steps changes from {kept.train.steps} to {recipe.train.steps}; the learning rate still decays to "
        f"{final:.3g} at step {now} and stays there (optimizer.decay_steps = {recipe.train.steps} stretches the decay)"
    )


def _validation_loss(trainer: Trainer, params: Decoder, loader: Loader, recipe: Recipe, mesh: Mesh) -> float:
    """Nats a token over the whole validation split."""
    rows = recipe.data.batch_size // recipe.train.accumulate
    sharding = BatchSharding(rows, mesh)
    total = weight = 0.0
    for batch in loader.in_order(rows):
        sums = to_host(_loss(params, sharding.place(vars(batch)), trainer))
        total, weight = total + float(sums[0]), weight + float(sums[1])
    return total / weight


@partial(jax.jit, static_argnames="trainer")
def _loss(params: Decoder, batch: dict[str, jax.Array], trainer: Trainer) -> tuple[jax.Array, jax.Array]:
    return trainer.loss(params, batch)
