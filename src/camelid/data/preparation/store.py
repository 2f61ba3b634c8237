"""A store: tokenized documents in a folder of arrays that are memory-mapped."""

import contextlib
import fcntl
import hashlib
import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt8

from camelid.disk.atomic import write_json
from camelid.disk.hashes import hash_file
from camelid.errors import UserError

FORMAT, VERSION = "camelid store", 1
MANIFEST, TOKENS, OFFSETS, WEIGHTS = "manifest.json", "tokens.bin", "offsets.bin", "weights.bin"
VALIDATION = "validation"
"""Folder, in that of a store, of the store of its held-out documents."""
AGAIN = "The store is damaged: copy it again, or remove it and prepare it again."


@dataclass(frozen=True, eq=False)
class Store:
    """The tokens of all documents, concatenated, and the weight of each in the loss when it is predicted."""

    folder: Path
    manifest: dict[str, Any]
    tokens: Integer[np.ndarray, " tokens"]
    """uint16, or uint32 if the vocabulary needs it."""
    offsets: Int64[np.ndarray, " offsets"]
    """Index of the first token of each document, and the number of tokens; no document is empty."""
    codes: UInt8[np.ndarray, " tokens"] | None
    """For each token, the index of its weight in `levels`. None if the first token of each document has weight `first`,
    and all others have weight 1."""
    levels: Float32[np.ndarray, " levels"]
    first: float

    @classmethod
    def open(cls, folder: str | Path) -> "Store":
        """Maps the arrays in a folder; raises UserError if it is not a store, or damaged."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        tokens, documents, weights = manifest["num_tokens"], manifest["num_documents"], manifest["weights"]
        for name, about in manifest["files"].items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != about["bytes"]:
                state = "is missing" if found is None else f"has {found} bytes"
                raise UserError(f"{folder / name} {state}, but the manifest lists {about['bytes']}", AGAIN)
        offsets = map_array(folder / OFFSETS, np.dtype("<i8"), documents + 1)
        if offsets[0] != 0 or offsets[-1] != tokens:
            raise UserError(f"{folder / OFFSETS} goes from {offsets[0]} to {offsets[-1]}, not 0 to {tokens}", AGAIN)
        return cls(
            folder,
            manifest,
            map_array(folder / TOKENS, token_dtype(manifest["vocab_size"]), tokens, at_random=True),
            offsets,
            map_array(folder / WEIGHTS, np.dtype("u1"), tokens, at_random=True) if "levels" in weights else None,
            np.array(weights.get("levels", []), np.float32),
            float(weights.get("first", 0.0)),
        )

    def __reduce__(self):
        # A copy in another process maps the same files.
        return _open, (self.folder,)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """Hash of the content of the store."""
        files = self.manifest["files"]
        return hashlib.sha256(json.dumps([files, self.manifest["weights"]], sort_keys=True).encode()).hexdigest()

    @property
    def sources(self) -> dict[str, str]:
        """The hashes of the files that it was prepared from, by path."""
        files = (self.manifest.get("prepared") or {"files": []})["files"]
        return {file["path"]: file["sha256"] for group in files for file in group}

    @property
    def templates(self) -> set[str | None]:
        """Names of the templates of its chats; None is the default of the tokenizer."""
        return {source["template"] for source in self._made_of if source["kind"] in ("chat", "instruct", "preference")}

    @property
    def kinds(self) -> set[str]:
        """The kinds of the sources that it was prepared from, as in `Source.kind`; empty if they are not known."""
        return {source["kind"] for source in self._made_of}

    @property
    def _made_of(self) -> list[dict[str, Any]]:
        """The options of each source that it was prepared from."""
        return (self.manifest.get("prepared") or {"options": {"sources": []}})["options"]["sources"]

    def weights(self, start: int, stop: int) -> Float32[np.ndarray, " tokens"]:
        """Returns the loss weights of tokens [start, stop)."""
        if self.codes is not None:
            return self.levels[self.codes[start:stop]]
        weights = np.ones(stop - start, np.float32)
        first, last = np.searchsorted(self.offsets[:-1], [start, stop])
        weights[self.offsets[first:last] - start] = self.first
        return weights

    def check_tokenizer(self, fingerprint: str, name: object) -> None:
        """Raises UserError if the store was prepared with another tokenizer."""
        if self.manifest.get("tokenizer") != fingerprint:
            raise UserError(
                f"{self.folder} was prepared with another tokenizer than {name}",
                "Prepare its sources again with this tokenizer, or use the store that was prepared with it.",
            )

    def verify(self) -> None:
        """Reads all files; raises UserError if one does not have its checksum."""
        for name, about in self.manifest["files"].items():
            if hash_file(self.folder / name) != about.get("sha256"):
                raise UserError(f"{self.folder / name} does not have the checksum in the manifest", AGAIN)


def _open(folder: Path) -> Store:
    return Store.open(folder)


def is_store(folder: str | Path) -> bool:
    """Whether a folder has the manifest of a store."""
    try:
        content = json.loads((Path(folder) / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a store; raises UserError if it is missing, damaged, or of another version."""
    if not is_store(folder):
        raise UserError(f"{folder} is not a prepared store", "Create one with `camelid data prepare`.")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if (version := manifest.get("version")) != VERSION:
        raise UserError(
            f"{folder} is a store of version {version}, but this release of camelid reads version {VERSION}",
            "Prepare its sources again, or use the release that created it.",
        )
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is inconsistent ({error!r})", AGAIN) from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises an error (of several types) if an entry is missing, or the sizes of files do not match the counts."""
    tokens, documents, vocab_size = (manifest[name] for name in ("num_tokens", "num_documents", "vocab_size"))
    if not all(type(count) is int and count >= 0 for count in (tokens, documents, vocab_size)):
        raise ValueError(f"{documents} documents of {tokens} tokens, each one of {vocab_size}")
    sizes = {TOKENS: tokens * token_dtype(vocab_size).itemsize, OFFSETS: 8 * (documents + 1)}
    weights = manifest["weights"]
    if "levels" in weights:
        sizes[WEIGHTS] = tokens
    np.array(weights["levels"] if "levels" in weights else weights["first"], np.float32)
    if (found := {name: about["bytes"] for name, about in manifest["files"].items()}) != sizes:
        raise ValueError(f"files of {found} bytes, not {sizes}")


