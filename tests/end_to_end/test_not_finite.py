"""Infinite and NaN values end a run with its good checkpoints kept, and are named wherever they come from."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import camelid.runs.run
from camelid.checkpoint.convert import convert
from camelid.checkpoint.integrity import checksum, checksum_arrays, count_not_finite
from camelid.checkpoint.state import orbax_state as native
from camelid.checkpoint.state.saved_state import verify_step
from camelid.errors import UserError
from camelid.parallel.mesh import one_device
from camelid.train.loggers import MetricsFile
from runs import assert_refused, called, lay_over, recipe, tensor_bytes, tiny_run, write_recipe_file

pytestmark = pytest.mark.quick_compile


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


def diverging(folder: Path, **fields: Any) -> dict[str, Any]:
    """The loss of its second step is not finite, while the state after the first one is."""
    optimizer = {"learning_rate": 1e30, "clip_norm": math.inf, "warmup_steps": 0}
    return tiny_run(
        folder, **{"train": {"steps": 6, "checkpoint_every": 1, "max_skipped": 0}, "optimizer": optimizer} | fields
    )


def overflowing(folder: Path) -> dict[str, Any]:
    """The first update makes numbers that float32 cannot hold."""
    optimizer = {"learning_rate": 3e38, "weight_decay": 100, "final_fraction": 1.0, "warmup_steps": 0}
    return tiny_run(folder, train={"steps": 1}, optimizer=optimizer)


def train(folder: Path, table: dict[str, Any]):
    return called("train", write_recipe_file(table, folder / "recipe.toml"))


def strict_rows(path: Path) -> list[dict[str, Any]]:
    """The rows, read as a reader of JSON does who knows no NaN."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps_of(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_finite_ends_the_run_at_its_step_with_the_last_good_checkpoint(
    tmp_path: Path, log_every: int
):
    table = diverging(tmp_path, train__keep_checkpoints=1, train__log_every=log_every)
    run = tmp_path / "run"
    for _ in range(2):  # the same command ends in the same way
        ended = train(tmp_path, table)
        assert_refused(ended, "step 2 has loss ")
        assert "The last checkpoint, of step 1, is kept. The same command would stop here again: start" in ended.stderr
        assert f"init = '{run / 'checkpoints' / '1'}', with AdamW also init_optimizer = true" in ended.stderr
        assert steps_of(run) == ["1"]
        assert verify_step(run / "checkpoints" / "1") is None
        assert not (run / "model").exists()
        rows = strict_rows(run / "metrics.jsonl")
        assert [row["step"] for row in rows] == ([1, 2] if log_every == 1 else [2])
        assert rows[-1]["loss"] is None or rows[-1]["gradient_norm"] is None


def test_another_run_may_go_on_from_the_last_good_checkpoint(tmp_path: Path):
    assert train(tmp_path, diverging(tmp_path, optimizer__learning_rate=1e30)).returncode == 2
    (tmp_path / "next").mkdir()
    fields = {"init": str(tmp_path / "run" / "checkpoints" / "1"), "init_optimizer": True, "train__steps": 2}
    table = tiny_run(tmp_path / "next", **fields)
    del table["model"], table["tokenizer"]
    ended = train(tmp_path / "next", table)
    # Its parameters are of the size of the learning rate, so that it ends at once; but it does begin.
    assert "continuing after step 1 of init" in ended.stderr


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path):
    """The loss and the gradients of the last step are finite, what the update makes is not."""
    ended = train(tmp_path, overflowing(tmp_path))
    assert_refused(ended, "the state after step 1 has infinite or NaN values in params.embed (")
    assert "There is no checkpoint yet." in ended.stderr
    assert not (tmp_path / "run" / "model").exists()


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    validated = iter([3.0, 2.0, math.nan])
    monkeypatch.setattr(camelid.runs.run, "mean_losses", lambda *given: {"loss": next(validated)})
    train_fields = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 2}
    ended = train(tmp_path, tiny_run(tmp_path, train=train_fields, data__validation_fraction=0.1))
    assert_refused(ended, "after step 4 the validation loss is nan")
    assert "The last checkpoint, of step 2, is kept." in ended.stderr
    assert steps_of(tmp_path / "run") == ["2"]
    assert strict_rows(tmp_path / "run" / "metrics.jsonl")[-1] == {"step": 4, "validation_loss": None}


