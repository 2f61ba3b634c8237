"""Parts of a store: each a small store of one chunk of a source, made by any process.

Chunks follow from the files alone, so parts are the same for any number of processes, and those that a killed process
left are of use to the next one.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from camelid.data.config import ONLY, Source
from camelid.data.preparation.examples import Encoder, make_encoder
from camelid.data.preparation.store import VERSION, Store, Writer, writing
from camelid.data.preparation.workers import Worker, end_workers, receive, start_worker
from camelid.data.readers.formats import Record
from camelid.data.readers.sources import Chunk, Tally, read_chunk, reading, refuse_repeated, source_files
from camelid.disk.hashes import content_hash, hash_file
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer, load_tokenizer

Progress = Callable[[int, int], None]
"""hears of bytes of the sources that are done, and of bytes in all"""


class Stages(Protocol):
    """Progress of stages that follow each other: is called with the bytes done, those in all, and the stage's name."""

    def __call__(self, done: int, total: int, stage: str = "tokenizing", /) -> None: ...


Piece = tuple[Source, Chunk]

ENDING = re.compile(r"(\.[^.]*)?(\.(gz|zst))?$")

# Enough to keep every core busy; the tokenizer needs about a hundred bytes for each character meanwhile.
CHARACTERS_AT_ONCE = 1_000_000
RECORDS_AT_ONCE = 4096
BESIDE = ("chat_template", "tokenizer_config")
"""Names of the files that may hold templates; what decides ids is in the tokenizer's fingerprint."""
HASHING_THREADS = 8  # also a network file system with a long latency is read at its full speed
INTERRUPT_S = 0.5  # after which a signal that the wait for an answer has missed is noticed


