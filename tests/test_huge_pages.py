"""Commands that train on a CPU execute themselves again with huge pages, once, as the same process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import camelid.__main__
from camelid import huge_pages

SCRIPT = """
import os, sys
from pathlib import Path
from camelid import huge_pages
huge_pages.MODE, huge_pages.ACCELERATORS = Path(sys.argv[1]), ()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.flags.utf8_mode, *sys.argv[2:], flush=True)
huge_pages.use_huge_pages(sys.argv[2:])
print("returned")
"""


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A machine without accelerators that gives huge pages on request; the list receives the calls of os.execv."""
    calls: list[tuple] = []
    mode = tmp_path / "enabled"
    mode.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "MODE", mode)
    monkeypatch.setattr(huge_pages, "ACCELERATORS", ())
    monkeypatch.setattr(os, "execv", lambda *words: calls.append((*words, os.environ.get(huge_pages.TUNABLES))))
    monkeypatch.delenv(huge_pages.TUNABLES, raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return calls


@pytest.mark.parametrize("command", ["train", "finetune", "demo"])
def test_commands_that_train_execute_themselves_with_huge_pages(cpu: list, command: str, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    huge_pages.use_huge_pages([command, "recipe.toml"])
    assert cpu == [(sys.executable, sys.orig_argv, "glibc.malloc.hugetlb=1")]


def test_others_do_not(cpu: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for arguments in ([], ["inspect", "train"], ["data", "prepare"], ["--version"]):
        huge_pages.use_huge_pages(arguments)
    for value in ("", "glibc.malloc.check=1"):  # how users opt out, and settings of their own
        with monkeypatch.context() as set_by_user:
            set_by_user.setenv("GLIBC_TUNABLES", value)
            huge_pages.use_huge_pages(["train"])
    with monkeypatch.context() as gpu:
        gpu.setenv("JAX_PLATFORMS", "cuda,cpu")
        huge_pages.use_huge_pages(["train"])
    device = tmp_path / "nvidia0"
    device.touch()
    monkeypatch.setattr(huge_pages, "ACCELERATORS", (f"{tmp_path}/nvidia[0-9]*",))
    huge_pages.use_huge_pages(["train"])
    device.unlink()
    for mode in ("[always] madvise never", "always madvise [never]"):
        huge_pages.MODE.write_text(mode)
        huge_pages.use_huge_pages(["train"])
    huge_pages.MODE.unlink()  # macOS
    huge_pages.use_huge_pages(["train"])
    assert cpu == []


def test_a_process_that_cannot_execute_itself_goes_on(cpu: list, monkeypatch: pytest.MonkeyPatch):
    def refuse(*words: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "execv", refuse)
    huge_pages.use_huge_pages(["train"])
    assert huge_pages.TUNABLES not in os.environ


def test_it_happens_once_with_the_same_process_and_arguments(cpu: list):
    command = [sys.executable, "-X", "utf8", "-c", SCRIPT, str(huge_pages.MODE), "train", "a b", ""]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.splitlines() == [
        f"{process.pid} None 1 train a b ",
        f"{process.pid} glibc.malloc.hugetlb=1 1 train a b ",
        "returned",
    ]


def test_the_command_asks_before_it_begins(monkeypatch: pytest.MonkeyPatch):
    calls: list[object] = []
    monkeypatch.setattr(sys, "argv", ["camelid", "train", "x.toml"])
    monkeypatch.setattr(camelid.__main__, "use_huge_pages", calls.append)
    monkeypatch.setattr(camelid.__main__, "run_command", lambda main: calls.append("run"))
    camelid.__main__.main()
    assert calls == [["train", "x.toml"], "run"]
