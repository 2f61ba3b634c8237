"""A run whose rows an earlier release read in another order is not resumed with other batches."""

import json
from pathlib import Path
from typing import Any

import pytest

import camelid.runs.run
from camelid.parallel.mesh import one_device
from runs import assert_refused, called, lay_over, losses, tiny_run, write_recipe_file


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


def train(folder: Path, table: dict[str, Any], steps: int):
    table = lay_over(table, {"train__steps": steps, "optimizer__decay_steps": 4})
    return called("train", write_recipe_file(table, folder / "recipe.toml"))


def as_earlier_releases_wrote_it(run: Path) -> None:
    """Removes the orders of the rows from what the run has recorded."""
    data = json.loads((run / "data.json").read_text())
    for store in (*data["train"], *data.get("validation", [])):
        del store["row_order"]
    (run / "data.json").write_text(json.dumps(data))


@pytest.mark.parametrize("without", ["the order", "data.json"])
def test_a_run_with_another_order_of_many_rows_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str
):
    monkeypatch.setattr("camelid.data.rows.mixture.DRAWN_AT_ONCE", 5)
    table = tiny_run(tmp_path)
    assert train(tmp_path, table, 2).returncode == 0
    run = tmp_path / "run"
    assert json.loads((run / "data.json").read_text())["train"][0]["row_order"] == "feistel"
    assert train(tmp_path, table, 3).returncode == 0
    if without == "data.json":
        (run / "data.json").unlink()
    else:
        as_earlier_releases_wrote_it(run)
    assert_refused(train(tmp_path, table, 4), "earlier release", "another order")
    assert len(losses(run)) == 3


def test_other_runs_of_earlier_releases_are_resumed(tmp_path: Path):
    table = tiny_run(tmp_path, data__validation_fraction=0.2)
    assert train(tmp_path, table, 2).returncode == 0
    as_earlier_releases_wrote_it(tmp_path / "run")
    assert train(tmp_path, table, 4).returncode == 0
    assert len(losses(tmp_path / "run")) == 4


def test_rows_in_order_are_not_affected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("camelid.data.rows.mixture.DRAWN_AT_ONCE", 5)
    table = tiny_run(tmp_path, data__shuffle=False)
    assert train(tmp_path, table, 2).returncode == 0
    as_earlier_releases_wrote_it(tmp_path / "run")
    assert train(tmp_path, table, 4).returncode == 0
