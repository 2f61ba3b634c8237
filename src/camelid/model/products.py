"""Products of activations and weights, with the gradients that training needs, in the forms that compilers run fast.

A weight is stored outputs first. Axes: B batch, S tokens, I inputs and O outputs of a matrix (flattened).
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32

KEPT = "kept"  # the name of what ComputeConfig.remat = "elementwise" saves for the backward pass
LAYER_INPUT = "layer input"  # the name of what is saved for the backward pass of a layer in any case


@runtime_checkable
class Dequantizable(Protocol):
    """A weight that is not an array, but has the values of one."""

    def dense(self) -> Float32[Array, "..."]:
        """The matrix in float32."""
        ...


@partial(jax.checkpoint, static_argnums=(2,))
def dequantized_product(x: Float[Array, "B S I"], weight: Dequantizable, dtype: Any) -> Float[Array, "B S O"]:
    """x times the transposed weight, in `dtype`.

    The matrix is dequantized again in the backward pass, which would otherwise keep the dense matrices of all layers.
    """
    return product(x, weight.dense().astype(x.dtype).reshape(-1, x.shape[-1]), dtype)


# The default gradient of a bfloat16 product mixes float32 and bfloat16 operands, for which CPUs have no fast kernel,
# and rounds the weight's gradient to bfloat16; this one casts the cotangent once and keeps the gradient in float32.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "B S I"], weight: Float[Array, "O I"], dtype: Any) -> Float[Array, "B S O"]:
    """x times the transposed weight, in `dtype`; the weight is cast to the dtype of `x`."""
    return dot("BSI,OI->BSO", x, weight.astype(x.dtype)).astype(dtype)


def _forward(x: Array, weight: Array, dtype: Any):
    return product(x, weight, dtype), (x, weight)


def _backward(dtype: Any, saved: tuple[Array, Array], g: Array):
    x, weight = saved
    g = g.astype(x.dtype)
    dx = dot("BSO,OI->BSI", g, weight.astype(x.dtype)).astype(x.dtype)
    return dx, weight_gradient(g, x).astype(weight.dtype)


product.defvjp(_forward, _backward)


def weight_gradient(g: Float[Array, "B S O"], x: Float[Array, "B S I"]) -> Float[Array, "O I"]:
    """The gradient of a weight from that of its outputs `g` and its inputs `x`, summed over all tokens, in float32."""

    def plain(g: Array, x: Array) -> Array:
        return dot("BSO,BSI->OI", g, x)

    def transposed_first(g: Array, x: Array) -> Array:
        # XLA's CPU backend folds the transpose of `g` into the product, which then runs at a third of its speed in
        # bfloat16; computing the transpose beforehand costs far less than it saves.
        transposed = with_layout_constraint(g.reshape(-1, g.shape[-1]).T, Layout(major_to_minor=(0, 1)))
        return dot("ON,NI->OI", transposed, x.reshape(-1, x.shape[-1]))

    if jax.sharding.get_abstract_mesh().size > 1:
        return plain(g, x)  # the partitioner cannot see through a layout: it would gather all tokens on every device
    return lax.platform_dependent(g, x, cpu=transposed_first, default=plain)


def dot(equation: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays of one dtype, accumulated and returned in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


# XLA's CPU backend slices and updates arrays of 16-bit floats in float32. In a scan over layers it would hold a
# float32 copy of all parameters, and convert what all layers have saved, there and back, in every layer. Integers are
# sliced and updated in place.


def kept(x: Array, name: str = KEPT) -> Array:
    """`x`, which rematerialization saves for the backward pass where its policy has this name."""
    bits = as_bits(x)
    return checkpoint_name(x, name) if bits is None else from_bits(checkpoint_name(bits, name), x)


def as_bits(x: Array) -> Array | None:
    """The bits of an array of 16-bit floats as integers, if XLA's CPU backend slices it; None for all others."""
    if x.dtype.itemsize != 2 or not jnp.issubdtype(x.dtype, jnp.floating) or jax.default_backend() != "cpu":
        return None
    return lax.bitcast_convert_type(lax.stop_gradient(x), jnp.uint16)


@jax.custom_jvp
def from_bits(bits: Array, x: Array) -> Array:
    """`x`, computed from its bits: unless it is differentiated, the array itself is not used."""
    return lax.bitcast_convert_type(bits, x.dtype)


@from_bits.defjvp
def _from_bits_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Array]) -> tuple[Array, Array]:
    # Integers have tangents without values, which are NumPy arrays outside of a trace.
    return lax.bitcast_convert_type(primals[0], primals[1].dtype), tangents[1]
