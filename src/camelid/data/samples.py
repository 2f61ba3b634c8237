"""The first documents of a store and the first rows of training as text, with the loss weight of each token."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from camelid.data.preparation.store import Store
from camelid.data.rows.loader import Loader
from camelid.text.tokenizer import Tokenizer

SHOWN = 2048  # tokens of a document that are shown


def documents_as_text(store: Store, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """Returns the first documents of a store as text, each truncated to SHOWN tokens."""
    shown = []
    for number in range(min(count, store.num_documents)):
        begin, end = store.offsets[number : number + 2].tolist()
        cut = min(end, begin + SHOWN)
        loss = store.weights(begin, cut)
        loss[:1] = 0
        runs = _runs(store.tokens[begin:cut], loss, tokenizer)
        shown.append({"document": number, "tokens": end - begin, "left_out": end - cut, "documents": [runs]})
    return shown


def rows_as_text(loader: Loader, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """Returns the first rows of training as text, in the order in which it reads them."""
    shown = []
    for source, row in zip(*loader.mixture.find(np.arange(count)), strict=True):
        batch = loader.packings[source].rows(np.array([row]))
        tokens, targets, weights, segments = (
            each[0] for each in (batch.tokens, batch.targets, batch.weights, batch.segments)
        )
        documents = []
        for segment in range(1, int(segments.max()) + 1):
            here = segments == segment
            # Include the last target if it has a loss, although it may not be a token of the row.
            last = weights[here][-1:] > 0
            ids = np.concatenate([tokens[here], targets[here][-1:][last]])
            loss = np.concatenate([[0], weights[here][:-1], weights[here][-1:][last]])
            documents.append(_runs(ids, loss, tokenizer))
        padding = int(np.count_nonzero(segments == 0))
        shown.append({"source": int(source), "row": int(row), "padding": padding, "documents": documents})
    return shown


def _runs(
    tokens: Integer[np.ndarray, " n"], loss: Float[np.ndarray, " n"], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Runs of tokens of equal weight as text; each special token is a run of its own."""
    specials = tokenizer.backend.special_ids
    ids = tokenizer.checked(tokens)
    keys = [
        (weight, n if token in specials else None)
        for n, (token, weight) in enumerate(zip(ids, loss.tolist(), strict=True))
    ]
    runs = []
    for (weight, special), indices in itertools.groupby(range(len(ids)), key=keys.__getitem__):
        run = [ids[n] for n in indices]
        if special is None:
            text = tokenizer.decode_after_text(run)
        else:
            text = tokenizer.backend.decode(run) or f"<|{run[0]}|>"
        runs.append({"text": text, "tokens": len(run), "weight": weight, "special": special is not None})
    return runs
