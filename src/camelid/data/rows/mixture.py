"""The endless sequence of rows that training reads: which row of which source comes when."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from camelid.data.randomness import draw, permute, seed_of

BLOCK = 1024  # rows over which the shares are exact; more if there are very many sources
DRAWN_AT_ONCE = 4096  # rows; the order of an epoch of at most this many is drawn at once, that of more is computed
FEISTEL = "feistel"


class RowShares(NamedTuple):
    """The shares of the sources in the rows, from an index on."""

    first: int
    """Index in the sequence of rows."""
    weights: tuple[float, ...]
    """One weight for each source; they need not add up to 1."""


@dataclass(frozen=True)
class Mixture:
    """An endless sequence of rows with random access.

    It is divided into blocks. After any number of blocks, each source has contributed its share of the rows, rounded;
    the source with the largest share contributes the rest. The order within a block is random. If the shares change,
    every source continues with its next row. Each source is read epoch after epoch, each in a different order.
    """

    num_rows: tuple[int, ...]
    """Rows in an epoch of each source."""
    shares: tuple[RowShares, ...]
    """The first starts at index 0, the others in ascending order."""
    shuffle: bool
    seed: int

    def find(self, indices: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Returns the source at each index of the sequence, and the number of the row in this source."""
        sources, counts = np.empty_like(indices), np.empty_like(indices)
        for n, index in enumerate(indices.tolist()):
            stage, block, within = self._split(index)
            before, order, nth = self._block_of(stage, block)
            source = sources[n] = order[within]
            counts[n] = self._starts[stage][source] + before[source] + int(nth[within])
        rows = np.empty_like(indices)
        for source in np.unique(sources).tolist():
            here = sources == source
            rows[here] = self._rows(source, counts[here])
        return sources, rows

    def taken(self, index: int) -> tuple[int, ...]:
        """Returns the number of rows of each source before an index of the sequence."""
        stage = self._split(index)[0]
        return _sum(self._starts[stage], self._given(stage, index - self.shares[stage].first))

    def _split(self, index: int) -> tuple[int, int, int]:
        """The stage of an index, the block in the stage, and the index in the block."""
        stage = sum(share.first <= index for share in self.shares) - 1
        return stage, *divmod(index - self.shares[stage].first, self._block)

    @property
    def _block(self) -> int:
        # Large enough for the largest share to compensate for the rounding of all others.
        return max(BLOCK, len(self.num_rows) ** 2)

    @functools.cached_property
    def _block_of(self):
        # Consecutive indices are in the same block.
        return functools.lru_cache(8)(self._draw_block)

    def _draw_block(self, stage: int, block: int) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
        """The rows of each source before a block; the source of each row of the block, and its index in this source."""
        before, after = (self._in_blocks(stage, blocks) for blocks in (block, block + 1))
        counts = np.subtract(after, before)
        order = np.repeat(np.arange(len(counts)), counts)
        if len(counts) > 1:
            order = order[np.argsort(draw(len(order), self.seed, "mixture", stage, block), kind="stable")]
        nth = np.empty_like(order)
        nth[np.argsort(order, kind="stable")] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        return before, order, nth

    def _in_blocks(self, stage: int, blocks: int) -> tuple[int, ...]:
        """The number of rows of each source in the first blocks of a stage."""
        weights = list(map(Fraction, self.shares[stage].weights))
        weight_sum, total = sum(weights), blocks * self._block
        given = [int(total * weight / weight_sum + Fraction(1, 2)) for weight in weights]
        given[weights.index(max(weights))] += total - sum(given)
        return tuple(given)

    def _given(self, stage: int, rows: int) -> tuple[int, ...]:
        """The number of rows of each source among the first rows of a stage."""
        block, within = divmod(rows, self._block)
        before, order, _ = self._block_of(stage, block)
        return _sum(before, np.bincount(order[:within], minlength=len(before)).tolist())

    @functools.cached_property
    def _starts(self) -> list[tuple[int, ...]]:
        """The number of rows of each source before each stage."""
        starts = [(0,) * len(self.num_rows)]
        for stage, (share, following) in enumerate(itertools.pairwise(self.shares)):
            starts.append(_sum(starts[-1], self._given(stage, following.first - share.first)))
        return starts

    def _rows(self, source: int, counts: np.ndarray) -> np.ndarray:
        """The numbers of the rows that a source contributes after `counts` rows."""
        epochs, indices = np.divmod(counts, self.num_rows[source])
        if not self.shuffle:
            return indices
        rows = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._shuffled(source, epoch, indices[here])
        return rows

    def _shuffled(self, source: int, epoch: int, indices: np.ndarray) -> np.ndarray:
        """The numbers of the rows at these indices of an epoch."""
        if self.row_orders[source] is None:
            return self._order_of(source, epoch)[indices]
        return permute(indices, self.num_rows[source], seed_of(self.seed, "rows", source, epoch))

    @property
    def row_orders(self) -> tuple[str | None, ...]:
        """For each source, the name of the algorithm that orders its rows; a change of it changes the batches of a run.

        None if the rows are in order, or if the order of an epoch is drawn at once, which no release has changed.
        """
        return tuple(FEISTEL if self.shuffle and num_rows > DRAWN_AT_ONCE else None for num_rows in self.num_rows)

    @functools.cached_property
    def _order_of(self):
        return functools.lru_cache(2 * len(self.num_rows))(self._draw_epoch)

    def _draw_epoch(self, source: int, epoch: int) -> np.ndarray:
        """The order of the rows of an epoch, drawn at once."""
        return np.argsort(draw(self.num_rows[source], self.seed, "rows", source, epoch), kind="stable")

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def row_shares(weights: Sequence[float], tokens_per_row: Sequence[float]) -> tuple[float, ...]:
    """Converts shares of tokens to shares of rows: a source with fewer tokens per row contributes more rows."""
    return tuple(weight / tokens for weight, tokens in zip(weights, tokens_per_row, strict=True))


def _sum(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
