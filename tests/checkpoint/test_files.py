"""Files that are planned, written by several threads, and gone on with after a process was killed."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from camelid.checkpoint import files as files_module
from camelid.checkpoint.compare import compare
from camelid.checkpoint.convert import convert
from camelid.checkpoint.files import (
    JOURNAL,
    MANIFEST,
    DeferredBytes,
    PlannedFile,
    TensorPayload,
    raw_payload,
    write_files,
)
from camelid.checkpoint.registry import open_checkpoint
from camelid.checkpoint.tensors import PlannedTensor
from camelid.errors import UserError
from runs import TIMEOUT_S, contents
from tiny import save_hf, tiny_config, tiny_params, transformers_twin

CONFIG = tiny_config(head_dim=8, vocab_size=96)
FLOAT = np.dtype(np.float32)


def drawn(name: str, size: int, seed: int, read: Callable[[str], None] = lambda name: None) -> TensorPayload:
    numbers = np.random.default_rng(seed).standard_normal(size, np.float32)

    def chunks() -> Iterator[np.ndarray]:
        read(name)
        return (numbers[i : i + 7] for i in range(0, size, 7))

    return raw_payload(PlannedTensor(name, (size,), FLOAT), chunks)


def two_files(read: Callable[[str], None] = lambda name: None) -> list[PlannedFile]:
    a = [drawn(f"a{i}", 50 + i, i, read) for i in range(9)]
    b = [drawn(f"b{i}", 20 + i, 100 + i, read) for i in range(5)]
    sums = DeferredBytes(4, lambda crcs: sum(crcs.values()).to_bytes(8, "little")[:4])
    return [PlannedFile("one", [b"begin", *a, b"end"]), PlannedFile("inner/two", [sums, *b])]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_write_what_one_after_another_lies_end_to_end(tmp_path: Path, workers: int):
    write_files(tmp_path, two_files(), workers=workers)
    one = b"".join(bytes(chunk) for held in two_files()[0].payloads for chunk in held.chunks())
    assert (tmp_path / "one").read_bytes() == b"begin" + one + b"end"
    assert {file.name for file in tmp_path.iterdir()} == {"one", "inner", MANIFEST}


def test_the_manifest_has_the_place_and_the_checksum_of_every_tensor(tmp_path: Path):
    write_files(tmp_path, two_files())
    held = json.loads((tmp_path / MANIFEST).read_text())["files"]
    assert {name: list(file["tensors"]) for name, file in held.items()} == {
        "one": [f"a{i}" for i in range(9)],
        "inner/two": [f"b{i}" for i in range(5)],
    }
    for name, file in held.items():
        for tensor in file["tensors"].values():
            found = (tmp_path / name).read_bytes()[tensor["offset"] :][: tensor["bytes"]]
            assert hashlib.sha256(found).hexdigest() == tensor["sha256"]
            assert (tensor["dtype"], tensor["shape"]) == ("float32", [tensor["bytes"] // 4])


def broken_off(folder: Path, at: str) -> None:
    """Begins to write, and ends when tensor `at` is to be read."""

    def read(name: str) -> None:
        if name == at:
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        write_files(folder, two_files(read), workers=1)


def test_what_was_finished_is_not_read_again(tmp_path: Path):
    write_files(tmp_path / "whole", two_files())
    broken_off(tmp_path / "a", "a5")
    assert (tmp_path / "a" / JOURNAL).is_file()
    asked: list[str] = []
    heard: list[tuple[int, int]] = []
    write_files(tmp_path / "a", two_files(asked.append), progress=lambda *pair: heard.append(pair))
    assert sorted(asked) == [*(f"a{i}" for i in range(5, 9)), *(f"b{i}" for i in range(5))]
    assert heard[-1][0] == heard[-1][1]
    assert content(tmp_path / "a") == content(tmp_path / "whole")


def test_what_was_lost_after_it_was_finished_is_written_again(tmp_path: Path):
    """As after a crash of the machine: the journal has the line, and the disk has not the bytes."""
    write_files(tmp_path / "whole", two_files())
    broken_off(tmp_path / "a", "a5")
    held = bytearray((tmp_path / "a" / "one").read_bytes())
    held[5 + 4 * 50 + 3] ^= 1  # in a1
    (tmp_path / "a" / "one").write_bytes(held)
    asked: list[str] = []
    write_files(tmp_path / "a", two_files(asked.append))
    assert sorted(asked)[:2] == ["a1", "a5"]
    assert content(tmp_path / "a") == content(tmp_path / "whole")


def test_a_line_that_was_cut_is_as_if_it_were_not_there(tmp_path: Path):
    write_files(tmp_path / "whole", two_files())
    broken_off(tmp_path / "a", "a5")
    journal = tmp_path / "a" / JOURNAL
    journal.write_text(journal.read_text()[:-20])
    broken_off(tmp_path / "a", "b2")
    asked: list[str] = []
    write_files(tmp_path / "a", two_files(asked.append))
    assert sorted(asked) == ["b2", "b3", "b4"]
    assert content(tmp_path / "a") == content(tmp_path / "whole")


@pytest.mark.parametrize("change", ["source", "files"])
def test_other_files_or_another_source_do_not_go_on(tmp_path: Path, change: str):
    broken_off(tmp_path / "a", "a5")
    files, source = two_files(), ""
    if change == "source":
        source = "another"
    else:
        files[0] = PlannedFile("one", [*files[0].parts, b"more"])
    with pytest.raises(UserError, match=r"was started from other files, or with other options\n.*--resume"):
        write_files(tmp_path / "a", files, source=source)


def test_the_first_failure_ends_the_others(tmp_path: Path):
    waiting, asked = threading.Barrier(2), []

    def read(name: str) -> None:
        asked.append(name)
        if name in ("a0", "a1"):
            waiting.wait(TIMEOUT_S)
        if name == "a1":
            raise RuntimeError("broken")
        time.sleep(0.2)

    with pytest.raises(RuntimeError, match="broken"):
        write_files(tmp_path, two_files(read), workers=2)
    assert len(asked) < 7  # of 14


# A conversion that is killed ---------------------------------------------------------------

KILLED = """
import os, signal, sys, threading
from camelid.checkpoint import files
left, write, lock = [9], files._write, threading.Lock()
def written(*words):
    sums = write(*words)
    with lock:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return sums
