"""The decoder.

Axes: B batch, S tokens, E embed, H query heads, K key/value heads, D head_dim, M mlp, V vocab.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from camelid.model.attention import attend
from camelid.model.config import Compute, ModelConfig
from camelid.model.kv_cache import KVCache
from camelid.model.loss import cross_entropy, project
from camelid.model.params import child, declare, module, param
from camelid.model.rope import rotate, rotations
from camelid.model.weights import KEPT, add_bias, einsum
from camelid.parallel.rules import shard


@module
class Norm:
    """Root mean square or layer normalisation over the last axis, in float32."""

    scale: Array = param("embed", init="norm")
    bias: Array | None = param("embed", init="zeros", when=lambda c: c.norm == "layer")

    def __call__(self, x: Float[Array, "*rows F"], config: ModelConfig) -> Float[Array, "*rows F"]:
        y = x.astype(jnp.float32)
        if config.norm == "layer":
            y = y - jnp.mean(y, -1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.norm_eps)
        y = y * (self.scale.astype(jnp.float32) + config.norm_offset)
        return add_bias(y, self.bias).astype(x.dtype)


@module
class HeadNorm(Norm):
    """The same over the features of each head."""

    scale: Array = param("head_dim", init="norm")
    bias: Array | None = param("head_dim", init="zeros", when=lambda c: c.norm == "layer")


@module
class Attention:
    q_proj: Array = param("embed -> heads head_dim")
    k_proj: Array = param("embed -> kv_heads head_dim")
    v_proj: Array = param("embed -> kv_heads head_dim")
    o_proj: Array = param("heads head_dim -> embed", init="residual")
    q_bias: Array | None = param("heads head_dim", init="zeros", when=lambda c: c.qkv_bias)
    k_bias: Array | None = param("kv_heads head_dim", init="zeros", when=lambda c: c.qkv_bias)
    v_bias: Array | None = param("kv_heads head_dim", init="zeros", when=lambda c: c.qkv_bias)
    o_bias: Array | None = param("embed", init="zeros", when=lambda c: c.o_bias)
    q_norm: HeadNorm | None = child(HeadNorm, when=lambda c: c.qk_norm)
    k_norm: HeadNorm | None = child(HeadNorm, when=lambda c: c.qk_norm)

    def __call__(
        self,
        x: Float[Array, "B S E"],
        place: "Place",
        cache: KVCache | None,
        layer: Int[Array, ""],
        config: ModelConfig,
        compute: Compute,
    ) -> tuple[Float[Array, "B S E"], KVCache | None]:
        q = add_bias(einsum("BSE,HDE->BSHD", x, self.q_proj), self.q_bias)
        k = add_bias(einsum("BSE,KDE->BSKD", x, self.k_proj), self.k_bias)
        v = add_bias(einsum("BSE,KDE->BSKD", x, self.v_proj), self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, config), self.k_norm(k, config)
        q = shard(rotate(q, place.rotation), "batch seq heads head_dim", compute.replicate)
        k = shard(rotate(k, place.rotation), "batch seq kv_heads head_dim", compute.replicate)
        v = shard(v, "batch seq kv_heads head_dim", compute.replicate)
        if cache is None:
            own_k, own_v = (y.transpose(0, 2, 1, 3) for y in (k, v))
            out = attend(q, own_k, own_v, None, place.segments, place.local, config, compute)
        else:
            cache = cache.write(layer, k, v, place.positions)
            out = attend(q, cache.k[layer], cache.v[layer], place.positions, None, place.local, config, compute)
        return add_bias(einsum("BSHD,EHD->BSE", out, self.o_proj), self.o_bias), cache


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@module
class MLP:
    """activation(gate) x up, brought back down; without a gate, activation(up)."""

    gate_proj: Array | None = param("embed -> mlp", when=lambda c: c.gated_mlp)
    up_proj: Array = param("embed -> mlp")
    down_proj: Array = param("mlp -> embed", init="residual")
    gate_bias: Array | None = param("mlp", init="zeros", when=lambda c: c.mlp_bias and c.gated_mlp)
    up_bias: Array | None = param("mlp", init="zeros", when=lambda c: c.mlp_bias)
    down_bias: Array | None = param("embed", init="zeros", when=lambda c: c.mlp_bias)

    def __call__(self, x: Float[Array, "B S E"], config: ModelConfig, compute: Compute) -> Float[Array, "B S E"]:
        activation = ACTIVATIONS[config.activation]
        hidden = add_bias(einsum("BSE,ME->BSM", x, self.up_proj), self.up_bias)
        if self.gate_proj is None:
            hidden = activation(hidden)
        else:
            hidden = activation(add_bias(einsum("BSE,ME->BSM", x, self.gate_proj), self.gate_bias)) * hidden
        hidden = shard(hidden, "batch seq mlp", compute.replicate)
        return add_bias(einsum("BSM,EM->BSE", hidden, self.down_proj), self.down_bias)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the tokens stand, as one layer sees it."""

    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None
    rotation: tuple[Float[Array, "B S half"], Float[Array, "B S half"]]
    local: bool | Bool[Array, ""]
    """whether the layer has the sliding window"""


