"""Frozen parameters in fewer bits: quantized one at a time, so that memory holds one of them twice."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.nf4 import NF4, quantize_nf4
from camelid.model.params import Spec, build, named, shardings
from camelid.model.weights import Quantized

Bits = Literal["int8", "nf4"]


def dtype_of(form: str) -> str:
    """The dtype of the frozen matrices of a model whose form is int8, nf4 or a dtype; 8 and 4 bits are made of it."""
    return "bfloat16" if form in ("int8", "nf4") else form


def held_dtype(spec: Spec, form: str) -> Any:
    """The dtype in which a frozen parameter is held, or from which it is quantized."""
    return jnp.dtype(dtype_of(form) if spec.is_matrix else "float32")


def held_shapes(config: ModelConfig, form: str) -> Decoder:
    """Shapes and dtypes of the frozen parameters of a model with its matrices in `form`; nothing is allocated.

    Raises UserError for a matrix that cannot be held in this form.
    """
    specs = declare_decoder(config)

    def held(path: str, spec: Spec) -> Any:
        dtype = held_dtype(spec, form)
        if form == "int8" or form == "nf4":
            return quantized_shape(path, spec, dtype, form)
        return jax.ShapeDtypeStruct(spec.shape, dtype)

    return build(specs, [held(path, spec) for path, spec in named(specs).items()])


def quantize_parameter(
    path: str, matrix: jax.Array, spec: Spec, bits: Bits, mesh: Mesh, replicate: tuple[str, ...] = ()
) -> jax.Array | Quantized | NF4:
    """The parameter quantized, if it is a matrix of all layers; embeddings, the head, norms and biases as they are.

    A matrix that is replaced is deleted as soon as it has been quantized. Raises UserError if it cannot be held in NF4,
    which stores pairs of elements.
    """
    held = quantized_shape(path, spec, matrix.dtype, bits)
    if isinstance(held, jax.ShapeDtypeStruct):
        return matrix
    program = partial(quantize, spec=spec, bits=bits)
    placed = shardings(spec, held, mesh, replicate)
    quantized = jax.block_until_ready(jax.jit(program, out_shardings=placed)(matrix))
    matrix.delete()
    return quantized


def quantized_shape(path: str, spec: Spec, dtype: Any, bits: Bits) -> Any:
    """Shapes and dtypes of what `quantize_parameter` returns for a parameter in `dtype`; raises the same errors."""
    matrix = jax.ShapeDtypeStruct(spec.shape, dtype)
    if not (spec.stacked and spec.is_matrix):
        return matrix
    if bits == "nf4" and spec.shape[-1] % 2:
        raise UserError(f"{path} has an odd number of {spec.axes[-1]}, {spec.shape[-1]}", "Use int8 for it.")
    return jax.eval_shape(partial(quantize, spec=spec, bits=bits), matrix)


def quantize(matrix: Float[Array, "..."], spec: Spec, bits: Bits) -> Quantized | NF4:
    """A parameter in fewer bits, layer by layer if it is stacked: to NF4, or to int8 with a scale for each output."""
    one_layer = partial({"int8": _quantize_int8, "nf4": quantize_nf4}[bits], num_outputs=len(spec.outputs))
    return lax.map(one_layer, matrix) if spec.stacked else one_layer(matrix)


def _quantize_int8(matrix: Float[Array, "..."], num_outputs: int) -> Quantized:
    rows = matrix.astype(jnp.float32).reshape(*matrix.shape[:num_outputs], -1)
    scale = jnp.maximum(jnp.abs(rows).max(-1, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    return Quantized(jnp.rint(rows / scale).astype(jnp.int8).reshape(matrix.shape), scale)
