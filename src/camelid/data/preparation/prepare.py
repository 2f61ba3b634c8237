"""Tokenizes sources into a store: in partial stores by several processes, which are then concatenated.

.NAME.incomplete/parts-FINGERPRINT/000000 000001 ...  ->  .NAME.incomplete/store  ->  NAME
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from camelid.data.config import Source
from camelid.data.preparation.concatenation import concatenate
from camelid.data.preparation.examples import make_encoder
from camelid.data.preparation.existing import difference, existing_store
from camelid.data.preparation.partial_stores import Progress, make_partial_stores, refuse_unguarded
from camelid.data.preparation.store import Store, is_store, writing
from camelid.data.preparation.task import Task, fingerprint
from camelid.data.readers.file_names import list_files, reading
from camelid.data.readers.sources import chunks
from camelid.disk.hashes import content_hash
from camelid.disk.locks import locked, no_empty_folders, unfinished
from camelid.errors import UserError
from camelid.interrupts import cleaned_up
from camelid.text.tokenizer import Tokenizer


def prepare(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    validation_fraction: float = 0.0,
    seed: int = 0,
    sequence_length: int | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Store:
    """Returns the store of these sources in a folder; if needed, `workers` processes (0: this one) prepare it.

    A call after an interruption resumes. An existing store of the same options and unchanged files is opened. A
    damaged one, or one of other sources or options (see Task), raises UserError with the difference, or is replaced if
    `overwrite` is set; a folder with other files is never replaced. Other processes of this machine that prepare the
    same store wait for this one. Errors of the file system are UserErrors.
    """
    refuse_unguarded()
    _check_tokenizer(sources, tokenizer)
    _check_encoders(sources, tokenizer, sequence_length)
    task = Task(tuple(sources), tokenizer, validation_fraction, seed, sequence_length)
    folder = Path(os.path.realpath(folder))
    described = task.describe()
    work = unfinished(folder)
    parts = work / f"parts-{fingerprint(described)[:16]}"
    with writing(folder):
        found = existing_store(folder, described, overwrite)
    # Partial stores are left if a process was killed after its store was finished.
    if found is not None and not parts.exists():
        return found
    with cleaned_up(), no_empty_folders(folder.parent), writing(folder), locked(work):
        try:
            if (found := existing_store(folder, described, overwrite)) is None:
                _make(task, described, work, parts, workers, progress or (lambda done, total: None))
                if folder.exists():
                    folder.rename(work / "replaced")
                (work / "store").rename(folder)
        except BaseException:
            if not any(work.glob("parts-*/[0-9]*")):
                shutil.rmtree(work, ignore_errors=True)  # there is nothing to resume from
            raise
        # The lock is removed last, with its folder.
        shutil.rmtree(work)
    return found or Store.open(folder)


def _check_tokenizer(sources: Sequence[Source], tokenizer: Tokenizer) -> None:
    """Raises UserError for stores of another tokenizer among the sources: their ids stand for other text."""
    for source in sources:
        for path in list_files(source.files) if source.kind == "tokens" else ():
            if is_store(path):
                Store.open(path).check_tokenizer(tokenizer.fingerprint, tokenizer.files[0])


def _check_encoders(sources: Sequence[Source], tokenizer: Tokenizer, sequence_length: int | None) -> None:
    """Raises UserError for options with which no record can be encoded; it names all sources with the same problem."""
    refused: dict[tuple[str, str], list[str]] = {}
    for source in sources:
        try:
            make_encoder(source, tokenizer, sequence_length=sequence_length)
        except UserError as error:
            refused.setdefault((error.problem, error.advice), []).extend(source.files)
    for (problem, advice), names in refused.items():
        raise UserError(f"{', '.join(names)}: {problem}", advice)


def _make(task: Task, described: dict[str, Any], work: Path, folder: Path, workers: int, progress: Progress) -> None:
    """Writes the store into the folder `store` of `work`, from partial stores in `folder`."""
    for path in work.iterdir():
        if path != folder and path.is_dir():
            shutil.rmtree(path)  # of other files or options, or unfinished
    folder.mkdir(exist_ok=True)
    all_chunks = [(source, chunk) for source in task.sources for chunk in chunks(source)]
    paths = [file["path"] for files in described["files"] for file in files]
    with _hashing(paths) as hashes:
        parts = make_partial_stores(task, all_chunks, folder, workers, progress)
        found = hashes.result()
    files = [[file | {"sha256": found[file["path"]]} for file in files] for files in described["files"]]
    prepared = {"options": described["options"], "files": files}
    after = task.describe()
    changes = difference(prepared, after)
    if changes is not None or after != described:
        raise UserError(
            f"while the sources were read, {changes or 'the time of a file changed'}",
            "Let the program that writes them finish, and run the command again.",
        )
    concatenate(task, all_chunks, parts, work / "store", prepared)


@contextlib.contextmanager
def _hashing(paths: Iterable[str]) -> Iterator[Future[dict[str, str]]]:
    """Computes the hashes of files in a thread; it stops early if an error ends this context."""
    stop = threading.Event()

    def hash_all() -> dict[str, str]:
        found = {}
        for path in dict.fromkeys(paths):
            with reading(Path(path)):
                found[path] = content_hash(Path(path), stop.is_set)
        return found

    with ThreadPoolExecutor(1, thread_name_prefix="camelid-hash") as hasher:
        try:
            yield hasher.submit(hash_all)
        finally:
            stop.set()
