"""Files that are planned before they are written.

A format lists the consecutive contents of each of its files: bytes and tensors. So all sizes and offsets are known
before anything is written, several tensors can be written at the same time, and an interrupted process can be resumed:
a journal in the folder has the checksum of every tensor that has been written.
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

WORKERS = 4  # tensors that are written at the same time: while one waits for the disk, another is transposed
JOURNAL = ".journal"
AGAIN = "Copy the files again, or convert once more."

Chunks = Iterable[np.ndarray | bytes]


@dataclass(frozen=True)
class TensorPayload:
    """A tensor in a planned file, and the bytes that represent it."""

    tensor: PlannedTensor
    size: int
    """number of bytes in the file"""
    chunks: Callable[[], Chunks]
    """returns these bytes as consecutive contiguous arrays"""


@dataclass(frozen=True)
class DeferredBytes:
    """Bytes that depend on those of the tensors, such as their checksums, and are written last."""

    size: int
    content: Callable[[Mapping[str, int]], bytes]
    """called with the CRC-32 of each tensor's bytes, by the tensor's name"""


@dataclass(frozen=True)
class PlannedFile:
    """A file and its consecutive contents."""

    name: str
    """relative to the checkpoint's folder"""
    parts: Sequence[bytes | TensorPayload | DeferredBytes]
    mode: int = 0o666
    """permissions, before the user's umask"""
    notes: tuple[str, ...] = ()
    """for the user, on what the file cannot hold"""

    @functools.cached_property
    def size(self) -> int:
        return sum(map(_size, self.parts))

    def places(self) -> Iterator[tuple[int, bytes | TensorPayload | DeferredBytes]]:
        """The offset in bytes and the contents of each part."""
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
    """A tensor whose values are stored without an encoding."""
    return TensorPayload(tensor, tensor.bytes, chunks)


def json_file(name: str, value: Any) -> PlannedFile:
    """A file of JSON, formatted as Hugging Face's libraries format it."""
    return PlannedFile(name, [hf_json(value).encode()])


@dataclass(frozen=True)
class Sums:
    """Checksums of a tensor's bytes in the file."""

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
    """Writes files into a folder, `workers` tensors at a time, and a MANIFEST with their checksums.

    If the folder has a JOURNAL, tensors that it lists are not written again if their checksums match. `source` is a
    fingerprint of the values: UserError is raised if the journal belongs to another source, or to other files.
    `progress` is called with the bytes done and the bytes in total. With one worker, tensors are written in order.
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
    """Creates a file, or sets its size; its contents are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path, file.mode) as descriptor:
        os.ftruncate(descriptor, file.size)


@contextlib.contextmanager
def _opened(path: Path, mode: int = 0o666) -> Iterator[int]:
    """A descriptor of a file, open only while it is needed: there may be more files than a process may have open."""
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
    """Checksums of bytes in a file, which after a crash of the machine may differ from those that were written."""
    sha, crc = hashlib.sha256(), 0
    for start in range(0, size, CHUNK):
        held = os.pread(descriptor, min(CHUNK, size - start), offset + start)
        sha.update(held)
        crc = zlib.crc32(held, crc)
    return Sums(sha.hexdigest(), crc)


def _plan(files: Sequence[PlannedFile], source: str) -> str:
    """A fingerprint of the planned files and of their source."""
    digest = hashlib.sha256(source.encode())
    for file in files:
        digest.update(f"{file.name} {file.size}\n".encode())
        for part in file.parts:
            digest.update(part if isinstance(part, bytes) else f"{_name(part)} {part.size}\n".encode())
    return digest.hexdigest()


def _name(part: TensorPayload | DeferredBytes) -> str:
    return f"{part.tensor}" if isinstance(part, TensorPayload) else "later"


def _read_journal(path: Path, plan: str) -> dict[str, Sums]:
    """The checksums of the tensors in a journal, by key; creates a journal if there is none."""
    if not path.exists():
        path.write_text(json.dumps({"plan": plan}) + "\n", "utf-8")
        return {}
    lines = []
    for line in path.read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError):  # a line that is incomplete because the process was killed
            lines.append(json.loads(line))
    if not lines:
        path.unlink()
        return _read_journal(path, plan)
    if lines[0].get("plan") != plan:
        raise UserError(
            f"{path.parent} was started from other files, or with other options",
            "Give the same command as before, or leave --resume out to start over.",
        )
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")  # ends an incomplete line
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
    """Verifies the checksums in a folder's manifest, and returns the number of tensors; 0 without a manifest.

    Raises UserError for the first tensor that differs from what was written.
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
                raise UserError(f"{named} in {path} differs from what was written: its checksum does not match", AGAIN)
            done += tensor["bytes"]
            progress(done, total)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / name} is not a manifest of camelid", "Remove it, or copy it again.") from error
    return len(tensors)
