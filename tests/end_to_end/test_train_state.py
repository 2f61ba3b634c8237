"""Training goes on from a train state of another system, and from a run's own folder."""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import camelid
import camelid.runs.components
import camelid.runs.run
from camelid.api import load_params
from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.convert import convert
from camelid.checkpoint.layout import slice_reader
from camelid.checkpoint.registry import open_checkpoint
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.model.config import ComputeConfig
from camelid.model.params import named
from camelid.parallel.hosts import to_host
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from camelid.parallel.stop_signal import StopSignal
from camelid.runs.adamw_import import import_adamw
from camelid.runs.components import Components
from camelid.runs.recipe import Recipe, read_recipe
from camelid.runs.start import abstract_start
from camelid.train.loggers import read_metrics
from camelid.train.state import TrainState, start_state
from camelid.train.step import TrainStep
from runs import assert_refused, called, column, losses, recipe, stories_run, tensor_bytes, tiny_run, write_recipe_file

STATE = "streaming_train_state"


@pytest.fixture
def theirs(assets: Path, stories: Path, tmp_path: Path) -> Path:
    """What EasyLM's training left, beside the config.json that its files lack."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("streaming_params_fp32", STATE):
        shutil.copy(assets / "golden" / "easylm" / name, folder)
    config = json.loads((stories / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    for file in stories.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


# EasyLM's own training, done again ----------------------------------------------------------


@pytest.fixture
def golden(assets: Path) -> dict[str, Any]:
    return json.loads((assets / "golden" / "easylm" / "training_run.json").read_text())


def easylm_recipe(theirs: Path, assets: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe of EasyLM's run, whose relative paths are those of the folder `theirs`."""
    on_one_device(monkeypatch)
    monkeypatch.chdir(theirs)
    shutil.copy(assets / "golden" / "easylm" / "train.jsonl", theirs)
    return read_recipe(Path(__file__).parent / "easylm_run.toml")


def batches_from(components: Components, step: int) -> Iterator[dict[str, jax.Array]]:
    """The batches of the steps after `step`."""
    for number in itertools.count(step):
        yield {name: jnp.asarray(array) for name, array in vars(components.loader.batch(number)).items()}


def from_params(source: Checkpoint, step: TrainStep, mesh: Mesh) -> TrainState:
    """The state at step 0 with the parameters of a checkpoint."""
    return start_state(load_params(source, ComputeConfig(), mesh), step.optimizer)


def from_moments(
    source: Checkpoint, step: TrainStep, mesh: Mesh, compute: ComputeConfig = ComputeConfig()
) -> TrainState:
    """The state with the parameters, step and moments of a checkpoint."""
    return import_adamw(source, abstract_start(source.config, step.optimizer, compute, mesh), compute, mesh)


def trained(step: TrainStep, state: TrainState, batches: Iterator, steps: int) -> tuple[TrainState, list[dict]]:
    """The state after some steps, and the metrics of each."""
    compiled, rows = jax.jit(step), []
    for _ in range(steps):
        state, metrics = compiled(state, next(batches))
        rows.append(to_host(metrics))
    return state, rows


def adam(state: TrainState) -> Any:
    (found,) = (part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState))
    return found


def records(file: Path) -> dict[str, Any]:
    """The arrays of a stream of EasyLM, and its counts, by name."""
    unpacker = msgpack.Unpacker(max_buffer_size=0, ext_hook=lambda code, data: msgpack.unpackb(data))
    unpacker.feed(file.read_bytes())
    found = {}
    for key, value in unpacker:
        held = msgpack.unpackb(value, ext_hook=lambda code, data: msgpack.unpackb(data))
        if isinstance(held, list):
            shape, dtype, data = held
            held = np.frombuffer(data, dtype).reshape(shape)
        found["/".join(key)] = held
    return found


