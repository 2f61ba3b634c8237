"""The processes that share a mesh: start them, tell them apart, move arrays between them and the mesh."""

import math
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from camelid.errors import UserError
from camelid.parallel.rules import COMPUTE, partition


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
    jax.distributed.initialize(processes.coordinator, processes.count, processes.id)


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


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in COMPUTE["batch"])


def own_rows(rows: int, mesh: Mesh) -> slice:
    """The rows of a batch that the devices of this process need; raises UserError where rows do not divide."""
    ways = batch_ways(mesh)
    if rows % ways:
        raise UserError(
            f"{rows} rows do not divide over {' x '.join(COMPUTE['batch'])} = {ways} devices",
            f"Use a multiple of {ways} rows for each batch (and each of its microbatches).",
        )
    indices = _rows_sharding(mesh).addressable_devices_indices_map((rows, 1)).values()
    cuts = [index[0].indices(rows) for index in indices if index is not None]
    return slice(min(start for start, *_ in cuts), max(stop for _, stop, _ in cuts))


def place(local: Mapping[str, np.ndarray], own: slice, rows: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays of `rows` rows, cut over the mesh as batches are; `local` holds the rows `own` of each."""

    def one(x: np.ndarray) -> jax.Array:
        def cut(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(rows)
            return x[start - own.start : stop - own.start]

        return jax.make_array_from_callback((rows, *x.shape[1:]), _rows_sharding(mesh), cut)

    return {name: one(x) for name, x in local.items()}


def _rows_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition(("batch", "seq"), COMPUTE))


def to_host(tree):
    """The whole of each array as numpy, in every process; every process calls this."""

    def fetch(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


class StopSignal:
    """Tells all processes, at the same step, that one of them was asked to end (SIGTERM, or Ctrl-C)."""

    def __init__(self):
        self._asked = threading.Event()
        self._before = {}

    def __enter__(self) -> "StopSignal":
        # With several processes JAX's own runtime takes over SIGTERM, so that all of them can agree on a step.
        names = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGTERM, signal.SIGINT]
        for name in names:
            self._before[name] = signal.signal(name, self._ask)
        return self

    def _ask(self, number: int, frame) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()

    def __exit__(self, *error) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def at(self, step: int) -> bool:
        """True where every process is to end after this step; every process asks at every step."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        return multihost_utils.reached_preemption_sync_point(step)
