"""Partial stores: each holds the documents of one chunk of a source, and any process can create it.

The chunks depend on the files alone, so partial stores are the same for any number of processes, and those of an
interrupted command are used again.
"""

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from camelid.data.config import Source
from camelid.data.preparation.examples import Encoder, make_encoder
from camelid.data.preparation.store import Store, Writer, writing
from camelid.data.preparation.task import Task
from camelid.data.preparation.workers import Worker, end_workers, receive, start_worker
from camelid.data.readers.records import Record
from camelid.data.readers.sources import Chunk, Tally, read_chunk
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer, load_tokenizer

Progress = Callable[[int, int], None]
"""Called with the bytes of the sources that are done, and the total bytes."""

SourceChunk = tuple[Source, Chunk]

# Enough to keep every core busy; the tokenizer needs about a hundred bytes of memory for each character.
CHARACTERS_AT_ONCE = 1_000_000
RECORDS_AT_ONCE = 4096
INTERRUPT_S = 0.5  # delay after which a signal that the wait for an answer has missed is noticed


def make_partial_stores(
    task: Task, chunks: Sequence[SourceChunk], folder: Path, workers: int, progress: Progress
) -> list[Path]:
    """Returns the partial store of each chunk, in `folder`; those that exist already are kept.

    Raises UserError if a source is unreadable, or a process ends unexpectedly.
    """
    for unfinished in folder.glob(".*"):  # by processes that were killed
        shutil.rmtree(unfinished, ignore_errors=True)
    sizes = [sum(part.size for part in chunk) for _, chunk in chunks]
    missing = {n: chunk for n, chunk in enumerate(chunks) if not _is_complete(folder / _name(n), chunk)}
    done = sum(sizes) - sum(sizes[n] for n in missing)
    progress(done, sum(sizes))
    with contextlib.closing(
        _by_workers(task, missing, folder, workers) if workers else _here(task, missing, folder)
    ) as finished:
        for n in finished:
            done += sizes[n]
            progress(done, sum(sizes))
    return [folder / _name(n) for n in range(len(chunks))]


def _name(number: int) -> str:
    return f"{number:06}"


def _is_complete(folder: Path, chunk: SourceChunk) -> bool:
    """Whether an earlier process has finished the partial store of the same chunk, and it is undamaged."""
    with contextlib.suppress(UserError):
        store = Store.open(folder)
        store.verify()
        if store.manifest.get("piece") == _fingerprint(chunk):
            return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _fingerprint(chunk: SourceChunk) -> str:
    return hashlib.sha256(repr(chunk).encode(errors="backslashreplace")).hexdigest()


def _here(task: Task, missing: dict[int, SourceChunk], folder: Path) -> Generator[int, None, None]:
    maker = _Maker(task.tokenizer, task.sequence_length, folder)
    for n, chunk in missing.items():
        maker.make(n, *chunk)
        yield n


class _Maker:
    """Creates partial stores, in this process or in a worker."""

    def __init__(self, tokenizer: Tokenizer, sequence_length: int | None, folder: Path):
        self._tokenizer, self._sequence_length, self._folder = tokenizer, sequence_length, folder
        self._encoders: dict[Source, Encoder] = {}
        self._tally = Tally(0.0)

    def make(self, number: int, source: Source, chunk: Chunk) -> None:
        encode = self._encoder(source)
        self._tally = tally = Tally(source.max_unreadable)
        empty = 0
        temporary = self._folder / f".{_name(number)}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        with Writer(temporary, self._tokenizer.vocab_size) as writer:
            for records in _batches(read_chunk(source, chunk, tally)):
                refused = tally.unreadable
                found = encode(records)
                empty += sum(not documents for documents in found) - (tally.unreadable - refused)
                examples = [example for documents in found for example in documents]
                if examples:
                    writer.append(
                        np.concatenate([example.tokens for example in examples]),
                        np.fromiter((len(example.tokens) for example in examples), np.int64, len(examples)),
                        np.concatenate([example.weights for example in examples]),
                    )
            counts = {"rows": tally.rows, "unreadable": tally.unreadable, "empty": empty, "problems": tally.problems}
            writer.finish({"piece": _fingerprint((source, chunk)), "counts": counts})
        # A process that outlived its parent may have created it, too.
        shutil.rmtree(self._folder / _name(number), ignore_errors=True)
        temporary.rename(self._folder / _name(number))

    def _encoder(self, source: Source) -> Encoder:
        if source not in self._encoders:
            self._encoders[source] = make_encoder(
                source,
                self._tokenizer,
                sequence_length=self._sequence_length,
                refuse=lambda error: self._tally.refuse(error),
            )
        return self._encoders[source]


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += _characters(record.value)
        if characters >= CHARACTERS_AT_ONCE or len(batch) == RECORDS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(value: Any) -> int:
    if isinstance(value, str | bytes | np.ndarray):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    return sum(map(_characters, value if isinstance(value, Iterable) else ()))


def refuse_unguarded() -> None:
    """Raises UserError in a worker process that runs the script of its parent, because the script has no main guard."""
    # It would wait for a lock of its parent, and its parent for it.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "this script starts processes, and each of them runs the script again",
            "Put its code behind `if __name__ == '__main__':`.",
        )


# Workers --------------------------------------------------------------------------------


def _by_workers(task: Task, missing: dict[int, SourceChunk], folder: Path, workers: int) -> Generator[int, None, None]:
    """Creates partial stores in other processes, which end with this generator; yields the number of each."""
    waiting = iter(missing.items())
    vocabulary = task.vocabulary
    processes: dict[Any, Worker] = {}
    try:
        for _ in range(min(workers, len(missing))):
            worker = start_worker(_work, vocabulary, task.sequence_length, folder)
            processes[worker[0]] = worker
            _give(worker[0], waiting)
        for _ in missing:
            ready = _next_answer(processes)
            yield _receive(processes[ready])
            _give(ready, waiting)
    finally:
        end_workers(processes.values())


def _next_answer(connections: Iterable[Any]) -> Any:
    """A connection on which a process has answered, or that it has closed."""
    # A signal that arrives just before the system call that waits, or in another thread, does not interrupt it: the
    # KeyboardInterrupt would be raised only when a process answers.
    while not (ready := wait(list(connections), timeout=INTERRUPT_S)):
        pass
    return ready[0]


def _give(connection: Any, waiting: Iterator[tuple[int, SourceChunk]]) -> None:
    with contextlib.suppress(ConnectionError):  # it has ended, which is noticed when its answer is read
        if (task := next(waiting, None)) is not None:
            connection.send(task)


def _receive(worker: Worker) -> int:
    kind, what = receive(worker, "prepares data", "workers")
    if kind == "refused":
        raise UserError(*what)
    if kind == "failed":
        raise RuntimeError(f"a process that prepares data failed:\n{what}")
    return what


def _work(connection: Any, vocabulary: Path, sequence_length: int | None, folder: Path) -> None:
    """Creates partial stores until the parent ends or has no more chunks."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    maker = None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number, chunk = connection.recv()
            try:
                maker = maker or _Maker(load_tokenizer(vocabulary), sequence_length, folder)
                with writing(folder):  # errors of reading are UserErrors already
                    maker.make(number, *chunk)
                answer = "done", number
            except UserError as error:
                answer = "refused", (error.problem, error.advice)
            except Exception:  # any error must reach the parent, which waits for an answer
                answer = "failed", traceback.format_exc()
            connection.send(answer)


def _end_with_parent() -> None:
    """Ends this process when its parent ends, at any time."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # it was started by one
    parent.join()
    os._exit(1)