def assert_near(found: Any, expected: Any, name: str) -> None:
    """Equal to 1e-5 of the largest element."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_a_run_of_easylm_is_reproduced_and_goes_on_from_the_state_that_it_left(
    assets: Path, theirs: Path, golden: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    whole = easylm_recipe(theirs, assets, monkeypatch)
    folder, mesh = camelid.runs.run.run(whole).folder, one_device()
    components = camelid.runs.components.build_components(whole, mesh)
    trainer, rows, steps = components.step, losses(folder), golden["steps"]
    for name in ("loss", "gradient_norm", "accuracy", "param_norm"):
        np.testing.assert_allclose(column(rows, name), column(steps, name), rtol=1e-5, err_msg=name)
    # EasyLM logs the learning rate of the next update.
    assert rows[0]["learning_rate"] == 0
    rates = [*column(rows, "learning_rate")[1:], float(trainer.schedule(6))]
    np.testing.assert_allclose(rates, column(steps, "learning_rate"), rtol=1e-5)

    end, own = open_checkpoint(theirs / STATE), open_checkpoint(folder)
    ours, theirs_then = (from_moments(each, trainer, mesh) for each in (own, end))
    assert (int(ours.step), int(theirs_then.step), int(adam(theirs_then).count)) == (6, 6, 6)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs_then)
    pairs = {
        "params": (ours.trainable, theirs_then.trainable),
        "mu": (adam(ours).mu, adam(theirs_then).mu),
        "nu": (adam(ours).nu, adam(theirs_then).nu),
    }
    for name, (left, right) in pairs.items():
        for path, leaf in named(left).items():
            assert_near(leaf, named(right)[path], f"{name} {path}")

    convert(folder, theirs / "written", to="easylm-trainstate")
    written, held = records(theirs / "written" / STATE), records(theirs / STATE)
    assert list(written) == list(held)
    for name, value in held.items():
        assert_near(written[name], value, name)

    more = list(itertools.islice(batches_from(components, 6), 4))
    rows = [trained(trainer, start, iter(more), 4)[1] for start in (ours, theirs_then)]
    np.testing.assert_allclose(column(rows[0], "loss"), column(rows[1], "loss"), rtol=0, atol=5e-6)
    # And not so without the moments, so that this says something of them.
    bare = replace(from_params(end, trainer, mesh), step=theirs_then.step)
    _, other = trained(trainer, bare, iter(more), 4)
    assert np.abs(column(other, "loss") - column(rows[0], "loss")).max() > 1e-3


# A recipe that goes on from it ---------------------------------------------------------------


def going_on(folder: Path, assets: Path, theirs: Path, **fields: Any) -> dict[str, Any]:
    own = {"init": f"trainstate::{theirs / STATE}", "init_optimizer": True, "train": {"steps": 12}}
    return stories_run(folder, assets, **own | fields)


def on_one_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


def stopping_after(step: int) -> type[StopSignal]:
    return type("Stopping", (StopSignal,), {"should_stop": lambda self, made: made == step})


def same_rows(left: Path, right: Path, *names: str) -> bool:
    return all(column(losses(left), name).tolist() == column(losses(right), name).tolist() for name in ("step", *names))


@pytest.mark.quick_compile
def test_a_recipe_goes_on_from_the_step_of_a_train_state_on_any_mesh(
    assets: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "eight").mkdir()
    outcome = camelid.runs.run.run(recipe(going_on(tmp_path / "eight", assets, theirs, mesh={"data": 2, "tensor": 2})))
    assert outcome.model.mesh.size == 8
    on_one_device(monkeypatch)
    table = going_on(tmp_path, assets, theirs, train__checkpoint_every=5)
    done = called("train", write_recipe_file(table, tmp_path / "recipe.toml"))
    assert done.returncode == 0, done.stderr
    assert "continuing after step 6 of init" in done.stderr
    assert "resuming" not in done.stderr
    assert "are not used" not in done.stderr
    rows, others = losses(tmp_path / "run"), losses(tmp_path / "eight" / "run")
    assert column(rows, "step").tolist() == column(others, "step").tolist() == [7, 8, 9, 10, 11, 12]
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(column(rows, name), column(others, name), rtol=1e-4, err_msg=name)
    steps = sorted(file.name for file in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == ["10", "12"]

    # The seventh step is that of the seventh batch, with these moments.
    whole = recipe(table | {"run": str(tmp_path / "another")})  # one that has not begun
    components = camelid.runs.components.build_components(whole, one_device())
    assert components.source is not None
    state = from_moments(components.source, components.step, one_device())
    _, seventh = trained(components.step, state, iter([vars(components.loader.batch(6))]), 1)
    for name in ("loss", "weight", "gradient_norm", "learning_rate"):
        assert seventh[0][name] == pytest.approx(rows[0][name], rel=1e-6), name


def test_a_run_that_began_so_goes_on_from_its_own_checkpoints(
    assets: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on_one_device(monkeypatch)
    fields = {"data__validation_fraction": 0.2, "train__evaluate_every": 4, "train__checkpoint_every": 2}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = recipe(going_on(tmp_path / "whole", assets, theirs, **fields))
    camelid.runs.run.run(whole)
    cut = recipe(going_on(tmp_path / "cut", assets, theirs, **fields))
    for step in (7, 9):
        with monkeypatch.context() as patch:
            patch.setattr(camelid.runs.run, "StopSignal", stopping_after(step))
            outcome = camelid.runs.run.run(cut)
        assert (outcome.steps, outcome.finished) == (step, False)
        if step == 7:
            shutil.rmtree(outcome.folder / "checkpoints")  # as if killed before the first one: it begins again
    camelid.runs.run.run(cut)
    runs = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    assert same_rows(*runs, "loss", "gradient_norm", "learning_rate")
    assert tensor_bytes(runs[0] / "model") == tensor_bytes(runs[1] / "model")
    rows = read_metrics(runs[1] / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation_loss" in row] == [6, 8, 12]
    assert [row["step"] for row in rows if "loss" in row] == [7, 8, 9, 10, 11, 12]


def test_without_the_flag_it_begins_at_step_0_and_says_what_is_left_out(
    assets: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on_one_device(monkeypatch)
    table = going_on(tmp_path, assets, theirs, init_optimizer=False, train__steps=2, optimizer__decay_steps=12)
    done = called("train", write_recipe_file(table, tmp_path / "recipe.toml"))
    assert done.returncode == 0, done.stderr
    assert (
        "the step (6) and the AdamW moments of init are not used; init_optimizer = true continues from them"
        in done.stderr
    )
    assert [row["step"] for row in losses(tmp_path / "run")] == [1, 2]
    table["train"]["steps"] = 3
    again = called("train", write_recipe_file(table, tmp_path / "recipe.toml"))
    assert "resuming after step 2" in again.stderr
    assert "are not used" not in again.stderr


@pytest.mark.parametrize(
    ("fields", "about"),
    [
        ({"init": "{theirs}/streaming_params_fp32"}, "streaming_params_fp32' has no step and no moments of AdamW"),
        ({"init": "trainstate_params::{theirs}"}, "has no step and no moments of AdamW"),
        ({"train__steps": 6}, "init has already made 6 steps, and the recipe sets train.steps = 6"),
        ({"train__steps": 5}, "init has already made 6 steps, and the recipe sets train.steps = 5"),
    ],
)
def test_a_training_that_cannot_go_on_is_refused(
    assets: Path,
    theirs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    about: str,
):
    on_one_device(monkeypatch)
    fields = {name: value.format(theirs=theirs) if name == "init" else value for name, value in fields.items()}
    table = going_on(tmp_path, assets, theirs, **fields)
    assert_refused(called("train", write_recipe_file(table, tmp_path / "recipe.toml")), about)
    assert not (tmp_path / "run").exists()


def test_moments_without_an_init_are_refused(tmp_path: Path):
    table = tiny_run(tmp_path, init_optimizer=True)
    assert_refused(called("train", write_recipe_file(table, tmp_path / "recipe.toml")), "init_optimizer and no init")
    assert not (tmp_path / "run").exists()


def test_a_state_in_bfloat16_keeps_its_moments_in_float32(assets: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch):
    whole = easylm_recipe(theirs, assets, monkeypatch)
    trainer = camelid.runs.components.build_components(whole, one_device()).step
    end = open_checkpoint(theirs / STATE)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = from_moments(end, trainer, mesh, ComputeConfig(param_dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trainable)} == {"bfloat16"}
    assert end.training is not None
    for moments, tensors in ((adam(state).mu, end.training.mu), (adam(state).nu, end.training.nu)):
        read = slice_reader(end.table, tensors)
        for path, leaf in named(moments).items():
            assert leaf.dtype == jnp.float32
            assert leaf.sharding == named(state.trainable)[path].sharding
            layer = 3 if path.startswith("layers.") else None
            held = np.asarray(leaf)[() if layer is None else layer]
            index = tuple(slice(0, n) for n in held.shape)
            np.testing.assert_array_equal(held, read(path, layer, index, np.dtype(np.float32)), err_msg=path)


# A run's own folder --------------------------------------------------------------------------


def small(folder: Path, **fields: Any) -> dict[str, Any]:
    """A recipe of six steps from scratch, of a model that EasyLM can hold: its heads add up to embed_dim."""
    folder.mkdir(exist_ok=True)
    steps = {"steps": 6, "checkpoint_every": 2}
    return tiny_run(folder, **{"train": steps, "data__shuffle": True, "model__head_dim": 8} | fields)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, all its checkpoints kept; its text and tokenizer are beside it."""
    folder = tmp_path_factory.mktemp("shared") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        return camelid.runs.run.run(recipe(small(folder, train__keep_checkpoints=9))).folder


