"""The decoder.

Axes: B batch, S tokens, E embed, H query heads, K key/value heads, D head_dim, M mlp, V vocab.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from camelid.model.attention import View, attend
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context, dropout
from camelid.model.kv_cache import KVCache
from camelid.model.loss import LossSums, TokenLogProbs, project, summed_loss, token_log_probs
from camelid.model.mask import forgetful_mask
from camelid.model.params import child, declare, module, param
from camelid.model.products import KEPT, LAYER_INPUT, as_bits, from_bits, kept
from camelid.model.rope import rotate, rotations
from camelid.model.weights import Adapted, Weight, add_bias, einsum, lookup
from camelid.parallel.rules import shard


@module
class Norm:
    """RMS or layer normalization over the last axis, in float32."""

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
    """Normalization over the features of each head."""

    scale: Array = param("head_dim", init="norm")
    bias: Array | None = param("head_dim", init="zeros", when=lambda c: c.norm == "layer")


@module
class Attention:
    q_proj: Weight = param("embed -> heads head_dim")
    k_proj: Weight = param("embed -> kv_heads head_dim")
    v_proj: Weight = param("embed -> kv_heads head_dim")
    o_proj: Weight = param("heads head_dim -> embed", init="residual")
    q_bias: Array | None = param("heads head_dim", init="zeros", when=lambda c: c.qkv_bias)
    k_bias: Array | None = param("kv_heads head_dim", init="zeros", when=lambda c: c.qkv_bias)
    v_bias: Array | None = param("kv_heads head_dim", init="zeros", when=lambda c: c.qkv_bias)
    o_bias: Array | None = param("embed", init="zeros", when=lambda c: c.o_bias)
    q_norm: HeadNorm | None = child(HeadNorm, when=lambda c: c.qk_norm)
    k_norm: HeadNorm | None = child(HeadNorm, when=lambda c: c.qk_norm)

    def __call__(
        self,
        x: Float[Array, "B S E"],
        inputs: "LayerInputs",
        cache: KVCache | None,
        config: ModelConfig,
        compute: ComputeConfig,
        context: Context,
    ) -> tuple[Float[Array, "B S E"], KVCache | None]:
        q = add_bias(einsum("BSE,HDE->BSHD", x, self.q_proj, context.at("q_proj")), self.q_bias)
        k = add_bias(einsum("BSE,KDE->BSKD", x, self.k_proj, context.at("k_proj")), self.k_bias)
        v = add_bias(einsum("BSE,KDE->BSKD", x, self.v_proj, context.at("v_proj")), self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, config), self.k_norm(k, config)
        q = shard(rotate(q, inputs.rotation), "batch seq heads head_dim", compute.replicate)
        k = shard(rotate(k, inputs.rotation), "batch seq kv_heads head_dim", compute.replicate)
        v = shard(v, "batch seq kv_heads head_dim", compute.replicate)
        k_heads, v_heads = (y.transpose(0, 2, 1, 3) for y in (k, v))
        view, query_positions = View(k_heads, v_heads, segments=inputs.segments, valid=inputs.valid), None
        if cache is not None:
            cache, stored = cache.update(inputs.windowed, inputs.index, k, v, inputs.positions)
            # The first chunk of a prompt sees no keys but its own, for which devices have fused kernels.
            if context.phase != "prefill":
                view, query_positions = stored, inputs.positions
        out = attend(q, view, query_positions, inputs.windowed, config, compute, context)
        return add_bias(einsum("BSHD,EHD->BSE", out, self.o_proj, context.at("o_proj")), self.o_bias), cache


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@module
class MLP:
    """down(activation(gate(x)) x up(x)); without a gate, down(activation(up(x)))."""

    gate_proj: Weight | None = param("embed -> mlp", when=lambda c: c.gated_mlp)
    up_proj: Weight = param("embed -> mlp")
    down_proj: Weight = param("mlp -> embed", init="residual")
    gate_bias: Array | None = param("mlp", init="zeros", when=lambda c: c.mlp_bias and c.gated_mlp)
    up_bias: Array | None = param("mlp", init="zeros", when=lambda c: c.mlp_bias)
    down_bias: Array | None = param("embed", init="zeros", when=lambda c: c.mlp_bias)

    def __call__(
        self, x: Float[Array, "B S E"], config: ModelConfig, compute: ComputeConfig, context: Context
    ) -> Float[Array, "B S E"]:
        activation = ACTIVATIONS[config.activation]
        hidden = add_bias(einsum("BSE,ME->BSM", x, self.up_proj, context.at("up_proj")), self.up_bias)
        if self.gate_proj is None:
            hidden = activation(hidden)
        else:
            gate = add_bias(einsum("BSE,ME->BSM", x, self.gate_proj, context.at("gate_proj")), self.gate_bias)
            hidden = activation(gate) * hidden
        hidden = dropout(hidden, context.mlp_dropout, "mlp hidden", context)
        hidden = shard(hidden, "batch seq mlp", compute.replicate)
        return add_bias(einsum("BSM,EM->BSE", hidden, self.down_proj, context.at("down_proj")), self.down_bias)


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What a layer needs besides the hidden state, the cache and the context."""

    index: Int[Array, ""]
    """the number of the layer within the model"""
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None
    rotation: tuple[Float[Array, "B S half"], Float[Array, "B S half"]]
    """cosine and sine of the rotary angles"""
    windowed: bool | Bool[Array, ""]
    """whether the layer uses the sliding window"""
    valid: Bool[Array, "B S"] | None = None
    """whether attention may see each token as a key; None: all, as far as they are visible"""


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
        inputs: LayerInputs,
        cache: KVCache | None,
        config: ModelConfig,
        compute: ComputeConfig,
        context: Context,
    ) -> tuple[Float[Array, "B S E"], KVCache | None]:
        with jax.named_scope("attention"):
            normed = self.attn_norm(x, config)
            attended, cache = self.attn(normed, inputs, cache, config, compute, context)
            if self.attn_post_norm is not None:
                attended = self.attn_post_norm(attended, config)
            x = x + dropout(attended, context.residual_dropout, "attention output", context)
        with jax.named_scope("mlp"):
            # A parallel block has one norm for both.
            out = self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x, config), config, compute, context)
            if self.mlp_post_norm is not None:
                out = self.mlp_post_norm(out, config)
            x = x + dropout(out, context.residual_dropout, "mlp output", context)
        return shard(x, "batch seq embed", compute.replicate), cache


