import errno
import os
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from camelid.data.rows import best_fit
from camelid.data.rows.best_fit import fill, open_plan
from camelid.errors import UserError


def obvious_rooms(lengths: list[int], size: int) -> list[int]:
    """What is left in each row, one piece after another, the longest first, each into the fullest row that has room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(size - length)
    return sorted(rooms)


def test_rows_are_as_full_as_one_piece_after_another_makes_them():
    chance = random.Random(0)
    for _ in range(300):
        size = chance.randint(1, 30)
        lengths = [chance.randint(1, size) for _ in range(chance.randint(0, 80))]
        patterns = fill(np.bincount(lengths, minlength=size + 1).astype(np.int64))
        rooms = [
            size - sum(length * n for length, n in pattern.items) for pattern in patterns for _ in range(pattern.rows)
        ]
        assert sorted(rooms) == obvious_rooms(lengths, size)


def plan(folder: Path, lengths: np.ndarray, size: int, **how):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return open_plan(folder, offsets, size, **{"whole_rows": False, "overlong": "split", "fingerprint": "f"} | how)


@pytest.mark.parametrize("whole_rows", [False, True])
def test_a_plan_is_the_same_in_however_small_blocks_it_is_made(tmp_path: Path, monkeypatch, whole_rows: bool):
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    whole = plan(tmp_path / "whole", lengths, 16, whole_rows=whole_rows)
    monkeypatch.setattr(best_fit, "BLOCK", 7)
    blocks = plan(tmp_path / "blocks", lengths, 16, whole_rows=whole_rows)
    assert blocks.counts == whole.counts
    for name in ("rows", "starts", "lengths"):
        np.testing.assert_array_equal(getattr(blocks, name), getattr(whole, name))


def test_a_million_documents_are_planned_in_seconds_and_little_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(best_fit, "BLOCK", 2**16)
    lengths = np.exp(np.random.default_rng(0).normal(5, 1, 1_000_000)).astype(np.int64) + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    del lengths
    tracemalloc.start()
    began = time.perf_counter()
    made = open_plan(tmp_path / "p", offsets, 2048, whole_rows=False, overlong="split", fingerprint="f")
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 20
    assert peak < 10 * 2**20, "it should grow with the block, not with the documents"
    assert made.counts["places"] / (made.counts["rows"] * 2048) > 0.99


def test_a_plan_that_was_not_finished_is_made_again(tmp_path: Path):
    left = tmp_path / ".p.incomplete"
    left.mkdir()
    (left / "rows.bin").write_bytes(b"half")
    assert plan(tmp_path / "p", np.array([5, 3, 2]), 4).counts["rows"] == 2
    assert not left.exists()


@pytest.mark.parametrize("damage", ["a file is cut", "a file is gone", "what it says is cut", "it says something else"])
def test_a_plan_that_was_damaged_is_made_again(tmp_path: Path, damage: str):
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    made = plan(tmp_path / "whole", lengths, 16)
    plan(tmp_path / "p", lengths, 16)
    starts, manifest = tmp_path / "p" / "starts.bin", tmp_path / "p" / "plan.json"
    if damage == "a file is cut":
        starts.write_bytes(starts.read_bytes()[:-8])
    elif damage == "a file is gone":
        starts.unlink()
    else:
        manifest.write_text("{" if damage == "what it says is cut" else "[]")
    again = plan(tmp_path / "p", lengths, 16)
    for name in ("rows", "starts", "lengths"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))


def test_a_disk_that_is_full_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"p cannot be written: .*No space left"):
        plan(tmp_path / "p", np.array([5, 3, 2]), 4)
    assert not (tmp_path / "p").exists()
