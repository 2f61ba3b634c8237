"""Worker processes, each connected by a pipe.

Not a pool of the standard library, which leaves processes behind if the parent is killed, and hangs if a worker is.
"""

import multiprocessing
import signal
from collections.abc import Callable, Collection, Iterable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from camelid.errors import UserError
from camelid.interrupts import undivided

Worker = tuple[Connection, BaseProcess]


class WorkerEnded(UserError):
    """A worker was killed, or failed before it could report the reason."""


def start_worker(
    work: Callable[..., None], *arguments: object, duplex: bool = True, blocked: Iterable[signal.Signals] = ()
) -> Worker:
    """Starts a process that runs `work(connection, *arguments)`; with `duplex` False, it only sends.

    It ignores Ctrl-C, which the parent handles, and the signals in `blocked`.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex)
    process = spawn.Process(target=work, args=(theirs, *arguments), daemon=True)
    resource_tracker.ensure_running()  # otherwise process.start() starts it, which unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *blocked})
    try:
        with undivided():  # a process whose parent ends before it has sent the arguments prints a traceback
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return ours, process


def receive(worker: Worker, does: str, option: str) -> Any:
    """Returns what a worker sends; raises WorkerEnded, with what it does and the option that sets their number."""
    connection, process = worker
    try:
        return connection.recv()
    except (EOFError, OSError):  # between two messages, or within one
        process.join()
        raise WorkerEnded(
            f"a process that {does} ended unexpectedly (exit code {process.exitcode})",
            f"Use fewer {option} if memory ran out; otherwise see its messages above.",
        ) from None


def end_workers(workers: Collection[Worker]) -> None:
    """Kills the processes."""
    for _, process in workers:
        process.kill()
    for connection, process in workers:
        process.join()
        connection.close()
