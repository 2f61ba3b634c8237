"""A model learns which answers are preferred. Not with quick_compile, which makes steps slow."""

import json
from pathlib import Path

import pytest

import camelid.runs.run
from camelid.parallel.mesh import one_device
from camelid.runs.recipe import structure
from camelid.runs.run import run
from camelid.train.loggers import read_metrics


def test_the_margin_of_held_out_pairs_rises(
    assets: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Short pairs of the instruct data, and a model that tells stories."""
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
    file = assets / "data" / "instruct" / "rasbt-instruction-data-with-preference.json"
    short = [row for row in json.loads(file.read_text()) if len(row["chosen"] + row["rejected"]) < 90]
    short = [row for row in short if not row["input"] and row["chosen"] != row["rejected"]][:60]
    assert len(short) == 60
    (tmp_path / "pairs.json").write_text(json.dumps(short))
    train = [{"files": [str(tmp_path / "pairs.json")], "kind": "preference", "template": "llama2"}]
    data = {"train": train, "validation_fraction": 0.3, "sequence_length": 256, "batch_size": 4}
    table = {"run": str(tmp_path / "run"), "init": str(stories), "data": data, "dpo": {}, "train": {"steps": 12}}
    run(structure(table | {"optimizer": {"learning_rate": 2e-4, "warmup_steps": 2}}))
    before, after = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in row]
    assert before["validation_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert after["validation_rewards/margins"] > 0.1
    assert after["validation_rewards/accuracies"] > 0.6
    assert after["validation_loss"] < before["validation_loss"] - 0.03
