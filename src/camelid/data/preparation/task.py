"""What a prepared store is made from, and the fingerprints by which it is recognized."""

import dataclasses
import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from camelid.data.config import ONLY, Source
from camelid.data.preparation.store import VERSION
from camelid.data.readers.file_names import reading, refuse_repeated
from camelid.data.readers.sources import source_files
from camelid.disk.hashes import content_hash, hash_file
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer

SUFFIX = re.compile(r"(\.[^.]*)?(\.(gz|zst))?$")
TEMPLATE_FILES = ("chat_template", "tokenizer_config")
"""Names of the files that may hold chat templates, which the fingerprint of a tokenizer does not cover."""
HASHING_THREADS = 8  # enough to read a network file system with a high latency at full speed


class StageProgress(Protocol):
    """Progress of consecutive stages: called with the bytes done, the total bytes, and the name of the stage."""

    def __call__(self, done: int, total: int, stage: str = "tokenizing", /) -> None: ...


@dataclass(frozen=True)
class Task:
    """Everything that determines the content of a store."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    validation_fraction: float = 0.0
    """Fraction of the documents to hold out, in a store of its own in the folder of the store."""
    seed: int = 0
    """Seed of the choice of held-out documents."""
    sequence_length: int | None = None
    """For compat = "mindformers" only."""

    @property
    def vocabulary(self) -> Path:
        """The file from which another process can load the tokenizer."""
        for file in self.tokenizer.files:
            if file.is_file() and hash_file(file) == self.tokenizer.vocabulary_hash:
                return file
        raise UserError(f"{self.tokenizer.files[0]} has changed since it was loaded", "Run the command again.")

    def describe(self) -> dict[str, Any]:
        """Returns JSON: the options, and path, size and time of each file; raises UserError if a file is missing."""
        files = [source_files(source) for source in self.sources]
        alike = defaultdict(list)
        for source, paths in zip(self.sources, files, strict=True):
            alike[dataclasses.replace(source, files=("",), weight=None, name=None)] += paths
        for paths in alike.values():
            refuse_repeated(paths, "Name each file once.")
        return {"options": self._options(), "files": [[_about(path) for path in paths] for paths in files]}

    def content_key(self, progress: StageProgress | None = None) -> str:
        """Fingerprint of the options and of the contents and suffixes of the files, not of their names and times."""
        described = self.describe()
        hashes = content_hashes((file["path"] for files in described["files"] for file in files), progress)
        options = described["options"] | {
            "sources": [source | {"files": []} for source in described["options"]["sources"]]
        }
        files = [[[_suffix(file["path"]), hashes[file["path"]]] for file in files] for files in described["files"]]
        return fingerprint({"options": options, "files": files})

    def _options(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        templates = [file for file in tokenizer.files if file.stem in TEMPLATE_FILES]
        # The weight and the name of a source do not change its store; stores were prepared before there were names.
        sources = [dataclasses.asdict(dataclasses.replace(source, weight=None)) for source in self.sources]
        for source in sources:
            del source["name"]
        mindformers = any(source.compat == "mindformers" for source in self.sources)
        options = {
            "version": VERSION,
            "sources": sources,
            "tokenizer": tokenizer.fingerprint,
            "bos_id": tokenizer.bos_id,
            "eos_ids": tokenizer.eos_ids,
            "adds_bos": tokenizer.adds_bos,
            "beside_tokenizer": {file.name: hash_file(file) for file in templates},
            "validation_fraction": self.validation_fraction,
            "seed": self.seed if self.validation_fraction else None,
            "sequence_length": self.sequence_length if mindformers else None,
        }
        if any(source.kind in ONLY["template"] for source in self.sources):
            # Version 1, which had neither option, ignored training flags of messages, and other keys in a message.
            options |= {"version_of_messages": 2, "named_specials": tokenizer.named_specials}
        return json.loads(json.dumps(options))


def fingerprint(described: dict[str, Any]) -> str:
    """Fingerprint of the result of Task.describe."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def content_hashes(paths: Iterable[str], progress: StageProgress | None = None) -> dict[str, str]:
    """Returns the SHA-256 of the content of each file, by path; raises UserError if one cannot be read."""
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
            stop.set()  # do not read the others to the end
            raise

    for path in paths:
        with reading(Path(path)):
            total += Path(path).stat().st_size
    with ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="camelid-hash") as pool:
        try:
            return dict(zip(paths, pool.map(hashed, paths), strict=True))
        finally:
            stop.set()  # also if this thread is interrupted


def _suffix(path: str) -> str:
    """The part of the name of a file that decides how it is read."""
    suffix = SUFFIX.search(Path(path).name.lower())
    assert suffix is not None  # it may be empty
    return suffix[0]


def _about(path: Path) -> dict[str, Any]:
    with reading(path):
        stat = path.stat()
    return {"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
