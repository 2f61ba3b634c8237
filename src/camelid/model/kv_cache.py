"""Caches of the keys and values of tokens already processed, so that decoding computes only the newest.

A KVCache has one LayerCache for the layers with a sliding window and one for the others. DenseCache and RingCache are
two implementations of LayerCache; another storage (pages, 8-bit values) is another implementation.

Axes: B batch, S tokens of the chunk that is added, K key/value heads, D head_dim; layers, those of one kind.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from camelid.model.attention import View, ViewByKind
from camelid.model.config import ModelConfig
from camelid.model.mask import INVISIBLE
from camelid.parallel.rules import shard


@runtime_checkable
class LayerCache(Protocol):
    """Keys and values of all layers of one kind, for rows of at most a fixed length. Implementations are pytrees.

    An implementation may share the storage of equal prompts and copy it when it is first written: rows become equal in
    `reorder` (an index that occurs twice) and `insert`, and are written only in `update`, which names the positions.
    """

    def update(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        positions: Int[Array, "B S"],
    ) -> tuple["LayerCache", Callable[[], View]]:
        """Adds a chunk of keys and values to one layer, and returns a function that reads what its queries may see.

        `layer` is an index among the layers of this kind; if it is out of range, nothing is written. `positions` of a
        row are consecutive, starting where the row ends, or earlier to replace its last tokens. Tokens with negative
        positions (padding) are written nowhere, and neither are those beyond the capacity.
        """
        ...

    def reorder(self, rows: Int[Array, " N"]) -> "LayerCache":
        """The cache whose row i is row `rows[i]` of this one."""
        ...

    def insert(self, row: Int[Array, ""], other: Any, other_row: Int[Array, ""]) -> "LayerCache":
        """The cache with one row replaced by a row of another cache of the same capacity."""
        ...

    def shortest_rollback(self, written: Int[Array, " B"]) -> Int[Array, " B"]:
        """The smallest lengths to which rows can be truncated, if position `written` - 1 is the last ever written."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """The token at position p of a row is stored in slot p."""

    k: Float[Array, "layers B K slots D"]
    v: Float[Array, "layers B K slots D"]

    def update(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        positions: Int[Array, "B S"],
    ) -> tuple["DenseCache", Callable[[], View]]:
        slots = jnp.where(positions < 0, self.k.shape[3], positions)
        new = DenseCache(_write(self.k, layer, slots, k), _write(self.v, layer, slots, v))
        return new, lambda: View(new.k[layer], new.v[layer])  # no query sees the slots after its own position

    def reorder(self, rows: Int[Array, " N"]) -> "DenseCache":
        return DenseCache(self.k[:, rows], self.v[:, rows])

    def insert(self, row: Int[Array, ""], other: "DenseCache", other_row: Int[Array, ""]) -> "DenseCache":
        k, v = (x.at[:, row].set(y[:, other_row]) for x, y in ((self.k, other.k), (self.v, other.v)))
        return DenseCache(k, v)

    def shortest_rollback(self, written: Int[Array, " B"]) -> Int[Array, " B"]:
        return jnp.zeros_like(written)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
    """For layers with a window: the token at position p is stored in slot p mod slots, in place of an older one.

    The slots hold at least the window, and as many more tokens as rows are to be rolled back by, less one.
    """

    k: Float[Array, "layers B K slots D"]
    v: Float[Array, "layers B K slots D"]
    window: int = dataclasses.field(metadata={"static": True})

    def update(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        positions: Int[Array, "B S"],
    ) -> tuple["RingCache", Callable[[], View]]:
        count = self.k.shape[3]
        last = positions.max(1, keepdims=True)
        # Of a chunk longer than the ring, only the end is written: no slot is written twice.
        written = (positions >= 0) & (positions > last - count)
        slots = jnp.where(written, positions % count, count)
        new = RingCache(_write(self.k, layer, slots, k), _write(self.v, layer, slots, v), self.window)

        def read() -> View:
            if k.shape[1] + self.window - 1 <= count:  # the window of the chunk's first token is still stored
                stored = new._slot_positions(last)
                return View(new.k[layer], new.v[layer], stored, valid=stored >= 0)
            first = jnp.where(positions < 0, INVISIBLE, positions).min(1, keepdims=True)
            both = jnp.concatenate([self._slot_positions(first - 1), positions], 1)
            keys, values = (
                jnp.concatenate([old[layer], chunk.transpose(0, 2, 1, 3)], 2)
                for old, chunk in ((self.k, k), (self.v, v))
            )
            return View(keys, values, both, valid=both >= 0)

        return new, read

    def _slot_positions(self, last: Int[Array, "B 1"]) -> Int[Array, "B slots"]:
        """The position stored in each slot of rows that end at position `last`; negative for empty slots.

        After a rollback some slots hold later tokens. They are those of the oldest positions, which no
        window of the remaining tokens reaches, if the rollback was allowed.
        """
        count = self.k.shape[3]
        return last - (last - jnp.arange(count)) % count

    def reorder(self, rows: Int[Array, " N"]) -> "RingCache":
        return RingCache(self.k[:, rows], self.v[:, rows], self.window)

    def insert(self, row: Int[Array, ""], other: "RingCache", other_row: Int[Array, ""]) -> "RingCache":
        k, v = (x.at[:, row].set(y[:, other_row]) for x, y in ((self.k, other.k), (self.v, other.v)))
        return RingCache(k, v, self.window)

    def shortest_rollback(self, written: Int[Array, " B"]) -> Int[Array, " B"]:
        count = self.k.shape[3]
        return jnp.where(written <= count, 0, written - 1 - count + self.window)


def _write(
    stored: Float[Array, "layers B K slots D"],
    layer: Int[Array, ""],
    slots: Int[Array, "B S"],
    new: Float[Array, "B S K D"],
) -> Float[Array, "layers B K slots D"]:
    return stored.at[layer, jnp.arange(len(new))[:, None], :, slots].set(new, mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of a model: its layers with a sliding window, and its other layers."""

    windowed: LayerCache | None
    """None if no layer has a window"""
    full: LayerCache | None
    """None if all layers have a window"""
    index_in_kind: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """for each layer of the model, its index among the layers of its kind"""

    def update(
        self,
        windowed: bool | Bool[Array, ""],
        layer: Int[Array, ""],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        positions: Int[Array, "B S"],
    ) -> tuple["KVCache", View | ViewByKind]:
        """Adds a chunk to layer `layer` of the model, of the kind `windowed`; and what the chunk's queries may see.

        `positions` as in LayerCache.update. A traced `windowed` is for a scan over layers of both kinds.
        """
        index = jnp.asarray(self.index_in_kind)[layer]
        if isinstance(windowed, bool):
            kind = self.windowed if windowed else self.full
            assert kind is not None
            new, read = kind.update(index, k, v, positions)
            return dataclasses.replace(self, **{"windowed" if windowed else "full": new}), read()
        assert self.windowed is not None
        assert self.full is not None
        # Both are updated, one of them beyond its last layer: a conditional that returned the caches would copy them.
        nowhere = len(self.index_in_kind)
        in_windowed, read_windowed = self.windowed.update(jnp.where(windowed, index, nowhere), k, v, positions)
        in_full, read_full = self.full.update(jnp.where(windowed, nowhere, index), k, v, positions)
        cache = dataclasses.replace(self, windowed=in_windowed, full=in_full)
        return cache, ViewByKind(windowed, lambda windowed: read_windowed() if windowed else read_full())

    def reorder(self, rows: Int[Array, " N"]) -> "KVCache":
        """The cache whose row i is row `rows[i]` of this one; N may differ from B."""
        return self._each(lambda cache: cache.reorder(rows))

    def insert(self, row: int | Int[Array, ""], other: "KVCache", other_row: int | Int[Array, ""]) -> "KVCache":
        """The cache with row `row` replaced by row `other_row` of another one of the same capacity."""
        windowed, full = (
            None if mine is None else mine.insert(jnp.asarray(row), theirs, jnp.asarray(other_row))
            for mine, theirs in ((self.windowed, other.windowed), (self.full, other.full))
        )
        return dataclasses.replace(self, windowed=windowed, full=full)

    def shortest_rollback(self, written: Int[Array, " B"]) -> Int[Array, " B"]:
        """The smallest lengths to which rows can be truncated, if position `written` - 1 is the last ever written."""
        kinds = [kind for kind in (self.windowed, self.full) if kind is not None]
        return jnp.stack([kind.shortest_rollback(written) for kind in kinds]).max(0)

    def _each(self, function: Callable[[Any], Any]) -> "KVCache":
        windowed, full = (None if kind is None else function(kind) for kind in (self.windowed, self.full))
        return dataclasses.replace(self, windowed=windowed, full=full)


