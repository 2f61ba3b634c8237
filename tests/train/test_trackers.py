"""Services that follow a run get every number of every row."""

import sys

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
    assert scalars(file) == [("loss", 1, 3.5), ("loss", 2, 3.25)]


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
    with pytest.raises(UserError, match=r"camelid\[wandb\]"):
        check_installed("wandb")


def test_wandb_logs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = make_tracker("wandb", tmp_path / "run", {"train": {"steps": 2}})
    for row in ROWS:
        tracker.write(row)
    tracker.close()
    assert list(tmp_path.glob("**/*.wandb"))
