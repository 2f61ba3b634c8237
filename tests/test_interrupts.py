"""Ctrl-C ends a command at any moment, with one line and status 130; training saves first, with a status of its own."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from camelid.interrupts import INTERRUPTED, STOPPED
from runs import TIMEOUT_S, losses, tiny_run, wait_until, words, write_recipe_file

LINE = "camelid: interrupted"


class Started:
    """A process in a group of its own, as a terminal starts it, with its output in files."""

    def __init__(self, command: list[str], folder: Path, env: Mapping[str, str]):
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=err, stdin=-3, start_new_session=True)

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        wait_until(condition, self.process)

    def until_watched(self) -> None:
        """Waits for the thread that hears signals, which is the first that a command starts."""

        def threads() -> int:
            try:
                return len(os.listdir(f"/proc/{self.process.pid}/task"))
            except FileNotFoundError:
                return 0

        self.until(lambda: threads() > 1)

    def interrupt(self) -> None:
        """Sends what Ctrl-C in a terminal sends: SIGINT to the whole group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def until_group_ended(self) -> None:
        """Waits for the processes that the ended process had started."""
        with suppress(ProcessLookupError):
            latest = time.monotonic() + TIMEOUT_S
            while time.monotonic() < latest:
                os.killpg(self.process.pid, 0)
                time.sleep(0.01)


@contextmanager
def started(command: list[str], folder: Path, env: Mapping[str, str]) -> Iterator[Started]:
    run = Started(command, folder, env)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait(TIMEOUT_S)


def assert_interrupted(run: Started) -> None:
    assert run.wait() == INTERRUPTED, run.err
    assert run.err.splitlines()[-1].startswith(LINE), run.err
    assert run.err.count(LINE) == 1, run.err
    assert "Traceback" not in run.err, run.err
    assert "Exception ignored" not in run.err, run.err


# The process of a command -----------------------------------------------------------------


def program(body: str) -> list[str]:
    """A Python program whose command is `body`; it prints a line when it is to be interrupted."""
    text = "import atexit, os, signal, sys, threading, time\nfrom pathlib import Path\n"
    text += "from camelid.interrupts import *\nfrom camelid import interrupts\n\n"
    text += f"def command():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n\ninterrupts.run_command(command)\n"
    return [sys.executable, "-c", text]


def interrupted(body: str, folder: Path, env: Mapping[str, str]) -> Started:
    """A program after an interrupt that was sent when it had printed a line."""
    with started(program(body), folder, env) as run:
        run.until(lambda: "\n" in run.out)
        run.interrupt()
        run.wait()
    return run


