"""A destination appears whole or not at all: full disks, kills and failures leave nothing half-written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from camelid.checkpoint.checkpoint import ExportSpec
from camelid.checkpoint.files import MANIFEST
from camelid.checkpoint.folder import new_folder
from camelid.checkpoint.registry import open_checkpoint, write_checkpoint
from camelid.disk.locks import LOCK
from camelid.errors import UserError
from runs import TIMEOUT_S, assert_refused, called, command, tensor_bytes
from tiny import save_hf, tiny_config, tiny_params, transformers_twin


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About half a megabyte."""
    config = tiny_config(vocab_size=997)
    return save_hf(transformers_twin(config, tiny_params(config)), tmp_path_factory.mktemp("folder") / "model")


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose disk fills up after 300 KB, and says that it is nearly empty; a real one where we may mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        yield disk
        subprocess.run(["umount", disk], check=True)
        return

    def refuse(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    yield disk


def entries(folder: Path) -> set[str]:
    """The names in a folder, other than that of the manifest, which every checkpoint has."""
    return {file.name for file in folder.iterdir()} - {MANIFEST}


# What goes wrong while it is written -----------------------------------------------------


def test_a_disk_that_fills_up_while_saving_leaves_nothing(model: Path, full_disk: Path):
    assert_refused(called("convert", model, full_disk / "out"), f"the disk of {full_disk / 'out'} is full")
    assert entries(full_disk) == set()


def test_a_disk_without_room_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert called("convert", model, tmp_path / "first").returncode == 0
    written = [file for file in (tmp_path / "first").iterdir() if file.name != MANIFEST]
    size = sum(file.stat().st_size for file in written)
    shutil.rmtree(tmp_path / "first")
    for free, fits in ((size - 1, False), (size, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            assert called("convert", model, tmp_path / "out").returncode == 0
        else:
            assert_refused(called("convert", model, tmp_path / "out"), " kB free")
            assert entries(tmp_path) == set()


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_a_failure_in_the_middle_leaves_nothing_and_is_not_hidden(model: Path, tmp_path: Path, failure: BaseException):
    checkpoint = open_checkpoint(model)
    count = 0

    def failing(*slice_of) -> np.ndarray:
        nonlocal count
        count += 1
        if count == 5:
            assert entries(tmp_path) == {".out.incomplete"}
            raise failure
        return checkpoint.read_slice(*slice_of)

    with pytest.raises(type(failure)) as seen:
        write_checkpoint(tmp_path / "out", ExportSpec(checkpoint.config, checkpoint.dtypes, failing))
    assert seen.value is failure
    assert entries(tmp_path) == set()


KILLED_AT_THE_END_OF_WRITING = """
import os, signal, sys
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
from camelid.cli import main
main()
"""


def test_a_process_killed_while_saving_leaves_no_destination_and_the_next_one_saves(
    model: Path, tmp_path: Path, user_env: dict[str, str]
):
    words = [sys.executable, "-c", KILLED_AT_THE_END_OF_WRITING, "convert", str(model), str(tmp_path / "out")]
    killed = subprocess.run(words, env=user_env, capture_output=True, timeout=TIMEOUT_S, check=False)
    assert killed.returncode == -signal.SIGKILL
    # It did write: what it left is the temporary folder alone.
    assert entries(tmp_path) == {".out.incomplete"}
    assert "model.safetensors" in entries(tmp_path / ".out.incomplete")
    assert command("convert", model, tmp_path / "out", env=user_env).returncode == 0
    assert entries(tmp_path) == {"out"}
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(model)


# What was there before -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_an_existing_destination_is_refused_and_stays(model: Path, tmp_path: Path, kind: str):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "notes.txt").write_text("mine")
    assert_refused(called("convert", model, out), f"{out} exists already")
    assert entries(tmp_path) == {"out"}
    if kind != "empty folder":
        assert (out if kind == "file" else out / "notes.txt").read_text() == "mine"


def test_overwriting_replaces_a_checkpoint_but_only_when_the_new_one_is_complete(model: Path, tmp_path: Path):
    out = tmp_path / "out"
    with new_folder(out, 0) as folder:
        (folder / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError), new_folder(out, 0, overwrite=True) as folder:
        (folder / "new" / "missing").write_text("new")
    assert entries(out) == {"config.json"}
    with new_folder(out, 0, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert entries(out) == {"config.json"}
    assert entries(out) == {"new"}
    assert entries(tmp_path) == {"out"}


def test_a_file_is_never_overwritten_by_a_folder(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file"), new_folder(tmp_path / "out", 0, overwrite=True):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_what_killed_processes_left_is_swept_away(tmp_path: Path):
    with new_folder(tmp_path / "out", 0) as folder:
        (folder / "old").write_text("old")
    (tmp_path / ".out.incomplete").mkdir()
    (tmp_path / ".out.incomplete" / "config.json").write_text("{}")
    with new_folder(tmp_path / "out", 0, overwrite=True) as folder:
        assert entries(folder) == {LOCK}
        (folder / "new").write_text("new")
    assert entries(tmp_path) == {"out"}
    assert entries(tmp_path / "out") == {"new"}


def test_one_process_at_a_time_writes_a_destination(model: Path, tmp_path: Path):
    out = tmp_path / "out"
    with new_folder(out, 0) as folder:
        (folder / "config.json").write_text("{}")
        assert_refused(called("convert", model, out), f"another process is writing {out}")
        assert_refused(called("convert", model, out, "--resume"), f"another process is writing {out}")
    assert entries(out) == {"config.json"}
    assert entries(tmp_path) == {"out"}


def test_a_process_that_starts_while_another_one_ends_takes_nothing_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another writer starts before and after each of the last operations on the file system, and is refused."""
    rename, unlink = Path.rename, Path.unlink
    moments: list[str] = []

    def other(moment: str) -> None:
        moments.append(moment)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            patch.setattr(Path, "unlink", unlink)
            with pytest.raises(UserError, match=r"another process is writing|exists already"), new_folder(out, 0):
                pass

    def renaming(self: Path, target: Path) -> Path:
        other("before it is renamed")
        renamed = rename(self, target)
        other("after it is renamed")
        return renamed

    def unlinking(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok)
        other(f"without {self.name}")

    out = tmp_path / "out"
    with new_folder(out, 0) as folder:
        (folder / "mine").write_text("mine")
        monkeypatch.setattr(Path, "rename", renaming)
        monkeypatch.setattr(Path, "unlink", unlinking)
    monkeypatch.undo()
    assert moments == ["before it is renamed", "after it is renamed", f"without {LOCK}"]
    assert (out / "mine").read_text() == "mine"
    assert entries(out) == {"mine"}
    assert entries(tmp_path) == {"out"}


def test_a_lock_that_was_left_in_a_destination_is_ignored(model: Path, tmp_path: Path):
    """The process was killed between the last two operations on the file system."""
    out = tmp_path / "out"
    assert called("convert", model, out).returncode == 0
    (out / LOCK).touch()
    assert open_checkpoint(out).dtypes == open_checkpoint(model).dtypes
    assert called("convert", out, tmp_path / "copy").returncode == 0
    assert LOCK not in entries(tmp_path / "copy")
    assert called("convert", model, out, "--shards", 2, "--overwrite").returncode == 0
    assert "model.safetensors" not in entries(out)
    for path in out.iterdir():
        if path.name != LOCK:
            path.unlink()
    assert called("convert", model, out, "--overwrite").returncode == 0  # as into an empty folder
    assert entries(out) - {LOCK} == entries(tmp_path / "copy")
    assert entries(tmp_path) == {"out", "copy"}


def test_a_folder_is_removed_before_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files of a process that makes the folder anew meanwhile are left."""
    unlink = Path.unlink

    def watched(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok)
        if self.name == LOCK:
            assert entries(self.parent) == set()
            (self.parent / "of another process").write_text("new")

    def fail() -> None:
        with new_folder(tmp_path / "out", 0) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "mine").write_text("mine")
            raise RuntimeError("stop")

    monkeypatch.setattr(Path, "unlink", watched)
    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert entries(tmp_path / ".out.incomplete") == {"of another process"}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_where_it_leads(tmp_path: Path, there: bool):
    (tmp_path / "link").symlink_to("real")
    if there:
        (tmp_path / "real").mkdir()
    with new_folder(tmp_path / "link", 0, overwrite=there) as folder:
        # With the lock of this name, whoever writes by the link and whoever writes "real" exclude each other.
        assert folder == tmp_path / ".real.incomplete"
        (folder / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert entries(tmp_path / "real") == {"new"}
    assert entries(tmp_path) == {"link", "real"}


def test_folders_above_the_destination_are_made(model: Path, tmp_path: Path):
    assert called("convert", model, tmp_path / "a" / "b" / "out").returncode == 0
    assert json.loads((tmp_path / "a" / "b" / "out" / "config.json").read_text())["model_type"] == "llama"


def test_a_place_that_cannot_be_written_is_one_line(model: Path):
    assert_refused(called("convert", model, "/proc/nowhere/out"), "/proc/nowhere")
