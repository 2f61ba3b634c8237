"""Statistics of stores and of the data of a recipe, as plain values for JSON; stores are read a block at a time."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from camelid.data.preparation.store import VALIDATION, Store, is_store
from camelid.data.rows.loader import Loader
from camelid.data.rows.packing import Packing

BLOCK = 2**20  # tokens or documents that are in memory at once
FIRST = 5  # examples that are named of a finding
FIRST_ROWS = 1024  # that are examined when training starts
BARS = 20  # of a histogram

Progress = Callable[[int, int], None]


class Lengths(NamedTuple):
    """The number of documents of each length."""

    tokens: Int64[np.ndarray, " lengths"]
    """Different lengths, ascending."""
    documents: Int64[np.ndarray, " lengths"]


class SilentRows(NamedTuple):
    """Rows of a source in which no token has a loss."""

    number: int
    examined: int
    """Number of rows that were examined, from the first on."""
    rows: int
    """Number of all rows of the source."""


# Stores ---------------------------------------------------------------------------------


def of_store(store: Store) -> dict[str, Any]:
    """Returns the counts of a store; `with_loss` counts the tokens with a loss in rows of entire documents."""
    lengths = count_lengths(store.offsets)
    with_loss, silent, first = _count_loss(store, lengths)
    prepared = store.manifest.get("prepared") or {"options": {"sources": []}}
    counts = store.manifest.get("counts", {})
    return {
        "name": str(store.folder),
        "store": str(store.folder),
        "files": [name for source in prepared["options"]["sources"] for name in source["files"]],
        "made_of": [
            {key: source[key] for key in ("files", "kind", "template")} for source in prepared["options"]["sources"]
        ],
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "with_loss": with_loss,
        "weights": sorted(store.levels.tolist()) if store.codes is not None else [0.0, 1.0],
        "bytes": sum(file["bytes"] for file in store.manifest["files"].values()),
        "rows_read": counts.get("rows"),
        "empty": counts.get("empty", 0),
        "unreadable": counts.get("unreadable", 0),
        "problems": counts.get("problems", []),
        "lengths": _summary(lengths),
        "documents_without_loss": {"count": silent, "first": first},
        "held_out": _held_out(store),
    }


def count_lengths(offsets: Int64[np.ndarray, " offsets"]) -> Lengths:
    """Counts the lengths of documents with these offsets; memory grows with the number of different lengths only."""
    tokens, documents = np.empty(0, np.int64), np.empty(0, np.int64)
    for first in range(0, len(offsets) - 1, BLOCK):
        found, counts = np.unique(np.diff(offsets[first : first + BLOCK + 1]), return_counts=True)
        tokens, which = np.unique(np.concatenate([tokens, found]), return_inverse=True)
        merged = np.zeros(len(tokens), np.int64)
        np.add.at(merged, which, np.concatenate([documents, counts]))
        documents = merged
    return Lengths(tokens, documents)


def histogram(stores: Sequence[Store]) -> dict[str, Any]:
    """Returns a histogram of the lengths of documents, by store: bar b counts lengths in [edges[b], edges[b + 1]).

    Bars are equally wide, except for the last one: if the longest hundredth of the documents is much longer than the
    others, it counts them.
    """
    of_stores = [count_lengths(store.offsets) for store in stores]
    tokens = np.concatenate([lengths.tokens for lengths in of_stores])
    order = np.argsort(tokens)
    merged = Lengths(tokens[order], np.concatenate([lengths.documents for lengths in of_stores])[order])
    shortest, longest = int(merged.tokens[0]), int(merged.tokens[-1])
    most = _quantile(merged, 0.99)
    width = _round_number((most - shortest + 1) / (BARS - 2))
    edges = list(range(shortest // width * width, most + width, width))
    edges = [*edges, longest + 1] if longest >= edges[-1] else edges
    counts = [np.histogram(lengths.tokens, edges, weights=lengths.documents)[0] for lengths in of_stores]
    return {"edges": edges, "documents": [count.astype(np.int64).tolist() for count in counts]}


def _count_loss(store: Store, lengths: Lengths) -> tuple[int, int, list[int]]:
    """The number of tokens with a loss; the number of documents without any, and the first of them."""
    if store.codes is None:
        single = int(lengths.documents[lengths.tokens == 1].sum())
        return store.num_tokens - store.num_documents, single, _first_single(store) if single else []
    with_loss, silent, named = 0, 0, []
    for first, starts, has_loss in _blocks(store):
        of_document = np.add.reduceat(has_loss, starts, dtype=np.int64)
        with_loss += int(of_document.sum())
        empty = np.flatnonzero(of_document == 0)
        silent += len(empty)
        named += (first + empty[:FIRST]).tolist()
    return with_loss, silent, named[:FIRST]


def _first_single(store: Store) -> list[int]:
    """The first documents of a single token."""
    named: list[int] = []
    for first in range(0, store.num_documents, BLOCK):
        named += (first + np.flatnonzero(np.diff(store.offsets[first : first + BLOCK + 1]) == 1)[:FIRST]).tolist()
        if len(named) >= FIRST:
            break
    return named[:FIRST]


def _blocks(store: Store) -> Iterator[tuple[int, np.ndarray, Bool[np.ndarray, " tokens"]]]:
    """Yields some documents at a time: index of the first, start of each in the block, and which tokens have a loss."""
    first = 0
    while first < store.num_documents:
        enough = int(np.searchsorted(store.offsets, store.offsets[first] + BLOCK))
        stop = min(max(enough, first + 1), store.num_documents)
        begin, end = int(store.offsets[first]), int(store.offsets[stop])
        starts = store.offsets[first:stop] - begin
        has_loss = store.weights(begin, end) > 0
        has_loss[starts] = False  # a first token is not predicted
        yield first, starts, has_loss
        first = stop


def _held_out(store: Store) -> dict[str, int] | None:
    if not is_store(store.folder / VALIDATION):
        return None
    held_out = Store.open(store.folder / VALIDATION)
    return {"documents": held_out.num_documents, "tokens": held_out.num_tokens}


def _summary(lengths: Lengths) -> dict[str, int | float]:
    documents = int(lengths.documents.sum())
    quantiles = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        "shortest": int(lengths.tokens[0]),
        "mean": float(lengths.tokens @ lengths.documents) / documents,
        **{name: _quantile(lengths, share) for name, share in quantiles.items()},
        "longest": int(lengths.tokens[-1]),
    }


def _quantile(lengths: Lengths, share: float) -> int:
    """The smallest length that this fraction of the documents does not exceed."""
    below = np.cumsum(lengths.documents)
    return int(lengths.tokens[np.searchsorted(below, math.ceil(share * below[-1]))])


def _round_number(least: float) -> int:
    """The first of 1, 2, 5, 10, 20, 50, ... that is at least this large."""
    return next(number for power in itertools.count() for digit in (1, 2, 5) if (number := digit * 10**power) >= least)


# Recipes --------------------------------------------------------------------------------


def of_loader(loader: Loader, steps: int | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Returns the statistics of the sources and rows of a recipe, and what a number of steps reads of each source.

    Sources that share a store are one source here. `progress` is called with the rows examined and all rows.
    """
    done, sources = 0, []
    given = {Path(source.files[0]) for source in (*loader.config.train, *loader.config.validation)}
    for packing in loader.packings:

        def report_progress(seen: int, before: int = done) -> None:
            if progress is not None:
                progress(before + seen, sum(_rows(packing) for packing in loader.packings))

        about = of_store(packing.store)
        own = given & {
            packing.store.folder,
            packing.store.folder.parent,
        }  # the parent holds the store of which this one was held out
        # The name of a folder in the cache is a hash.
        name = about["name"] if own or not about["files"] else ", ".join(about["files"])
        sources.append(about | {"name": name, "packing": of_packing(packing, report_progress)})
        done += _rows(packing)
    return {
        "sources": sources,
        "rows": done,
        "stages": [] if steps is None else _stages(loader, steps),
        "repeats": [] if steps is None else list(loader.epochs(steps)),
    }


