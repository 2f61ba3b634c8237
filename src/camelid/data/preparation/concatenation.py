"""Concatenates partial stores into a store, and holds documents out for validation."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from camelid.data.preparation.partial_stores import SourceChunk
from camelid.data.preparation.store import VALIDATION, Store, Writer, read_manifest
from camelid.data.preparation.task import Task
from camelid.data.randomness import GOLDEN_RATIO, splitmix64
from camelid.data.readers.sources import Tally
from camelid.errors import UserError

TOKENS_AT_ONCE = 2**22  # tokens that are in memory at once


def concatenate(
    task: Task, chunks: Sequence[SourceChunk], parts: Sequence[Path], folder: Path, prepared: dict[str, Any]
) -> None:
    """Writes the documents of the partial stores into one store, and those to hold out into a second one in its folder.

    `parts` are the folders of the partial stores of `chunks`. Raises UserError if too many records of a source are
    unreadable.
    """
    manifests = [read_manifest(part) for part in parts]
    about = {
        "tokenizer": task.tokenizer.fingerprint,
        "tokenizer_file": str(task.vocabulary.resolve()),
        "prepared": prepared,
        "counts": _counts(task, chunks, manifests),
    }
    if not task.validation_fraction:
        with Writer(folder, task.tokenizer.vocab_size) as writer:
            for part in parts:
                for tokens, lengths, weights in _blocks(part):
                    writer.append(tokens, lengths, weights)
            writer.finish(about)
    else:
        documents = [manifest["num_documents"] for manifest in manifests]
        _concatenate_apart(task, chunks, parts, documents, folder, about)
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _counts(task: Task, chunks: Sequence[SourceChunk], manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all sources; raises UserError if too much of one is unreadable, or no document is left."""
    total, empty = Tally(1.0), 0
    for source in task.sources:
        tally = Tally(source.max_unreadable)
        for (whose, _), manifest in zip(chunks, manifests, strict=True):
            if whose is source:
                counts = manifest["counts"]
                tally.add(Tally(0.0, counts["rows"], counts["unreadable"], counts["problems"]))
                empty += counts["empty"]
        tally.check()
        total.add(tally)
    if not any(manifest["num_documents"] for manifest in manifests):
        raise UserError(
            f"there is no text in {', '.join(name for source in task.sources for name in source.files)}",
            "Name files with text.",
        )
    return {"rows": total.rows, "unreadable": total.unreadable, "empty": empty, "problems": total.problems}


def _blocks(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields tokens, lengths and weights of some documents of a partial store at a time."""
    # One store at a time: each keeps files open, whose number is limited.
    part = Store.open(folder)
    first = 0
    while first < part.num_documents:
        enough = int(np.searchsorted(part.offsets, part.offsets[first] + TOKENS_AT_ONCE))
        stop = min(max(enough, first + 1), part.num_documents)
        begin, end = int(part.offsets[first]), int(part.offsets[stop])
        yield part.tokens[begin:end], np.diff(part.offsets[first : stop + 1]), part.weights(begin, end)
        first = stop


def _concatenate_apart(
    task: Task,
    chunks: Sequence[SourceChunk],
    parts: Sequence[Path],
    documents: Sequence[int],
    folder: Path,
    about: dict[str, Any],
) -> None:
    """The same with a fraction of the documents, or of the tokens of a single document, held out."""
    # The two answers of a preference stay together.
    sizes = [2 if source.kind == "preference" else 1 for source, _ in chunks]
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
    """Units with a random integer up to this one are held out: at least one, and never all."""
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
            f"a single {'document' if part.num_documents == 1 else 'pair'} of {count} tokens cannot be divided",
            "Give more text, or name validation files.",
        )
    cut = count - min(max(2, round(count * fraction)), count - 2)
    for writer, begin, end in ((kept, 0, cut), (held_out, cut, count)):
        writer.append(part.tokens[begin:end], np.array([end - begin]), part.weights(begin, end))
