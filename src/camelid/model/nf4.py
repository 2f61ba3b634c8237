"""NF4, the 4-bit weights of QLoRA (arXiv:2305.14314), with double quantization.

A matrix is divided into blocks of 64 elements. Each block is divided by its largest magnitude, and each element becomes
the index of the nearest of 16 values, the quantiles of a normal distribution (appendix E). The largest magnitudes, from
which their mean is subtracted, are quantized in turn, to 8 bits in blocks of 256 (section 3).

Codes and magnitudes equal those of bitsandbytes if the number of inputs is a multiple of 64, as in all released models.
Otherwise the last block of every output is shorter, where bitsandbytes' blocks extend over two outputs: blocks within
an output are what lets a matrix be sharded.

Axes: outputs and inputs of a matrix, G blocks per output, N blocks of magnitudes.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from camelid.model.context import Context
from camelid.model.products import dequantized_product, kept
from camelid.model.pytree import register_pytree

BLOCK = 64
"""elements that share a largest magnitude"""
NESTED_BLOCK = 256
"""magnitudes that share a scale"""
VALUES = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""what the 16 codes stand for"""


def _dynamic_values() -> np.ndarray:
    """The 256 values of the signed dynamic data type (arXiv:1511.04561): an exponent of variable length, a fraction.

    The borders between fractions are rounded as `torch.linspace` rounds them, so that the values are bitsandbytes' own.
    """
    values = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        count = 2**exponent
        step = np.float64((np.float32(1.0) - np.float32(0.1)) / np.float32(count))
        index = np.arange(count + 1)
        from_start, from_end = np.float64(np.float32(0.1)) + step * index, 1.0 - step * (count - index)
        borders = np.where(index < (count + 1) // 2, from_start, from_end).astype(np.float32)
        means = np.float32(10.0 ** (exponent - 6)) * ((borders[:-1] + borders[1:]) / 2)
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


DYNAMIC_VALUES = _dynamic_values()


@register_pytree
@dataclasses.dataclass(frozen=True)
class NF4:
    """A matrix in NF4 with double quantization; about 4.13 bits per element."""

    codes: UInt8[Array, "..."]
    """(outputs..., inputs...), with two elements in each byte: of the last axis of the inputs, the first element is in
    the upper four bits"""
    absmax: UInt8[Array, "..."]
    """(outputs..., G): the codes of the largest magnitudes"""
    absmax_scale: Float32[Array, " N"]
    absmax_offset: Float32[Array, ""]
    """the mean of the largest magnitudes"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    @property
    def dtype(self) -> Any:
        """The dtype in which the matrix is saved as an array."""
        return jnp.dtype("bfloat16")

    def dense(self) -> Float32[Array, "..."]:
        """The matrix in float32."""
        return _dequantized(self.codes, self._magnitudes(self.absmax, jnp.arange(self.absmax.size)))

    def product(self, x: Float[Array, "B S I"], dtype: Any, context: Context) -> Float[Array, "B S O"]:
        """x times the transposed matrix, in `dtype`."""
        return kept(dequantized_product(x, self, dtype))

    def rows(self, tokens: Int[Array, "B S"], context: Context) -> Float32[Array, "B S E"]:
        """The rows of the table for these tokens, in float32."""
        blocks = self.absmax.shape[-1]
        places = tokens[..., None] * blocks + jnp.arange(blocks)
        return _dequantized(self.codes[tokens], self._magnitudes(self.absmax[tokens], places))

    def _magnitudes(self, absmax: UInt8[Array, "*rows G"], places: Int[Array, "..."]) -> Float32[Array, "*rows G"]:
        """The largest magnitudes of blocks, given their codes and their places in the flattened `self.absmax`."""
        scale = self.absmax_scale[places // NESTED_BLOCK].reshape(absmax.shape)
        return jnp.asarray(DYNAMIC_VALUES)[absmax] * scale + self.absmax_offset


def quantize_nf4(matrix: Float[Array, "..."], num_outputs: int) -> NF4:
    """The matrix in NF4, computed in float32; `num_outputs` is the number of its axes that are outputs.

    The last axis has to have an even length.
    """
    outputs = matrix.shape[:num_outputs]
    rows = matrix.astype(jnp.float32).reshape(*outputs, -1)
    width = rows.shape[-1]
    blocks = _blocks(rows, BLOCK)
    absmax = jnp.abs(blocks).max(-1)
    codes = _nearest(blocks, absmax, VALUES).reshape(*outputs, -1)[..., :width].reshape(matrix.shape)
    offset = absmax.mean()
    centered = _blocks((absmax - offset).reshape(-1), NESTED_BLOCK)
    scale = jnp.abs(centered).max(-1)
    absmax_codes = _nearest(centered, scale, DYNAMIC_VALUES).reshape(-1)[: absmax.size].reshape(absmax.shape)
    return NF4(codes[..., ::2] << 4 | codes[..., 1::2], absmax_codes, scale, offset)


def _blocks(x: Float32[Array, "*rows I"], size: int) -> Float32[Array, "*rows G block"]:
    """The last axis in blocks; the last block is filled up with zeros."""
    missing = -x.shape[-1] % size
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return padded.reshape(*x.shape[:-1], -1, size)


def _nearest(
    blocks: Float32[Array, "... block"], absmax: Float32[Array, "..."], values: np.ndarray
) -> UInt8[Array, "..."]:
    """The index of the value that is nearest to each element divided by the largest magnitude of its block."""
    scaled = jnp.clip(blocks * (1.0 / jnp.maximum(absmax, 1e-38))[..., None], -1, 1)
    borders = (values[:-1] + values[1:]) / 2
    return jnp.searchsorted(borders, scaled, side="left", method="scan_unrolled").astype(jnp.uint8)


def _dequantized(codes: UInt8[Array, "*rows half"], absmax: Float32[Array, "..."]) -> Float32[Array, "*rows inputs"]:
    """The elements of packed codes; `absmax` has the axes of the outputs, followed by G."""
    pairs = jnp.stack([codes >> 4, codes & 15], -1)
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    values = jnp.asarray(VALUES)[pairs].reshape(*absmax.shape[:-1], -1)
    width = values.shape[-1]
    return (_blocks(values, BLOCK) * absmax[..., None]).reshape(*absmax.shape[:-1], -1)[..., :width].reshape(shape)
