"""The batch of a step, as a function of the configuration and the step alone."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace

import numpy as np

from camelid.data.config import DataConfig
from camelid.data.preparation.store import AGAIN, Store
from camelid.data.preparation.task import StageProgress
from camelid.data.randomness import permute, seed_of
from camelid.data.rows.batch import Batch, PairBatch
from camelid.data.rows.mixture import Mixture, RowShares, row_shares
from camelid.data.rows.packing import Packing
from camelid.data.rows.stores import Split, is_mixed, open_stores
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer

TOKENS_AT_ONCE = 2**20  # tokens that are searched at once


class Loader:
    """The batches of one split: from the given stores, or from those of the configuration, prepared if needed."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        split: Split = "train",
        progress: StageProgress | None = None,
        stores: Sequence[Store] | None = None,
    ):
        self.config, self.split = config, split
        self.vocab_size = tokenizer.vocab_size
        stores = open_stores(config, tokenizer, split, progress) if stores is None else stores
        self.pairs = _holds_pairs(stores, config)
        looped = config.cross_documents and not config.shuffle and len(stores) == 1 and split == "train"
        self.packings = tuple(
            Packing(
                store,
                config.sequence_length,
                config.packing_method,
                config.overlong,
                config.cross_documents,
                looped,
                self.pairs,
            )
            for store in stores
        )
        for packing in self.packings:
            _check_size(packing, split)
        _check_loss(self.packings, split)
        self.mixture = _mixture(config, self.packings, split)

    def check_ids(self, vocab_size: int) -> None:
        """Raises UserError if a store holds an id that is not below the `vocab_size` of a model."""
        if self.vocab_size <= vocab_size:  # the stores hold ids of the tokenizer only
            return
        for store in (packing.store for packing in self.packings):
            blocks = (store.tokens[at : at + TOKENS_AT_ONCE] for at in range(0, store.num_tokens, TOKENS_AT_ONCE))
            if (largest := max((int(block.max()) for block in blocks), default=0)) >= vocab_size:
                raise UserError(
                    f"{store.folder} holds token id {largest}, but the vocabulary of the model has {vocab_size} tokens",
                    "Train a model with more embeddings, or remove the texts and templates that need this token.",
                )

    def with_reference(self, reference: Sequence[np.ndarray]) -> "Loader":
        """The same rows as PairBatch; for each of `packings` its float32 values of `reference`, one per document."""
        loader = copy(self)
        loader.packings = tuple(
            replace(packing, reference=values) for packing, values in zip(self.packings, reference, strict=True)
        )
        return loader

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the rows."""
        if self.pairs:
            return self._notes_of_pairs()
        # Stored weights mean that parts of documents have no loss: prompts.
        prompts = any(packing.method == "stream" and packing.store.codes is not None for packing in self.packings)
        if not (prompts or (self.config.packing_method == "stream" and any(s.has_prompts for s in self.config.train))):
            return ()
        return (
            "packing = 'stream' splits documents that have prompts, so that rows start in the middle of them; "
            "best_fit splits only those that are longer than a row",
        )

    def _notes_of_pairs(self) -> tuple[str, ...]:
        plans = [plan for packing in self.packings if (plan := packing.plan) is not None]
        counts = {"truncated": sum(plan.truncated for plan in plans), "dropped": sum(plan.dropped for plan in plans)}
        return tuple(
            f"{count:,} of {sum(store.num_documents for store in self.stores):,} answers of the {self.split} data are "
            f"{what}, because their pairs are longer than a row of {self.config.sequence_length} tokens"
            for what, count in counts.items()
            if count
        )

    @property
    def stores(self) -> tuple[Store, ...]:
        return tuple(packing.store for packing in self.packings)

    @property
    def num_rows(self) -> int:
        return sum(packing.num_rows for packing in self.packings)

    @property
    def num_tokens(self) -> int:
        return sum(packing.store.num_tokens for packing in self.packings)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Returns rows [start, stop) of a step, which depend on the configuration and the arguments only."""
        first = step * self.config.batch_size
        return self._rows(*self.mixture.find(np.arange(first, first + self.config.batch_size)[start:stop]))

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Yields every row once; the last batch is padded with rows of weight 0."""
        ends = np.cumsum([packing.num_rows for packing in self.packings])
        for first in range(0, self.num_rows, batch_size):
            rows = np.arange(first, first + batch_size)
            which = np.minimum(np.searchsorted(ends, rows, "right"), len(ends) - 1)
            yield self._rows(which, rows - np.append(0, ends)[which])

    def validation_rows(self) -> list[np.ndarray]:
        """The numbers of the rows of each of `packings` that are validated, in order: all, or a choice by the seed."""
        limit, total = self.config.max_validation_tokens, self.num_rows
        count = total if limit is None else min(total, limit // self.config.sequence_length)
        chosen = np.arange(total)
        if count < total:
            chosen = np.sort(permute(np.arange(count), total, seed_of(self.config.seed, "validation rows")))
        ends = np.cumsum([packing.num_rows for packing in self.packings])
        parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
        return [part - first for part, first in zip(parts, [0, *ends[:-1]], strict=True)]

    def for_validation(self, batch_size: int) -> Iterator[tuple[int, Batch]]:
        """Yields each of `validation_rows` once, in batches of one packing each, with the index of the packing.

        The last batch of a packing is padded with rows of weight 0.
        """
        for number, (packing, rows) in enumerate(zip(self.packings, self.validation_rows(), strict=True)):
            padding = np.full(-len(rows) % batch_size, packing.num_rows)
            for batch in np.append(rows, padding).reshape(-1, batch_size):
                yield number, self._checked(packing, batch)

    def epochs(self, step: int) -> tuple[float, ...]:
        """Returns how often each of `packings` was read before a step."""
        taken = self.mixture.taken(step * self.config.batch_size)
        return tuple(rows / packing.rows_per_epoch for rows, packing in zip(taken, self.packings, strict=True))

    def _rows(self, which: np.ndarray, rows: np.ndarray) -> Batch:
        """The rows with these numbers, of the packings with these indices."""
        if len(self.packings) == 1:
            return self._checked(self.packings[0], rows)
        parts = [vars(self._checked(packing, rows[which == n])) for n, packing in enumerate(self.packings)]
        order = np.argsort(np.argsort(which, kind="stable"))
        kind = PairBatch if "reference" in parts[0] else Batch
        return kind(**{name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]})

    def _checked(self, packing: Packing, rows: np.ndarray) -> Batch:
        """Rows of a packing; raises UserError for ids outside of the vocabulary."""
        batch = packing.rows(rows)
        # As unsigned integers, so that values that overflowed int32 are not negative.
        largest = max(int(x.view(np.uint32).max(initial=0)) for x in (batch.tokens, batch.targets))
        if largest >= self.vocab_size:
            raise UserError(
                f"{packing.store.folder} holds token id {largest}, outside of the vocabulary of "
                f"{self.vocab_size} tokens",
                AGAIN,
            )
        return batch


def _mixture(config: DataConfig, packings: Sequence[Packing], split: Split) -> Mixture:
    tokens_per_row = [packing.num_places / packing.num_rows for packing in packings]
    weights = [float(packing.num_places) for packing in packings]
    stages = []
    if split == "train" and is_mixed(config):
        weights = [
            weight if source.weight is None else source.weight
            for source, weight in zip(config.train, weights, strict=True)
        ]
        stages = [RowShares(stage.first_step * config.batch_size, stage.weights) for stage in config.stages]
    shares = [RowShares(0, tuple(weights)), *stages]
    return Mixture(
        tuple(packing.num_rows for packing in packings),
        tuple(RowShares(share.first, row_shares(share.weights, tokens_per_row)) for share in shares),
        config.shuffle,
        config.seed,
    )


def _holds_pairs(stores: Sequence[Store], config: DataConfig) -> bool:
    """Whether all documents are the answers of pairs; raises UserError if some are, or if rows would separate them."""
    paired = [store for store in stores if "preference" in store.kinds]
    if not paired:
        return False
    if others := [store for store in stores if store.kinds != {"preference"}]:
        raise UserError(
            f"{paired[0].folder} holds pairs of answers (kind = 'preference'), and {others[0].folder} also holds "
            "other documents",
            "Train on sources of kind = 'preference' alone.",
        )
    if config.packing_method == "stream":
        raise UserError(
            "packing = 'stream' would separate the two answers of a preference",
            "Set data.packing = 'best_fit', or 'none' for one pair in each row.",
        )
    return True


def _check_size(packing: Packing, split: Split) -> None:
    store = packing.store
    # The first token of a document is predicted only in rows across documents.
    predicted = store.num_tokens - (1 if packing.cross_documents else store.num_documents)
    if predicted > 0 and not packing.num_rows:
        raise UserError(
            f"every document of the {split} data is longer than a row of {packing.sequence_length} tokens",
            "Increase sequence_length, or set overlong = 'split' or 'truncate'.",
        )
    if predicted < 1:
        raise UserError(
            f"the {split} data has nothing to predict: {store.num_tokens} tokens in all",
            "Provide documents of two tokens or more.",
        )
    if split == "train" and packing.method == "stream" and store.num_tokens < packing.sequence_length:
        raise UserError(
            f"the train data has {store.num_tokens} tokens, fewer than a row of {packing.sequence_length}",
            f"Provide more text, or set sequence_length = {store.num_tokens} or less.",
        )


def _check_loss(packings: Sequence[Packing], split: Split) -> None:
    if not any(map(_has_loss, packings)):
        raise UserError(
            f"no row of the {split} data has a token with a loss",
            "Increase sequence_length: prompts may fill the rows. "
            f"`camelid data inspect {packings[0].store.folder}` shows which tokens have a loss.",
        )


def _has_loss(packing: Packing) -> bool:
    """Whether any row has a token with a loss; one of the first rows nearly always does."""
    first, count = 0, 1
    while first < packing.num_rows:
        rows = np.arange(first, min(first + count, packing.num_rows))
        if packing.rows(rows).weights.any():
            return True
        first, count = first + count, min(2 * count, max(1, TOKENS_AT_ONCE // packing.sequence_length))
    return False
