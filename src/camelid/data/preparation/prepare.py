"""Sources to a store: tokenized in parts by several processes, then laid end to end.

.NAME.incomplete/parts-PLAN/000000 000001 ...  ->  .NAME.incomplete/store  ->  NAME
"""

import contextlib
import itertools
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from camelid.data.config import Source
from camelid.data.preparation.examples import make_encoder
from camelid.data.preparation.parts import (
    Piece,
    Progress,
    Task,
    content_hashes,
    fingerprint,
    make_parts,
    refuse_unguarded,
)
from camelid.data.preparation.store import (
    MANIFEST,
    OFFSETS,
    TOKENS,
    VALIDATION,
    WEIGHTS,
    Store,
    Writer,
    is_store,
    read_manifest,
    writing,
)
from camelid.data.randomness import GOLDEN_RATIO, splitmix64
from camelid.data.readers.sources import Tally, chunks, list_files, reading
from camelid.disk.hashes import content_hash
from camelid.disk.locks import locked, no_empty_folders, unfinished
from camelid.errors import UserError
from camelid.interrupts import cleaned_up
from camelid.text.tokenizer import Tokenizer

TOKENS_AT_ONCE = 2**22  # that are laid end to end at once
ARRAYS = f"({MANIFEST}|{TOKENS}|{OFFSETS}|{WEIGHTS})"
PLAN = (
    r"\.?[^/]+/(\.?manifest\.json(\.incomplete)?|(rows|starts|lengths|places)\.bin|\.[0-9a-f]{16}\.incomplete|\.lock)"
)
CONTENTS = re.compile(rf"({VALIDATION}/)?({ARRAYS}|plans/{PLAN})")
"""the files that are replaced with a store"""


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
    """The store of these sources in a folder, made with `workers` processes (0: in this one) if it is not there.

    The same command goes on where it was killed. A store that is there, of the same options and unchanged files, is
    opened. One of others, or a damaged one, is a UserError that names what is wrong, or replaced with `overwrite`; a
    folder that holds something else is never replaced. Other processes of this machine that want the same store wait
    for it. What the system refuses is a UserError. What decides what the store holds is explained at Task.
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
        found = _existing(folder, described, overwrite)
    # Parts are left where a process was killed after its store was done.
    if found is not None and not parts.exists():
        return found
    with cleaned_up(), no_empty_folders(folder.parent), writing(folder), locked(work):
        try:
            if (found := _existing(folder, described, overwrite)) is None:
                _make(task, described, work, parts, workers, progress or (lambda done, total: None))
                if folder.exists():
                    folder.rename(work / "replaced")
                (work / "store").rename(folder)
        except BaseException:
            if not any(work.glob("parts-*/[0-9]*")):
                shutil.rmtree(work, ignore_errors=True)  # there is nothing to go on from
            raise
        # The lock goes last, with its folder.
        shutil.rmtree(work)
    return found or Store.open(folder)


def _check_tokenizer(sources: Sequence[Source], tokenizer: Tokenizer) -> None:
    """Refuses stores of another tokenizer among the sources: their ids would mean other text."""
    for source in sources:
        for path in list_files(source.files) if source.kind == "tokens" else ():
            if is_store(path):
                Store.open(path).check_tokenizer(tokenizer.fingerprint, tokenizer.files[0])


def _check_encoders(sources: Sequence[Source], tokenizer: Tokenizer, sequence_length: int | None) -> None:
    """Refuses sources that cannot be encoded whatever their rows are; all that have the same problem are named."""
    refused: dict[tuple[str, str], list[str]] = {}
    for source in sources:
        try:
            make_encoder(source, tokenizer, sequence_length=sequence_length)
        except UserError as error:
            refused.setdefault((error.problem, error.advice), []).extend(source.files)
    for (problem, advice), names in refused.items():
        raise UserError(f"{', '.join(names)}: {problem}", advice)


def _existing(folder: Path, described: dict[str, Any], overwrite: bool) -> Store | None:
    """The store that is there already; None where it has to be made."""
    if not folder.exists():
        return None
    if not is_store(folder):
        if not folder.is_dir() or any(folder.iterdir()):
            raise UserError(f"{folder} holds something else than a store", "Choose another folder.")
        if os.path.ismount(folder):
            raise UserError(f"{folder} is a disk, which no store can take the place of", f"Choose {folder / 'store'}.")
        return None
    try:
        store = Store.open(folder)
        if (difference := _difference(store.manifest.get("prepared"), described)) is None:
            return _renamed(store, described)
        raise UserError(
            f"{folder} was prepared before, and {difference}",
            "Allow --overwrite to prepare it anew, or choose another.",
        )
    except UserError:
        if not overwrite:
            raise
    inside = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    if foreign := sorted(name for name in inside if not CONTENTS.fullmatch(name)):
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"{folder} holds {foreign[0]}{others} beside its store", "Move it away, or choose another folder."
        )
    return None


def _renamed(store: Store, described: dict[str, Any]) -> Store:
    """The store with the sources' present names, which may be others than those it was prepared from."""
    hashes = iter([file["sha256"] for file in itertools.chain.from_iterable(store.manifest["prepared"]["files"])])
    files = [[file | {"sha256": next(hashes)} for file in files] for files in described["files"]]
    return replace(store, manifest=store.manifest | {"prepared": described | {"files": files}})


