"""What a store, or the data of a recipe, holds and gives: as plain values for JSON, read a block at a time."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer

from camelid.data.preparation.store import VALIDATION, Store, is_store
from camelid.data.rows.loader import Loader
from camelid.data.rows.packing import Packing
from camelid.text.tokenizer import Tokenizer

# S tokens of a row

BLOCK = 2**20  # tokens, or documents, that are looked at at once
FIRST = 5  # places that are named of what is found more often
BARS = 20  # of a histogram, the last of which may be open
SHOWN = 2048  # tokens of a document that are shown as text

Progress = Callable[[int, int], None]


class Lengths(NamedTuple):
    """How many documents there are of each length."""

    tokens: Int64[np.ndarray, " lengths"]
    """rising"""
    documents: Int64[np.ndarray, " lengths"]


# Stores ---------------------------------------------------------------------------------


def of_store(store: Store) -> dict[str, Any]:
    """Counts of a store; `with_loss` are the tokens that a row of whole documents learns to predict."""
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
        "lengths": _told(lengths),
        "documents_without_loss": {"count": silent, "first": first},
        "held_out": _held_out(store),
    }


def count_lengths(offsets: Int64[np.ndarray, " offsets"]) -> Lengths:
    """Of documents that begin at the offsets; the memory grows with the number of different lengths alone."""
    tokens, documents = np.empty(0, np.int64), np.empty(0, np.int64)
    for first in range(0, len(offsets) - 1, BLOCK):
        found, numbers = np.unique(np.diff(offsets[first : first + BLOCK + 1]), return_counts=True)
        tokens, which = np.unique(np.concatenate([tokens, found]), return_inverse=True)
        together = np.zeros(len(tokens), np.int64)
        np.add.at(together, which, np.concatenate([documents, numbers]))
        documents = together
    return Lengths(tokens, documents)


def histogram(stores: Sequence[Store]) -> dict[str, Any]:
    """Documents of each store by length: bar b counts those of edges[b] up to, and without, edges[b + 1] tokens.

    Bars are equally wide, but for the last: it holds the longest hundredth of the documents, where that is far off.
    """
    of_stores = [count_lengths(store.offsets) for store in stores]
    tokens = np.concatenate([lengths.tokens for lengths in of_stores])
    order = np.argsort(tokens)
    together = Lengths(tokens[order], np.concatenate([lengths.documents for lengths in of_stores])[order])
    shortest, longest = int(together.tokens[0]), int(together.tokens[-1])
    most = _quantile(together, 0.99)
    width = _round_number((most - shortest + 1) / (BARS - 2))
    edges = list(range(shortest // width * width, most + width, width))
    edges = [*edges, longest + 1] if longest >= edges[-1] else edges
    counts = [np.histogram(lengths.tokens, edges, weights=lengths.documents)[0] for lengths in of_stores]
    return {"edges": edges, "documents": [count.astype(np.int64).tolist() for count in counts]}


def _count_loss(store: Store, lengths: Lengths) -> tuple[int, int, list[int]]:
    """Tokens with loss; documents without any, and the first of these."""
    if store.codes is None:
        single = int(lengths.documents[lengths.tokens == 1].sum())
        return store.num_tokens - store.num_documents, single, _first_single(store) if single else []
    with_loss, silent, named = 0, 0, []
    for first, starts, learnt in _blocks(store):
        of_document = np.add.reduceat(learnt, starts, dtype=np.int64)
        with_loss += int(of_document.sum())
        empty = np.flatnonzero(of_document == 0)
        silent += len(empty)
        named += (first + empty[:FIRST]).tolist()
    return with_loss, silent, named[:FIRST]


def _first_single(store: Store) -> list[int]:
    """The first documents of one token."""
    named: list[int] = []
    for first in range(0, store.num_documents, BLOCK):
        named += (first + np.flatnonzero(np.diff(store.offsets[first : first + BLOCK + 1]) == 1)[:FIRST]).tolist()
        if len(named) >= FIRST:
            break
    return named[:FIRST]


def _blocks(store: Store) -> Iterator[tuple[int, np.ndarray, Bool[np.ndarray, " tokens"]]]:
    """Some documents at a time: the number of the first, where each starts in the block, which tokens are learnt."""
    first = 0
    while first < store.num_documents:
        enough = int(np.searchsorted(store.offsets, store.offsets[first] + BLOCK))
        stop = min(max(enough, first + 1), store.num_documents)
        begin, end = int(store.offsets[first]), int(store.offsets[stop])
        starts = store.offsets[first:stop] - begin
        learnt = store.weights(begin, end) > 0
        learnt[starts] = False  # nothing stands before a first token
        yield first, starts, learnt
        first = stop


def _held_out(store: Store) -> dict[str, int] | None:
    if not is_store(store.folder / VALIDATION):
        return None
    held_out = Store.open(store.folder / VALIDATION)
    return {"documents": held_out.num_documents, "tokens": held_out.num_tokens}


def _told(lengths: Lengths) -> dict[str, int | float]:
    documents = int(lengths.documents.sum())
    quantiles = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        "shortest": int(lengths.tokens[0]),
        "mean": float(lengths.tokens @ lengths.documents) / documents,
        **{name: _quantile(lengths, share) for name, share in quantiles.items()},
        "longest": int(lengths.tokens[-1]),
    }


def _quantile(lengths: Lengths, share: float) -> int:
    """The least length that this share of the documents does not exceed."""
    below = np.cumsum(lengths.documents)
    return int(lengths.tokens[np.searchsorted(below, math.ceil(share * below[-1]))])


def _round_number(least: float) -> int:
    """The first of 1, 2, 5, 10, 20, 50, ... that is no less."""
    return next(number for power in itertools.count() for digit in (1, 2, 5) if (number := digit * 10**power) >= least)


# Recipes --------------------------------------------------------------------------------


def of_loader(loader: Loader, steps: int | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Sources, rows, and what so many steps take of each; `progress(done, total)` hears of rows that are looked at.

    Sources of a recipe that share a store are one here.
    """
    done, sources = 0, []
    given = {Path(source.files[0]) for source in (*loader.config.train, *loader.config.validation)}
    for packing in loader.packings:

        def told(seen: int, before: int = done) -> None:
            if progress is not None:
                progress(before + seen, sum(_rows(packing) for packing in loader.packings))

        about = of_store(packing.store)
        own = given & {packing.store.folder, packing.store.folder.parent}  # the parent of what was held out
        # What is in the cache has a name that says nothing.
        name = about["name"] if own or not about["files"] else ", ".join(about["files"])
        sources.append(about | {"name": name, "packing": of_packing(packing, told)})
        done += _rows(packing)
    return {
        "sources": sources,
        "rows": done,
        "stages": [] if steps is None else _stages(loader, steps),
        "repeats": [] if steps is None else list(loader.epochs(steps)),
    }


