"""Keys and values of tokens already seen, so that decoding computes only the newest."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from camelid.model.config import ModelConfig
from camelid.parallel.rules import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """By slot: the token at position p of row b lives in slot p of row b."""

    k: Float[Array, "layers B K T D"]
    v: Float[Array, "layers B K T D"]

    def write(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        positions: Int[Array, "B S"],
    ) -> "KVCache":
        """The cache with these keys and values at their positions; a position beyond the last slot is dropped."""
        rows = jnp.arange(k.shape[0])[:, None]
        return KVCache(self.k.at[layer, rows, :, positions].set(k), self.v.at[layer, rows, :, positions].set(v))


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype, replicate: tuple[str, ...]) -> KVCache:
    """A cache for `batch` rows of at most `slots` tokens."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)

    def zeros() -> Array:
        return shard(jnp.zeros(shape, dtype), "layers batch kv_heads seq head_dim", replicate)

    return KVCache(zeros(), zeros())