@module
class Layer:
    attn_norm: Norm = child(Norm)
    attn: Attention = child(Attention)
    attn_post_norm: Norm | None = child(Norm, when=lambda c: c.post_norms)
    mlp_norm: Norm | None = child(Norm, when=lambda c: not c.parallel_block)
    mlp: MLP = child(MLP)
    mlp_post_norm: Norm | None = child(Norm, when=lambda c: c.post_norms)

    def __call__(
        self,
        x: Float[Array, "B S E"],
        place: Place,
        cache: KVCache | None,
        layer: Int[Array, ""],
        config: ModelConfig,
        compute: Compute,
    ) -> tuple[Float[Array, "B S E"], KVCache | None]:
        with jax.named_scope("attention"):
            normed = self.attn_norm(x, config)
            attended, cache = self.attn(normed, place, cache, layer, config, compute)
            if self.attn_post_norm is not None:
                attended = self.attn_post_norm(attended, config)
            x = x + attended
        with jax.named_scope("mlp"):
            # A parallel block has one norm for both.
            out = self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x, config), config, compute)
            if self.mlp_post_norm is not None:
                out = self.mlp_post_norm(out, config)
            x = x + out
        return shard(x, "batch seq embed", compute.replicate), cache


@module
class Decoder:
    # Declared in the direction of the head that may share it: one row a token.
    embed: Array = param("embed_in -> vocab_in")
    layers: Layer | tuple[Layer, ...] = child(Layer, stack="layers")
    final_norm: Norm = child(Norm)
    lm_head: Array | None = param("embed -> vocab", when=lambda c: not c.tie_embeddings)
    lm_head_bias: Array | None = param("vocab", init="zeros", when=lambda c: c.head_bias)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        config: ModelConfig,
        compute: Compute,
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B S V"], KVCache | None]:
        """Logits in float32 for the token after each, and the cache with these tokens written."""
        x, cache = self.hidden(tokens, positions, segments, config, compute, cache, lengths)
        return self.logits(x, config, compute), cache

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        config: ModelConfig,
        compute: Compute,
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B S E"], KVCache | None]:
        """What the head reads: the last layer's output, normed.

        `segments` number the documents of a packed row (0 is padding); None means that each row is one document.
        `lengths` say how long each row will become, for rope scalings that ask; None: as long as it is now.
        """
        x = self.embed[tokens].astype(compute.dtype)
        if config.embed_scale != 1.0:
            x = x * jnp.asarray(config.embed_scale, compute.dtype)
        x = shard(x, "batch seq embed", compute.replicate)
        cos, sin = rotations(positions, segments, lengths, config)

        def one_layer(x, cache, index, local, layer):
            kind = 0 if config.local_rope_theta is None else jnp.int32(local)
            place = Place(positions, segments, (cos[kind], sin[kind]), local)
            return layer(x, place, cache, index, config, compute)

        if isinstance(self.layers, tuple):
            for index, (local, layer) in enumerate(zip(config.windowed, self.layers, strict=True)):
                x, cache = one_layer(x, cache, jnp.int32(index), local, layer)
            return self.final_norm(x, config), cache

        alike = len(set(config.windowed)) == 1

        def scanned(carry, item):
            (x, cache), (index, local, layer) = carry, item
            return one_layer(x, cache, index, config.windowed[0] if alike else local, layer), None

        # The cache rides in the carry, where XLA updates it in place; as a scan output it would be copied whole.
        layers = (jnp.arange(config.num_layers), jnp.array(config.windowed), self.layers)
        (x, cache), _ = lax.scan(rematerialized(scanned, compute), (x, cache), layers)
        return self.final_norm(x, config), cache

    def logits(self, x: Float[Array, "B S E"], config: ModelConfig, compute: Compute) -> Float[Array, "B S V"]:
        logits = project(x, self.head, self.lm_head_bias, config.logits_softcap)
        return shard(logits, "batch seq vocab", compute.replicate)

    def loss(
        self,
        x: Float[Array, "B S E"],
        targets: Int[Array, "B S"],
        weights: Float[Array, "B S"],
        config: ModelConfig,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The sum of weight x -log p(target) for what `hidden` gave, and the sum of weights; logits are never whole."""
        cap = config.logits_softcap
        return cross_entropy(x, self.head, targets, weights, bias=self.lm_head_bias, softcap=cap)

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
