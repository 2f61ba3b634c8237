"""Small stores of made-up documents."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from camelid.data.preparation.store import Store, Writer

VOCAB = 70_000


def write_store(
    folder: Path,
    documents: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] | None = None,
    vocab_size: int = VOCAB,
    tokenizer: str = "none",
) -> Store:
    """A store of these documents; without weights, each document's first token weighs 0 and the others 1."""
    with Writer(folder, vocab_size) as writer:
        for n, document in enumerate(documents):
            given = [0.0] + [1.0] * (len(document) - 1) if weights is None else weights[n]
            writer.append(np.array(document), np.array([len(document)]), np.array(given, np.float32))
        writer.finish({"tokenizer": tokenizer})
    return Store.open(folder)


def documents_of(store: Store) -> list[list[int]]:
    return [part.tolist() for part in np.split(store.tokens, store.offsets[1:-1])]
