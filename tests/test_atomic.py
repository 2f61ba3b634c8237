"""A file appears whole or stays as it was, whoever else writes it."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from camelid.disk.atomic import write_atomically


def test_a_file_is_made_and_replaced_with_the_permissions_of_a_new_one(tmp_path: Path):
    (tmp_path / "plain").write_text("")
    for content in ("text: \u00e4\r\n", b"bytes \xff"):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "file"}


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("old")
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        write(self, content[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_many_writers_of_one_file_leave_one_of_theirs(tmp_path: Path):
    """With one temporary name, one of them would move the half-written file of another, or find none to move."""
    file, contents = tmp_path / ("n" * 255), [bytes([i]) * 100_000 for i in range(40)]

    def write(content: bytes) -> None:
        write_atomically(file, content)
        assert file.read_bytes() in contents

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, contents))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
