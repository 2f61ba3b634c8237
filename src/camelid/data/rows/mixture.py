"""Which row of which source stands at a place of an endless sequence of rows."""

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

BLOCK = 1024  # rows whose order is drawn at once; more where there are very many sources
FEW = 4096
"""rows of a source whose order is drawn an epoch at once: Grain's takes milliseconds for each of a handful"""


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
        """The source of each place, and which of its rows."""
        sources, rows = np.empty_like(places), np.empty_like(places)
        for n, place in enumerate(places.tolist()):
            stage, block, within = self._split(place)
            before, order, nth = self._block_of(stage, block)
            source = sources[n] = order[within]
            rows[n] = self._row(int(source), self._starts[stage][source] + before[source] + int(nth[within]))
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
            order = order[np.argsort(_draw(len(order), self.seed, "mixture", stage, block), kind="stable")]
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

    def _row(self, source: int, taken: int) -> int:
        """Which of its rows a source gives after so many."""
        num_rows = self.num_rows[source]
        epoch, place = divmod(taken, num_rows)
        if not self.shuffle:
            return place
        return int(self._epoch_of(source, epoch)[place]) if num_rows <= FEW else self._orders[source][taken]

    @functools.cached_property
    def _epoch_of(self):
        return functools.lru_cache(2 * len(self.num_rows))(self._draw_epoch)

    def _draw_epoch(self, source: int, epoch: int) -> np.ndarray:
        """The order of an epoch of few rows."""
        return np.argsort(_draw(self.num_rows[source], self.seed, "rows", source, epoch), kind="stable")

    @functools.cached_property
    def _orders(self) -> list[Any]:
        """Of each source of many rows, which of them is the k-th; it needs no memory for them."""
        import grain

        return [
            grain.MapDataset.range(num_rows).shuffle(_seed(self.seed, "rows", source) % 2**32).repeat()
            for source, num_rows in enumerate(self.num_rows)
        ]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def row_shares(weights: Sequence[float], tokens_per_row: Sequence[float]) -> tuple[float, ...]:
    """Shares of rows from shares of tokens: a source whose rows hold fewer tokens gives more of them."""
    return tuple(weight / tokens for weight, tokens in zip(weights, tokens_per_row, strict=True))


def _sum(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _draw(count: int, *words: object) -> np.ndarray:
    """So many numbers of 64 bits, from a seed and what they are for."""
    # The raw numbers of this generator are the same in every version of numpy; what is drawn from them is not.
    return np.random.Philox(key=_seed(*words)).random_raw(count)


def _seed(*words: object) -> int:
    """A number of 64 bits from a seed and what it is for."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, words)).encode()).digest()[:8], "little")
