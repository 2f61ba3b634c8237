"""Wires a run together: recipe -> model, data, optimizer, loop -> a folder."""

import contextlib
import fcntl
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from camelid.api import Model, load_params
from camelid.checkpoint import hf
from camelid.checkpoint.formats import open_checkpoint
from camelid.checkpoint.native import RunCheckpoints
from camelid.checkpoint.opened import Checkpoint
from camelid.data.batch import Batch
from camelid.data.loader import Loader, prefetched
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.flops import count_parameters, peak_flops, training_flops
from camelid.model.params import initialize, map_specs
from camelid.parallel.hosts import StopSignal, batch_ways, is_main, own_rows, place, to_host, wait_for_all
from camelid.parallel.mesh import make_mesh
from camelid.parallel.rules import COMPUTE, check_divides, partition
from camelid.recipe import Recipe, write_recipe
from camelid.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from camelid.train.loggers import MetricsFile, Speed, Terminal, draw_losses, read_metrics
from camelid.train.loop import Callback, train
from camelid.train.optimizer import learning_rate, make_optimizer
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


def run(recipe: Recipe) -> Outcome:
    """Trains as the recipe says, from the newest checkpoint of its folder where there is one.

    Raises UserError for recipes that do not fit the data, the model, the machine or the folder.
    """
    folder = Path(recipe.run).absolute()
    _check_folder(folder, recipe)
    mesh = make_mesh(recipe.mesh)
    _check_rows(recipe, mesh)
    with jax.set_mesh(mesh):
        parts = _prepare(recipe, mesh)
        with _folder(folder, recipe), contextlib.closing(_checkpoints(folder, recipe)) as checkpoints:
            return _run(recipe, parts, folder, checkpoints, mesh)


@dataclass(frozen=True)
class Parts:
    """What a run is made of, read and checked before anything is written."""

    source: Checkpoint | None
    config: ModelConfig
    tokenizer: Tokenizer
    loader: Loader
    validation: Loader | None
    trainer: Trainer


def _prepare(recipe: Recipe, mesh: Mesh) -> Parts:
    source = None if recipe.init is None else open_checkpoint(recipe.init)
    config, where = (recipe.model, recipe.tokenizer) if source is None else (source.config, source.folder)
    assert config is not None  # a Recipe has init, or model and tokenizer
    assert where is not None
    tokenizer = load_tokenizer(recipe.tokenizer or where)
    check_vocabulary(tokenizer, config.vocab_size)
    check_divides(config.axis_sizes, mesh, recipe.compute.replicate)
    hf.table_of(config)  # what could not be saved is not trained
    if recipe.data.sequence_length > config.max_length:
        raise UserError(
            f"data.sequence_length = {recipe.data.sequence_length} exceeds the context of {config.max_length}",
            "Use shorter rows.",
        )
    loader = Loader(recipe.data, tokenizer)
    validation = Loader(recipe.data, tokenizer, "validation") if _validates(recipe) else None
    return Parts(source, config, tokenizer, loader, validation, _trainer(recipe, config))


