"""Processes that work for this one, each at the other end of a pipe.

Not a pool of the library or of Grain: these leave processes behind where the parent is killed, or wait for ever for one
that was.
"""

import multiprocessing
import signal
from collections.abc import Callable, Collection, Iterable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from camelid.errors import UserError

Worker = tuple[Connection, BaseProcess]


class WorkerEnded(UserError):
    """A process that was killed, or failed before it could say why."""


def start_worker(
    work: Callable[..., None], *arguments: object, duplex: bool = True, blocked: Iterable[signal.Signals] = ()
) -> Worker:
    """A process that runs `work(connection, *arguments)`, with its pipe; duplex False: it only sends.

    It never hears of Ctrl-C, which is the parent's to answer, nor of the signals that are `blocked`.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex)
    process = spawn.Process(target=work, args=(theirs, *arguments), daemon=True)
    resource_tracker.ensure_running()  # its start, otherwise within, would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *blocked})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return ours, process


def receive(worker: Worker, does: str, option: str) -> Any:
    """What a worker sends; raises WorkerEnded by what it does and the option that says how many there are."""
    connection, process = worker
    try:
        return connection.recv()
    except (EOFError, OSError):  # between two answers, or within one
        process.join()
        raise WorkerEnded(
            f"a process that {does} ended by itself (code {process.exitcode})",
            f"Use fewer {option} if memory ran out; else it has said above what went wrong.",
        ) from None


def end_workers(workers: Collection[Worker]) -> None:
    """Ends the processes, whatever they do."""
    for _, process in workers:
        process.kill()
    for connection, process in workers:
        process.join()
        connection.close()
