"""The processes of a distributed run: initialization, agreement between them, failures, and signals to stop."""

import atexit
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from camelid.errors import UserError
from camelid.interrupts import INTERRUPTED, before_end, handling_signals

HEARTBEAT_TIMEOUT_S = 60
"""After this time without a heartbeat of a process, JAX ends the others."""
ACKNOWLEDGE_MS = 1000
"""A process that failed waits up to this time until the others know."""
EXIT_DELAY_S = 0.3
"""Process 0, which runs the coordinator, exits this much later than the others: JAX aborts processes that lose it."""
FOREVER_MS = 10**9  # twelve days
FAILURE = "camelid/failure"

_T = TypeVar("_T")
_broadcasts = itertools.count()
"""Numbers the calls of `broadcast_from_main`, which are the same in all processes."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How this process finds the others; without any values, it runs alone."""

    coordinator: str | None = None
    """Address of process 0, host:port."""
    count: int | None = None
    id: int | None = None
    detect: bool = False
    """Take the values from the environment of SLURM, MPI or a TPU pod."""


def start(processes: Processes) -> None:
    """Connects to the other processes, if there are any; has to be called before the first use of a device."""
    given = (processes.coordinator, processes.count, processes.id)
    if all(value is None for value in given) and not processes.detect:
        return
    if any(value is None for value in given) and not processes.detect:
        raise UserError(
            "--coordinator, --processes and --process-id belong together",
            "Set all three, or --detect in a cluster job.",
        )
    jax.distributed.initialize(
        processes.coordinator, processes.count, processes.id, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
    )


def is_main() -> bool:
    """Whether this is process 0, the one that prints and writes."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """A barrier: returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_true(value: bool) -> bool:
    """Whether the value is true in any process; every process has to call this."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.asarray(value)).any())


def broadcast_from_main(decide: Callable[[], _T]) -> _T:
    """Calls `decide` in the main process and returns its value in every process.

    Every process has to call this, in the same order. For decisions on which later collectives depend: processes may
    see different states of a shared folder, for example. The value has to be representable in JSON. A UserError of
    the main process is raised in every process.
    """
    if (client := _client()) is None:
        return decide()
    key = f"camelid/broadcast/{next(_broadcasts)}"
    if _process_id() != 0:  # is_main() would initialize the devices, which is too early here
        answer = json.loads(client.blocking_key_value_get(key, FOREVER_MS))
        if "error" in answer:
            raise UserError(*answer["error"])
        return answer["value"]
    try:
        value = decide()
    except UserError as error:
        client.key_value_set(key, json.dumps({"error": [error.problem, error.advice]}))
        raise
    client.key_value_set(key, json.dumps({"value": value}))
    return value


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Runs the block in the main process first, and then in the others."""
    # A barrier of the coordinator: collectives of devices would time out if the main process takes hours.
    if (client := _client()) is not None and not is_main():
        client.wait_at_barrier(f"camelid/{name}", FOREVER_MS)
    yield
    if client is not None and is_main():
        client.wait_at_barrier(f"camelid/{name}", FOREVER_MS)


def _client() -> Any:
    """JAX's connection to the coordinator; None for a single process."""
    return distributed.global_state.client


def _process_id() -> int:
    """The index of this process; does not initialize the devices."""
    return distributed.global_state.process_id


@contextlib.contextmanager
def fail_together(as_user_error: Callable[[Exception], UserError | None]) -> Iterator[None]:
    """If the block fails in one process, the others, which would wait for it, exit with its message.

    For commands: it ends the process.
    """
    if (client := _client()) is None:
        yield
        return

    def fail(error: UserError, status: int) -> None:
        failure = {"process": _process_id(), "status": status, "error": [error.problem, error.advice]}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has failed already
            client.key_value_set(FAILURE, json.dumps(failure))
            client.wait_at_barrier(f"{FAILURE}/heard", ACKNOWLEDGE_MS)
        if _process_id() == 0:
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
    if failure["process"] == _process_id():
        return
    problem, advice = failure["error"]
    print(f"camelid: process {failure['process']}: {problem}\n         {advice}", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier(f"{FAILURE}/heard", ACKNOWLEDGE_MS)
    if _process_id() == 0:
        time.sleep(EXIT_DELAY_S)
    os._exit(failure["status"])


def to_host(tree):
    """Each array, unsharded, as NumPy in every process; every process has to call this."""

    def fetch(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


class StopSignal:
    """Stops all processes after the same step when one of them receives SIGTERM or Ctrl-C.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self, first: int = 0, last: int | None = None):
        """`first` is the number of completed steps; training ends at step `last`."""
        self._requested = threading.Event()
        self._step, self._last = first, last
        self._agreed = False
        self._several = jax.process_count() > 1

    def __enter__(self) -> "StopSignal":
        # With several processes, JAX's runtime handles SIGTERM, so that all processes agree on a step.
        numbers = [signal.SIGINT] if self._several else [signal.SIGTERM, signal.SIGINT]
        self._handling = handling_signals(self._handle, *numbers)
        self._handling.__enter__()
        return self

    def _handle(self, number: int) -> None:
        if self._requested.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # launchers may forward a SIGTERM that the process received itself
        self._requested.set()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        where = "a step that all processes agree on" if self._several else f"step {self._stop_step}"
        text = f"stopping after saving {where}; press Ctrl-C again to stop without saving"
        # In a thread, because standard error may be blocked, or in use by the interrupted code.
        threading.Thread(target=print, args=(text,), kwargs={"file": sys.stderr}, daemon=True).start()

    @property
    def _stop_step(self) -> int:
        return self._step + 1 if self._last is None else min(self._step + 1, self._last)

    def __exit__(self, *error) -> None:
        self._handling.__exit__(*error)

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived; with several processes, whether they have agreed on a step. Equal in all."""
        return self._agreed if self._several else self._requested.is_set()

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step, the same in every process; every process has to call this at every step."""
        self._step = step
        if self._several:
            self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(step)
        return self.requested
