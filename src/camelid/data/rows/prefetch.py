"""Creates batches ahead of time, in a thread or in worker processes."""

import atexit
import contextlib
import pickle
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection

from camelid.data.preparation.workers import Worker, WorkerEnded, end_workers, receive, start_worker
from camelid.data.rows.batch import Batch
from camelid.data.rows.loader import Loader
from camelid.errors import UserError


def prefetched(
    loader: Loader,
    first_step: int,
    last_step: int,
    start: int = 0,
    stop: int | None = None,
    depth: int = 2,
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """Yields the batches of steps [first_step, last_step), which are created ahead of time.

    `workers` processes (by default, those of the configuration) create them, each up to `depth` batches ahead; with 0
    workers, a thread of this process does. The batches and their order are the same. A worker that is killed is
    replaced, with a RuntimeWarning; if its replacement ends at the same step, too, UserError is raised.
    """
    workers = loader.config.workers if workers is None else workers
    create = partial(loader.batch, start=start, stop=stop)
    steps = range(first_step, last_step)
    return _by_processes(create, steps, depth, workers) if workers else _by_thread(create, steps, depth)


def _by_thread(create: Callable[[int], Batch], steps: range, depth: int) -> Generator[Batch, None, None]:
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="camelid-batches")
    ahead = deque()
    try:
        for step in steps:
            ahead.append(executor.submit(create, step))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _by_processes(
    create: Callable[[int], Batch], steps: range, depth: int, workers: int
) -> Generator[Batch, None, None]:
    processes: list[Worker] = []
    packed = pickle.dumps(create)
    close = partial(end_workers, processes)
    atexit.register(close)  # the standard library would send SIGTERM, which they ignore, and wait

    def start(steps: range) -> Worker:
        # Schedulers send SIGTERM to all processes: this one needs batches until it has saved.
        return start_worker(_work, packed, steps, depth, duplex=False, blocked=[signal.SIGTERM])

    def batch(step: int) -> Batch:
        number = steps.index(step) % workers
        try:
            return _receive(processes[number])
        except WorkerEnded as ended:
            warnings.warn(f"{ended.problem}; another one resumes at step {step}", RuntimeWarning, stacklevel=2)
            end_workers([processes[number]])
            processes[number] = start(range(step, steps.stop, workers))
            return _receive(processes[number])  # a second failure raises WorkerEnded

    try:
        for number in range(min(workers, len(steps))):
            processes.append(start(steps[number::workers]))
        yield from _by_thread(batch, steps, depth)
    finally:
        close()
        atexit.unregister(close)


def _receive(worker: Worker) -> Batch:
    batch, error = receive(worker, "creates batches", "data.workers")
    if error is not None:
        raise error
    return batch


def _work(connection: Connection, packed: bytes, steps: range, depth: int) -> None:
    """Sends the batches of these steps until the pipe is closed; the stores are opened in this process."""
    with contextlib.suppress(BrokenPipeError):
        try:
            for batch in _by_thread(_unpacked(packed), steps, depth):
                connection.send((batch, None))
        except UserError as error:
            while True:  # the parent may wait for later steps already
                connection.send((None, error))


def _unpacked(packed: bytes) -> Callable[[int], Batch]:
    try:
        return pickle.loads(packed)
    except UserError as error:
        raise UserError(
            f"{error.problem}; a process that creates batches needs to open it again",
            "If it was removed, rerun the command: it prepares the sources again and resumes at the newest checkpoint.",
        ) from error
