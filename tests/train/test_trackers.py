"""Services that follow a run get every number of every row."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from camelid.errors import UserError
from camelid.train.trackers import check_installed, make_tracker

ROWS = [{"step": 1, "loss": 3.5, "mfu": None}, {"step": 2, "loss": 3.25, "mfu": None}]


def test_tensorboard_files_hold_the_rows(tmp_path):
    tracker = make_tracker("tensorboard", tmp_path, {})
    for row in ROWS:
        tracker.write(row)
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert scalars(file) == [("train/loss", 1, 3.5), ("train/loss", 2, 3.25)]


def scalars(file) -> list[tuple[str, int, float]]:
    """What an event file holds: records of length, checksum, protobuf, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found, data = [], file.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb.*\nRun: pip install .*wandb"):
        check_installed("wandb")


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []

    def log(self, row: dict, step: int) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.rows.append((-1, {}))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What stands in for the service: the options of each init, and the runs."""
    fake = SimpleNamespace(options=[], runs=[])

    def init(**options) -> FakeRun:
        fake.options.append(options)
        fake.runs.append(FakeRun())
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_runs_of_one_name_have_ids_of_their_own_and_keep_them(tmp_path: Path, wandb: SimpleNamespace):
    mine, yours = tmp_path / "mine" / "runs" / "alpaca", tmp_path / "yours" / "runs" / "alpaca"
    for folder in (mine, yours, mine, yours):
        folder.mkdir(parents=True, exist_ok=True)
        tracker = make_tracker("wandb", folder, {"train": {"steps": 2}})
        tracker.write(ROWS[0])
        tracker.close()
    ids = [options["id"] for options in wandb.options]
    assert ids[:2] == ids[2:]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in ids), "a form that the service takes"
    assert {options["name"] for options in wandb.options} == {"alpaca"}
    assert {options["resume"] for options in wandb.options} == {"allow"}
    assert wandb.runs[0].rows == [(1, {"train/loss": 3.5}), (-1, {})]


def test_a_run_of_an_earlier_version_keeps_the_id_that_it_had(tmp_path: Path, wandb: SimpleNamespace):
    (tmp_path / "alpaca" / "wandb").mkdir(parents=True)
    for _ in range(2):
        make_tracker("wandb", tmp_path / "alpaca", {})
    assert [options["id"] for options in wandb.options] == ["alpaca"] * 2


def test_wandb_logs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = make_tracker("wandb", tmp_path / "run", {"train": {"steps": 2}})
    for row in ROWS:
        tracker.write(row)
    tracker.close()
    assert list(tmp_path.glob("**/*.wandb"))


class FakeMLflow(SimpleNamespace):
    """Stands in for MLflow: what is called, in order."""

    def __init__(self) -> None:
        super().__init__(calls=[])

    def set_experiment(self, name: str) -> None:
        self.calls.append(("experiment", name))

    def start_run(self, **options: str) -> SimpleNamespace:
        self.calls.append(("start", options))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc123"))

    def log_params(self, params: dict) -> None:
        self.calls.append(("params", params))

    def log_metrics(self, metrics: dict, step: int) -> None:
        self.calls.append(("metrics", step, metrics))

    def end_run(self) -> None:
        self.calls.append(("end",))


def test_mlflow_resumes_its_run_and_gets_parameters_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    for row in ROWS:
        tracker = make_tracker("mlflow", tmp_path, {"run": "x" * 900, "train": {"steps": 2}})
        tracker.write(row)
        tracker.close()
    assert fake.calls == [
        ("experiment", "camelid"),
        ("start", {"run_name": tmp_path.name}),
        ("params", {"run": "x" * 500, "train.steps": "2"}),
        ("metrics", 1, {"train/loss": 3.5}),
        ("end",),
        ("start", {"run_id": "abc123"}),
        ("metrics", 2, {"train/loss": 3.25}),
        ("end",),
    ]


def test_services_get_the_names_that_others_use(tmp_path: Path, wandb: SimpleNamespace):
    row = {"step": 3, "loss": 1.0, "gradient_norm": 2.0, "learning_rate": 3.0, "tokens_per_second": 4.0, "tokens": 5}
    tracker = make_tracker("wandb", tmp_path, {})
    tracker.write(row)
    tracker.write({"step": 3, "validation_loss": 6.0, "validation_loss/code": 7.0})
    assert wandb.runs[0].rows == [
        (
            3,
            {
                "train/loss": 1.0,
                "train/grad_norm": 2.0,
                "train/learning_rate": 3.0,
                "perf/tokens_per_second": 4.0,
                "train/tokens": 5,
            },
        ),
        (3, {"eval/loss": 6.0, "eval/loss/code": 7.0}),
    ]


SAMPLES = [{"step": 2, "prompt": "One *day*", "completion": "a dog\nsat", "finish_reason": "stop", "seed": 0}]


def test_tensorboard_shows_samples_as_they_are(tmp_path: Path):
    tracker = make_tracker("tensorboard", tmp_path, {})
    tracker.write_samples(2, SAMPLES)
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"    One *day*\n    ---\n    a dog\n    sat\n" in file.read_bytes()
    assert [(tag, step) for tag, step, _ in scalars(file)] == [("samples/0/text_summary", 2)]


def test_wandb_gets_samples_as_a_table_and_mlflow_as_a_text(
    tmp_path: Path, wandb: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    wandb.Table = lambda columns, data: (columns, data)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    make_tracker("wandb", tmp_path, {}).write_samples(2, SAMPLES)
    table = (["step", "prompt", "completion"], [[2, "One *day*", "a dog\nsat"]])
    assert wandb.runs[0].rows == [(2, {"samples": table})]
    assert wandb.options[0]["project"] == "mine"
    texts = []
    fake = FakeMLflow()
    fake.log_text = lambda text, place: texts.append((text, place))
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    make_tracker("mlflow", tmp_path, {}).write_samples(2, SAMPLES)
    assert texts == [("One *day*\n---\na dog\nsat\n", "samples/step_2.txt")]
