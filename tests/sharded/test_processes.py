"""Two processes of four devices each train what one process of eight does, end together, and take turns with it."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest

import camelid.runs.run
from camelid.interrupts import STOPPED
from camelid.train.loggers import read_metrics
from runs import (
    TIMEOUT_S,
    column,
    lines,
    losses,
    recipe,
    started,
    tensor_bytes,
    tiny_run,
    wait_until,
    write_recipe_file,
)

pytestmark = pytest.mark.quick_compile

STEPS = 24


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    return tiny_run(
        folder,
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        train={"steps": STEPS, "checkpoint_every": 1000, "evaluate_every": 12},
        data__validation_fraction=0.1,
        optimizer__learning_rate=1e-3,
        samples={"prompts": ["abc", "h"], "max_new_tokens": 4},
    )


@pytest.fixture
def devices_env(user_env: dict[str, str]) -> dict[str, str]:
    # NPROC: see conftest.py.
    return user_env | {"XLA_FLAGS": f"{user_env['XLA_FLAGS']} --xla_force_host_platform_device_count=4", "NPROC": "16"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextmanager
def two_processes(file: Path, env: dict[str, str], name: str) -> Iterator[list[Popen]]:
    port = free_port()
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    *("train", file, "--coordinator", f"localhost:{port}", "--processes", 2, "--process-id", number),
                    env=env,
                    log=file.with_name(f"{name}.{number}.log"),
                )
            )
            for number in range(2)
        ]


def ended(processes: list[Popen], file: Path, name: str, status: int = 0) -> None:
    for number, process in enumerate(processes):
        code = process.wait(TIMEOUT_S)
        assert code == status, file.with_name(f"{name}.{number}.log").read_text()


@pytest.fixture(scope="module")
def together(table: dict[str, Any]) -> list[dict]:
    """The same run in this process, on eight devices."""
    folder = Path(table["run"]).with_name("together")
    camelid.runs.run.run(recipe(table | {"run": str(folder)}))
    return read_metrics(folder / "metrics.jsonl")


def test_ctrl_c_in_one_of_two_processes_ends_both_and_one_and_then_two_go_on_to_the_losses_of_one(
    table: dict[str, Any], together: list[dict], devices_env: dict[str, str]
):
    run = Path(table["run"])
    file = write_recipe_file(table, run.with_name("recipe.toml"))

    with two_processes(file, devices_env, "first") as processes:
        wait_until(lambda: lines(run / "metrics.jsonl") >= 6, processes[0])
        os.kill(processes[1].pid, signal.SIGINT)
        ended(processes, file, "first", STOPPED)
    stopped = losses(run)[-1]["step"]
    assert 5 <= stopped < STEPS, "the run was over before the signal"
    # Both wrote their part of it, or it would not be whole.
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [str(stopped)]
    assert not (run / "model").exists()

    alone = devices_env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    with started("train", file, env=alone, log=file.with_name("alone.0.log")) as process:
        wait_until(lambda: lines(run / "metrics.jsonl") >= stopped + 6, process)
        process.terminate()
        ended([process], file, "alone", STOPPED)
    assert f"resuming after step {stopped}" in file.with_name("alone.0.log").read_text()
    assert stopped < (again := losses(run)[-1]["step"]) < STEPS, "the run was over before the signal"

    with two_processes(file, devices_env, "second") as processes:
        ended(processes, file, "second")
    assert f"resuming after step {again}" in file.with_name("second.0.log").read_text()
    samples = [read_metrics(folder / "samples.jsonl") for folder in (run, run.with_name("together"))]
    assert [(row["step"], row["prompt"]) for row in samples[0]] == [(n, x) for n in (0, 12, 24) for x in ("abc", "h")]
    assert samples[0][:2] == samples[1][:2]
    rows = read_metrics(run / "metrics.jsonl")
    assert [(row["step"], "loss" in row) for row in rows] == [(row["step"], "loss" in row) for row in together]
    for name in ("loss", "gradient_norm", "validation_loss", "weight", "learning_rate"):
        ours, theirs = (column([row for row in some if name in row], name) for some in (rows, together))
        # Sums over processes are taken in another order.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=name)
    ours, theirs = (tensor_bytes(folder / "model") for folder in (run, run.with_name("together")))
    assert ours.keys() == theirs.keys()
    for name, (dtype, _, content) in ours.items():
        pair = (np.frombuffer(data, dtype) for data in (content, theirs[name][2]))
        # AdamW's steps are as large for tiny gradients as for others; 24 of them make about 2e-2.
        np.testing.assert_allclose(*pair, atol=1e-3, err_msg=name)
    # The second process writes nothing of its own.
    assert "loss" not in file.with_name("second.1.log").read_text()
