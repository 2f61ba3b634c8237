"""Weights: what a matrix parameter may hold, and the two operations that use it.

`einsum` multiplies activations by a weight, and `lookup` reads rows of an embedding table. Nothing else in the model
uses a matrix, so a new type of weight is a class with the members of `Quantized`, added to `Weight`. That is also how a
backend supplies a kernel of its own: `decoder.decode_params` converts weights to the type that uses it.

A weight is stored outputs first, (outputs..., inputs...), as in most checkpoint files. Weights of repeated layers are
stacked along an additional first axis, which `lax.scan` removes before a product is computed.

Axes: B batch, S tokens, I inputs and O outputs of a matrix (flattened), R rank, N adapters, V vocab, E embed.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from camelid.model.context import Context, dropout
from camelid.model.nf4 import NF4
from camelid.model.products import dequantized_product, dot, kept, product
from camelid.model.pytree import register_pytree


@register_pytree
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix of integer codes, whose values are codes x scale: symmetric quantization, for example to int8 or int4.

    The inputs of each output, flattened, are divided into groups of equal size, and each group has a scale.
    """

    codes: Int[Array, "..."]
    """(outputs..., inputs...)"""
    scale: Float[Array, "..."]
    """(outputs..., groups)"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        """The dtype in which the matrix is saved as an array."""
        return self.scale.dtype

    def dense(self) -> Float32[Array, "..."]:
        """The matrix in float32."""
        grouped = self.codes.reshape(*self.scale.shape, -1).astype(jnp.float32)
        return (grouped * self.scale[..., None].astype(jnp.float32)).reshape(self.codes.shape)

    def product(self, x: Float[Array, "B S I"], dtype: Any, context: Context) -> Float[Array, "B S O"]:
        """x times the transposed matrix, in `dtype`."""
        return kept(_base_product(x, self, dtype))

    def rows(self, tokens: Int[Array, "B S"], context: Context) -> Float32[Array, "B S E"]:
        """The rows of the table for these tokens, in float32."""
        return Quantized(self.codes[tokens], self.scale[tokens]).dense()


@register_pytree
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix with a low-rank update, LoRA (arXiv:2106.09685): base + scale x (b a).

    With a magnitude it is DoRA (arXiv:2402.09353): for each output, the row of that sum is rescaled to the length
    `magnitude`. The length that it has before is not differentiated. A scale of 0 leaves the base as it is: stacked
    layers need not all have an adapter.

    In training, inputs of the factors are dropped with the probability `context.adapter_dropout`. Those of the base are
    not, except for the part that a magnitude adds to its product, as in PEFT.

    `context.adapters`, if given, is negative for rows of the batch that use the base alone. A leaf may also hold N
    adapters of one base, of which it selects one for each row; the caller checks that indices are below N. Then `a`,
    `b`, `scale` and `magnitude` have an axis N in front of the axes given below, after the axis of stacked layers.
    Factors of different ranks are stacked by padding the shorter ones with zeros.
    """

    base: "Base | None"
    """(outputs..., inputs...). None in `Decoder.lm_head` of a model with tied embeddings: the embedding table; and in
    trees that hold only some of the parameters, such as gradients"""
    a: Float[Array, "..."]
    """(rank, inputs...)"""
    b: Float[Array, "..."]
    """(outputs..., rank)"""
    scale: Float[Array, "..."]
    """(): a constant, usually alpha / rank"""
    magnitude: Float[Array, "..."] | None = None
    """(outputs...)"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self._base.shape

    @property
    def dtype(self) -> Any:
        """The dtype in which the matrix is saved as an array: that of the base."""
        return self._base.dtype

    def dense(self) -> Float32[Array, "..."]:
        """The matrix in float32, adapter included. Raises ValueError if there are several adapters."""
        if self.scale.ndim:
            raise ValueError("a weight that holds several adapters has no single dense equivalent")
        dense = self._merged()
        if self.magnitude is not None:
            dense = dense * self._ratio()[:, None]
        return dense.reshape(self.shape)

    def product(self, x: Float[Array, "B S I"], dtype: Any, context: Context) -> Float[Array, "B S O"]:
        """x times the transposed matrix, in `dtype`."""
        a, b, scale = self._factors()
        index, off = self._index(context), None if context.adapters is None else context.adapters < 0
        x, given = _inputs(x, context)
        if index is not None:
            a, b, scale = a[index], b[index], scale[index]
        if off is not None:
            scale = jnp.where(off, 0.0, scale)[:, None, None]
        h = kept(_rowwise_product(given, a, x.dtype)).astype(jnp.float32) * scale
        delta = _rowwise_product(h.astype(x.dtype), b, dtype)
        if self.magnitude is None:
            return kept(_base_product(x, self._base, dtype) + delta)
        # Saved before it is rescaled: the gradient of the magnitude needs this value.
        y = kept(_base_product(given, self._base, dtype) + delta)
        ratio = kept(self._ratio())
        ratio = ratio if index is None else ratio[index]
        if off is not None:
            ratio = jnp.where(off[:, None], 1.0, ratio)[:, None]
        y = (y.astype(jnp.float32) * ratio).astype(dtype)
        return y if given is x else y + _base_product(x - given, self._base, dtype)

    def rows(self, tokens: Int[Array, "B S"], context: Context) -> Float32[Array, "B S E"]:
        """The rows of the table for these tokens, in float32."""
        a, b, scale = self._factors()
        index, off = self._index(context), None if context.adapters is None else context.adapters < 0
        at = (tokens,)
        if index is not None:
            a, scale, at = a[index], scale[index], (index[:, None], tokens)
        if off is not None:
            scale = jnp.where(off, 0.0, scale)[:, None, None]
        delta = _rowwise_product(b[at].astype(jnp.float32), a.swapaxes(-1, -2), jnp.float32)
        rows = lookup(self._base, tokens, context, jnp.float32) + scale * delta
        if self.magnitude is None:
            return rows
        ratio = self.magnitude[at].astype(jnp.float32) / row_lengths(rows)
        if off is not None:
            ratio = jnp.where(off[:, None], 1.0, ratio)
        return rows * ratio[..., None]

    @property
    def _base(self) -> "Base":
        assert self.base is not None, "the base of a tied head is the embedding table: use Decoder.head"
        return self.base

    def _factors(self) -> tuple[Float[Array, "*N R I"], Float[Array, "*N O R"], Float32[Array, "*N"]]:
        """`a`, `b` and `scale` with flattened inputs and outputs."""
        adapters = self.scale.shape
        a = self.a.reshape(*adapters, self.a.shape[len(adapters)], -1)
        b = self.b.reshape(*adapters, -1, self.b.shape[-1])
        return a, b, lax.stop_gradient(self.scale.astype(jnp.float32))

    def _index(self, context: Context) -> Int[Array, " B"] | None:
        """The adapter of each row, if there are several."""
        if not self.scale.ndim:
            return None
        if context.adapters is None:
            raise ValueError("the weights hold several adapters, and context.adapters does not select any")
        return context.adapters

    def _merged(self) -> Float32[Array, "*N O I"]:
        a, b, scale = self._factors()
        delta = dot("...OR,...RI->...OI", b.astype(jnp.float32), a.astype(jnp.float32))
        return dense(self._base).astype(jnp.float32).reshape(b.shape[-2], -1) + scale[..., None, None] * delta

    def _ratio(self) -> Float32[Array, "*N O"]:
        """What DoRA multiplies each output by: its magnitude over the length of its row of the merged matrix."""
        assert self.magnitude is not None
        lengths = row_lengths(self._merged())
        ratio = self.magnitude.reshape(lengths.shape).astype(jnp.float32) / lengths
        return jnp.where(self.scale[..., None] == 0, 1.0, ratio)


Base = Array | Quantized | NF4
Weight = Base | Adapted


def einsum(equation: str, x: Array, weight: Weight, context: Context, dtype: Any = None) -> Array:
    """`jnp.einsum` of activations and a weight, accumulated in float32 and returned in `dtype` (None: that of `x`).

    The axes that are summed over come last in both operands: "BSE,HDE->BSHD". The gradient of a float32 weight is
    computed and accumulated in float32; if the weight is not differentiated, it is not computed at all.
    """
    operands, out = equation.split("->")
    x_axes, w_axes = operands.split(",")
    inputs = "".join(axis for axis in w_axes if axis in x_axes)
    batch, outputs = x_axes.removesuffix(inputs), w_axes.removesuffix(inputs)
    assert (x_axes, w_axes, out) == (batch + inputs, outputs + inputs, batch + outputs), equation
    width = math.prod(weight.shape[len(outputs) :]) * (2 if context.adapter_inputs else 1)
    flat = x.reshape(*x.shape[: len(batch)], width)
    dtype = x.dtype if dtype is None else dtype
    if isinstance(weight, Array):
        y = kept(_base_product(flat, weight, dtype))
    else:
        y = weight.product(flat, dtype, context)
    return y.reshape(*x.shape[: len(batch)], *weight.shape[: len(outputs)])


def beside_dropped(
    x: Float[Array, "B S I"], weight: Weight, context: Context
) -> tuple[Float[Array, "B S I"] | Float[Array, "B S J"], Context]:
    """`x` and the context for `einsum`, whose result of a part of the tokens is then a part of that of all tokens.

    Dropout is drawn for rows as a whole. Here it is drawn at once for the factors of an adapter, and its result
    follows `x` on the last axis, which has twice the size: parts of it have the same elements dropped.
    """
    if not isinstance(weight, Adapted) or context.adapter_dropout == 0.0 or context.dropout_key is None:
        return x, context
    return jnp.concatenate(_inputs(x, context), -1), dataclasses.replace(context, adapter_inputs=True)


def _inputs(x: Float[Array, "B S J"], context: Context) -> tuple[Float[Array, "B S I"], Float[Array, "B S I"]]:
    """The input of a product, and that of an adapter's factors, of which elements are dropped."""
    if context.adapter_inputs:
        x, given = jnp.split(x, 2, -1)
        return x, given
    return x, dropout(x, context.adapter_dropout, f"adapter of {context.module}", context)