@pytest.mark.parametrize(
    "body",
    {
        "swallows it": """
            print(flush=True)
            while True:
                try:
                    time.sleep(0.001)
                except BaseException:
                    pass
            """,
        "is within a C function": """
            import ctypes
            print(flush=True)
            ctypes.CDLL(None).sleep(600)
            ctypes.CDLL(None).sleep(600)
            """,
        "blocks the signal in its main thread": """
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            print(flush=True)
            threading.Event().wait()
            """,
        "waits for a thread of its own": """
            threading.Thread(target=time.sleep, args=(600,)).start()
            print(flush=True)
            """,
        "is being shut down": """
            atexit.register(time.sleep, 600)
            atexit.register(print, flush=True)
            """,
        "runs an event loop that takes the wakeup file": """
            import socket
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            signal.set_wakeup_fd(theirs.fileno())
            print(flush=True)
            while True:
                time.sleep(0.1)
            """,
        "cleans up for too long": """
            with interrupts.cleaned_up():
                try:
                    print(flush=True)
                    time.sleep(600)
                finally:
                    time.sleep(600)
            """,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_command_ends_that(body: tuple[str, str], tmp_path: Path, user_env: dict[str, str]):
    assert_interrupted(interrupted(body[1], tmp_path, user_env))


def test_a_command_ends_whose_error_stream_nobody_reads(tmp_path: Path, user_env: dict[str, str]):
    body = """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, bytes(4096))
        except BlockingIOError:
            os.set_blocking(writer, True)
        os.dup2(writer, 2)
        print(flush=True)
        threading.Event().wait()
        """
    assert interrupted(body, tmp_path, user_env).wait() == INTERRUPTED


def test_temporary_files_are_removed_first(tmp_path: Path, user_env: dict[str, str]):
    body = f"""
        import tempfile
        interrupts.END_S = 60  # a loaded machine may take longer than a user would wait
        with interrupts.cleaned_up(), tempfile.TemporaryDirectory(dir={str(tmp_path)!r}, prefix="temporary"):
            print(flush=True)
            time.sleep(600)
        """
    assert_interrupted(interrupted(body, tmp_path, user_env))
    assert not list(tmp_path.glob("temporary*"))


@pytest.mark.parametrize(
    "writes",
    [
        "from camelid.cli import main; sys.argv[1:] = ['convert', SOURCE, OUT]; main()",
        "import camelid; camelid.load(SOURCE).save(OUT)",
    ],
    ids=["convert", "save"],
)
def test_a_checkpoint_that_is_not_begun_leaves_no_temporary_files(
    writes: str, stories: Path, tmp_path: Path, user_env: dict[str, str]
):
    """Those of the tokenizer lie where the system has its temporary files."""
    (tmp_path / "temporary").mkdir()
    body = f"""
        from camelid.checkpoint import registry
        interrupts.END_S = 60  # a loaded machine may take longer than a user would wait

        def plan(*saving):
            assert os.listdir(os.environ["TMPDIR"])
            print(flush=True)
            time.sleep(600)

        registry.plan_files = plan
        SOURCE, OUT = {str(stories)!r}, {str(tmp_path / "out")!r}
        {writes}
        """
    run = interrupted(body, tmp_path / "logs", {**user_env, "TMPDIR": str(tmp_path / "temporary")})
    assert_interrupted(run)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"temporary", "logs"}


def test_a_worker_that_is_being_started_gets_its_arguments_first(tmp_path: Path, user_env: dict[str, str]):
    """It would print a traceback otherwise."""
    body = """
        import multiprocessing.util
        from camelid.data.preparation.workers import start_worker
        interrupts.END_S = 60  # a loaded machine may take longer than a user would wait
        start = multiprocessing.util.spawnv_passfds

        def start_slowly(*about):
            process = start(*about)
            if "--multiprocessing-fork" in about[1]:  # not the resource tracker
                print(flush=True)
                time.sleep(1)
            return process

        multiprocessing.util.spawnv_passfds = start_slowly
        start_worker(bool)
        time.sleep(600)
        """
    with started(program(body), tmp_path, user_env) as run:
        run.until(lambda: "\n" in run.out)
        run.interrupt()
        run.wait()
        run.until_group_ended()
        assert_interrupted(run)


def test_what_hears_the_signal_decides_when_the_command_ends(tmp_path: Path, user_env: dict[str, str]):
    body = """
        def hear(number):
            print("heard", number, flush=True)
            heard_before.append(number)
            if len(heard_before) == 2:
                raise KeyboardInterrupt
        heard_before = []
        with interrupts.handling_signals(hear, signal.SIGINT, signal.SIGTERM):
            print(flush=True)
            threading.Event().wait()
        """
    with started(program(body), tmp_path, user_env) as run:
        run.until(lambda: "\n" in run.out)
        run.process.terminate()
        run.until(lambda: "heard 15" in run.out)
        run.interrupt()
        assert_interrupted(run)
    assert "heard 2" in run.out


@pytest.mark.parametrize(
    ("body", "status", "err"),
    [
        ("print('out')", 0, ""),
        ("print('out'); sys.exit(75)", 75, ""),
        ("print('out'); sys.exit()", 0, ""),
        ("print('out'); raise ValueError('odd')", 1, "ValueError: odd"),
    ],
)
def test_a_command_ends_with_its_status_and_all_of_its_output(
    body: str, status: int, err: str, tmp_path: Path, user_env: dict[str, str]
):
    with started(program(body), tmp_path, user_env | {"PYTHONUNBUFFERED": ""}) as run:
        assert (run.wait(), run.out) == (status, "out\n")
    assert run.err.strip().endswith(err)


def test_a_signal_that_the_parent_ignores_stays_ignored(tmp_path: Path, user_env: dict[str, str]):
    # As a shell does for a script's jobs in the background.
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]
    body = "print(flush=True); time.sleep(1); print('done')"
    with started([*ignoring, *program(body)], tmp_path, user_env) as run:
        run.until(lambda: "\n" in run.out)
        run.interrupt()
        assert (run.wait(), run.out) == (0, "\ndone\n")


def test_signals_that_libraries_handle_do_not_end_a_command(tmp_path: Path, user_env: dict[str, str]):
    body = """
        import subprocess
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        subprocess.run(["true"])
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.5)
        print("done")
        """
    with started(program(body), tmp_path, user_env) as run:
        assert (run.wait(), run.out) == (0, "done\n")


def test_importing_camelid_leaves_signals_alone(tmp_path: Path, user_env: dict[str, str]):
    text = """
        import signal, threading
        import camelid.__main__, camelid.cli, camelid.runs.run
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.set_wakeup_fd(-1) == -1
        assert "camelid-signals" not in [thread.name for thread in threading.enumerate()]
        """
    with started([sys.executable, "-c", textwrap.dedent(text)], tmp_path, user_env) as run:
        assert run.wait() == 0, run.err


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0])
def test_ctrl_c_while_xla_compiles(seconds: float, tmp_path: Path, user_env: dict[str, str]):
    body = """
        import jax, jax.numpy as jnp
        def slow(x):
            for n in range(400):
                x = jnp.sort(x @ x + n)
            return x
        lowered = jax.jit(slow).lower(jnp.ones((64, 64)))
        print(flush=True)
        lowered.compile()
        print("compiled", flush=True)
        """
    # Otherwise the second test would read what the first one has compiled.
    with started(program(body), tmp_path, user_env | {"JAX_ENABLE_COMPILATION_CACHE": "0"}) as run:
        run.until(lambda: "\n" in run.out)
        time.sleep(seconds)
        run.interrupt()
        assert_interrupted(run)
    assert "compiled" not in run.out, "it was over before the signal"


