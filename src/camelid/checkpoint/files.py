"""Files that are planned before they are written.

A format says which bytes and which tensors lie end to end in each of its files. So the sizes are known before anything
is written, tensors can be written at the same time, each at its place, and what was finished before a process was
killed need not be written again: a journal in the folder keeps the checksum of every tensor that is.
"""

import contextlib
import functools
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.replacing import MANIFEST
from camelid.checkpoint.tensors import CHUNK, PlannedTensor
from camelid.disk.json_files import hf_json, read_json, write_hf_json
from camelid.errors import UserError

WORKERS = 4  # tensors at once: while one waits for the disk, another is transposed
JOURNAL = ".journal"
AGAIN = "Copy the files again, or convert once more."

Chunks = Iterable[np.ndarray | bytes]


@dataclass(frozen=True)
class TensorPayload:
    """A tensor's place in a file."""

    tensor: PlannedTensor
    size: int
    """bytes in the file"""
    chunks: Callable[[], Chunks]
    """these bytes, in contiguous arrays that lie end to end"""


@dataclass(frozen=True)
class DeferredBytes:
    """Bytes that follow from those of the segments, such as their checksums."""

    size: int
    content: Callable[[Mapping[str, int]], bytes]
    """from the CRC-32 of each segment, by the tensor's name"""


@dataclass(frozen=True)
class PlannedFile:
    """What lies end to end in a file."""

    name: str
    """with the folders below that of the checkpoint"""
    parts: Sequence[bytes | TensorPayload | DeferredBytes]
    mode: int = 0o666
    """permissions, of which the user's mask takes away"""
    notes: tuple[str, ...] = ()
    """what users should know of what is not in it"""

    @functools.cached_property
    def size(self) -> int:
        return sum(map(_size, self.parts))

    def places(self) -> Iterator[tuple[int, bytes | TensorPayload | DeferredBytes]]:
        """Each part, after the byte at which it begins."""
        offset = 0
        for part in self.parts:
            yield offset, part
            offset += _size(part)

    @property
    def payloads(self) -> Iterator[TensorPayload]:
        return (part for part in self.parts if isinstance(part, TensorPayload))


def _size(part: bytes | TensorPayload | DeferredBytes) -> int:
    return len(part) if isinstance(part, bytes) else part.size


def raw_payload(tensor: PlannedTensor, chunks: Callable[[], Chunks]) -> TensorPayload:
    """A tensor whose numbers stand in the file as they are."""
    return TensorPayload(tensor, tensor.bytes, chunks)


def json_file(name: str, value: Any) -> PlannedFile:
    """JSON as Hugging Face writes it."""
    return PlannedFile(name, [hf_json(value).encode()])


@dataclass(frozen=True)
class Sums:
    """Of the bytes of a segment."""

    sha256: str
    crc32: int


def write_files(
    folder: Path,
    files: Sequence[PlannedFile],
    *,
    source: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    workers: int = WORKERS,
) -> None:
    """Writes files into a folder, some tensors at a time (in order with one worker), and MANIFEST with their checksums.

    Where the folder has a JOURNAL, goes on from there. `source` identifies where the numbers come from: a journal of
    another source, or of other files, is a UserError. `progress` hears of bytes done and bytes in all.
    """
    total, done = sum(file.size for file in files), 0
    lock, stop = threading.Lock(), threading.Event()
    for file in files:
        _create(folder / file.name, file)
    finished = _read_journal(folder / JOURNAL, _plan(files, source))
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context((folder / JOURNAL).open("a", encoding="utf-8"))
        stack.callback(stop.set)

        def advance(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                progress(min(done, total), total)

        def put(file: PlannedFile, offset: int, content: bytes) -> None:
            with _opened(folder / file.name) as descriptor:
                _pwrite(descriptor, content, offset)
            advance(len(content))

        def write(file: PlannedFile, offset: int, part: TensorPayload) -> None:
            key = f"{file.name}/{part.tensor.name}"
            with _opened(folder / file.name) as descriptor:
                if (sums := finished.get(key)) is not None and _sums_of(descriptor, offset, part.size) == sums:
                    return advance(part.size)
                sums = _write(descriptor, offset, part, advance, stop)
            line = json.dumps({"key": key, "sha256": sums.sha256, "crc32": sums.crc32})
            with lock:
                finished[key] = sums
                journal.write(line + "\n")
                journal.flush()

        tasks = [(file, *place) for file in files for place in file.places()]
        for file, offset, part in tasks:
            if isinstance(part, bytes):
                put(file, offset, part)
        payloads = [(file, offset, part) for file, offset, part in tasks if isinstance(part, TensorPayload)]
        _in_threads(workers, write, payloads, stop)
        for file, offset, part in tasks:
            if isinstance(part, DeferredBytes):
                crcs = {held.tensor.name: finished[f"{file.name}/{held.tensor.name}"].crc32 for held in file.payloads}
                put(file, offset, part.content(crcs))
        write_hf_json(folder / MANIFEST, _manifest(files, finished))
        for file in files:
            with _opened(folder / file.name) as descriptor:
                os.fsync(descriptor)
    (folder / JOURNAL).unlink()


def _create(path: Path, file: PlannedFile) -> None:
    """Makes a file of the right size; what stands in it stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path, file.mode) as descriptor:
        os.ftruncate(descriptor, file.size)


@contextlib.contextmanager
def _opened(path: Path, mode: int = 0o666) -> Iterator[int]:
    """The descriptor of a file, not for longer than it is needed: a process may have fewer of them than files."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _in_threads(workers: int, write: Callable, tasks: Sequence[tuple], stop: threading.Event) -> None:
    if workers == 1:
        for task in tasks:
            write(*task)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="camelid-write") as pool:
        try:
            for future in as_completed([pool.submit(write, *task) for task in tasks]):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write(
    descriptor: int, offset: int, part: TensorPayload, advance: Callable[[int], None], stop: threading.Event
) -> Sums:
    sha, crc, written = hashlib.sha256(), 0, 0
    for chunk in part.chunks():
        if stop.is_set():
            raise InterruptedError("another tensor could not be written")
        held = memoryview(chunk) if isinstance(chunk, bytes) else chunk.reshape(-1).view(np.uint8).data
        sha.update(held)
        crc = zlib.crc32(held, crc)
        _pwrite(descriptor, held, offset + written)
        written += len(held)
        advance(len(held))
    assert written == part.size, f"{part.tensor.name}: {written} bytes written, {part.size} promised"
    return Sums(sha.hexdigest(), crc)


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _sums_of(descriptor: int, offset: int, size: int) -> Sums:
    """Of bytes that are in a file; after a crash of the machine they may not be those that were written."""
    sha, crc = hashlib.sha256(), 0
    for start in range(0, size, CHUNK):
        held = os.pread(descriptor, min(CHUNK, size - start), offset + start)
        sha.update(held)
        crc = zlib.crc32(held, crc)
    return Sums(sha.hexdigest(), crc)