def lookup(weight: Weight, tokens: Int[Array, "B S"], context: Context, dtype: Any) -> Float[Array, "B S E"]:
    """The rows of an embedding table for these tokens, in `dtype`; no other row is dequantized or adapted."""
    rows = weight[tokens] if isinstance(weight, Array) else weight.rows(tokens, context)
    return rows.astype(dtype)


def dense(weight: Weight) -> Array:
    """The array that gives the same products: an array as it is, any other weight in float32."""
    return weight if isinstance(weight, Array) else weight.dense()


def add_bias(y: Float[Array, "*rows"], bias: Float[Array, "*outputs"] | None) -> Float[Array, "*rows"]:
    """`y` plus the bias of a product, if there is one; added, and its gradient summed over the tokens, in float32."""
    return y if bias is None else (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)


def _base_product(x: Float[Array, "B S I"], weight: Base, dtype: Any) -> Float[Array, "B S O"]:
    if isinstance(weight, Array):
        # Two axes: XLA's CPU backend copies a weight with three before it multiplies.
        return product(x, weight.reshape(-1, x.shape[-1]), dtype)
    return dequantized_product(x, weight, dtype)


def _rowwise_product(
    x: Float[Array, "B S I"], weight: Float[Array, "O I"] | Float[Array, "B O I"], dtype: Any
) -> Float[Array, "B S O"]:
    """x times the transposed weight, which is the same for all rows of the batch or differs from row to row."""
    if weight.ndim == 2:
        return product(x, weight, dtype)
    return dot("BSI,BOI->BSO", x, weight.astype(x.dtype)).astype(dtype)


def row_lengths(rows: Float[Array, "*rows I"]) -> Float[Array, "*rows"]:
    """The Euclidean norm of each row, not differentiated; 1 for a row of zeros."""
    norm = lax.stop_gradient(jnp.linalg.norm(rows, axis=-1))
    return jnp.where(norm > 0, norm, 1.0)
