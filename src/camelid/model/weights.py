"""The one place that knows what a weight is and how a product with it is computed fast."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

KEPT = "kept"  # the name of what Compute.remat = "elementwise" keeps for the backward pass


def einsum(equation: str, x: Array, weight: Array) -> Array:
    """`jnp.einsum` of activations and a stored weight, in the dtype of `x`, accumulated in float32.

    The weight is stored outputs first, and what is summed over comes last in both: "BSE,HDE->BSHD".
    """
    operands, out = equation.split("->")
    x_axes, w_axes = operands.split(",")
    inputs = "".join(axis for axis in w_axes if axis in x_axes)
    batch, outputs = x_axes.removesuffix(inputs), w_axes.removesuffix(inputs)
    assert (x_axes, w_axes, out) == (batch + inputs, outputs + inputs, batch + outputs), equation
    # Two plain axes: XLA's CPU backend copies a weight of three before it multiplies.
    width = math.prod(weight.shape[len(outputs) :])
    flat = product(x.reshape(*x.shape[: len(batch)], width), weight.reshape(-1, width))
    y = flat.reshape(*x.shape[: len(batch)], *weight.shape[: len(outputs)])
    return checkpoint_name(y, KEPT)


def add_bias(y: Float[Array, "*rows"], bias: Float[Array, "*outputs"] | None) -> Float[Array, "*rows"]:
    """`y` with the bias of a product, if it has one; added, and its gradient summed over the tokens, in float32."""
    return y if bias is None else (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)


# The default gradient of a bfloat16 product mixes float32 and bfloat16 operands, for which CPUs have no fast kernel,
# and rounds the weight's gradient to bfloat16; this one casts the cotangent once and keeps the gradient in float32.
@jax.custom_vjp
def product(x: Float[Array, "B S I"], weight: Float[Array, "O I"]) -> Float[Array, "B S O"]:
    """x times the weight's transpose, in the dtype of `x`."""
    return dot("BSI,OI->BSO", x, weight.astype(x.dtype)).astype(x.dtype)


def _forward(x: Array, weight: Array):
    return product(x, weight), (x, weight)


def _backward(saved: tuple[Array, Array], g: Array):
    x, weight = saved
    dx = dot("BSO,OI->BSI", g, weight.astype(x.dtype)).astype(x.dtype)
    return dx, weight_gradient(g, x).astype(weight.dtype)


product.defvjp(_forward, _backward)


def weight_gradient(g: Float[Array, "B S O"], x: Float[Array, "B S I"]) -> Float[Array, "O I"]:
    """The gradient of a weight from those of its outputs, summed over all tokens, in float32."""

    def plain(g: Array, x: Array) -> Array:
        return dot("BSO,BSI->OI", g, x)

    def rows_first(g: Array, x: Array) -> Array:
        # XLA's CPU backend folds the transpose of `g` into the product, which then runs at a third of its speed in
        # bfloat16; written out first, the transpose costs far less than it saves.
        turned = with_layout_constraint(g.reshape(-1, g.shape[-1]).T, Layout(major_to_minor=(0, 1)))
        return dot("ON,NI->OI", turned, x.reshape(-1, x.shape[-1]))

    if jax.sharding.get_abstract_mesh().size > 1:
        return plain(g, x)  # the partitioner cannot see through a layout: it would gather all tokens on every device
    return lax.platform_dependent(g, x, cpu=rows_first, default=plain)


def dot(equation: str, a: Array, b: Array) -> Array:
    """A product of two arrays of one dtype, accumulated and returned in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