def _run(recipe: Recipe, parts: Parts, folder: Path, checkpoints: RunCheckpoints, mesh: Mesh) -> Outcome:
    config, loader, validation, trainer = parts.config, parts.loader, parts.validation, parts.trainer
    steps = recipe.train.steps
    state = _state(recipe, config, parts.source, trainer, checkpoints, mesh)
    first = int(state.step)
    if first > steps:
        raise UserError(f"the run has made {first} steps already, the recipe asks for {steps}", "Ask for more steps.")

    terminal, sinks = Terminal(first, steps), []
    if is_main():
        trackers = (make_tracker(name, folder, asdict(recipe)) for name in recipe.train.trackers)
        sinks = [MetricsFile(folder / "metrics.jsonl", first), *trackers]
        for note in () if parts.source is None else parts.source.notes:
            terminal.say(f"note: {note}")
        _introduce(terminal, recipe, config, loader, mesh, first)
    batches = _batches(recipe, loader, mesh, first)
    step = _compile(trainer, state, recipe, mesh, terminal) if first < steps else trainer.step
    speed = Speed(first, steps, training_flops(config, recipe.data.sequence_length), _peak())
    tokens = recipe.data.batch_size * recipe.data.sequence_length

    def record(row: dict) -> None:
        for sink in sinks:
            sink.write(row)

    def report(made: int, numbers: dict) -> None:
        if made % recipe.train.log_every and made != steps:
            return
        row = {"step": made} | numbers | speed.read(made, tokens)
        record(row)
        if is_main():
            terminal.show(made, row)

    def validate(made: int, state: TrainState) -> None:
        assert validation is not None
        loss = _validation_loss(trainer, state.params, validation, recipe, mesh)
        record({"step": made, "validation_loss": loss})
        if is_main():
            terminal.say(f"step {made}: validation loss {loss:.4f}, perplexity {np.exp(loss):.2f}")

    callbacks = [Callback(recipe.train.checkpoint_every, checkpoints.save, at_end=True, at_stop=True)]
    if validation is not None:
        # Before the checkpoint: what a run resumes from is in metrics.jsonl already.
        callbacks.insert(0, Callback(recipe.train.evaluate_every or steps, validate, at_end=True))
        if first == 0:
            validate(0, state)
    with StopSignal() as stop, contextlib.closing(terminal), contextlib.ExitStack() as ending:
        for sink in sinks:
            ending.callback(sink.close)
        made, state = train(step, state, batches, report, callbacks, stop)
    checkpoints.wait()
    inherited = [] if parts.source is None else parts.source.companions
    companions = {file.name: file for file in [*inherited, *parts.tokenizer.files]}
    model = Model(config, state.params, parts.tokenizer, recipe.compute, mesh, tuple(companions.values()))
    if made == steps:
        model.save(folder / "model", overwrite=True)
    if is_main():
        draw_losses(read_metrics(folder / "metrics.jsonl"), folder / "loss.png")
    return Outcome(folder, made, made == steps, model)


@contextlib.contextmanager
def _folder(folder: Path, recipe: Recipe) -> Iterator[None]:
    """The run's folder, locked, with this recipe in it."""
    if not is_main():
        wait_for_all("run folder")
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process trains in {folder}", "Wait for it, or choose another --run.") from error
        _check_folder(folder, recipe)
        temporary = folder / ".recipe.incomplete"
        temporary.write_text(write_recipe(recipe), "utf-8")
        temporary.rename(folder / "recipe.toml")
        wait_for_all("run folder")
        yield