@module
class Decoder:
    # Declared in the direction of the head, which may share it: one row per token.
    embed: Weight = param("embed_in -> vocab_in")
    layers: Layer | tuple[Layer, ...] = child(Layer, stack="layers")
    final_norm: Norm = child(Norm)
    lm_head: Weight | None = param("embed -> vocab", when=lambda c: not c.tie_embeddings)
    lm_head_bias: Array | None = param("vocab", init="zeros", when=lambda c: c.head_bias)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        config: ModelConfig,
        compute: ComputeConfig,
        *,
        context: Context = Context(),
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B S V"], KVCache | None]:
        """Float32 logits of the token after each, and the cache with the keys and values of `tokens` added."""
        x, cache = self.hidden(
            tokens, positions, segments, config, compute, context=context, cache=cache, lengths=lengths
        )
        return self.logits(x, config, compute, context=context), cache

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        config: ModelConfig,
        compute: ComputeConfig,
        *,
        context: Context = Context(),
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B S E"], KVCache | None]:
        """The normalized output of the last layer, which the head reads, in `compute.dtype`; and the updated cache.

        Args:
          tokens: Ids of the tokens.
          positions: Position of each token within its document, from 0.
          segments: Number of each token's document within a packed row, 0 for padding. None: each row is one document.
          config: The model.
          compute: Its precision, kernels and rematerialization.
          context: Dropout and the choice of adapters.
          cache: Keys and values of the tokens before these. None: there are none.
          lengths: Number of tokens that each row will have in the end, for rope scalings that depend on it. None: those
            that it has now.
        """
        x = self.embed_tokens(tokens, config, compute, context)
        x, cache = run_layers(
            self.layers,
            x,
            positions,
            segments,
            lengths,
            config=config,
            compute=compute,
            context=context,
            cache=cache,
        )
        return self.final_norm(x, config), cache

    def embed_tokens(
        self, tokens: Int[Array, "B S"], config: ModelConfig, compute: ComputeConfig, context: Context
    ) -> Float[Array, "B S E"]:
        """The embeddings of the tokens: the input of the first layer."""
        x = lookup(self.embed, tokens, context, compute.dtype)
        if config.embed_scale != 1.0:
            x = x * jnp.asarray(config.embed_scale, compute.dtype)
        return shard(dropout(x, context.embedding_dropout, "embedding", context), "batch seq embed", compute.replicate)

    def logits(
        self, x: Float[Array, "B S E"], config: ModelConfig, compute: ComputeConfig, *, context: Context = Context()
    ) -> Float[Array, "B S V"]:
        """Float32 logits from the output of `hidden`."""
        logits = project(x, self.head, self.lm_head_bias, config.logits_softcap, context)
        return shard(logits, "batch seq vocab", compute.replicate)

    def loss(
        self,
        x: Float[Array, "B S E"],
        targets: Int[Array, "B S"],
        weights: Float[Array, "B S"],
        config: ModelConfig,
        *,
        context: Context = Context(),
        z: float = 0.0,
        label_smoothing: float = 0.0,
        accuracy: bool = False,
    ) -> LossSums:
        """The sums over tokens of weight x loss and of its parts, from the output of `hidden`; see `loss.summed_loss`.

        The logits of the complete batch are never stored.
        """
        return summed_loss(
            x,
            self.head,
            targets,
            weights,
            bias=self.lm_head_bias,
            softcap=config.logits_softcap,
            context=context,
            z=z,
            label_smoothing=label_smoothing,
            accuracy=accuracy,
        )

    def token_log_probs(
        self,
        x: Float[Array, "B S E"],
        targets: Int[Array, "B S"],
        config: ModelConfig,
        *,
        context: Context = Context(),
        top_k: int = 0,
    ) -> TokenLogProbs:
        """The log-probability of each target and other statistics of the logits, from the output of `hidden`.

        The logits of the complete batch are never stored. `top_k` > 0 adds the most probable tokens.
        """
        cap, bias = config.logits_softcap, self.lm_head_bias
        return token_log_probs(x, self.head, targets, bias=bias, softcap=cap, context=context, top_k=top_k)

    @property
    def head(self) -> Weight:
        """The weight of the output head, (V, E).

        With tied embeddings it is the embedding table. An adapter belongs to one use of the table, as in PEFT: that of
        `embed` is for lookups alone, and one of the head is an `lm_head` whose base is None.
        """
        table = self.embed.base if isinstance(self.embed, Adapted) else self.embed
        head = table if self.lm_head is None else self.lm_head
        if isinstance(head, Adapted) and head.base is None:
            head = dataclasses.replace(head, base=table)
        assert head is not None
        return head


