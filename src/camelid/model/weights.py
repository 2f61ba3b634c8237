"""The one place that knows what a weight is and how a product with it is computed fast."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

KEPT = "kept"  # the name of what Compute.remat = "elementwise" keeps for the backward pass


def einsum(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`jnp.einsum` of activations and a stored weight, in the dtype of `x`, accumulated in float32."""
    return checkpoint_name(_einsum(equation, x, weight), KEPT)


# The default gradient of a bfloat16 product mixes float32 and bfloat16 operands, for which CPUs have no fast kernel,
# and rounds the weight's gradient to bfloat16; this one casts the cotangent once and keeps the gradient in float32.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return dot(equation, x, weight.astype(x.dtype)).astype(x.dtype)


def _forward(equation: str, x: jax.Array, weight: jax.Array):
    return _einsum(equation, x, weight), (x, weight)


def _backward(equation: str, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, weight = saved
    operands, out = equation.split("->")
    x_axes, w_axes = operands.split(",")
    dx = dot(f"{out},{w_axes}->{x_axes}", g, weight.astype(x.dtype)).astype(x.dtype)
    dw = weight_gradient(f"{out},{x_axes}->{w_axes}", g, x)
    return dx, dw.astype(weight.dtype)


_einsum.defvjp(_forward, _backward)


def dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of two arrays of one dtype, accumulated and returned in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def weight_gradient(equation: str, g: jax.Array, x: jax.Array) -> jax.Array:
    """The product that sums over all tokens: `g` and `x` share their leading axes, which `equation` contracts."""

    def transposed(g: jax.Array, x: jax.Array) -> jax.Array:
        # XLA's CPU backend folds the transpose of `g` into the product, which then runs at a third of its speed in
        # bfloat16; written out in rows first, the transpose costs far less than it saves.
        g_axes, rest = equation.split(",")
        kept = sum(axis in rest.split("->")[1] for axis in g_axes)
        order = (*range(g.ndim - kept, g.ndim), *range(g.ndim - kept))
        rows = with_layout_constraint(g.transpose(order), Layout(major_to_minor=tuple(range(g.ndim))))
        return dot(f"{g_axes[-kept:]}{g_axes[:-kept]},{rest}", rows, x)

    return lax.platform_dependent(g, x, cpu=transposed, default=lambda g, x: dot(equation, g, x))
