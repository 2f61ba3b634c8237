"""Wires a run together: recipe -> model, data, optimizer, loop -> a folder."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from camelid.api import Model, load_params
from camelid.checkpoint import hf, layout
from camelid.checkpoint.folder import json_text
from camelid.checkpoint.formats import open_checkpoint
from camelid.checkpoint.hf_config import config_to_hf
from camelid.checkpoint.native import RunCheckpoints
from camelid.checkpoint.opened import Checkpoint, Training
from camelid.checkpoint.tensors import Tensor
from camelid.data.batch import Batch
from camelid.data.loader import Loader, prefetched
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.flops import count_parameters, peak_flops, training_flops
from camelid.model.params import build, initialize, map_specs, named
from camelid.parallel.hosts import StopSignal, batch_ways, is_main, main_first, own_rows, place, to_host
from camelid.parallel.mesh import make_mesh
from camelid.parallel.rules import COMPUTE, check_divides, partition
from camelid.recipe import Recipe
from camelid.resume import Data, check_folder, claimed, has_begun
from camelid.text.chat import load_template
from camelid.text.templates import NAMED
from camelid.text.tokenizer import CHAT_TEMPLATE, Tokenizer, check_vocabulary, load_tokenizer
from camelid.train.loggers import MetricsFile, Speed, Terminal, draw_losses, read_metrics, tokenizing
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
    check_folder(folder, recipe)
    mesh = make_mesh(recipe.mesh)
    _check_rows(recipe, mesh)
    with jax.set_mesh(mesh):
        parts = _prepare(recipe, mesh)
        with (
            claimed(folder, recipe, parts.files, parts.data),
            contextlib.closing(_checkpoints(folder, recipe)) as checkpoints,
        ):
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

    @property
    def companions(self) -> dict[str, Path]:
        """By name: the files that go wherever the model goes."""
        inherited = [] if self.source is None else self.source.companions
        return {file.name: file for file in [*inherited, *self.tokenizer.files]}

    @property
    def files(self) -> dict[str, bytes]:
        """By name: all of a checkpoint but its numbers."""
        config = json_text(config_to_hf(self.config, self.trainer.compute.param_dtype)).encode()
        template = {} if self.chat_template is None else {CHAT_TEMPLATE: self.chat_template.encode()}
        inherited = {name: file.read_bytes() for name, file in self.companions.items()}
        return {**inherited, **template, "config.json": config}

    @property
    def chat_template(self) -> str | None:
        """The template that the model learns to answer in, where it is not what its tokenizer comes with."""
        names = set().union(*(packing.store.templates for packing in self.loader.packings))
        name = names.pop() if len(names) == 1 else None
        return load_template(name, self.tokenizer).text if name in (*NAMED, *self.tokenizer.chat_templates) else None

    @property
    def data(self) -> Data:
        """Of what the batches are made."""
        loaders = {"train": self.loader} | ({} if self.validation is None else {"validation": self.validation})
        return {
            split: [{"fingerprint": p.store.fingerprint, "sources": p.store.sources} for p in loader.packings]
            for split, loader in loaders.items()
        }


def _prepare(recipe: Recipe, mesh: Mesh) -> Parts:
    source = None if recipe.init is None else open_checkpoint(recipe.init, config=recipe.model)
    config, where = (recipe.model, recipe.tokenizer) if source is None else (source.config, source.folder)
    assert config is not None  # a Recipe has init, or model and tokenizer
    assert where is not None
    if source is not None and recipe.init_optimizer and not has_begun(Path(recipe.run)):
        _check_training(source, recipe)
    tokenizer = load_tokenizer(recipe.tokenizer or where)
    check_vocabulary(tokenizer, config.vocab_size)
    check_divides(config.axis_sizes, mesh, recipe.compute.replicate)
    hf.table_of(config)  # what could not be saved is not trained
    if recipe.data.sequence_length > config.max_length:
        raise UserError(
            f"data.sequence_length = {recipe.data.sequence_length} exceeds the context of {config.max_length}",
            "Use shorter rows.",
        )
    if any(text.kind == "preference" for text in (*recipe.data.train, *recipe.data.validation)):
        raise UserError(
            "kind = 'preference' is not trained on: that needs a loss that compares the two answers",
            "`camelid data prepare` and `inspect` take it; to imitate the good answers, give them as kind = 'chat'.",
        )
    progress = tokenizing() if is_main() else None
    with main_first("data"):
        loader = Loader(recipe.data, tokenizer, progress=progress)
        validation = Loader(recipe.data, tokenizer, "validation", progress) if _validates(recipe) else None
    return Parts(source, config, tokenizer, loader, validation, _trainer(recipe, config))


def _check_training(source: Checkpoint, recipe: Recipe) -> None:
    """Raises UserError where there is nothing to go on from, or no step to make."""
    if source.training is None:
        raise UserError(
            f"init = {recipe.init!r} holds no step and no moments of AdamW",
            "Train states of EasyLM and runs' checkpoints do; without init_optimizer, training begins at step 0.",
        )
    if (made := source.training.step) >= recipe.train.steps:
        raise UserError(
            f"init has made {made} steps already, the recipe asks for {recipe.train.steps}",
            "train.steps counts them too: ask for more.",
        )


def _run(recipe: Recipe, parts: Parts, folder: Path, checkpoints: RunCheckpoints, mesh: Mesh) -> Outcome:
    config, loader, validation, trainer = parts.config, parts.loader, parts.validation, parts.trainer
    steps = recipe.train.steps
    latest = checkpoints.latest()
    state = _state(recipe, parts, checkpoints, mesh)
    first = int(state.step)
    if first > steps:
        raise UserError(f"the run has made {first} steps already, the recipe asks for {steps}", "Ask for more steps.")

    terminal, sinks = Terminal(first, steps), []
    if is_main():
        trackers = (make_tracker(name, folder, asdict(recipe)) for name in recipe.train.trackers)
        sinks = [MetricsFile(folder / "metrics.jsonl", 0 if latest is None else first), *trackers]
        _introduce(terminal, recipe, parts, mesh, first, latest)
    step = _compile(trainer, state, recipe, mesh, terminal) if first < steps else trainer.step
    speed = Speed(first, steps, training_flops(config, recipe.data.sequence_length), _peak())
    batches = _batches(recipe, loader, mesh, first, speed)
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
        with speed.aside():
            loss = _validation_loss(trainer, state.params, validation, recipe, mesh)
        record({"step": made, "validation_loss": loss})
        if is_main():
            terminal.say(f"step {made}: validation loss {loss:.4f}, perplexity {np.exp(loss):.2f}")

    def save(made: int, state: TrainState) -> None:
        with speed.aside():
            checkpoints.save(made, state)

    callbacks = [Callback(recipe.train.checkpoint_every, save, at_end=True, at_stop=True)]
    if validation is not None:
        # Before the checkpoint: what a run resumes from is in metrics.jsonl already.
        callbacks.insert(0, Callback(recipe.train.evaluate_every or steps, validate, at_end=True))
        if latest is None:
            validate(first, state)
    with StopSignal(first, steps) as stop, contextlib.closing(terminal), contextlib.ExitStack() as ending:
        for sink in sinks:
            ending.callback(sink.close)
        made, state = train(step, state, batches, report, callbacks, stop)
        checkpoints.wait()
    finished = made == steps and not stop.asked
    companions = parts.companions | ({} if parts.chat_template is None else {CHAT_TEMPLATE: folder / CHAT_TEMPLATE})
    model = Model(config, state.params, parts.tokenizer, recipe.compute, mesh, tuple(companions.values()))
    if finished:
        model.save(folder / "model", overwrite=True)
    if is_main():
        draw_losses(read_metrics(folder / "metrics.jsonl"), folder / "loss.png")
    return Outcome(folder, made, finished, model)


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


def _state(recipe: Recipe, parts: Parts, checkpoints: RunCheckpoints, mesh: Mesh) -> TrainState:
    """The newest checkpoint's state, or a first one; made where it lives, never whole on one device."""
    config, trainer = parts.config, parts.trainer
    specs = declare_decoder(config)
    target = abstract_state(specs, trainer.optimizer, recipe.compute, mesh)
    if (latest := checkpoints.latest()) is not None:
        return checkpoints.restore(latest, target)
    if parts.source is not None:
        training = parts.source.training if recipe.init_optimizer else None
        return from_checkpoint(parts.source, training, trainer, mesh)

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
        arrays = layout.load(source.table, tensors, named(like))
        return build(specs, [arrays[path] for path in named(specs)])

    def taken(part: Any) -> Any:
        if isinstance(part, optax.ScaleByAdamState):
            return optax.ScaleByAdamState(taken(part.count), moments(mu, part.mu), moments(nu, part.nu))
        assert part.shape == (), "beside its moments AdamW holds counters, which count the same steps"
        return jax.device_put(np.asarray(step, part.dtype), part.sharding)

    opt_state = jax.tree.map(taken, target.opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState))
    return TrainState(taken(target.step), params, opt_state)


def _batches(recipe: Recipe, loader: Loader, mesh: Mesh, first: int, speed: Speed) -> Iterator[dict[str, jax.Array]]:
    rows = recipe.data.batch_size
    own = own_rows(rows, mesh)
    for batch in speed.timed(prefetched(loader, first, recipe.train.steps, own.start, own.stop)):
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


def _introduce(terminal: Terminal, recipe: Recipe, parts: Parts, mesh: Mesh, first: int, resumed: int | None) -> None:
    for note in () if parts.source is None else parts.source.notes:
        terminal.say(f"note: {note}")
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    tokens = recipe.data.batch_size * recipe.data.sequence_length
    terminal.say(
        f"{count_parameters(parts.config):,} parameters on {sizes} ({jax.devices()[0].device_kind}); "
        f"{parts.loader.num_tokens:,} tokens of text, {tokens:,} a step"
    )
    if resumed is not None:
        terminal.say(f"resuming after step {first}")
    elif first:
        terminal.say(f"going on after step {first} of init")
    elif parts.source is not None and (training := parts.source.training) is not None:
        terminal.say(
            f"note: the {training.step} steps of init and its moments of AdamW are left out; "
            "init_optimizer = true takes them"
        )


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
