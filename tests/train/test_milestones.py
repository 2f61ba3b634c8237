"""What a run writes for use elsewhere at milestones, its dtype, and checkpoints without the state of the optimizer."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import camelid
import camelid.runs.run
from camelid.checkpoint.registry import TRAIN_STATE, WRITABLE
from camelid.checkpoint.state import saved_state
from camelid.checkpoint.state.saved_state import steps_in
from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.parallel.mesh import one_device
from camelid.parallel.stop_signal import StopSignal
from camelid.runs.dry_run import dry_run
from camelid.runs.results import Results
from camelid.runs.run import run
from camelid.train.config import ExportFormat
from camelid.train.state import TrainState, start_state, with_new_optimizer_state
from runs import VOCAB, contents, lay_over, losses, recipe, tensor_bytes, tiny_run
from tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config(vocab_size=VOCAB, head_dim=8, bos_id=256, eos_ids=(257,))  # EasyLM's form can hold it
TOKENS = tiny_tokens(CONFIG, 2, 9)


class StopAfterTwo(StopSignal):
    def should_stop(self, step: int) -> bool:
        return step == 2


def stopped_after_two(table: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "StopSignal", StopAfterTwo)
        assert run(recipe(table)).steps == 2


def exporting_run(folder: Path, **fields: Any) -> dict[str, Any]:
    """A recipe's table: four steps, of which the second and the fourth are milestones."""
    shared = {"train__milestones_every": 2, "train__keep_checkpoints": 1}
    return small_run(folder, **shared | {"checkpoint": {"export": "hf", "dtype": "bfloat16"}} | fields)


def small_run(folder: Path, **fields: Any) -> dict[str, Any]:
    """A recipe's table: four steps of the model that CONFIG describes."""
    return tiny_run(folder, **{"model__head_dim": 8, "optimizer__decay_steps": 4} | fields)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    return run(recipe(exporting_run(tmp_path_factory.mktemp("straight"), ema={"decay": 0.5}))).folder


