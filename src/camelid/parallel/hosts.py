"""The processes of a distributed run: initialization, agreement between them, and arrays that they share."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from camelid.errors import UserError

HEARTBEAT_TIMEOUT_S = 60
"""After this time without a heartbeat of a process, JAX ends the others."""
FOREVER_MS = 10**9  # twelve days

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
    if (client := coordinator()) is None:
        return decide()
    key = f"camelid/broadcast/{next(_broadcasts)}"
    if process_id() != 0:  # is_main() would initialize the devices, which is too early here
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
    if (client := coordinator()) is not None and not is_main():
        client.wait_at_barrier(f"camelid/{name}", FOREVER_MS)
    yield
    if client is not None and is_main():
        client.wait_at_barrier(f"camelid/{name}", FOREVER_MS)


def coordinator() -> Any:
    """JAX's connection to the coordinator; None for a single process."""
    return distributed.global_state.client


def process_id() -> int:
    """The index of this process; does not initialize the devices."""
    return distributed.global_state.process_id


def to_host(tree):
    """Each array, unsharded, as NumPy in every process; every process has to call this."""

    def fetch(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)
