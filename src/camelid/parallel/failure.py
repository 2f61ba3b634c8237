"""Failures in a distributed run: if one process fails, the others, which would wait for it, exit with its message."""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from camelid.errors import UserError
from camelid.interrupts import INTERRUPTED, before_end
from camelid.parallel.hosts import FOREVER_MS, coordinator, process_id

ACKNOWLEDGE_MS = 1000
"""A process that failed waits up to this time until the others know."""
EXIT_DELAY_S = 0.3
"""Process 0, which runs the coordinator, exits this much later than the others: JAX aborts processes that lose it."""
FAILURE = "camelid/failure"


@contextlib.contextmanager
def fail_together(as_user_error: Callable[[Exception], UserError | None]) -> Iterator[None]:
    """If the block fails in one process, the others, which would wait for it, exit with its message.

    For commands: it ends the process.
    """
    if (client := coordinator()) is None:
        yield
        return

    def fail(error: UserError, status: int) -> None:
        failure = {"process": process_id(), "status": status, "error": [error.problem, error.advice]}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has failed already
            client.key_value_set(FAILURE, json.dumps(failure))
            client.wait_at_barrier(f"{FAILURE}/heard", ACKNOWLEDGE_MS)
        if process_id() == 0:
            time.sleep(EXIT_DELAY_S)

    threading.Thread(target=_end_with_others, args=(client,), daemon=True).start()
    interrupted = UserError("interrupted", "Run the same command again to resume.")
    with before_end(lambda: fail(interrupted, INTERRUPTED)):
        try:
            yield
        except Exception as error:
            explained = as_user_error(error)
            status = 1 if explained is None else 2
            fail(explained or UserError(f"{type(error).__name__}: {error}", "See the traceback there."), status)
            atexit.register(os._exit, status)  # before JAX's exit handler, which waits for the others
            raise


def _end_with_others(client: Any) -> None:
    """Ends this process when another process has failed."""
    try:
        failure = json.loads(client.blocking_key_value_get(FAILURE, FOREVER_MS))
    except jax.errors.JaxRuntimeError:
        return  # the run is over
    if failure["process"] == process_id():
        return
    problem, advice = failure["error"]
    print(f"camelid: process {failure['process']}: {problem}\n         {advice}", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier(f"{FAILURE}/heard", ACKNOWLEDGE_MS)
    if process_id() == 0:
        time.sleep(EXIT_DELAY_S)
    os._exit(failure["status"])