def run_layers(
    layers: Layer | Iterable[Layer],
    x: Float[Array, "B S E"],
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None,
    lengths: Int[Array, " B"] | None,
    *,
    config: ModelConfig,
    compute: ComputeConfig,
    context: Context,
    cache: KVCache | None = None,
    first: int = 0,
) -> tuple[Float[Array, "B S E"], KVCache | None]:
    """The hidden state after some layers of a model, and the updated cache.

    Args:
      layers: A stacked Layer, which runs as one `lax.scan`, or an iterable of Layers, which are unrolled. An iterable
        may read each layer when it is needed; no more than one is held at a time.
      x: The hidden state before the first of these layers.
      positions, segments, lengths: See `Decoder.hidden`.
      config: The model of which these are layers.
      compute: Its precision, kernels and rematerialization.
      context: The context of the forward pass; each layer gets its own from it.
      cache: The cache of all layers of the model.
      first: The number of the first of these layers within the model, an int.

    Raises:
      ValueError: If there are segments and a cache, whose rows are one document each.
    """
    if segments is not None and cache is not None:
        raise ValueError("tokens that are added to a cache have no segments: each of its rows is one document")
    cos, sin = rotations(positions, segments, lengths, config)
    valid = forgetful_mask(context, segments, *positions.shape)

    def one_layer(x, cache, index, windowed, layer):
        kind = 0 if config.local_rope_theta is None else jnp.int32(windowed)
        inputs = LayerInputs(index, positions, segments, (cos[kind], sin[kind]), windowed, valid)
        x = kept(x, LAYER_INPUT)
        return layer(x, inputs, cache, config, compute, context.layer(index))

    if not isinstance(layers, Layer):
        index = first
        # A `for` with enumerate or zip would hold each layer while the next one is read.
        for layer in layers:
            unrolled = partial(one_layer, index=jnp.int32(index), windowed=config.windowed[index])
            x, cache = rematerialized(unrolled, compute, prevent_cse=True)(x, cache, layer=layer)
            del layer, unrolled  # before the next one is read
            index += 1
        return x, cache

    count = jax.tree.leaves(layers)[0].shape[0]
    kinds = config.windowed[first : first + count]
    alike = len(set(kinds)) == 1

    stacks, tree = jax.tree.flatten(layers)

    def scanned(carry, item):
        (x, cache), (index, windowed, arrays, bits) = carry, item
        arrays = [array if b is None else from_bits(b, array) for array, b in zip(arrays, bits, strict=True)]
        return one_layer(x, cache, index, kinds[0] if alike else windowed, jax.tree.unflatten(tree, arrays)), None

    # The cache is part of the carry, which XLA updates in place; as an output of the scan it would be copied.
    items = (jnp.arange(first, first + count), jnp.array(kinds), stacks, list(map(as_bits, stacks)))
    (x, cache), _ = lax.scan(rematerialized(scanned, compute, prevent_cse=False), (x, cache), items)
    return x, cache