files._write = written
from camelid.cli import main
main()
"""
WRITTEN: dict[str, list[str]] = {
    "hf": ["--shards", "3"],
    "meta": ["--tensor-parallel", "2"],
    "easylm": [],
    "easylm-flax": [],
    "mindspore": ["--tensor-parallel", "2", "--pipeline-parallel", "2"],
    "megatron": ["--tensor-parallel", "2", "--pipeline-parallel", "2"],
    "llama2-jax": [],
    "gguf-q8_0": [],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(transformers_twin(CONFIG, tiny_params(CONFIG)), tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("to", WRITTEN)
def test_a_conversion_that_was_killed_goes_on_to_the_same_bytes(
    model: Path, tmp_path: Path, user_env: dict[str, str], to: str
):
    out = tmp_path / "out"
    words = ["convert", str(model), str(out), "--to", to, *WRITTEN[to], "--resume"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *words], env=user_env, capture_output=True, timeout=TIMEOUT_S, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    done = len((tmp_path / ".out.incomplete" / JOURNAL).read_text().splitlines())
    assert done > 1
    again = subprocess.run(
        [sys.executable, "-m", "camelid", *words], env=user_env, capture_output=True, timeout=TIMEOUT_S, check=False
    )
    assert again.returncode == 0, again.stderr
    options: dict[str, Any] = {
        name.removeprefix("--").replace("-", "_"): int(value)
        for name, value in zip(WRITTEN[to][::2], WRITTEN[to][1::2], strict=True)
    }
    convert(model, tmp_path / "whole", to=to, **options)
    assert content(out) == content(tmp_path / "whole")
    assert {file.name for file in tmp_path.iterdir()} == {"out", "whole"}


def unfinished(monkeypatch: pytest.MonkeyPatch, *words: Any, **options: Any) -> None:
    """A conversion that fails when all tensors are written, and leaves them to the next one."""

    def broken(*_: Any) -> None:
        raise RuntimeError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "_manifest", broken)
        with pytest.raises(RuntimeError, match="broken off"):
            convert(*words, **options, resume=True)


def test_a_source_that_changed_in_between_is_noticed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "source"
    convert(model, source)
    unfinished(monkeypatch, source, tmp_path / "out", to="easylm")
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(UserError, match="was started from other files"):
        convert(source, tmp_path / "out", to="easylm", resume=True)
    convert(source, tmp_path / "out", to="easylm")
    assert (tmp_path / "out" / "streaming_params").is_file()


def test_another_layout_of_the_same_names_and_sizes_does_not_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """MindSpore's two rotary layouts: as they are read, and as they are written."""
    out, begun = tmp_path / "out", "was started from other files, or with other options"
    unfinished(monkeypatch, model, out, to="mindspore")
    with pytest.raises(UserError, match=begun):
        convert(model, out, to="mindspore-interleaved", resume=True)
    convert(model, out, to="mindspore", resume=True)
    unfinished(monkeypatch, out, tmp_path / "back", format="mindspore-interleaved")
    with pytest.raises(UserError, match=begun):
        convert(out, tmp_path / "back", format="mindspore", resume=True)