def _plan(files: Sequence[PlannedFile], source: str) -> str:
    """A fingerprint of what is to be written, and from what."""
    digest = hashlib.sha256(source.encode())
    for file in files:
        digest.update(f"{file.name} {file.size}\n".encode())
        for part in file.parts:
            digest.update(part if isinstance(part, bytes) else f"{_name(part)} {part.size}\n".encode())
    return digest.hexdigest()


def _name(part: TensorPayload | DeferredBytes) -> str:
    return f"{part.tensor}" if isinstance(part, TensorPayload) else "later"


def _read_journal(path: Path, plan: str) -> dict[str, Sums]:
    """What was finished before; a new journal where there is none."""
    if not path.exists():
        path.write_text(json.dumps({"plan": plan}) + "\n", "utf-8")
        return {}
    lines = []
    for line in path.read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError):  # a line that was cut when the process was killed, or the power failed
            lines.append(json.loads(line))
    if not lines:
        path.unlink()
        return _read_journal(path, plan)
    if lines[0].get("plan") != plan:
        raise UserError(
            f"{path.parent} was begun from other files, or with other options",
            "Give the same command as before, or leave --resume out to begin anew.",
        )
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that was cut
    return {line["key"]: Sums(line["sha256"], line["crc32"]) for line in lines[1:]}


def _manifest(files: Sequence[PlannedFile], finished: Mapping[str, Sums]) -> dict[str, Any]:
    tensors = {
        file.name: {
            part.tensor.name: {
                "dtype": part.tensor.dtype.name,
                "shape": list(part.tensor.shape),
                "offset": offset,
                "bytes": part.size,
                "sha256": finished[f"{file.name}/{part.tensor.name}"].sha256,
            }
            for offset, part in file.places()
            if isinstance(part, TensorPayload)
        }
        for file in files
    }
    return {"version": 1, "files": {name: {"tensors": held} for name, held in tensors.items() if held}}


def check_manifest(
    folder: Path, progress: Callable[[int, int], None] = lambda done, total: None, name: str = MANIFEST
) -> int:
    """How many tensors a manifest has, every one of them as it was written; 0 where there is none.

    Raises UserError for the first one that is not.
    """
    if not (folder / name).is_file():
        return 0
    try:
        held = read_json(folder / name)["files"]
        tensors = [(file, *item) for file, content in held.items() for item in content["tensors"].items()]
        total, done = sum(tensor["bytes"] for *_, tensor in tensors), 0
        for file, named, tensor in tensors:
            path = folder / file
            if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
                raise UserError(f"{folder / name} names {file}, which is not in the folder", AGAIN)
            with path.open("rb", buffering=0) as opened:
                sums = _sums_of(opened.fileno(), tensor["offset"], tensor["bytes"])
            if sums.sha256 != tensor["sha256"]:
                raise UserError(f"{named} in {path} is not what was written: its checksum differs", AGAIN)
            done += tensor["bytes"]
            progress(done, total)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / name} is no manifest of camelid's", "Remove it, or copy it again.") from error
    return len(tensors)