def of_packing(packing: Packing, progress: Callable[[int], None] = lambda rows: None) -> dict[str, Any]:
    """Returns how documents are packed: fill rate, documents split, truncated and dropped, and rows without a loss."""
    silent, first = _rows_without_loss(packing, progress)
    if packing.plan is None:
        lost = dict.fromkeys(("truncated", "dropped", "lost"), 0)
        counts = {"split": _split_by_stream(packing), **lost}
    else:
        counts = {name: getattr(packing.plan, name) for name in ("split", "truncated", "dropped", "lost")}
    return {
        "method": packing.method,
        "sequence_length": packing.sequence_length,
        "rows": _rows(packing),
        "filled": packing.fill_rate,
        **counts,
        "rows_without_loss": {"count": silent, "first": first},
    }


def silent_among_first(packing: Packing, most: int = FIRST_ROWS) -> SilentRows:
    """Examines the first `most` rows of a source, and reads no others."""
    examined = min(most, _rows(packing))
    return SilentRows(_examine(packing, examined)[0], examined, _rows(packing))


def _rows(packing: Packing) -> int:
    """The number of rows in which every document appears once."""
    return math.ceil(packing.rows_per_epoch)


def _split_by_stream(packing: Packing) -> int:
    """The number of documents that are in more than one row."""
    offsets, split = packing.store.offsets, 0
    for first in range(0, len(offsets) - 1, BLOCK):
        bounds = offsets[first : first + BLOCK + 1]
        split += int(
            np.count_nonzero(bounds[:-1] // packing.sequence_length != (bounds[1:] - 1) // packing.sequence_length)
        )
    return split


def _rows_without_loss(packing: Packing, progress: Callable[[int], None]) -> tuple[int, list[int]]:
    """The number of rows without a loss, and the first of them."""
    return (0, []) if _always_has_loss(packing) else _examine(packing, _rows(packing), progress)


def _examine(packing: Packing, stop: int, progress: Callable[[int], None] = lambda rows: None) -> tuple[int, list[int]]:
    """The number of rows without a loss among those before `stop`, and the first of them."""
    count, named = 0, []
    at_once = max(1, BLOCK // packing.sequence_length)
    for first in range(0, stop, at_once):
        rows = np.arange(first, min(first + at_once, stop))
        silent = rows[~packing.rows(rows).weights.any(axis=1)]
        count += len(silent)
        named += silent[:FIRST].tolist()
        progress(int(rows[-1]) + 1)
    return count, named[:FIRST]


def _always_has_loss(packing: Packing) -> bool:
    """Whether every row must have a loss, so that a large text need not be read to find out."""
    if packing.store.codes is not None:
        return False
    if packing.plan is not None:
        return True
    # In a row of at least two tokens, one is not the last of its document, unless documents are single tokens.
    return packing.sequence_length > 1 and bool(count_lengths(packing.store.offsets).tokens[0] > 1)


def _stages(loader: Loader, steps: int) -> list[dict[str, Any]]:
    """The requested and the actual share of each source in the tokens of each stage."""
    size, mixture = loader.config.batch_size, loader.mixture
    tokens_per_row = np.array([packing.num_places / packing.num_rows for packing in loader.packings])
    firsts = [0, *(stage.first_step for stage in loader.config.stages)]
    stages = []
    for share, first, last in zip(mixture.shares, firsts, [*firsts[1:], steps], strict=True):
        begin, end = min(first, steps), min(last, steps)
        rows = np.subtract(mixture.taken(end * size), mixture.taken(begin * size))
        asked, given = np.array(share.weights) * tokens_per_row, rows * tokens_per_row
        stages.append(
            {
                "first_step": first,
                "steps": end - begin,
                "asked": (asked / asked.sum()).tolist(),
                "given": (given / max(1, given.sum())).tolist(),
                "rows": rows.tolist(),
                "repeats": (rows / [packing.rows_per_epoch for packing in loader.packings]).tolist(),
            }
        )
    return stages
