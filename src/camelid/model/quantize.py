"""Quantizes the matrices of a model's layers: each parameter in turn, so that memory holds one of them twice."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import Decoder, specs_of
from camelid.model.nf4 import NF4, quantize_nf4
from camelid.model.params import Spec, build, named, shardings
from camelid.model.weights import Quantized

Bits = Literal["int8", "nf4"]


def quantize_layers(
    params: Decoder, config: ModelConfig, bits: Bits, mesh: Mesh, replicate: tuple[str, ...] = ()
) -> Decoder:
    """`params` with the matrices of all layers quantized. Embeddings, the head, norms and biases stay as they are.

    The arrays of the matrices that are replaced are deleted as soon as they have been quantized. Raises UserError if
    a matrix cannot be held in NF4, which stores pairs of elements.
    """
    leaves = dict(named(params))
    for path, spec in named(specs_of(params, config)).items():
        if spec.stacked and spec.is_matrix:
            if bits == "nf4" and spec.shape[-1] % 2:
                raise UserError(f"{path} has an odd number of {spec.axes[-1]}, {spec.shape[-1]}", "Use int8 for it.")
            quantized = jax.eval_shape(partial(quantize, spec=spec, bits=bits), leaves[path])
            placed = shardings(spec, quantized, mesh, replicate)
            whole, leaves[path] = leaves[path], None
            leaves[path] = jax.jit(partial(quantize, spec=spec, bits=bits), out_shardings=placed)(whole)
            jax.block_until_ready(leaves[path])
            whole.delete()
    return build(specs_of(params, config), leaves.values())


def quantize(matrix: Float[Array, "..."], spec: Spec, bits: Bits) -> Quantized | NF4:
    """A parameter in fewer bits, layer by layer if it is stacked: to NF4, or to int8 with a scale for each output."""
    one_layer = partial({"int8": _quantize_int8, "nf4": quantize_nf4}[bits], num_outputs=len(spec.outputs))
    return lax.map(one_layer, matrix) if spec.stacked else one_layer(matrix)


def _quantize_int8(matrix: Float[Array, "..."], num_outputs: int) -> Quantized:
    rows = matrix.astype(jnp.float32).reshape(*matrix.shape[:num_outputs], -1)
    scale = jnp.maximum(jnp.abs(rows).max(-1, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    return Quantized(jnp.rint(rows / scale).astype(jnp.int8).reshape(matrix.shape), scale)
