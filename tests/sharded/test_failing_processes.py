"""Of two processes that train together one fails: the other ends too, with its message, and waits for nobody."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from camelid.interrupts import INTERRUPTED
from runs import TIMEOUT_S, lines, tiny_run, wait_until, write_recipe_file

pytestmark = pytest.mark.quick_compile

# How long processes wait for each other before they end: a loaded machine may take longer than a user would wait.
COMMAND = """
from camelid import interrupts
from camelid.__main__ import main
from camelid.parallel import failure

interrupts.END_S, failure.ACKNOWLEDGE_MS, failure.EXIT_DELAY_S = 60, 60_000, 2
main()
"""
PATCHED = f"""
import camelid.runs.components, camelid.runs.run
from camelid.errors import UserError

def fail(*arguments, **options):
    raise {{error}}

assert hasattr({{module}}, {{name!r}})
{{module}}.{{name}} = fail
{COMMAND}
"""


@contextmanager
def two_processes(recipe: Path, env: dict[str, str], *programs: str) -> Iterator[list[subprocess.Popen]]:
    """Two processes that train, each as a program that may be patched, with their output in 0.log and 1.log."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    with ExitStack() as stack:
        processes = []
        for number, text in enumerate(programs):
            words = ["train", recipe, "--coordinator", address, "--processes", 2, "--process-id", number]
            log = stack.enter_context(recipe.with_name(f"{number}.log").open("wb"))
            process = subprocess.Popen([sys.executable, "-c", text, *map(str, words)], env=env, stdout=log, stderr=log)
            stack.callback(process.wait, TIMEOUT_S)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def logs(recipe: Path) -> list[str]:
    return [recipe.with_name(f"{number}.log").read_text() for number in range(2)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    table = tiny_run(tmp_path, train={"steps": 100_000, "evaluate_every": 5}, data__validation_fraction=0.1)
    return write_recipe_file(table, tmp_path / "recipe.toml")


USER_ERROR = "UserError('no such thing here', 'Copy it.')"


@pytest.mark.parametrize(
    ("failing", "module", "name", "error", "status", "said"),
    [
        (1, "camelid.runs.components", "load_tokenizer", USER_ERROR, 2, "no such thing here\n         Copy it."),
        (0, "camelid.runs.components", "Loader", USER_ERROR, 2, "no such thing here\n         Copy it."),
        (1, "camelid.runs.run", "prefetched", USER_ERROR, 2, "no such thing here\n         Copy it."),
        (1, "camelid.runs.run", "mean_losses", "ArithmeticError('odd')", 1, "ArithmeticError: odd"),
    ],
    ids=["before the data", "while the main process prepares the data", "in the loader", "in validation"],
)
def test_an_error_of_one_process_ends_both(
    failing: int, module: str, name: str, error: str, status: int, said: str, recipe: Path, user_env: dict[str, str]
):
    programs = [COMMAND, COMMAND]
    programs[failing] = PATCHED.format(module=module, name=name, error=error)
    with two_processes(recipe, user_env, *programs) as processes:
        statuses = [process.wait(TIMEOUT_S) for process in processes]
    assert statuses == [status, status], logs(recipe)
    assert said in logs(recipe)[failing]
    assert f"camelid: process {failing}: {said}" in logs(recipe)[1 - failing]


RECORDED = f"""
import sys, time
import camelid.runs.components

Loader = camelid.runs.components.Loader

def recorded(*arguments, **options):
    print("begins", time.time())
    time.sleep(1)  # in which the others would begin
    loader = Loader(*arguments, **options)
    print("ends", time.time(), flush=True)
    if sys.argv[-1] == "1":
        raise KeyError("enough")
    return loader

camelid.runs.components.Loader = recorded
{COMMAND}
"""


def test_the_main_process_prepares_the_data_first(recipe: Path, user_env: dict[str, str]):
    with two_processes(recipe, user_env, RECORDED, RECORDED) as processes:
        for process in processes:
            process.wait(TIMEOUT_S)

    def times(log: str, word: str) -> list[float]:
        return [float(line.split()[1]) for line in log.splitlines() if line.startswith(word)]

    main, other = logs(recipe)
    assert len(times(main, "ends")) == 2, "training and validation text"
    assert max(times(main, "ends")) < min(times(other, "begins"))


def test_a_process_that_is_killed_ends_the_other(recipe: Path, user_env: dict[str, str]):
    with two_processes(recipe, user_env, COMMAND, COMMAND) as processes:
        wait_until(lambda: lines(recipe.with_name("run") / "metrics.jsonl") > 5, processes[0])
        processes[1].kill()
        status = processes[0].wait(TIMEOUT_S)
    assert status != 0
    assert "another process" in logs(recipe)[0] or "another task died" in logs(recipe)[0], logs(recipe)


def test_ctrl_c_before_the_first_step_ends_both(recipe: Path, user_env: dict[str, str]):
    sleeping = f"""
import time
import camelid.runs.components

def wait(*arguments, **options):
    print("waiting", flush=True)
    time.sleep(600)

camelid.runs.components.Loader = wait
{COMMAND}
"""
    with two_processes(recipe, user_env, sleeping, COMMAND) as processes:
        wait_until(lambda: "waiting" in logs(recipe)[0], processes[0])
        os.kill(processes[0].pid, signal.SIGINT)
        statuses = [process.wait(TIMEOUT_S) for process in processes]
    assert statuses[0] == INTERRUPTED, logs(recipe)
    assert statuses[1] != 0, logs(recipe)
    assert logs(recipe)[0].count("camelid: interrupted") == 1
    assert "camelid: process 0: interrupted" in logs(recipe)[1]