def empty_cache(
    config: ModelConfig,
    batch: int,
    slots: int,
    dtype: jnp.dtype,
    replicate: tuple[str, ...],
    max_rollback: int | None = None,
) -> KVCache:
    """A cache for `batch` rows of at most `slots` tokens.

    With `max_rollback`, layers with a window get rings of only window - 1 + `max_rollback` slots (at least the window),
    if that is less; rows can then be rolled back by up to `max_rollback` tokens. None: by any number.
    """

    def dense(layers: int, slots: int) -> DenseCache:
        shape = (layers, batch, config.num_kv_heads, slots, config.head_dim)
        k, v = (shard(jnp.zeros(shape, dtype), "layers batch kv_heads seq head_dim", replicate) for _ in range(2))
        return DenseCache(k, v)

    def windowed(layers: int, window: int) -> DenseCache | RingCache:
        if max_rollback is None or (ring := window - 1 + max(max_rollback, 1)) >= slots:
            return dense(layers, slots)
        storage = dense(layers, ring)
        return RingCache(storage.k, storage.v, window)

    kinds = config.windowed
    count = sum(kinds)
    return KVCache(
        windowed=windowed(count, config.sliding_window) if count and config.sliding_window is not None else None,
        full=dense(len(kinds) - count, slots) if count < len(kinds) else None,
        index_in_kind=tuple(kinds[:i].count(kind) for i, kind in enumerate(kinds)),
    )
