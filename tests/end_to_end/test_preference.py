"""Runs on pairs of answers: what they compute, resume and refuse."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import camelid
import camelid.runs.reference
import camelid.runs.run
from camelid.api import Model
from camelid.data.config import Source
from camelid.data.preparation.prepare import prepare
from camelid.data.preparation.store import Store
from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.parallel.mesh import one_device
from camelid.parallel.stop_signal import StopSignal
from camelid.runs.recipe import structure, write_recipe
from camelid.runs.reference import REFERENCE
from camelid.runs.run import run
from camelid.text.tokenizer import load_tokenizer
from camelid.train.config import DPOConfig
from camelid.train.loggers import read_metrics
from runs import VOCAB, column, lay_over, losses, recipe, tensor_bytes
from text.tiny import save_byte_tokenizer
from tiny import tiny_config, tiny_params

pytestmark = pytest.mark.quick_compile

STEPS = 4
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
NAMES = (*REWARDS, "logps/chosen", "logps/rejected")
ABOUT_TIME = ("tokens_per_second", "mfu", "step_s", "data_s", "eta_s")


def save_init(folder: Path, seed: int = 0) -> None:
    config = tiny_config(vocab_size=VOCAB, context_length=128, num_layers=2, bos_id=256, eos_ids=(257,))
    tokenizer = load_tokenizer(save_byte_tokenizer(folder.with_name("tokenizer")))
    params = tiny_params(config, seed, scale=3)
    Model(config, params, tokenizer, ComputeConfig(), one_device(), tuple(tokenizer.files)).save(folder, overwrite=True)


def write_pairs(path: Path) -> Path:
    chosen, rejected = ["yes", "a cat", "of course"], ["no", "a dog", "go away", "never"]
    rows = [
        {"prompt": f"ask {number}", "chosen": chosen[number % 3], "rejected": rejected[number % 4]}
        for number in range(40)
    ]
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_run(folder: Path, **fields: Any) -> dict[str, Any]:
    """A recipe's table: the tiny model on made-up pairs, several in a row, some of them held out."""
    if not (init := folder / "init").exists():
        save_init(init)
    table = {
        "run": str(folder / "run"),
        "init": str(init),
        "data": {
            "train": [
                {"files": [str(write_pairs(folder / "pairs.jsonl"))], "kind": "preference", "template": "llama2"}
            ],
            "validation_fraction": 0.2,
            "sequence_length": 128,
            "batch_size": 8,
        },
        "train": {"steps": STEPS, "evaluate_every": 2, "checkpoint_every": 2},
        "dpo": {"beta": 0.5},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
    }
    return {name: value for name, value in lay_over(table, fields).items() if value is not None}


def on_one_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> None:
    on_one_device(monkeypatch)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one device, and its files."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        assert run(recipe(pairs_run(folder))).finished
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    found = read_metrics(folder / "run" / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in ABOUT_TIME} for row in found]


def validations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if "validation_loss" in row]


# What a run does -----------------------------------------------------------------------------------------