def _difference(prepared: Any, described: dict[str, Any]) -> str | None:
    """What is not as it was; None where the options and the contents of the files are, whatever these are called."""
    try:
        before = [[(file["path"], file["sha256"]) for file in files] for files in prepared["files"]]
        if (difference := _changed_option(prepared["options"], described["options"])) is not None:
            return difference
    except (KeyError, TypeError, AttributeError):
        return "does not say from what"
    hashes = content_hashes(file["path"] for files in described["files"] for file in files)
    now = [[(file["path"], hashes[file["path"]]) for file in files] for files in described["files"]]
    if [[sha256 for _, sha256 in files] for files in before] == [[sha256 for _, sha256 in files] for files in now]:
        return None
    was, is_now = (dict(itertools.chain.from_iterable(groups)) for groups in (before, now))
    for path in sorted(was.keys() ^ is_now.keys()):
        return f"{path} {'is gone from' if path in was else 'came to'} its sources"
    changed = (f"{path} has changed" for path, sha256 in is_now.items() if was[path] != sha256)
    return next(changed, "the order of its files is another")


def _changed_option(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    for name, value in now.items():
        was: Any = before.get(name)
        if name == "files":
            continue  # what they are called does not matter
        if name == "sources" and len(was) == len(value):
            # Of a source, only what differs is worth reading.
            if (found := next(filter(None, map(_changed_option, was, value)), None)) is not None:
                return found
        elif was != value:
            return f"{name} was {was!r}, and is {value!r} now"
    return None


def _make(task: Task, described: dict[str, Any], work: Path, folder: Path, workers: int, progress: Progress) -> None:
    """Writes the store into the folder `store` of `work`, from parts in `folder`."""
    for path in work.iterdir():
        if path != folder and path.is_dir():
            shutil.rmtree(path)  # of other files or options, or not finished
    folder.mkdir(exist_ok=True)
    pieces = [(source, chunk) for source in task.sources for chunk in chunks(source)]
    paths = [file["path"] for files in described["files"] for file in files]
    with _hashing(paths) as hashes:
        parts = make_parts(task, pieces, folder, workers, progress)
        found = hashes.result()
    files = [[file | {"sha256": found[file["path"]]} for file in files] for files in described["files"]]
    prepared = {"options": described["options"], "files": files}
    after = task.describe()
    difference = _difference(prepared, after)
    if difference is not None or after != described:
        difference = difference or "a file was touched"
        raise UserError(f"while the sources were read, {difference}", "Let what writes them finish, and run it again.")
    _lay(task, pieces, parts, work / "store", prepared)


@contextlib.contextmanager
def _hashing(paths: Iterable[str]) -> Iterator[Future[dict[str, str]]]:
    """The hashes of files, taken meanwhile; not to the end of them where something goes wrong."""
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


# The store ------------------------------------------------------------------------------


def _lay(task: Task, pieces: Sequence[Piece], parts: Sequence[Path], folder: Path, prepared: dict[str, Any]) -> None:
    """Writes the documents of the parts, one after another, into a store and into that of those held out."""
    manifests = [read_manifest(part) for part in parts]
    about = {
        "tokenizer": task.tokenizer.fingerprint,
        "tokenizer_file": str(task.vocabulary.resolve()),
        "prepared": prepared,
        "counts": _counts(task, pieces, manifests),
    }
    if not task.validation_fraction:
        with Writer(folder, task.tokenizer.vocab_size) as writer:
            for part in parts:
                for tokens, lengths, weights in _blocks(part):
                    writer.append(tokens, lengths, weights)
            writer.finish(about)
    else:
        documents = [manifest["num_documents"] for manifest in manifests]
        _lay_apart(task, pieces, parts, documents, folder, about)
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _counts(task: Task, pieces: Sequence[Piece], manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was read of all sources; raises UserError where too much of one is unreadable, or nothing is left."""
    total, empty = Tally(1.0), 0
    for source in task.sources:
        tally = Tally(source.max_unreadable)
        for (whose, _), manifest in zip(pieces, manifests, strict=True):
            if whose is source:
                counts = manifest["counts"]
                tally.add(Tally(0.0, counts["rows"], counts["unreadable"], counts["problems"]))
                empty += counts["empty"]
        tally.check()
        total.add(tally)
    if not any(manifest["num_documents"] for manifest in manifests):
        raise UserError(
            f"there is no text in {', '.join(name for source in task.sources for name in source.files)}",
            "Name files that hold some.",
        )
    return {"rows": total.rows, "unreadable": total.unreadable, "empty": empty, "problems": total.problems}


def _blocks(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, lengths and weights of some documents of a part at a time."""
    # Not all parts at once: each keeps files open, and a process may not have many.
    part = Store.open(folder)
    first = 0
    while first < part.num_documents:
        enough = int(np.searchsorted(part.offsets, part.offsets[first] + TOKENS_AT_ONCE))
        stop = min(max(enough, first + 1), part.num_documents)
        begin, end = int(part.offsets[first]), int(part.offsets[stop])
        yield part.tokens[begin:end], np.diff(part.offsets[first : stop + 1]), part.weights(begin, end)
        first = stop


def _lay_apart(
    task: Task,
    pieces: Sequence[Piece],
    parts: Sequence[Path],
    documents: Sequence[int],
    folder: Path,
    about: dict[str, Any],
) -> None:
    """The same in two stores: a share of the documents, or of the tokens of a single one, is held out."""
    # What a preference compares stays together.
    sizes = [2 if source.kind == "preference" else 1 for source, _ in pieces]
    units = sum(count // size for count, size in zip(documents, sizes, strict=True))
    with Writer(folder, task.tokenizer.vocab_size) as kept:
        with Writer(folder / VALIDATION, task.tokenizer.vocab_size) as held_out:
            if units == 1:
                (part,) = (part for part, count in zip(parts, documents, strict=True) if count)
                _cut(Store.open(part), task.validation_fraction, kept, held_out)
            else:
                largest = _largest_held_out(units, task)
                unit = 0
                for part, count, size in zip(parts, documents, sizes, strict=True):
                    document = 0
                    for tokens, lengths, weights in _blocks(part):
                        which = unit + np.arange(document, document + len(lengths)) // size
                        held = _draw(which, task.seed) <= largest
                        of_tokens = np.repeat(held, lengths)
                        kept.append(tokens[~of_tokens], lengths[~held], weights[~of_tokens])
                        held_out.append(tokens[of_tokens], lengths[held], weights[of_tokens])
                        document += len(lengths)
                    unit += count // size
            held_out.finish(about)
        kept.finish(about)


def _largest_held_out(units: int, task: Task) -> np.uint64:
    """At least one and never all of them draw a number up to this."""
    size = min(max(1, round(units * task.validation_fraction)), units - 1)
    return np.partition(_draw(np.arange(units), task.seed), size - 1)[size - 1]


def _draw(index: np.ndarray, seed: int) -> np.ndarray:
    """A random 64-bit integer for each index; no two are equal."""
    return splitmix64((index.astype(np.uint64) + np.uint64(seed << 32)) * np.uint64(GOLDEN_RATIO))


def _cut(part: Store, fraction: float, kept: Writer, held_out: Writer) -> None:
    """Holds out the end of a single document; no token is predicted across the cut."""
    count = part.num_tokens
    if part.num_documents != 1 or count < 4:
        raise UserError(
            f"a single {'document' if part.num_documents == 1 else 'pair'} of {count} tokens cannot be cut in two",
            "Give more text, or name validation files.",
        )
    cut = count - min(max(2, round(count * fraction)), count - 2)
    for writer, begin, end in ((kept, 0, cut), (held_out, cut, count)):
        writer.append(part.tokens[begin:end], np.array([end - begin]), part.weights(begin, end))