@pytest.fixture
def whole(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run that tests share and do not change; other runs of the test are on one device, as it is."""
    on_one_device(monkeypatch)
    return shared


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run, that a test may change."""
    return shutil.copytree(whole, tmp_path / "copied")


def killed(folder: Path, last: int) -> tuple[Path, dict[int, TrainState]]:
    """The same run, ended after a step as a power failure would; its folder, and the states that it saved."""
    held: dict[int, TrainState] = {}
    save = RunCheckpoints.save

    def keep(self: RunCheckpoints, made: int, state: TrainState) -> None:
        held[made] = to_host(state)
        save(self, made, state)

    class Failing(StopSignal):
        def should_stop(self, step: int) -> bool:
            if step == last:
                raise RuntimeError("power failure")
            return False

    whole = recipe(small(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCheckpoints, "save", keep)
        patch.setattr(camelid.runs.run, "StopSignal", Failing)
        with pytest.raises(RuntimeError, match="power failure"):
            camelid.runs.run.run(whole)
    steps = folder / "run" / "checkpoints"
    shutil.copytree(steps / str(max(held)), steps / f"{last}.orbax-checkpoint-tmp-7")  # half-written
    return folder / "run", held


@pytest.mark.quick_compile
def test_a_run_killed_in_the_middle_opens_as_a_model_and_still_goes_on(tmp_path: Path, whole: Path):
    run, held = killed(tmp_path / "killed", 3)
    assert list(held) == [2]
    assert not (run / "model").exists()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    model, tokens = camelid.load(run), np.arange(24)[None]
    theirs = replace(model, params=jax.tree.map(jnp.asarray, held[2].trainable))
    np.testing.assert_array_equal(model.logits(tokens), theirs.logits(tokens))
    done = called("generate", run, "abc", "--max-new-tokens", "5", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["completions"][0]["tokens"]) == 5
    told = called("inspect", run, "--json")
    assert json.loads(told.stdout)["bytes"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(held[2].trainable))
    assert called("convert", run, tmp_path / "hf", "--verify").returncode == 0
    theirs.save(tmp_path / "saved")
    assert tensor_bytes(tmp_path / "hf") == tensor_bytes(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "hf").iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before

    camelid.runs.run.run(recipe(small(tmp_path / "killed")))
    assert same_rows(run, whole, "loss", "gradient_norm", "learning_rate")
    assert tensor_bytes(run / "model") == tensor_bytes(whole / "model")


@pytest.mark.parametrize(("step", "begins"), [("checkpoints/2", 3), ("checkpoints/4", 5)])
def test_another_run_that_goes_on_from_its_step_is_the_run_itself(tmp_path: Path, whole: Path, step: str, begins: int):
    table = small(tmp_path / "other", init=str(whole / step), init_optimizer=True)
    del table["model"], table["tokenizer"]
    outcome = camelid.runs.run.run(recipe(table))
    rows, reference = losses(outcome.folder), losses(whole)[begins - 1 :]
    for name in ("step", "loss", "gradient_norm", "learning_rate", "weight"):
        assert column(rows, name).tolist() == column(reference, name).tolist(), name
    assert tensor_bytes(outcome.folder / "model") == tensor_bytes(whole / "model")


def test_a_run_goes_on_from_what_was_written_for_easylm(tmp_path: Path, whole: Path):
    """Through a train state of EasyLM, whose config.json is taken away and said by the recipe."""
    assert convert(whole / "checkpoints" / "4", tmp_path / "state", to="easylm-trainstate") == ()
    (tmp_path / "state" / "config.json").unlink()
    state = f"trainstate::{tmp_path / 'state' / 'streaming_train_state'}"
    outcome = camelid.runs.run.run(recipe(small(tmp_path / "other", init=state, init_optimizer=True)))
    rows, reference = losses(outcome.folder), losses(whole)[4:]
    for name in ("step", "loss", "gradient_norm", "learning_rate", "weight"):
        assert column(rows, name).tolist() == column(reference, name).tolist(), name
    assert tensor_bytes(outcome.folder / "model") == tensor_bytes(whole / "model")


def test_a_run_may_be_started_again_when_its_init_has_gone_on_further(tmp_path: Path, whole: Path, copied: Path):
    table = small(tmp_path / "other", init=str(copied), init_optimizer=True, train__steps=7, optimizer__decay_steps=6)
    del table["model"], table["tokenizer"]
    outcome = camelid.runs.run.run(recipe(table))
    assert [row["step"] for row in losses(outcome.folder)] == [7]
    camelid.runs.run.run(recipe(small(whole.parent, run=str(copied), train__steps=9)))
    again = camelid.runs.run.run(recipe(table))
    assert (again.steps, again.finished) == (7, True)


def test_a_run_of_an_older_camelid_may_go_on_and_opens_then(whole: Path, copied: Path):
    """Its folder lacks files, and its recipe fields, that came later."""
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "finished.json"):
        (copied / file).unlink()
    kept = (copied / "recipe.toml").read_text()
    (copied / "recipe.toml").write_text(kept.replace("init_optimizer = false\n", ""))
    assert (copied / "recipe.toml").read_text() != kept
    assert_refused(called("inspect", copied), "has no config.json, so it was started by an older version of camelid")
    camelid.runs.run.run(recipe(small(whole.parent, run=str(copied), train__keep_checkpoints=9)))
    assert camelid.load(copied).generate("ab", max_new_tokens=2)