def test_a_run_reports_the_metrics_of_trl_and_begins_at_the_reference(alone: Path):
    first, last = losses(alone / "run")[0], losses(alone / "run")[-1]
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert all(abs(first[name]) < 1e-4 for name in REWARDS if name != "rewards/accuracies")
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-4)
    assert first["weight"] > 8, "rows hold several pairs"
    for row in validations(alone):
        assert row.keys() == {"step", "validation_loss", *(f"validation_{name}" for name in NAMES)}
    assert [row["step"] for row in validations(alone)] == [0, 2, 4]
    before, after = validations(alone)[0], validations(alone)[-1]
    assert before["validation_loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert after["validation_loss"] < np.log(2) - 0.05
    assert after["validation_rewards/accuracies"] > 0.7


def test_the_values_of_the_reference_are_those_of_init(alone: Path):
    """One document at a time, by the public functions."""
    model = camelid.load(alone / "init")
    (store,) = json.loads((alone / "run" / "data.json").read_text())["train"]
    data = Store.open(store["folder"])
    with np.load(alone / "run" / REFERENCE) as arrays:
        values = arrays["train.0"]
    assert len(values) == data.num_documents == 64
    for number in (0, 1, 37):
        begin, end = data.offsets[number : number + 2].tolist()
        logits = np.asarray(model.logits([data.tokens[begin:end].tolist()])[0, :-1], np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets, weights = data.tokens[begin + 1 : end], data.weights(begin + 1, end)
        expected = (log_probs[np.arange(len(targets)), targets] * weights).sum()
        assert values[number] == pytest.approx(expected, rel=1e-5)


class StopAfterTwo(StopSignal):
    def should_stop(self, step: int) -> bool:
        return step == 2


@pytest.mark.usefixtures("one")
def test_a_resumed_run_ends_with_the_same_bits_and_needs_no_init(alone: Path, tmp_path: Path):
    table = pairs_run(tmp_path, data__train=pairs_run(alone)["data"]["train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "StopSignal", StopAfterTwo)
        assert not run(recipe(table)).finished
    shutil.rmtree(tmp_path / "init")
    assert run(structure(table)).finished
    assert rows(tmp_path) == rows(alone)
    assert tensor_bytes(tmp_path / "run" / "model") == tensor_bytes(alone / "run" / "model")


def test_eight_devices_and_microbatches_compute_what_one_device_does(alone: Path, tmp_path: Path):
    table = pairs_run(tmp_path, mesh={"data": 1, "fsdp": 4, "tensor": 2}, train__accumulate=2)
    run(recipe(table))
    ours, reference = losses(tmp_path / "run"), losses(alone / "run")
    assert column(ours, "weight").tolist() == column(reference, "weight").tolist()
    for name in ("loss", *NAMES):
        np.testing.assert_allclose(column(ours, name), column(reference, name), rtol=1e-5, atol=2e-5, err_msg=name)
    for row, other in zip(validations(tmp_path), validations(alone), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=2e-5)


@pytest.mark.usefixtures("one")
def test_the_reference_of_new_adapters_is_the_base_and_that_of_continued_ones_is_init(tmp_path: Path):
    fields = {"lora": {"rank": 2}, "train__steps": 2, "optimizer__learning_rate": 1e-2}
    run(recipe(pairs_run(tmp_path, **fields)))
    first, last = losses(tmp_path / "run")
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert last["rewards/margins"] > 1e-3
    assert not (tmp_path / "run" / REFERENCE).exists()
    further = tmp_path / "further"
    run(recipe(pairs_run(tmp_path, run=str(further), init=str(tmp_path / "run" / "adapter"), **fields)))
    again, _ = losses(further)
    assert abs(again["rewards/margins"]) < 1e-4 * abs(last["rewards/margins"]) + 1e-5, "it is compared with itself"
    assert (further / REFERENCE).exists()


# The file of the reference -------------------------------------------------------------------------------


def killed_before_a_checkpoint(table: dict[str, Any]) -> None:
    """Starts a run that dies at its first step."""

    def dies(*_: Any) -> None:
        raise RuntimeError("power failure")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "train_steps", dies)
        with pytest.raises(RuntimeError, match="power failure"):
            run(recipe(table))


@pytest.mark.usefixtures("one")
def test_a_run_without_a_checkpoint_keeps_the_values_of_the_same_reference_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compute, calls = camelid.runs.reference._computed, []

    def counted(*given: Any) -> Any:
        calls.append(given)
        return compute(*given)

    monkeypatch.setattr(camelid.runs.reference, "_computed", counted)
    path = tmp_path / "run" / REFERENCE

    def values() -> np.ndarray:
        with np.load(path) as arrays:
            return arrays["train.0"]

    killed_before_a_checkpoint(pairs_run(tmp_path))
    first = values()
    killed_before_a_checkpoint(pairs_run(tmp_path))
    assert len(calls) == 1
    path.write_bytes(path.read_bytes()[:100])
    killed_before_a_checkpoint(pairs_run(tmp_path))
    np.testing.assert_array_equal(values(), first)
    assert len(calls) == 2
    save_init(tmp_path / "init", seed=7)
    killed_before_a_checkpoint(pairs_run(tmp_path))
    assert len(calls) == 3
    assert np.abs(values() - first).max() > 0.1


@pytest.mark.usefixtures("one")
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PK")], ids=["missing", "damaged"])
def test_a_run_does_not_resume_without_its_reference(alone: Path, tmp_path: Path, damage: Callable[[Path], Any]):
    shutil.copytree(alone, tmp_path / "copy")
    folder = tmp_path / "copy" / "run"
    damage(folder / REFERENCE)
    table = pairs_run(alone, run=str(folder), train__steps=STEPS + 1)
    with pytest.raises(UserError, match=r"reference\.npz is missing or damaged.*\nRestore it from a copy"):
        run(recipe(table))


@pytest.mark.usefixtures("one")
def test_a_reference_that_is_not_finite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        camelid.runs.reference, "_log_probs", lambda params, batch, objective: jnp.full((8, 64, 2), jnp.nan)
    )
    with pytest.raises(UserError, match=r"reference gives to 64 of 64 answers are not finite\nUse compute\.dtype"):
        run(recipe(pairs_run(tmp_path)))
    assert not (tmp_path / "run" / REFERENCE).exists()


# Recipes -------------------------------------------------------------------------------------------------

PAIRS = {"files": ["a.jsonl"], "kind": "preference"}


def table(**fields: Any) -> dict[str, Any]:
    base = {"run": "r", "init": "i", "data": {"train": [PAIRS], "sequence_length": 8, "batch_size": 2}}
    found = lay_over(base | {"train": {"steps": 1}, "dpo": {}}, fields)
    return {name: value for name, value in found.items() if value is not None}


def test_a_recipe_with_dpo_is_read_and_written():
    found = structure(table(dpo__loss="ipo", dpo__beta=1))
    assert found.dpo == DPOConfig(beta=1.0, loss="ipo")
    assert structure(table()).dpo == DPOConfig()
    assert structure(tomllib.loads(write_recipe(found))) == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dpo": None}, r"kind = 'preference' holds pairs.*no loss that compares them\nAdd a table \[dpo\]"),
        ({"data__train": ["a.txt"]}, r"\[dpo\] compares pairs.*source of kind = 'text'\nUse kind = 'preference'"),
        ({"data__train": [PAIRS, {"files": ["b.jsonl"], "kind": "chat"}]}, r"a source of kind = 'chat'"),
        ({"data__validation": ["b.txt"]}, r"a source of kind = 'text'"),
        ({"init": None, "tokenizer": "t", "model": {"preset": "llama2_7b"}}, r"\[dpo\] and no init\nSet init"),
        ({"loss": {"z": 1e-4}}, r"\[loss\] does not apply to the loss of \[dpo\]"),
        ({"train__metrics": ["accuracy"]}, r"train\.metrics = 'accuracy' does not apply to the loss of \[dpo\]"),
        ({"dpo__loss": "hinge"}, r"dpo\.loss: 'hinge' is not one of 'sigmoid', 'ipo'"),
        ({"dpo__pref_beta": 0.1}, r"no field 'dpo\.pref_beta'\nDid you mean 'dpo\.beta'\?"),
    ],
    ids=str,
)
def test_data_and_loss_that_do_not_fit_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        structure(table(**fields))


@pytest.mark.usefixtures("one")
def test_a_prepared_store_and_the_loss_have_to_fit(alone: Path, tmp_path: Path):
    tokenizer = load_tokenizer(alone / "init")
    source = Source(files=(str(alone / "pairs.jsonl"),), kind="preference", template="llama2")
    (tmp_path / "story.txt").write_text("a story that is long enough " * 9)
    stores = {
        "pairs": prepare([source], tokenizer, tmp_path / "pairs").folder,
        "text": prepare([Source(files=(str(tmp_path / "story.txt"),))], tokenizer, tmp_path / "text").folder,
    }

    def started(name: str, **fields: Any) -> None:
        train = [{"files": [str(stores[name])], "kind": "tokens"}]
        found = pairs_run(alone, run=str(tmp_path / "run"), data__train=train, data__packing="best_fit", **fields)
        run(recipe(lay_over(found, {"data__validation_fraction": 0.0})))

    with pytest.raises(UserError, match=r"pairs holds pairs of answers, and the recipe has no loss that compares them"):
        started("pairs", dpo=None)
    with pytest.raises(UserError, match=r"\[dpo\] compares pairs of answers, and .*text was not prepared with kind"):
        started("text")
    assert not (tmp_path / "run").exists()