# Every command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe_file(tiny_run(folder, train={"steps": 10**6}), folder / "recipe.toml")


COMMANDS = {
    "data prepare": ("{text} --tokenizer {model} --out {out} --split line --workers 2", 20),
    "generate": ("{model} One Two Three Four --max-new-tokens 400", 20),
    "convert": ("{model} {out} --to megatron --verify", 10),
    "evaluate perplexity": ("{model} {text}", 5),
    "diff": ("{model} {model}", 3),
    "delta make": ("{model} {model} {out}", 3),
    "inspect": ("{model}", 3),
    "data inspect": ("{recipe}", 3),
    "demo": ("--folder {out}", 3),
}
"""by command: its options, and how many moments are tried here"""
COMPLETE = ("manifest.json", "config.json", "delta.json", "corpus")
"""what is written last, or renamed with the rest, by the commands that write a folder; the demo's grows file by file"""


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_a_command_at_every_moment(
    name: str, tmp_path: Path, assets: Path, stories: Path, recipe: Path, user_env: dict[str, str]
):
    options, count = COMMANDS[name]
    text = assets / "data" / "tinystories" / "tinystories_sample.txt"

    def command(folder: Path) -> list[str]:
        filled = options.format(model=stories, text=text, out=folder / "made", recipe=recipe)
        # A loaded machine may take longer than a user would wait, even to give a worker its arguments.
        body = f"interrupts.END_S = 60; sys.argv[1:] = {[*name.split(), *filled.split()]!r}"
        return program(f"{body}; from camelid.cli import main; main()")

    def interrupted_after(seconds: float, folder: Path) -> Started:
        with started(command(folder), folder, user_env) as run:
            run.until_watched()
            time.sleep(seconds)
            run.interrupt()
            run.wait()
        return run

    draw = random.Random(name)
    # From the first imports to the end of the work, or beyond it on a fast machine.
    moments = [draw.uniform(0.0, 2.0) for _ in range(count)]
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(interrupted_after, moments, (tmp_path / str(n) for n in range(count))))
    ended = [run for run in runs if run.process.returncode != 0]
    assert ended, "every run was over before its signal"
    for run in ended:
        assert_interrupted(run)
    for folder in tmp_path.iterdir():
        made = folder / "made"
        assert not made.exists() or any((made / file).exists() for file in COMPLETE), "half a folder is left"
    if name in ("data prepare", "convert"):
        again = next(folder for folder in sorted(tmp_path.iterdir()) if not (folder / "made").exists())
        with started(command(again), again, user_env) as run:
            assert run.process.wait(TIMEOUT_S) == 0, run.err
        assert {path.name for path in again.iterdir()} == {"made", "out", "err"}


# Training -----------------------------------------------------------------------------------


def stopping(line: str) -> bool:
    return "stopping after saving step " in line and line.endswith("press Ctrl-C again to stop without saving")


def test_the_first_ctrl_c_saves_and_says_so(recipe: Path, tmp_path: Path, user_env: dict[str, str]):
    folder = tmp_path / "run"
    with started(words("train", recipe, "--run", folder), tmp_path, user_env) as run:
        run.until(lambda: (folder / "metrics.jsonl").exists() and len(losses(folder)) > 3)
        run.interrupt()
        assert run.wait() == STOPPED, run.err
    step = losses(folder)[-1]["step"]
    lines = run.err.splitlines()
    assert sum(map(stopping, lines)) == 1, run.err
    assert lines[-1] == f"stopped after step {step} of 1000000; run the same command again to resume"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [str(step)]


def test_a_ctrl_c_before_the_first_checkpoint_says_that_nothing_was_saved(
    recipe: Path, tmp_path: Path, user_env: dict[str, str]
):
    body = f"""
        from camelid.runs import run
        from camelid.cli import main
        def compile_step(*about):
            print(flush=True)
            time.sleep(600)
        run.compile_step = compile_step
        sys.argv = ["camelid", "train", {str(recipe)!r}, "--run", {str(tmp_path / "run")!r}]
        main()
        """
    run = interrupted(body, tmp_path, user_env)
    assert_interrupted(run)
    assert (
        run.err.splitlines()[-1] == f"{LINE}; no step was saved; run the same command again to start from the beginning"
    )


def test_a_second_ctrl_c_ends_a_save_at_once(recipe: Path, tmp_path: Path, user_env: dict[str, str]):
    folder = tmp_path / "run"
    body = f"""
        from camelid.checkpoint.state.orbax_state import RunCheckpoints
        from camelid.cli import main
        RunCheckpoints.save = lambda *about: time.sleep(600)
        sys.argv = ["camelid", "train", {str(recipe)!r}, "--run", {str(folder)!r}]
        main()
        """
    with started(program(body), tmp_path, user_env) as run:
        run.until(lambda: (folder / "metrics.jsonl").exists() and len(losses(folder)) > 3)
        run.interrupt()
        run.until(lambda: any(map(stopping, run.err.splitlines())))
        run.interrupt()
        assert_interrupted(run)
    assert not list(folder.glob("checkpoints/*"))
