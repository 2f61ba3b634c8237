"""Quantizes the matrices of a model's layers: one parameter at a time, so that memory holds one of them twice."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from camelid.errors import UserError
from camelid.model.nf4 import NF4, quantize_nf4
from camelid.model.params import Spec, shardings
from camelid.model.weights import Quantized

Bits = Literal["int8", "nf4"]


def quantize_parameter(
    path: str, matrix: jax.Array, spec: Spec, bits: Bits, mesh: Mesh, replicate: tuple[str, ...] = ()
) -> jax.Array | Quantized | NF4:
    """The parameter quantized, if it is a matrix of all layers; embeddings, the head, norms and biases as they are.

    A matrix that is replaced is deleted as soon as it has been quantized. Raises UserError if it cannot be held in NF4,
    which stores pairs of elements.
    """
    if not (spec.stacked and spec.is_matrix):
        return matrix
    if bits == "nf4" and spec.shape[-1] % 2:
        raise UserError(f"{path} has an odd number of {spec.axes[-1]}, {spec.shape[-1]}", "Use int8 for it.")
    program = partial(quantize, spec=spec, bits=bits)
    placed = shardings(spec, jax.eval_shape(program, matrix), mesh, replicate)
    quantized = jax.block_until_ready(jax.jit(program, out_shardings=placed)(matrix))
    matrix.delete()
    return quantized


def quantize(matrix: Float[Array, "..."], spec: Spec, bits: Bits) -> Quantized | NF4:
    """A parameter in fewer bits, layer by layer if it is stacked: to NF4, or to int8 with a scale for each output."""
    one_layer = partial({"int8": _quantize_int8, "nf4": quantize_nf4}[bits], num_outputs=len(spec.outputs))
    return lax.map(one_layer, matrix) if spec.stacked else one_layer(matrix)


def _quantize_int8(matrix: Float[Array, "..."], num_outputs: int) -> Quantized:
    rows = matrix.astype(jnp.float32).reshape(*matrix.shape[:num_outputs], -1)
    scale = jnp.maximum(jnp.abs(rows).max(-1, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    return Quantized(jnp.rint(rows / scale).astype(jnp.int8).reshape(matrix.shape), scale)
