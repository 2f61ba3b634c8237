"""Which row of which source stands at a place of an endless sequence of rows."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from camelid.data.randomness import draw, permute, seed_of

BLOCK = 1024  # rows whose order is drawn at once; more where there are very many sources
DRAWN_AT_ONCE = 4096  # rows; the order of an epoch of at most this many is drawn at once, that of more is computed
FEISTEL = "feistel"


class Share(NamedTuple):
    """How much of the rows come from each source, from a place on."""

    first: int
    """a place in the sequence of rows"""
    weights: tuple[float, ...]
    """of rows, one a source; they need not add up to 1"""


@dataclass(frozen=True)
class Mixture:
    """An endless sequence of rows, read anywhere at once.

    After any number of blocks each source has given its share of the rows, to half a row; the one with the largest
    share gives what is left. Within a block the order is drawn. Where the shares change, sources go on where they were.
    Each source is read epoch after epoch, in an order of its own in each.
    """

    num_rows: tuple[int, ...]
    """of each source's epoch"""
    shares: tuple[Share, ...]
    """the first from place 0, the others in rising order"""
    shuffle: bool
    seed: int

    def find(
        self, places: Int64[np.ndarray, " places"]
    ) -> tuple[Int64[np.ndarray, " places"], Int64[np.ndarray, " places"]]:
        """Returns the source at each place of the sequence, and which of the source's rows stands there."""
        sources, counts = np.empty_like(places), np.empty_like(places)
        for n, place in enumerate(places.tolist()):
            stage, block, within = self._split(place)
            before, order, nth = self._block_of(stage, block)
            source = sources[n] = order[within]
            counts[n] = self._starts[stage][source] + before[source] + int(nth[within])
        rows = np.empty_like(places)
        for source in np.unique(sources).tolist():
            here = sources == source
            rows[here] = self._rows(source, counts[here])
        return sources, rows

    def taken(self, places: int) -> tuple[int, ...]:
        """How many rows each source has given before this place."""
        stage = self._split(places)[0]
        return _sum(self._starts[stage], self._given(stage, places - self.shares[stage].first))

    def _split(self, place: int) -> tuple[int, int, int]:
        """The stage of a place, the block of the stage, and where in the block."""
        stage = sum(share.first <= place for share in self.shares) - 1
        return stage, *divmod(place - self.shares[stage].first, self._block)

    @property
    def _block(self) -> int:
        # Large enough for the largest share to make up for the rounding of all others.
        return max(BLOCK, len(self.num_rows) ** 2)

    @functools.cached_property
    def _block_of(self):
        # Places come one after another: the last blocks are asked for again and again.
        return functools.lru_cache(8)(self._draw_block)

    def _draw_block(self, stage: int, block: int) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
        """What sources gave before a block; the source of each of its rows, and how many of it came before in it."""
        before, after = (self._in_blocks(stage, blocks) for blocks in (block, block + 1))
        counts = np.subtract(after, before)
        order = np.repeat(np.arange(len(counts)), counts)
        if len(counts) > 1:
            order = order[np.argsort(draw(len(order), self.seed, "mixture", stage, block), kind="stable")]
        nth = np.empty_like(order)
        nth[np.argsort(order, kind="stable")] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        return before, order, nth

    def _in_blocks(self, stage: int, blocks: int) -> tuple[int, ...]:
        """Rows of each source in the first blocks of a stage."""
        weights = list(map(Fraction, self.shares[stage].weights))
        whole, total = sum(weights), blocks * self._block
        given = [int(total * weight / whole + Fraction(1, 2)) for weight in weights]
        given[weights.index(max(weights))] += total - sum(given)
        return tuple(given)

    def _given(self, stage: int, rows: int) -> tuple[int, ...]:
        """Rows of each source among the first of a stage."""
        block, within = divmod(rows, self._block)
        before, order, _ = self._block_of(stage, block)
        return _sum(before, np.bincount(order[:within], minlength=len(before)).tolist())

    @functools.cached_property
    def _starts(self) -> list[tuple[int, ...]]:
        """What each source has given when a stage begins."""
        starts = [(0,) * len(self.num_rows)]
        for stage, (share, following) in enumerate(itertools.pairwise(self.shares)):
            starts.append(_sum(starts[-1], self._given(stage, following.first - share.first)))
        return starts

    def _rows(self, source: int, counts: np.ndarray) -> np.ndarray:
        """The rows that a source gives after it has given `counts` rows."""
        epochs, places = np.divmod(counts, self.num_rows[source])
        if not self.shuffle:
            return places
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._shuffled(source, epoch, places[here])
        return rows

    def _shuffled(self, source: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """The rows at these places of an epoch."""
        if self.row_orders[source] is None:
            return self._order_of(source, epoch)[places]
        return permute(places, self.num_rows[source], seed_of(self.seed, "rows", source, epoch))

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
    """Shares of rows from shares of tokens: a source whose rows hold fewer tokens gives more of them."""
    return tuple(weight / tokens for weight, tokens in zip(weights, tokens_per_row, strict=True))


def _sum(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
