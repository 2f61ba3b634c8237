"""One suite for every cache: what attention reads from it equals attention over all keys without a cache.

A toy paged cache passes it too, to show that attention and the model assume nothing about the storage.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array, Int

from camelid.model.attention import View, attend
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context
from camelid.model.kv_cache import KVCache, empty_cache
from tiny import tiny_config

pytestmark = pytest.mark.quick_compile

ROWS, TOKENS, SLOTS, PAGE, WINDOW = 2, 30, 32, 4, 6
# Of each kind, one layer stands before that of the same index of the other kind, and one after it.
CONFIG = tiny_config(num_layers=4, sliding_window=WINDOW, window_pattern=(True, False, False, True))
DECODE = Context(phase="decode")
# Sums over a few dozen float32 products in another order.
CLOSE = {"rtol": 0, "atol": 1e-5}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Pages of PAGE tokens in one pool, and for each row a table of its pages.

    Views list the pages of a row from last to first, so that keys are not in order. A toy: `reorder` copies pages at
    once, where a real cache would share them and copy a page in `update`.
    """

    k: Array
    """layers, pages, K, PAGE, D"""
    v: Array
    table: Array
    """B, pages of a row: indices into the pool"""

    def update(self, layer, k, v, positions) -> tuple["PagedCache", Callable[[], View]]:
        pages, rows = self.k.shape[1], jnp.arange(len(k))[:, None]
        page = jnp.where(positions < 0, pages, self.table[rows, jnp.maximum(positions, 0) // PAGE])
        stored = [x.at[layer, page, :, positions % PAGE].set(new, mode="drop") for x, new in ((self.k, k), (self.v, v))]
        new = PagedCache(*stored, self.table)

        def read() -> View:
            last_first = new.table[:, ::-1]
            keys, values = (
                x[layer][last_first].transpose(0, 2, 1, 3, 4).reshape(len(k), x.shape[2], -1, x.shape[-1])
                for x in (new.k, new.v)
            )
            at = jnp.arange(self.table.shape[1])[::-1, None] * PAGE + jnp.arange(PAGE)
            valid = jnp.broadcast_to(at.reshape(-1) <= positions.max(1, keepdims=True), (len(k), at.size))
            return View(keys, values, at.reshape(1, -1), valid=valid)

        return new, read

    def reorder(self, rows: Int[Array, " N"]) -> "PagedCache":
        """New pages for the rows, with the contents of the old ones."""
        table = jnp.arange(self.table[rows].size).reshape(-1, self.table.shape[1])
        k, v = (x[:, self.table[rows].reshape(-1)] for x in (self.k, self.v))
        return PagedCache(k, v, table)

    def insert(self, row, other: "PagedCache", other_row) -> "PagedCache":
        mine, theirs = self.table[row], other.table[other_row]
        k, v = (x.at[:, mine].set(y[:, theirs]) for x, y in ((self.k, other.k), (self.v, other.v)))
        return PagedCache(k, v, self.table)

    def shortest_rollback(self, written: Array) -> Array:
        return jnp.zeros_like(written)


def paged(config: ModelConfig, rows: int) -> KVCache:
    """Pages of a row are scattered over the pool."""
    pages = SLOTS // PAGE
    table = jnp.asarray(np.random.default_rng(0).permutation(rows * pages).reshape(rows, pages))

    def kind(layers: int) -> PagedCache:
        empty = jnp.full((layers, rows * pages, config.num_kv_heads, PAGE, config.head_dim), 1e4)
        return PagedCache(empty, empty, table)

    return dataclasses.replace(dense(config, rows), windowed=kind(2), full=kind(2))


def dense(config: ModelConfig, rows: int) -> KVCache:
    return empty_cache(config, rows, SLOTS, jnp.dtype("float32"), ())


def ring(config: ModelConfig, rows: int) -> KVCache:
    """8 slots: a window of 6, and 3 tokens may be rolled back."""
    return empty_cache(config, rows, SLOTS, jnp.dtype("float32"), (), max_rollback=3)


@pytest.fixture(params=[dense, ring, paged])
def make(request) -> Callable[[ModelConfig, int], KVCache]:
    return request.param


def draw(seed: int, rows: int = ROWS) -> tuple[np.ndarray, ...]:
    """Queries, keys and values (B S heads D) of TOKENS tokens in each of the layers."""
    numbers = np.random.default_rng(seed)
    heads = (CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.num_kv_heads)
    return tuple(
        numbers.normal(size=(CONFIG.num_layers, rows, TOKENS, n, CONFIG.head_dim)).astype(np.float32) for n in heads
    )


def without_cache(q, k, v, length: int) -> np.ndarray:
    """The outputs of all layers for rows of `length` tokens."""
    return np.stack(
        [
            attend(
                jnp.asarray(q[layer][:, :length]),
                View(*(jnp.asarray(x[layer][:, :length].transpose(0, 2, 1, 3)) for x in (k, v))),
                None,
                windowed,
                CONFIG,
                ComputeConfig(attention="dense"),
                Context(),
            )
            for layer, windowed in enumerate(CONFIG.windowed)
        ]
    )


@jax.jit
def unrolled(cache: KVCache, q, k, v, positions) -> tuple[KVCache, Array]:
    """A chunk through all layers, whose kinds are constants."""
    out = []
    for layer, windowed in enumerate(CONFIG.windowed):
        cache, view = cache.update(windowed, jnp.int32(layer), k[layer], v[layer], positions)
        out.append(attend(q[layer], view, positions, windowed, CONFIG, ComputeConfig(), DECODE))
    return cache, jnp.stack(out)


@jax.jit
def scanned(cache: KVCache, q, k, v, positions) -> tuple[KVCache, Array]:
    """The same in one scan, in which the kind of a layer is traced."""

    def one_layer(cache, item):
        layer, windowed, q, k, v = item
        cache, view = cache.update(windowed, layer, k, v, positions)
        return cache, attend(q, view, positions, windowed, CONFIG, ComputeConfig(), DECODE)

    return lax.scan(one_layer, cache, (jnp.arange(len(q)), jnp.asarray(CONFIG.windowed), q, k, v))


def chunk(starts, size: int, *arrays) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens from `starts[b]` of each row b, `size` of them, and their positions."""
    positions = np.asarray(starts)[:, None] + np.arange(size)
    rows = np.arange(len(positions))[:, None]
    return [x[:, rows, positions] for x in arrays], positions.astype(np.int32)


@pytest.mark.parametrize("run", [unrolled, scanned], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("sizes", [[1] * TOKENS, [3] * 10, [20, 1, 9], [30], [2, 7, 1, 1, 11, 3, 5]], ids=str)
def test_reading_a_cache_equals_attention_without_one(make, run, sizes: list[int]):
    arrays, cache, parts, start = draw(0), make(CONFIG, ROWS), [], 0
    for size in sizes:
        each, positions = chunk([start] * ROWS, size, *arrays)
        cache, out = run(cache, *each, positions)
        parts.append(out)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, 2), without_cache(*arrays, TOKENS), **CLOSE)


def test_rows_have_their_own_lengths_and_padding_is_not_written(make):
    """Prompts of 11 and 4 tokens in one chunk, then both continue."""
    arrays, lengths = draw(1), np.array([11, 4])
    each, positions = chunk([0, 0], 11, *arrays)
    each = [np.where((positions < lengths[:, None])[..., None, None], x, 1e3) for x in each]
    cache, first = unrolled(make(CONFIG, ROWS), *each, np.where(positions < lengths[:, None], positions, -1))
    expected = without_cache(*arrays, TOKENS)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(first[:, row, :length], expected[:, row, :length], **CLOSE)
    for start in range(15):
        each, positions = chunk(lengths + start, 1, *arrays)
        cache, out = unrolled(cache, *each, positions)
        for row, position in enumerate(positions[:, 0]):
            np.testing.assert_allclose(out[:, row, 0], expected[:, row, position], **CLOSE)


def test_a_row_without_tokens_does_not_disturb_the_others(make):
    arrays, cache, parts = draw(2), make(CONFIG, ROWS), []
    for start in range(0, TOKENS, 5):
        each, positions = chunk([start] * ROWS, 5, *arrays)
        cache, out = unrolled(cache, *each, np.where([[True], [False]], positions, -1))
        assert np.isfinite(out).all()
        parts.append(out[:, 0])
    np.testing.assert_allclose(np.concatenate(parts, 1), without_cache(*arrays, TOKENS)[:, 0], **CLOSE)


def test_positions_written_again_replace_the_old_ones(make):
    """A rollback by 3 tokens, the most that the ring allows, at every length."""
    arrays, wrong = draw(3), draw(4)
    expected, cache = without_cache(*arrays, TOKENS), make(CONFIG, ROWS)
    for start in range(TOKENS - 3):
        each, positions = chunk([start] * ROWS, 3, *wrong)
        cache, _ = unrolled(cache, *each, positions)
        assert (cache.shortest_rollback(jnp.full(ROWS, start + 3)) <= start).all()
        each, positions = chunk([start] * ROWS, 1, *arrays)
        cache, out = unrolled(cache, *each, positions)
        np.testing.assert_allclose(out[:, :, 0], expected[:, :, start], **CLOSE)


def test_reordered_and_inserted_rows_continue_as_their_own(make):
    arrays = draw(5, rows=3)
    each, positions = chunk([0] * 3, 13, *arrays)
    cache, _ = unrolled(make(CONFIG, 3), *each, positions)
    twice = cache.reorder(jnp.asarray([2, 0, 2, 1]))
    both = make(CONFIG, 2).insert(1, cache, 2).insert(0, twice, 1)
    # After their common beginning, the rows take the tokens of different rows.
    for each_cache, begin in ((twice, [2, 0, 2, 1]), (both, [0, 2])):
        rows = len(begin)
        later = draw(6, rows)
        mixed = [np.concatenate([x[:, begin, :13], y[:, :, 13:]], 2) for x, y in zip(arrays, later, strict=True)]
        each, positions = chunk([13] * rows, 9, *mixed)
        _, out = unrolled(each_cache, *each, positions)
        np.testing.assert_allclose(out, without_cache(*mixed, 22)[:, :, 13:], **CLOSE)


def test_a_ring_says_how_far_rows_can_be_rolled_back():
    written = jnp.asarray([0, 5, 8, 9, 30])
    np.testing.assert_array_equal(ring(CONFIG, 5).shortest_rollback(written), [0, 0, 0, 6, 27])
    np.testing.assert_array_equal(dense(CONFIG, 5).shortest_rollback(written), [0] * 5)