def of_packing(packing: Packing, progress: Callable[[int], None] = lambda rows: None) -> dict[str, Any]:
    """How a store's documents lie in rows: how full they are, what was cut or left out, and rows without any loss."""
    silent, first = _rows_without_loss(packing, progress)
    if packing.plan is None:
        lost = dict.fromkeys(("truncated", "dropped", "lost"), 0)
        counts = {"split": _split_by_stream(packing), **lost}
    else:
        counts = {name: packing.plan.counts[name] for name in ("split", "truncated", "dropped", "lost")}
    return {
        "method": packing.method,
        "sequence_length": packing.sequence_length,
        "rows": _rows(packing),
        "filled": packing.fill_rate,
        **counts,
        "rows_without_loss": {"count": silent, "first": first},
    }


def _rows(packing: Packing) -> int:
    """In which every document stands once; looped, the last of them is full of what stands in the first."""
    return math.ceil(packing.rows_per_epoch)


def _split_by_stream(packing: Packing) -> int:
    """Documents that lie in more rows than one."""
    offsets, split = packing.store.offsets, 0
    for first in range(0, len(offsets) - 1, BLOCK):
        bounds = offsets[first : first + BLOCK + 1]
        split += int(
            np.count_nonzero(bounds[:-1] // packing.sequence_length != (bounds[1:] - 1) // packing.sequence_length)
        )
    return split


def _rows_without_loss(packing: Packing, progress: Callable[[int], None]) -> tuple[int, list[int]]:
    """How many rows teach nothing, and the first of them."""
    if _always_learnt(packing):
        return 0, []
    count, named = 0, []
    at_once = max(1, BLOCK // packing.sequence_length)
    for first in range(0, _rows(packing), at_once):
        rows = np.arange(first, min(first + at_once, _rows(packing)))
        silent = rows[~packing.rows(rows).weights.any(axis=1)]
        count += len(silent)
        named += silent[:FIRST].tolist()
        progress(int(rows[-1]) + 1)
    return count, named[:FIRST]


def _always_learnt(packing: Packing) -> bool:
    """Whether every row has some loss for a reason that needs no look at them: large text need not be read for it."""
    if packing.store.codes is not None:
        return False
    if packing.plan is not None:
        return True
    # A row of two tokens or more has one that does not end its document, unless documents are single tokens.
    return packing.sequence_length > 1 and bool(count_lengths(packing.store.offsets).tokens[0] > 1)


def _stages(loader: Loader, steps: int) -> list[dict[str, Any]]:
    """What each source is asked to give and gives, of the tokens of each stage."""
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


# Text -----------------------------------------------------------------------------------


def documents(store: Store, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """The first documents of a store as text, each up to SHOWN tokens."""
    shown = []
    for number in range(min(count, store.num_documents)):
        begin, end = store.offsets[number : number + 2].tolist()
        cut = min(end, begin + SHOWN)
        loss = store.weights(begin, cut)
        loss[:1] = 0
        pieces = _pieces(store.tokens[begin:cut], loss, tokenizer)
        shown.append({"document": number, "tokens": end - begin, "left_out": end - cut, "documents": [pieces]})
    return shown


def rows(loader: Loader, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """The first rows of the training as text, in the order in which it reads them."""
    shown = []
    for source, row in zip(*loader.mixture.find(np.arange(count)), strict=True):
        batch = loader.packings[source].rows(np.array([row]))
        tokens, targets, weights, segments = (
            each[0] for each in (batch.tokens, batch.targets, batch.weights, batch.segments)
        )
        pieces = []
        for segment in range(1, int(segments.max()) + 1):
            here = segments == segment
            # What the row learns to predict, also where it is no token of the row itself.
            last = weights[here][-1:] > 0
            whole = np.concatenate([tokens[here], targets[here][-1:][last]])
            loss = np.concatenate([[0], weights[here][:-1], weights[here][-1:][last]])
            pieces.append(_pieces(whole, loss, tokenizer))
        padding = int(np.count_nonzero(segments == 0))
        shown.append({"source": int(source), "row": int(row), "padding": padding, "documents": pieces})
    return shown


def _pieces(
    tokens: Integer[np.ndarray, " n"], loss: Float[np.ndarray, " n"], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Runs of tokens of one weight as text; each special is a piece of its own, by its name."""
    specials = tokenizer.backend.special_ids
    ids = tokenizer.checked(tokens)
    keys = [
        (weight, n if token in specials else None)
        for n, (token, weight) in enumerate(zip(ids, loss.tolist(), strict=True))
    ]
    pieces = []
    for (weight, special), run in itertools.groupby(range(len(ids)), key=keys.__getitem__):
        of_run = [ids[n] for n in run]
        if special is None:
            text = tokenizer.decode_after_text(of_run)
        else:
            text = tokenizer.backend.decode(of_run) or f"<|{of_run[0]}|>"
        pieces.append({"text": text, "tokens": len(of_run), "weight": weight, "special": special is not None})
    return pieces