@dataclass(frozen=True)
class Task:
    """Everything that decides what a store will hold."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    validation_fraction: float = 0.0
    """the share of the documents that is held out, into a store of its own in the store's folder"""
    seed: int = 0
    """decides which ones"""
    sequence_length: int | None = None
    """of compat = "mindformers" alone"""

    @property
    def vocabulary(self) -> Path:
        """The file of the tokenizer from which it can be loaded again."""
        for file in self.tokenizer.files:
            if file.is_file() and hash_file(file) == self.tokenizer.vocabulary_hash:
                return file
        raise UserError(f"{self.tokenizer.files[0]} has changed since it was loaded", "Run it again.")

    def describe(self) -> dict[str, Any]:
        """As JSON: the options, and the files by path, size and time; raises UserError where a file is missing."""
        files = [source_files(source) for source in self.sources]
        alike = defaultdict(list)
        for source, paths in zip(self.sources, files, strict=True):
            alike[dataclasses.replace(source, files=("",), weight=None)] += paths
        for paths in alike.values():
            refuse_repeated(paths, "Name each file once.")
        return {"options": self._options(), "files": [[_about(path) for path in paths] for paths in files]}

    def content_key(self, progress: Stages | None = None) -> str:
        """What decides what the store will hold: options, contents and endings of files, not their names and times."""
        described = self.describe()
        hashes = content_hashes((file["path"] for files in described["files"] for file in files), progress)
        options = described["options"] | {
            "sources": [source | {"files": []} for source in described["options"]["sources"]]
        }
        files = [[[_ending(file["path"]), hashes[file["path"]]] for file in files] for files in described["files"]]
        return fingerprint({"options": options, "files": files})

    def _options(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        beside = [file for file in tokenizer.files if file.stem in BESIDE]
        # How often a source is read does not change what it holds.
        sources = [dataclasses.asdict(dataclasses.replace(source, weight=None)) for source in self.sources]
        mindformers = any(source.compat == "mindformers" for source in self.sources)
        options = {
            "version": VERSION,
            "sources": sources,
            "tokenizer": tokenizer.fingerprint,
            "bos_id": tokenizer.bos_id,
            "eos_ids": tokenizer.eos_ids,
            "adds_bos": tokenizer.adds_bos,
            "beside_tokenizer": {file.name: hash_file(file) for file in beside},
            "validation_fraction": self.validation_fraction,
            "seed": self.seed if self.validation_fraction else None,
            "sequence_length": self.sequence_length if mindformers else None,
        }
        if any(source.kind in ONLY["template"] for source in self.sources):
            # Version 1, which had neither option, ignored the training flags of messages and fields beside them.
            options |= {"version_of_messages": 2, "named_specials": tokenizer.named_specials}
        return json.loads(json.dumps(options))


def fingerprint(described: dict[str, Any]) -> str:
    """Of what Task.describe says."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def content_hashes(paths: Iterable[str], progress: Stages | None = None) -> dict[str, str]:
    """SHA-256 of what each of the files holds, read by several threads; raises UserError if one cannot be read."""
    paths = list(dict.fromkeys(paths))
    total, done = 0, 0
    lock, stop = threading.Lock(), threading.Event()

    def read(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            if progress is not None:
                progress(done, total, "reading")

    def hashed(path: str) -> str:
        try:
            with reading(Path(path)):
                return content_hash(Path(path), stop.is_set, read)
        except BaseException:
            stop.set()  # the others are not read to their ends
            raise

    for path in paths:
        with reading(Path(path)):
            total += Path(path).stat().st_size
    with ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="camelid-hash") as pool:
        try:
            return dict(zip(paths, pool.map(hashed, paths), strict=True))
        finally:
            stop.set()  # where this is interrupted


def _ending(path: str) -> str:
    """The part of a file's name that decides how it is read."""
    ending = ENDING.search(Path(path).name.lower())
    assert ending is not None  # it may be empty
    return ending[0]


def _about(path: Path) -> dict[str, Any]:
    with reading(path):
        stat = path.stat()
    return {"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def make_parts(task: Task, pieces: Sequence[Piece], folder: Path, workers: int, progress: Progress) -> list[Path]:
    """The part of each piece, in `folder`; those that are there already stay.

    Raises UserError where a source is unreadable, or a process ends by itself.
    """
    for begun in folder.glob(".*"):  # by processes that were killed
        shutil.rmtree(begun, ignore_errors=True)
    sizes = [sum(span.size for span in chunk) for _, chunk in pieces]
    missing = {n: piece for n, piece in enumerate(pieces) if not _is_whole(folder / _name(n), piece)}
    done = sum(sizes) - sum(sizes[n] for n in missing)
    progress(done, sum(sizes))
    with contextlib.closing(
        _by_workers(task, missing, folder, workers) if workers else _here(task, missing, folder)
    ) as made:
        for n in made:
            done += sizes[n]
            progress(done, sum(sizes))
    return [folder / _name(n) for n in range(len(pieces))]


def _name(number: int) -> str:
    return f"{number:06}"


def _is_whole(part: Path, piece: Piece) -> bool:
    """Whether an earlier process has finished a part, of the same chunk, and the machine has kept it."""
    with contextlib.suppress(UserError):
        store = Store.open(part)
        store.verify()
        if store.manifest.get("piece") == _piece_fingerprint(piece):
            return True
    shutil.rmtree(part, ignore_errors=True)
    return False


def _piece_fingerprint(piece: Piece) -> str:
    return hashlib.sha256(repr(piece).encode(errors="backslashreplace")).hexdigest()


def _here(task: Task, missing: dict[int, Piece], folder: Path) -> Generator[int, None, None]:
    maker = _Maker(task.tokenizer, task.sequence_length, folder)
    for n, piece in missing.items():
        maker.make(n, *piece)
        yield n


class _Maker:
    """Makes parts, in whatever process."""

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
            writer.finish({"piece": _piece_fingerprint((source, chunk)), "counts": counts})
        # A process that outlived its parent may have made it, too.
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
    """Raises UserError in a process that was started to help a script, and runs that script instead."""
    # It would wait for what its parent has locked, and its parent for it.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "a script that starts processes is run again in each of them",
            "Put what it does behind `if __name__ == '__main__':`.",
        )


# Workers --------------------------------------------------------------------------------


def _by_workers(task: Task, missing: dict[int, Piece], folder: Path, workers: int) -> Generator[int, None, None]:
    """Makes parts in other processes, which end with this generator; gives the number of each that is done."""
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
    """A connection on which a process has answered, or ended."""
    # A signal that arrives just before the system call that waits, or in another thread, does not interrupt it: the
    # KeyboardInterrupt would be raised only when a process answers.
    while not (ready := wait(list(connections), timeout=INTERRUPT_S)):
        pass
    return ready[0]


def _give(connection: Any, waiting: Iterator[tuple[int, Piece]]) -> None:
    with contextlib.suppress(ConnectionError):  # it has ended; that is noticed where its answer is read
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
    """Makes parts until the parent ends or has no more of them."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    maker = None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number, piece = connection.recv()
            try:
                maker = maker or _Maker(load_tokenizer(vocabulary), sequence_length, folder)
                with writing(folder):  # what cannot be read says so itself
                    maker.make(number, *piece)
                answer = "made", number
            except UserError as error:
                answer = "refused", (error.problem, error.advice)
            except Exception:  # whatever it is, the parent is to hear of it and not to wait
                answer = "failed", traceback.format_exc()
            connection.send(answer)


def _end_with_parent() -> None:
    """Ends this process when its parent does, in the midst of a part."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # it was started by one
    parent.join()
    os._exit(1)
