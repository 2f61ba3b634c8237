"""Small training runs, and the command line in this process or in one of its own."""

import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tomli_w
from safetensors.numpy import load_file

from camelid.cli import main
from camelid.runs.recipe import Recipe, structure
from camelid.train.loggers import read_metrics
from text.tiny import VOCAB_SIZE, save_byte_tokenizer
from tiny import tiny_config

# A hang ends the test. The machine may be busy, and nothing is compiled yet. What sleeps for ever sleeps for 600 s.
TIMEOUT_S = 480
VOCAB = -(-VOCAB_SIZE // 8) * 8  # every mesh of eight devices divides it


# Recipes --------------------------------------------------------------------------------


def tiny_run(folder: Path, **fields: Any) -> dict[str, Any]:
    """A recipe's table: a tiny model from scratch on made-up text; `train__steps=5` sets [train] steps."""
    config = tiny_config(vocab_size=VOCAB, bos_id=256, eos_ids=(257,))
    table = {
        "run": str(folder / "run"),
        "model": _plain(dataclasses.asdict(config)),
        "tokenizer": str(save_byte_tokenizer(folder / "tokenizer")),
        "data": {"train": [str(write_text(folder / "text.jsonl"))], "sequence_length": 16, "batch_size": 8},
        "train": {"steps": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    }
    return lay_over(table, fields)


def stories_run(folder: Path, assets: Path, **fields: Any) -> dict[str, Any]:
    """A recipe's table: the real stories260K, finetuned."""
    text = assets / "data" / "tinystories" / "tinystories_sample.txt"
    table = {
        "run": str(folder / "run"),
        "init": str(assets / "models" / "stories260K" / "hf"),
        "data": {"train": [str(text)], "sequence_length": 32, "batch_size": 8},
        "train": {"steps": 20},
        "optimizer": {"warmup_steps": 4},
    }
    return lay_over(table, fields)


def lay_over(table: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    for path, value in fields.items():
        *parents, name = path.split("__")
        inner = table
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return table


def recipe(table: dict[str, Any]) -> Recipe:
    return structure(table)


def write_recipe_file(table: dict[str, Any], path: Path) -> Path:
    path.write_text(tomli_w.dumps(table))
    return path


def write_text(path: Path, documents: int = 40) -> Path:
    """Documents of different lengths, the same in every run; a file that holds them already stays as it is."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 7))) for _ in range(50)]
    texts = [" ".join(draw.choices(words, k=draw.randint(2, 30))) for _ in range(documents)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if not path.exists() or path.read_text() != content:
        path.write_text(content)
    return path


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in table.items() if v is not None}


# What a run leaves --------------------------------------------------------------------------------


def losses(run: Path) -> list[dict[str, Any]]:
    """The training rows of metrics.jsonl, in order."""
    return [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each tensor of a checkpoint's folder, read by the safetensors library."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, array in load_file(file).items():
            assert name not in tensors
            tensors[name] = (array.dtype.name, array.shape, array.tobytes())
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    """What is in every file in and below a folder, by name; of a link, where it leads."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_symlink() or file.is_file()]
    return {
        str(file.relative_to(folder)): os.fsencode(file.readlink()) if file.is_symlink() else file.read_bytes()
        for file in files
    }


# Commands --------------------------------------------------------------------------------


def words(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "camelid", *map(str, arguments)]


def command(*arguments: object, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    """`camelid` as a user runs it; killed when it hangs."""
    return subprocess.run(
        words(*arguments), env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, **options
    )


@contextmanager
def started(*arguments: object, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """`camelid` running beside the test, its output in a file; killed when the test is done with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(words(*arguments), env=env, stdout=output, stderr=output, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait(TIMEOUT_S)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen | None = None, poll_s: float = 0.002) -> None:
    """Returns when `condition` holds, or when the process has ended; fails after TIMEOUT_S."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        if process is not None and process.poll() is not None:
            return
        time.sleep(poll_s)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def called(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """`camelid` in this process, which costs no start; an exception other than an exit goes through, as a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(sys, "argv", ["camelid", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def assert_refused(result: subprocess.CompletedProcess[str], *about: str) -> None:
    """Exit status 2, nothing on standard output, one line that names the fault and one of advice."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert result.stdout == ""
    problem, advice = result.stderr.strip().split("\n")[-2:]
    assert problem.startswith("camelid: "), result.stderr
    assert advice.startswith("         "), result.stderr
    for part in about:
        assert part in problem, problem
