"""The processes that share a mesh: start them, tell them apart, move arrays between them and the mesh."""

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
from camelid.interrupts import INTERRUPTED, before_end, heard

HEARTBEAT_TIMEOUT_S = 60
"""JAX ends all processes when one was killed, or its machine lost, so long ago"""
ANSWER_MS = 1000
"""for which a process that failed waits until the others have heard"""
LAST_S = 0.3
"""by which process 0, where the coordinator runs, ends after the others: JAX aborts those that lose it"""
FOREVER_MS = 10**9  # twelve days
FAILURE = "camelid/failure"

_T = TypeVar("_T")
_decisions = itertools.count()
"""numbers the calls of `decided`, which are the same in all processes"""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How this process finds the others. All None: one process, or what SLURM, MPI or a TPU pod says."""

    coordinator: str | None = None
    """host:port of process 0"""
    count: int | None = None
    id: int | None = None
    detect: bool = False
    """join the others that the cluster's environment tells of"""


def start(processes: Processes) -> None:
    """Joins the other processes, if there are any; call it before the first use of a device."""
    given = (processes.coordinator, processes.count, processes.id)
    if all(value is None for value in given) and not processes.detect:
        return
    if any(value is None for value in given) and not processes.detect:
        raise UserError(
            "coordinator, processes and process-id belong together", "Give all three, or --detect inside a cluster job."
        )
    jax.distributed.initialize(
        processes.coordinator, processes.count, processes.id, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
    )


def is_main() -> bool:
    """True in one process: the one that prints and writes."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_true(value: bool) -> bool:
    """Whether the value is true in any of the processes; every process calls this."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.asarray(value)).any())


def decided(decide: Callable[[], _T]) -> _T:
    """What `decide` returns in the main process, in every process; every process calls this, in the same order.

    For all that later collectives depend on: of a shared folder, say, processes may see different states. Values must
    be JSON. A UserError of the main process is raised in every process.
    """
    if (client := _client()) is None:
        return decide()
    key = f"camelid/decided/{next(_decisions)}"
    if _process_id() != 0:  # is_main would start JAX's devices, which is too early where a run begins
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
    """The block runs in the main process, and then in the others."""
    # A barrier of the coordinator: collectives of devices time out where the main process takes hours.
    if (client := _client()) is not None and not is_main():
        client.wait_at_barrier(f"camelid/{name}", FOREVER_MS)
    yield
    if client is not None and is_main():
        client.wait_at_barrier(f"camelid/{name}", FOREVER_MS)


def _client() -> Any:
    """JAX's connection to the coordinator, None where this process is alone."""
    return distributed.global_state.client


def _process_id() -> int:
    """This process's number, also before devices are asked for."""
    return distributed.global_state.process_id


@contextlib.contextmanager
def ended_together(explained: Callable[[Exception], UserError | None]) -> Iterator[None]:
    """Where the block fails in one process, the others, which would wait for it, end with its message.

    For a command: it ends the process.
    """
    if (client := _client()) is None:
        yield
        return

    def fail(error: UserError, status: int) -> None:
        failure = {"process": _process_id(), "status": status, "error": [error.problem, error.advice]}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has failed already
            client.key_value_set(FAILURE, json.dumps(failure))
            client.wait_at_barrier(f"{FAILURE}/heard", ANSWER_MS)
        if _process_id() == 0:
            time.sleep(LAST_S)

    threading.Thread(target=_end_with_others, args=(client,), daemon=True).start()
    interrupted = UserError("interrupted", "The same command goes on from where it was.")
    with before_end(lambda: fail(interrupted, INTERRUPTED)):
        try:
            yield
        except Exception as error:
            told = explained(error)
            status = 1 if told is None else 2
            fail(told or UserError(f"{type(error).__name__}: {error}", "See the traceback there."), status)
            atexit.register(os._exit, status)  # before JAX's own exit, which waits for the others
            raise


def _end_with_others(client: Any) -> None:
    """Ends this process when another one has failed."""
    try:
        failure = json.loads(client.blocking_key_value_get(FAILURE, FOREVER_MS))
    except jax.errors.JaxRuntimeError:
        return  # the run is over
    if failure["process"] == _process_id():
        return
    problem, advice = failure["error"]
    print(f"camelid: process {failure['process']}: {problem}\n         {advice}", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier(f"{FAILURE}/heard", ANSWER_MS)
    if _process_id() == 0:
        time.sleep(LAST_S)
    os._exit(failure["status"])


def to_host(tree):
    """The whole of each array as numpy, in every process; every process calls this."""

    def fetch(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


class StopSignal:
    """Asks all processes to stop after the same step when one of them receives SIGTERM or Ctrl-C.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self, first: int = 0, last: int | None = None):
        """`first` steps have been made, and training ends at step `last`."""
        self._asked = threading.Event()
        self._step, self._last = first, last
        self._agreed = False
        self._several = jax.process_count() > 1

    def __enter__(self) -> "StopSignal":
        # With several processes JAX's own runtime handles SIGTERM, so that all of them can agree on a step.
        numbers = [signal.SIGINT] if self._several else [signal.SIGTERM, signal.SIGINT]
        self._heard = heard(self._ask, *numbers)
        self._heard.__enter__()
        return self

    def _ask(self, number: int) -> None:
        if self._asked.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # launchers may forward a SIGTERM that the process has received already
        self._asked.set()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        where = "a step that all processes agree on" if self._several else f"step {self._stop_step}"
        text = f"stopping after saving {where}; press Ctrl-C again to stop without saving"
        # In a thread, because standard error may be blocked, or in use by what the signal has interrupted.
        threading.Thread(target=print, args=(text,), kwargs={"file": sys.stderr}, daemon=True).start()

    @property
    def _stop_step(self) -> int:
        return self._step + 1 if self._last is None else min(self._step + 1, self._last)

    def __exit__(self, *error) -> None:
        self._heard.__exit__(*error)

    @property
    def asked(self) -> bool:
        """True if a signal has come; with several processes, if all of them have agreed on a step. The same in all."""
        return self._agreed if self._several else self._asked.is_set()

    def at(self, step: int) -> bool:
        """True if every process is to stop after this step; every process calls this at every step."""
        self._step = step
        if self._several:
            self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(step)
        return self.asked