def rematerialized(one_layer: Callable, compute: ComputeConfig, prevent_cse: bool) -> Callable:
    """`one_layer`, which saves for the backward pass what `compute.remat` specifies.

    `prevent_cse` keeps the compiler from merging what is computed again with the forward pass; a scan does not need it.
    """
    if compute.remat == "none":
        return one_layer
    names = (LAYER_INPUT,) if compute.remat == "layer" else (LAYER_INPUT, KEPT)
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(one_layer, policy=policy, prevent_cse=prevent_cse)


def decode_params(params: Decoder) -> Decoder:
    """The parameters as decoding uses them: on a single CPU with unstacked layers that share their memory.

    XLA's CPU backend copies the weights of each layer out of the stack before it uses them, which takes twice the time
    of the products of a single token. On other devices the parameters are returned as they are. A backend that needs
    weights in a layout of its own would repack them here.
    """
    devices = jax.tree.leaves(params)[0].devices()
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
        return params

    def views(stack: Array) -> list[Array]:
        return [jax.device_put(layer, next(iter(devices))) for layer in np.asarray(stack)]

    stacks, tree = jax.tree.flatten(params.layers)
    layers = [jax.tree.unflatten(tree, arrays) for arrays in zip(*map(views, stacks), strict=True)]
    return dataclasses.replace(params, layers=tuple(layers))


def declare_decoder(config: ModelConfig) -> Decoder:
    """The decoder's parameters as Specs."""
    return declare(Decoder, config)


def untied(params: Decoder, config: ModelConfig) -> tuple[Decoder, ModelConfig]:
    """The same model with a head of its own, if an adapter makes the head of a tied model differ from the table."""
    if not config.tie_embeddings or (params.lm_head is None and not isinstance(params.embed, Adapted)):
        return params, config
    return dataclasses.replace(params, lm_head=params.head), dataclasses.replace(config, tie_embeddings=False)


def specs_of(params: Decoder, config: ModelConfig) -> Decoder:
    """The specs of every entry of `params`: those of the model, and of the `lm_head` that adapts a tied head."""
    return declare_decoder(config if params.lm_head is None else dataclasses.replace(config, tie_embeddings=False))