def peer_logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """transformers' logits, in float32, of the model in a folder, with PEFT's of an adapter."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(TOKENS, np.int64))).logits.numpy()


# Milestones -------------------------------------------------------------------------------------


def test_transformers_opens_a_milestone_and_computes_our_logits(straight: Path):
    assert steps_in(straight / "milestones") == [2, 4]
    for name in ("model", "model_ema"):
        milestone = straight / "milestones" / "2" / name
        ours = camelid.load(milestone, dtype="float32").logits(TOKENS)
        np.testing.assert_allclose(peer_logits(milestone), ours, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(straight / "milestones" / "2" / "model")
    assert tokenizer("hi").input_ids == [256, *b"hi"]


def test_only_what_is_written_for_use_elsewhere_is_rounded(straight: Path):
    trained: Any = camelid.load(straight / "checkpoints" / "2", dtype="float32").params.embed
    milestone: Any = camelid.load(straight / "milestones" / "2" / "model", dtype=None).params.embed
    assert milestone.dtype == jnp.bfloat16
    assert (milestone == trained.astype(jnp.bfloat16)).all()
    assert (milestone.astype(jnp.float32) != trained).any()
    assert {dtype for dtype, *_ in tensor_bytes(straight / "model").values()} == {"bfloat16"}
    arrays = saved_state.open_step(straight / "checkpoints", 2)
    assert {array.dtype.name for name, array in arrays.items() if name.startswith("params.")} == {"float32"}


def test_a_milestone_that_a_killed_process_did_not_write_is_made_up_for_and_written_once(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table = exporting_run(tmp_path, ema={"decay": 0.5})
    save = Results.save

    def dies(self: Results, state: Any, start: Any, place: Path, *about: Any) -> None:
        if place.name == "2":
            raise RuntimeError("killed")
        save(self, state, start, place, *about)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "save", dies)
        with pytest.raises(RuntimeError, match="killed"):
            run(recipe(table))
    place = tmp_path / "run" / "milestones"
    assert steps_in(tmp_path / "run" / "checkpoints") == [2]
    assert not place.exists()
    stopping = {**table, "train": table["train"] | {"steps": 3}}
    run(recipe(stopping))
    assert contents(place / "2") == contents(straight / "milestones" / "2")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    written = (place / "2" / "model" / "config.json").stat()
    run(recipe(table))
    assert sorted(path.name for path in place.iterdir()) == ["2", "4"]
    now = (place / "2" / "model" / "config.json").stat()
    assert (now.st_ino, now.st_mtime_ns) == (written.st_ino, written.st_mtime_ns), "it is written again"
    assert contents(place / "4") == contents(straight / "milestones" / "4")


def test_going_back_moves_later_milestones_aside(straight: Path, tmp_path: Path):
    shutil.copytree(straight, tmp_path / "run")
    table = exporting_run(straight.parent, ema={"decay": 0.5}) | {"run": str(tmp_path / "run")}
    expected = contents(straight / "milestones")
    run(recipe(table), from_step=2)
    aside = tmp_path / "run" / "set_aside_1"
    assert contents(aside / "milestones") == {name: x for name, x in expected.items() if name.startswith("4/")}
    assert contents(tmp_path / "run" / "milestones") == expected


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("merge", [False, True])
def test_milestones_of_adapters_are_opened_by_peft_or_merged(tmp_path: Path, merge: bool):
    base, dtype = tmp_path / "base", "float32" if merge else "bfloat16"
    camelid.Model(CONFIG, tiny_params(CONFIG), None, ComputeConfig(), one_device()).save(base)
    fields = {"lora": {"rank": 2, "merge": merge}, "optimizer__learning_rate": 0.1, "checkpoint__dtype": dtype}
    table = exporting_run(tmp_path, init=str(base), train__steps=3, **fields)
    del table["model"]
    run(recipe(table))
    assert steps_in(tmp_path / "run" / "milestones") == [2]
    milestone = tmp_path / "run" / "milestones" / "2"
    assert sorted(path.name for path in milestone.iterdir()) == (["adapter", "model"] if merge else ["adapter"])
    assert {kind for kind, *_ in tensor_bytes(milestone / "adapter").values()} == {dtype}
    trained = camelid.load(tmp_path / "run" / "checkpoints" / "2").logits(TOKENS)
    last = camelid.load(tmp_path / "run").logits(TOKENS)
    assert not np.allclose(trained, last, atol=1e-2), "the milestone is not the last step"
    ours = trained if merge else camelid.load(milestone / "adapter").logits(TOKENS)
    np.testing.assert_allclose(peer_logits(base, milestone / "adapter"), ours, rtol=1e-4, atol=1e-4)
    if merge:
        np.testing.assert_allclose(peer_logits(milestone / "model"), ours, rtol=1e-4, atol=1e-4)


def test_a_milestone_may_have_another_format(tmp_path: Path):
    fields = {"checkpoint__export": "easylm", "checkpoint__dtype": "float32", "ema": {"decay": 0.5}}
    run(recipe(exporting_run(tmp_path, train__steps=2, **fields)))
    milestone = tmp_path / "run" / "milestones" / "2" / "model"
    assert (milestone / "streaming_params").is_file()
    ours = camelid.load(tmp_path / "run" / "model").logits(TOKENS)
    np.testing.assert_array_equal(camelid.load(milestone).logits(TOKENS), ours)


def test_a_recipe_names_the_formats_that_hold_a_model_and_nothing_else():
    assert set(get_args(ExportFormat)) == set(WRITABLE) - {TRAIN_STATE}


def test_exports_that_cannot_work_are_refused_before_training(tmp_path: Path):
    for fields, problem in (
        ({"checkpoint__export": "bin"}, r"checkpoint\.export: 'bin' is not one of 'hf', 'meta'"),
        ({"checkpoint__dtype": "int8"}, r"checkpoint\.dtype: 'int8' is not one of"),
        ({"train__milestones_every": None}, r"checkpoint\.export = 'hf' writes milestones, and the recipe has none"),
        ({"init": "x", "lora": {}, "checkpoint__export": "gguf"}, r"checkpoint\.export = 'gguf' writes entire models"),
    ):
        table = exporting_run(tmp_path, **fields)
        table["train"] = {name: value for name, value in table["train"].items() if value is not None}
        with pytest.raises(UserError, match=problem):
            recipe(table)
    with pytest.raises(UserError, match="no field 'load_dataset_state'") as error:
        recipe(exporting_run(tmp_path, load_dataset_state="dataset.pkl"))
    assert error.value.advice == "A run keeps its place in the data: the same command resumes it with the next batch."
    with pytest.raises(UserError, match="head_dim"):  # EasyLM's heads add up to embed_dim
        run(recipe(exporting_run(tmp_path, checkpoint__export="easylm", model__head_dim=10)))
    with pytest.raises(UserError, match=r"restart_optimizer = true applies to checkpoints without"):
        run(recipe(exporting_run(tmp_path, checkpoint__restart_optimizer=True)))
    assert not (tmp_path / "run").exists()


# Checkpoints without the state of the optimizer ---------------------------------------------------


def without_moments(folder: Path, restart: bool = False, **fields: Any) -> dict[str, Any]:
    checkpoint = {"optimizer": False} | ({"restart_optimizer": True} if restart else {})
    return small_run(folder, checkpoint=checkpoint, **fields)


def test_a_run_without_moments_is_resumed_only_when_told(straight: Path, tmp_path: Path):
    table = without_moments(tmp_path)
    stopped_after_two(table)
    names = saved_state.open_step(tmp_path / "run" / "checkpoints", 2).keys()
    assert {name.partition(".")[0] for name in names} == {"step", "params", "counters"}
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"step 2 .* has no state of the optimizer") as error:
        run(recipe(table))
    assert "checkpoint.restart_optimizer = true" in error.value.advice
    assert f"init = '{tmp_path / 'run' / 'checkpoints' / '2'}'" in error.value.advice
    assert contents(tmp_path / "run") == before
    run(recipe(without_moments(tmp_path, restart=True)))
    ours, theirs = losses(tmp_path / "run"), losses(straight)
    assert [row["learning_rate"] for row in ours] == [row["learning_rate"] for row in theirs]
    assert ours[2]["loss"] == theirs[2]["loss"], "the same parameters and the same batch"
    assert ours[3]["loss"] != theirs[3]["loss"], "new moments"
    assert camelid.load(tmp_path / "run" / "model")


def test_a_run_without_moments_goes_on_with_checkpoints_that_have_them(tmp_path: Path):
    stopped_after_two(without_moments(tmp_path))
    before = contents(tmp_path / "run")
    for start in (run, dry_run):
        with pytest.raises(UserError, match=r"step 2 .* has no state of the optimizer"):
            start(recipe(small_run(tmp_path, checkpoint={"optimizer": True})))
    pair = small_run(tmp_path, checkpoint={"optimizer": True, "restart_optimizer": True}, train__steps=3)
    assert dry_run(recipe(pair)).first == 2
    assert contents(tmp_path / "run") == before
    run(recipe(pair))
    names = saved_state.open_step(tmp_path / "run" / "checkpoints", 3).keys()
    assert "opt_state" in {name.partition(".")[0] for name in names}
    assert run(recipe(lay_over(pair, {"train__steps": 4}))).finished, "the same command resumes the run"


def test_an_optimizer_that_keeps_nothing_but_its_schedule_restarts_with_the_same_bits(tmp_path: Path):
    sgd = {"optimizer__name": "sgd", "optimizer__momentum": 0.0, "optimizer__weight_decay": 0.1}
    run(recipe(without_moments(tmp_path / "straight", **sgd)))
    table = without_moments(tmp_path / "restarted", restart=True, **sgd)
    stopped_after_two(table)
    run(recipe(table))
    ours, theirs = (tensor_bytes(tmp_path / name / "run" / "model") for name in ("restarted", "straight"))
    assert ours == theirs


def test_checkpoints_that_have_the_state_of_the_optimizer_are_resumed_exactly(straight: Path, tmp_path: Path):
    stopped_after_two(small_run(tmp_path))
    run(recipe(without_moments(tmp_path)))
    assert [row["loss"] for row in losses(tmp_path / "run")] == [row["loss"] for row in losses(straight)]
    names = saved_state.open_step(tmp_path / "run" / "checkpoints", 4).keys()
    assert not any(name.startswith("opt_state.") for name in names)


def test_a_restarted_optimizer_has_new_moments_and_the_schedule_of_its_step():
    optimizer = optax.adamw(optax.linear_schedule(1.0, 0.0, 100))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    start = start_state({"w": jnp.ones(3)}, optimizer)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), start)
    state = with_new_optimizer_state(TrainState(jnp.int32(30), start.trainable, None), optimizer, target)
    adam, schedule = state.opt_state[0], state.opt_state[2]
    assert (int(adam.count), int(schedule.count)) == (0, 30)
    assert not any(np.any(x) for x in jax.tree.leaves((adam.mu, adam.nu)))


def test_a_run_without_a_checkpoint_table_is_resumed_as_before(straight: Path, tmp_path: Path):
    """Runs of an older camelid have neither table in their recipe.toml."""
    stopped_after_two(small_run(tmp_path))
    kept = tmp_path / "run" / "recipe.toml"
    text = kept.read_text()
    start = text.index("[checkpoint]")
    kept.write_text(text[:start] + text[text.index("\n[", start) + 1 :])
    run(recipe(small_run(tmp_path)))
    assert [row["loss"] for row in losses(tmp_path / "run")] == [row["loss"] for row in losses(straight)]
    assert json.loads((tmp_path / "run" / "finished.json").read_text()) == {"step": 4}