class Writer:
    """Writes a new store into a folder, the manifest last; a context manager that closes the files."""

    def __init__(self, folder: Path, vocab_size: int):
        folder.mkdir()
        self.folder, self.vocab_size = folder, vocab_size
        self.num_tokens = self.num_documents = 0
        self._dtype = token_dtype(vocab_size)
        self._files = {name: _Hashed(folder / name) for name in (TOKENS, OFFSETS, WEIGHTS)}
        self._levels = {0.0: 0, 1.0: 1}
        self._firsts: set[float] = set()
        self._others_are_1 = True
        self._files[OFFSETS].write(np.zeros(1, "<i8"))

    def append(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        lengths: Int64[np.ndarray, " documents"],
        weights: Float32[np.ndarray, " tokens"],
    ) -> None:
        """Appends concatenated documents; raises UserError for ids and weights that a store cannot hold."""
        if not len(lengths):
            return
        assert lengths.min() > 0
        assert lengths.sum() == len(tokens) == len(weights)
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"token id {token} is outside of the vocabulary of {self.vocab_size} tokens",
                    "Use the tokenizer that created these ids.",
                )
        ends = np.cumsum(lengths)
        firsts = weights[ends - lengths]
        self._others_are_1 &= np.count_nonzero(weights == 1) - np.count_nonzero(firsts == 1) == len(weights) - len(ends)
        if len(self._firsts) < 2:
            self._firsts.update(np.unique(firsts)[:2].tolist())
        self._files[WEIGHTS].write(self._codes(weights))
        self._files[TOKENS].write(tokens.astype(self._dtype))
        self._files[OFFSETS].write((self.num_tokens + ends).astype("<i8"))
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)

    def finish(self, about: dict[str, Any]) -> None:
        """Writes the manifest, with the entries of `about`, which completes the store."""
        uniform = self._others_are_1 and len(self._firsts) < 2
        self.__exit__()
        if uniform:
            del self._files[WEIGHTS]
            (self.folder / WEIGHTS).unlink()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "vocab_size": self.vocab_size,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "weights": {"first": next(iter(self._firsts), 0.0)} if uniform else {"levels": list(self._levels)},
            "files": {name: {"bytes": file.size, "sha256": file.sha256} for name, file in self._files.items()},
        }
        write_json(self.folder / MANIFEST, manifest | about)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error) -> None:
        for file in self._files.values():
            file.close()

    def _codes(self, weights: np.ndarray) -> np.ndarray:
        codes = (weights == 1).astype(np.uint8)
        rare = np.flatnonzero((weights != 0) & (weights != 1))
        if rare.size:
            values, which = np.unique(weights[rare], return_inverse=True)
            codes[rare] = np.array([self._code(value) for value in values.tolist()], np.uint8)[which]
        return codes

    def _code(self, weight: float) -> int:
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"a token has the loss weight {weight}", "Weights must be finite and 0 or more.")
        code = self._levels.setdefault(weight, len(self._levels))
        if code > 255:
            raise UserError("there are more than 256 different loss weights", "Round them.")
        return code


class _Hashed:
    """A file that is being written, and its checksum."""

    def __init__(self, path: Path):
        self.size = 0
        self._file = path.open("wb")
        self._sha = hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._file.write(data)
        self._sha.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    def close(self) -> None:
        self._file.close()


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest dtype that holds every id of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def map_array(path: Path, dtype: np.dtype, count: int, at_random: bool = False) -> np.ndarray:
    """Maps `count` elements of a file into memory."""
    if not count:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    with path.open("rb") as file:
        # The lock shows `camelid data cache --prune` that the store is in use; it waits only while another process
        # tests for it. The map keeps a copy of the open file, and so the lock. Not all file systems have locks.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        mapped = mmap.mmap(file.fileno(), count * dtype.itemsize, access=mmap.ACCESS_READ)
    if at_random:
        # Otherwise the system reads ahead, much more than a row.
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Errors of the system within this context become a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}",
            "Check the free space of the disk and the permissions of the folder; rerun the command to resume.",
        ) from error