@pytest.mark.parametrize("journal", [b"", b"\xff\xfe\x00"])
def test_a_journal_that_a_power_failure_emptied_is_begun_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: bytes
):
    unfinished(monkeypatch, model, tmp_path / "out", to="easylm")
    (tmp_path / ".out.incomplete" / JOURNAL).write_bytes(journal)
    convert(model, tmp_path / "out", to="easylm", resume=True)
    convert(model, tmp_path / "whole", to="easylm")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_it_goes_on_from_another_working_directory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(model.parent)
    unfinished(monkeypatch, model.name, tmp_path / "out", to="easylm")
    monkeypatch.chdir(tmp_path)
    convert(model, "out", to="easylm", resume=True)
    assert (tmp_path / "out" / "streaming_params").is_file()


def test_companions_are_there_before_the_journal_goes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(model, tmp_path / "source")
    (tmp_path / "source" / "LICENSE").write_text("free")
    unfinished(monkeypatch, tmp_path / "source", tmp_path / "out", to="easylm")
    assert (tmp_path / ".out.incomplete" / "LICENSE").read_text() == "free"


def test_more_files_than_a_process_may_open_are_written(model: Path, tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 10, before[1]))
        convert(model, tmp_path / "out", to="megatron", tensor_parallel=2, pipeline_parallel=4)
        convert(model, tmp_path / "shards", shards=20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(list((tmp_path / "out").rglob("*.pt"))) == 8
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 10


def test_a_source_below_its_destination_stays(model: Path, tmp_path: Path):
    """Meta's files in the folder of Hugging Face's: llama/original."""
    convert(model, tmp_path / "llama")
    convert(model, tmp_path / "llama" / "original", to="meta")
    original = contents(tmp_path / "llama" / "original")
    convert(tmp_path / "llama" / "original", tmp_path / "llama", overwrite=True)
    assert contents(tmp_path / "llama" / "original") == original
    with pytest.raises(UserError, match=r"cannot be replaced, because .* is read"):
        convert(tmp_path / "llama", tmp_path / "llama", dtype="float16", overwrite=True)
    assert {dtype.name for dtype in open_checkpoint(tmp_path / "llama").dtypes.values()} == {"float32"}


def test_layers_of_different_dtypes_lose_nothing(model: Path, tmp_path: Path):
    convert(model, tmp_path / "mixed", dtype="bfloat16")
    file = tmp_path / "mixed" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.self_attn.q_proj.weight"
    tensors[name] = load_file(model / "model.safetensors")[name]
    save_file(tensors, file, metadata={"format": "pt"})
    mixed = open_checkpoint(tmp_path / "mixed")
    assert [note for note in mixed.notes if "q_proj" in note] == list(mixed.notes)
    assert "layers.attn.q_proj are bfloat16 and float32; it is read as float32" in mixed.notes[0]
    convert(tmp_path / "mixed", tmp_path / "meta", to="meta")
    assert all(each.equal for each in compare(mixed, open_checkpoint(tmp_path / "meta")))