def test_a_checkpoint_of_an_older_camelid_that_is_not_finite_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table = overflowing(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(native, "checksum_arrays", lambda state: ({}, {}))  # as before there was a check
        camelid.runs.run.run(recipe(table))
    again = train(tmp_path, lay_over(table, {"train__steps": 2}))
    assert_refused(again, "the checkpoint of step 1 in ", "is damaged: infinite or NaN values in params.embed (")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_are_json_whatever_the_numbers(tmp_path: Path, value: float):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1, "loss": value, "mfu": None, "gradient_norm": 0.5})
    metrics.close()
    expected = {"step": 1, "loss": None, "mfu": None, "gradient_norm": 0.5}
    assert strict_rows(tmp_path / "metrics.jsonl") == [expected]
    # Those of an older camelid are mended when a run goes on.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": -Infinity}\n')
    MetricsFile(tmp_path / "metrics.jsonl", 2).close()
    assert strict_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]


# Weights ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run."""
    table = tiny_run(tmp_path_factory.mktemp("finite"), train={"steps": 1}, model__head_dim=8)  # as Meta's format asks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
        return camelid.runs.run.run(recipe(table)).folder / "model"


def edited(model: Path, folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of a model with other values."""
    shutil.copytree(model, folder)
    tensors = {name: array.copy() for name, array in load_file(model / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def model(finite: Path, tmp_path: Path) -> Path:
    """The same model, with an infinity in one tensor and two NaN in another."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.embed_tokens.weight"][3, 4] = -math.inf
        tensors["model.layers.1.mlp.up_proj.weight"][5, :2] = math.nan

    return edited(finite, tmp_path / "model", edit)


def test_training_does_not_begin_from_weights_that_are_not_finite(tmp_path: Path, model: Path):
    (tmp_path / "next").mkdir()
    table = tiny_run(tmp_path / "next", init=str(model))
    del table["model"], table["tokenizer"]
    about = f"init = '{model}' has infinite or NaN values in params.embed (1), params.layers.mlp.up_proj (2)"
    assert_refused(train(tmp_path / "next", table), about)
    assert not (tmp_path / "next" / "run").exists()


@pytest.mark.parametrize("to", ["hf", "meta", "megatron"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_conversion_keeps_them_and_says_where_they_are(tmp_path: Path, model: Path, to: str, dtype: str | None):
    parts = {"tensor_parallel": 2} if to == "meta" else {}
    notes = convert(model, tmp_path / "out", to=to, dtype=dtype, **parts)
    assert notes[-1] == "infinite or NaN values are written as they are: embed (1), layers.mlp.up_proj (2)"
    if to == "hf" and dtype is None:
        assert tensor_bytes(tmp_path / "out") == tensor_bytes(model)


def test_a_conversion_of_finite_weights_has_no_such_note(tmp_path: Path, finite: Path):
    assert convert(finite, tmp_path / "out") == ()


def test_a_model_is_not_saved_in_a_dtype_that_cannot_hold_it(tmp_path: Path, finite: Path):
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][3] = 1e6

    model = camelid.load(edited(finite, tmp_path / "model", edit))
    with pytest.raises(UserError, match=r"final_norm.scale holds 1e\+06, and the largest float16 is 65504"):
        model.save(tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


# Sums and counts --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32"])
@pytest.mark.parametrize("shape", [(), (7,), (33_000, 3), (5, 64, 9)])
def test_checksums_and_counts_are_the_same_on_devices_and_of_slices_read_back(dtype: str, shape: tuple[int, ...]):
    draw = np.random.default_rng(0)
    values = np.asarray(jnp.asarray(1e4 * draw.standard_normal(shape), dtype))
    if dtype != "int32" and shape:
        values = values.copy()
        values.reshape(-1)[[1, 3, 4]] = [math.inf, -math.inf, math.nan]
    sums, counts = checksum_arrays({"x": jnp.asarray(values)})
    assert sums == {"x": checksum(values)}
    found = 3 if dtype != "int32" and shape else 0
    assert counts == ({"x": 3} if found else {})
    assert count_not_finite(values) == found
    if shape:
        assert sum(checksum(values[i : i + 2]) for i in range(0, shape[0], 2)) % 2**32 == sums["x"]
        assert count_not_finite(values.T) == found
        one = values.copy()
        one.reshape(-1)[0] = 2
        assert checksum(one) != checksum(values)
