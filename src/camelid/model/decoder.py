"""The decoder.

Axes: B batch, S tokens, E embed, H query heads, K key/value heads, D head_dim, M mlp, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from camelid.model.attention import attend
from camelid.model.cache import KVCache
from camelid.model.config import Compute, ModelConfig
from camelid.model.params import child, declare, module, param
from camelid.model.rope import rotate, rotations
from camelid.model.weights import KEPT, dot, einsum
from camelid.parallel.rules import shard


@module
class Norm:
    """Root mean square normalisation (arXiv:1910.07467), in float32."""

    scale: Array = param("embed", init="ones")

    def __call__(self, x: Float[Array, "B S E"], config: ModelConfig) -> Float[Array, "B S E"]:
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.norm_eps)
        return (y * self.scale.astype(jnp.float32)).astype(x.dtype)


@module
class Attention:
    q_proj: Array = param("embed -> heads head_dim")
    k_proj: Array = param("embed -> kv_heads head_dim")
    v_proj: Array = param("embed -> kv_heads head_dim")
    o_proj: Array = param("heads head_dim -> embed", init="residual")

    def __call__(
        self,
        x: Float[Array, "B S E"],
        rotation: tuple[Float[Array, "B S half"], ...],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        cache: KVCache | None,
        layer: Int[Array, ""],
        compute: Compute,
    ) -> tuple[Float[Array, "B S E"], KVCache | None]:
        q = einsum("BSE,HDE->BSHD", x, self.q_proj)
        k = einsum("BSE,KDE->BSKD", x, self.k_proj)
        v = einsum("BSE,KDE->BSKD", x, self.v_proj)
        q = shard(rotate(q, rotation), "batch seq heads head_dim", compute.replicate)
        k = shard(rotate(k, rotation), "batch seq kv_heads head_dim", compute.replicate)
        v = shard(v, "batch seq kv_heads head_dim", compute.replicate)
        if cache is None:
            own_k, own_v = (y.transpose(0, 2, 1, 3) for y in (k, v))
            out = attend(q, own_k, own_v, None, segments, compute)
        else:
            cache = cache.write(layer, k, v, positions)
            out = attend(q, cache.k[layer], cache.v[layer], positions, None, compute)
        return einsum("BSHD,EHD->BSE", out, self.o_proj), cache


@module
class MLP:
    """SwiGLU (arXiv:2002.05202)."""

    gate_proj: Array = param("embed -> mlp")
    up_proj: Array = param("embed -> mlp")
    down_proj: Array = param("mlp -> embed", init="residual")

    def __call__(self, x: Float[Array, "B S E"], compute: Compute) -> Float[Array, "B S E"]:
        hidden = jax.nn.silu(einsum("BSE,ME->BSM", x, self.gate_proj)) * einsum("BSE,ME->BSM", x, self.up_proj)
        return einsum("BSM,EM->BSE", shard(hidden, "batch seq mlp", compute.replicate), self.down_proj)


@module
class Layer:
    attn_norm: Norm = child(Norm)
    attn: Attention = child(Attention)
    mlp_norm: Norm = child(Norm)
    mlp: MLP = child(MLP)

    def __call__(
        self,
        x: Float[Array, "B S E"],
        rotation: tuple[Float[Array, "B S half"], ...],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        cache: KVCache | None,
        layer: Int[Array, ""],
        config: ModelConfig,
        compute: Compute,
    ) -> tuple[Float[Array, "B S E"], KVCache | None]:
        with jax.named_scope("attention"):
            normed = self.attn_norm(x, config)
            attended, cache = self.attn(normed, rotation, positions, segments, cache, layer, compute)
            x = x + attended
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.mlp_norm(x, config), compute)
        return shard(x, "batch seq embed", compute.replicate), cache


@module
class Decoder:
    # Declared in the direction of the head that may share it: one row a token.
    embed: Array = param("embed_in -> vocab_in")
    layers: Layer | tuple[Layer, ...] = child(Layer, stack="layers")
    final_norm: Norm = child(Norm)
    lm_head: Array | None = param("embed -> vocab", when=lambda c: not c.tie_embeddings)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        config: ModelConfig,
        compute: Compute,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B S V"], KVCache | None]:
        """Logits in float32 for the token after each, and the cache with these tokens written."""
        x, cache = self.hidden(tokens, positions, segments, config, compute, cache)
        return self.logits(x, compute), cache

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        config: ModelConfig,
        compute: Compute,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B S E"], KVCache | None]:
        """What the head reads: the last layer's output, normed.

        `segments` number the documents of a packed row (0 is padding); None means that each row is one document.
        """
        x = self.embed[tokens].astype(compute.dtype)
        x = shard(x, "batch seq embed", compute.replicate)
        rotation = rotations(positions, config)

        if isinstance(self.layers, tuple):
            for index, layer in enumerate(self.layers):
                x, cache = layer(x, rotation, positions, segments, cache, jnp.int32(index), config, compute)
            return self.final_norm(x, config), cache

        def one_layer(carry, indexed):
            (x, cache), (index, layer) = carry, indexed
            return layer(x, rotation, positions, segments, cache, index, config, compute), None

        # The cache rides in the carry, where XLA updates it in place; as a scan output it would be copied whole.
        layers = (jnp.arange(config.num_layers), self.layers)
        (x, cache), _ = lax.scan(rematerialized(one_layer, compute), (x, cache), layers)
        return self.final_norm(x, config), cache

    def logits(self, x: Float[Array, "B S E"], compute: Compute) -> Float[Array, "B S V"]:
        logits = dot("BSE,VE->BSV", x, self.head.astype(x.dtype))
        return shard(logits, "batch seq vocab", compute.replicate)

    @property
    def head(self) -> Float[Array, "V E"]:
        return self.embed if self.lm_head is None else self.lm_head


def unstacked(params: Decoder) -> Decoder:
    """The same parameters, layer by layer, for decoding; on one CPU in the same memory, elsewhere as they are.

    XLA's CPU backend copies each layer's weights out of the stack before it uses them, at twice the cost of the
    products of a single token.
    """
    devices = params.embed.devices()
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
        return params

    def views(stack: Array) -> list[Array]:
        return [jax.device_put(layer, next(iter(devices))) for layer in np.asarray(stack)]

    stacks, tree = jax.tree.flatten(params.layers)
    layers = [jax.tree.unflatten(tree, parts) for parts in zip(*map(views, stacks), strict=True)]
    return dataclasses.replace(params, layers=tuple(layers))


def rematerialized(one_layer, compute: Compute):
    """`one_layer`, saving for the backward pass what Compute.remat says."""
    if compute.remat == "none":
        return one_layer
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if compute.remat == "layer" else policies.save_only_these_names(KEPT)
    return jax.checkpoint(one_layer, policy=policy, prevent_cse=False)


def declare_decoder(config: ModelConfig) -> Decoder:
    """The decoder's parameters as Specs."""
    return declare(Decoder, config)
