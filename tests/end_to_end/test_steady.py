"""Runs with NaN batches, float16 and a moving average: what is skipped, reported, saved and resumed."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import camelid
import camelid.runs.run
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.checkpoint.state.saved_state import open_step, steps_in
from camelid.errors import UserError
from camelid.parallel.mesh import one_device
from camelid.parallel.stop_signal import StopSignal
from camelid.train.loggers import read_metrics
from runs import column, losses, recipe, tensor_bytes, tiny_run

pytestmark = pytest.mark.quick_compile

ABOUT_TIME = ("tokens_per_second", "mfu", "step_s", "data_s", "eta_s")


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


def train(folder: Path, stop: int | None = None, bad: Sequence[int] = (), **fields: Any) -> camelid.runs.run.Outcome:
    """Runs a tiny recipe; it is asked to stop after a step, and the batches of some steps have NaN weights."""

    class StopAfter(StopSignal):
        def should_stop(self, step: int) -> bool:
            return step == stop

    batches = camelid.runs.run._batches

    def poisoned(recipe: Any, loader: Any, mesh: Any, first: int, speed: Any) -> Iterator[dict]:
        for number, batch in enumerate(batches(recipe, loader, mesh, first, speed), first + 1):
            yield batch | {"weights": batch["weights"] * jnp.nan} if number in bad else batch

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "StopSignal", StopAfter)
        patch.setattr(camelid.runs.run, "_batches", poisoned)
        return camelid.runs.run.run(recipe(tiny_run(folder, **fields)))


def rows(folder: Path) -> list[dict[str, Any]]:
    found = read_metrics(folder / "run" / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in ABOUT_TIME} for row in found]


def test_nan_batches_are_skipped_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outcome = train(tmp_path, bad=(2, 3), train={"steps": 8, "log_every": 4, "checkpoint_every": 2})
    assert outcome.finished
    assert (
        "step 3: the update is skipped: loss nan, gradient norm nan (2 in a row, 2 in the run)"
        in capsys.readouterr().err
    )
    found = losses(tmp_path / "run")
    assert [(row["step"], row["loss"] is None, row["skipped"]) for row in found] == [
        (2, True, 1),
        (3, True, 2),
        (4, False, 2),
        (8, False, 2),
    ]
    assert all(
        np.isfinite(np.frombuffer(data, name)).all()
        for name, _, data in tensor_bytes(outcome.folder / "model").values()
    )


def test_too_many_in_a_row_end_the_run_with_the_checkpoint_before_them_named(tmp_path: Path):
    fields = {"train": {"steps": 8, "checkpoint_every": 1, "keep_checkpoints": 2, "max_skipped": 3}}
    about = (
        r"step 6 has loss nan and gradient norm nan, and the 3 updates before it were skipped\n.* of step 2, is kept"
    )
    with pytest.raises(UserError, match=about):
        train(tmp_path, bad=range(3, 9), **fields)
    assert steps_in(tmp_path / "run" / "checkpoints") == [1, 2]


def test_a_stop_among_skipped_updates_saves_and_the_count_goes_on(tmp_path: Path):
    fields = {"train": {"steps": 8, "checkpoint_every": 1, "max_skipped": 3}}
    outcome = train(tmp_path, stop=4, bad=range(3, 9), **fields)
    assert (outcome.steps, outcome.finished) == (4, False)
    with pytest.raises(UserError, match=r"step 6 has .* the 3 updates before it were skipped"):
        train(tmp_path, bad=range(3, 9), **fields)


def test_a_float16_run_with_an_average_that_overflows_resumes_to_the_same_bits(tmp_path: Path):
    fields: dict[str, Any] = {
        "train": {"steps": 8, "evaluate_every": 4, "checkpoint_every": 4},
        "dropout": {"embedding": 0.1, "residual": 0.1, "attention": 0.1},
        "compute__dtype": "float16",
        "loss_scale": {"initial": 2.0**26, "window": 2},
        "ema": {"decay": 0.5},
        "data__validation_fraction": 0.1,
    }
    whole = train(tmp_path / "whole", bad=(6,), **fields)
    stopped = train(tmp_path / "stopped", stop=2, bad=(6,), **fields)
    assert not stopped.finished
    resumed = train(tmp_path / "stopped", bad=(6,), **fields)
    assert (whole.finished, resumed.finished) == (True, True)
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    for name in ("model", "model_ema"):
        assert tensor_bytes(resumed.folder / name) == tensor_bytes(whole.folder / name)
    states = [open_step(outcome.folder / "checkpoints", 8) for outcome in (whole, resumed)]
    sums = [{name: array.checksum for name, array in state.items()} for state in states]
    assert sums[0] == sums[1]
    assert {"ema.embed", "counters.loss_scale", "counters.loss_mean", "counters.skipped"} <= sums[0].keys()
    found = losses(tmp_path / "whole" / "run")
    assert column(found, "overflows")[1] == 2, "it did not overflow before the stop"
    assert column(found, "skipped")[-1] == 1
    assert found[-1]["loss_scale"] < 2.0**26
    # Both models can be opened, and the average was validated.
    last = rows(tmp_path / "whole")[-1]
    assert last["validation_loss_ema"] != last["validation_loss"]
    assert last["validation_loss_ema"] == pytest.approx(last["validation_loss"], rel=0.05)
    average = camelid.load(whole.folder / "model_ema")
    tokens = [[256, 97, 98, 99]]
    assert np.abs(average.logits(tokens) - camelid.load(whole.folder / "model").logits(tokens)).max() > 0


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of eight steps in float32, made once for the tests below."""
    folder = tmp_path_factory.getbasetemp() / "whole"
    if not folder.exists():
        train(folder, train={"steps": 8})
    return folder


def test_losses_in_float16_are_those_in_float32(tmp_path: Path, whole: Path):
    train(tmp_path, train={"steps": 8}, compute__dtype="float16")
    half, single = losses(tmp_path / "run"), losses(whole / "run")
    assert column(half, "overflows").max() == 0
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(column(half, name), column(single, name), rtol=1e-2, err_msg=name)
    assert (column(half, "loss") != column(single, "loss")).any()


def test_a_run_of_a_camelid_without_counters_resumes(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch):
    save = RunCheckpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(
            RunCheckpoints, "save", lambda self, step, state: save(self, step, dataclasses.replace(state, counters={}))
        )
        train(tmp_path, stop=2, train={"steps": 8})
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not any(name.startswith("counters.") for name in open_step(checkpoints, 2))
    resumed = train(tmp_path, train={"steps": 8})
    assert tensor_bytes(resumed.folder / "model") == tensor_bytes(whole / "run" / "model")
    saved = {name: array for name, array in open_step(checkpoints, 8).items() if name.startswith("counters.")}
    assert {"counters.skipped", "counters.loss_count"} <= saved.keys()