def _check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder of something else, and a run that has begun with another recipe."""
    kept = folder / "recipe.toml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "Choose another folder with --run.")
    if not kept.is_file():
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise UserError(f"{folder} holds something else than a run", "Choose another folder with --run.")
        return
    begun = any(file.name.isdigit() for file in folder.glob("checkpoints/*"))
    if begun and (changed := _changed(kept.read_text("utf-8"), write_recipe(recipe))):
        raise UserError(
            f"{folder} holds a run with another recipe: {changed}",
            "Choose another --run, or start with the recipe that the folder keeps.",
        )


FREE = {
    f"train.{name}"
    for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "evaluate_every", "trackers")
}
"""what may change when a run goes on; steps may only grow, and the mesh may be any"""


def _changed(kept: str, new: str) -> str | None:
    """The first field in which two recipes differ, other than those that may change."""
    old_fields, new_fields = (_flat(tomllib.loads(text)) for text in (kept, new))
    for field in sorted(old_fields.keys() | new_fields.keys()):
        before, now = old_fields.get(field), new_fields.get(field)
        if before != now and field not in FREE and not field.startswith("mesh."):
            return f"{field} = {before!r} there, {now!r} here"
    return None


def _flat(table: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _check_rows(recipe: Recipe, mesh: Mesh) -> None:
    rows, parts = recipe.data.batch_size, recipe.train.accumulate * batch_ways(mesh)
    if rows % parts:
        raise UserError(
            f"data.batch_size = {rows} does not divide over {recipe.train.accumulate} microbatches of "
            f"{batch_ways(mesh)} devices' rows",
            f"Use a multiple of {parts}.",
        )


def _checkpoints(folder: Path, recipe: Recipe) -> RunCheckpoints:
    return RunCheckpoints(folder / "checkpoints", recipe.train.keep_checkpoints)


def _validates(recipe: Recipe) -> bool:
    return bool(recipe.data.validation or recipe.data.validation_fraction)


def _trainer(recipe: Recipe, config: ModelConfig) -> Trainer:
    specs = declare_decoder(config)
    steps = recipe.train.steps
    return Trainer(
        config,
        recipe.compute,
        make_optimizer(recipe.optimizer, steps, map_specs(lambda spec: spec.is_matrix, specs)),
        learning_rate(recipe.optimizer, steps),
        recipe.optimizer.clip_norm,
        recipe.train.accumulate,
    )


def _state(
    recipe: Recipe,
    config: ModelConfig,
    source: Checkpoint | None,
    trainer: Trainer,
    checkpoints: RunCheckpoints,
    mesh: Mesh,
) -> TrainState:
    """The newest checkpoint's state, or a first one; made where it lives, never whole on one device."""
    specs = declare_decoder(config)
    target = abstract_state(specs, trainer.optimizer, recipe.compute, mesh)
    if (latest := checkpoints.latest()) is not None:
        return checkpoints.restore(latest, target)
    shardings = jax.tree.map(lambda x: x.sharding, target)
    if source is not None:
        params = load_params(source, recipe.compute, mesh)
        return jax.jit(lambda p: start_state(p, trainer.optimizer), out_shardings=shardings)(params)

    def fresh(key: jax.Array) -> TrainState:
        params = initialize(specs, config, key, jnp.dtype(recipe.compute.param_dtype))
        return start_state(params, trainer.optimizer)

    return jax.jit(fresh, out_shardings=shardings)(jax.random.key(recipe.train.seed))


def _batches(recipe: Recipe, loader: Loader, mesh: Mesh, first: int) -> Iterator[dict[str, jax.Array]]:
    rows = recipe.data.batch_size
    own = own_rows(rows, mesh)
    for batch in prefetched(loader, first, recipe.train.steps, own.start, own.stop):
        yield place(vars(batch), own, rows, mesh)


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


def _introduce(terminal: Terminal, recipe: Recipe, config: ModelConfig, loader: Loader, mesh: Mesh, first: int) -> None:
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    tokens = recipe.data.batch_size * recipe.data.sequence_length
    terminal.say(
        f"{count_parameters(config):,} parameters on {sizes} ({jax.devices()[0].device_kind}); "
        f"{loader.num_tokens:,} tokens of text, {tokens:,} a step"
    )
    if first:
        terminal.say(f"resuming after step {first}")


def _validation_loss(trainer: Trainer, params: Decoder, loader: Loader, recipe: Recipe, mesh: Mesh) -> float:
    """Nats a token over the whole validation split."""
    rows = recipe.data.batch_size // recipe.train.accumulate
    own = own_rows(rows, mesh)
    total = weight = 0.0
    for batch in loader.in_order(rows):
        local = {name: x[own] for name, x in vars(batch).items()}
        sums = to_host(_loss(params, place(local, own, rows, mesh), trainer))
        total, weight = total + float(sums[0]), weight + float(sums[1])
    return total / weight


@partial(jax.jit, static_argnames="trainer")
def _loss(params: Decoder, batch: dict[str, jax.Array], trainer: Trainer) -> tuple[jax.Array, jax.Array]:
    return trainer.loss(params, batch)
