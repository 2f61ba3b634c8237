"""The tensor types of ggml, as GGUF files use them: plain dtypes and quantizations.

A quantized row consists of blocks of 32 or 256 elements that share scales; ggml_blocks.py has their layouts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from camelid.checkpoint.containers import ggml_blocks as blocks
from camelid.checkpoint.tensors import CHUNK, DTYPES, Tensor, cast
from camelid.errors import UserError

BLOCK = 32  # elements in a block of the quantizations that camelid writes
# By code (ggml.h, ggml_type).
GGML_TYPES = """
    F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL
    IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0
    """.split()
F32, F16 = 0, 1
PLAIN: Mapping[int, np.dtype] = {F32: DTYPES["F32"], F16: DTYPES["F16"], 30: DTYPES["BF16"]}
CODES = {dtype: code for code, dtype in PLAIN.items()}


@dataclass(frozen=True)
class Quantization:
    """A quantization: the size of its blocks, and functions that decode and encode them."""

    name: str
    block: int
    """elements in a block"""
    bytes: int
    """bytes in a block"""
    unpack: Callable[[np.ndarray], np.ndarray]
    """decodes blocks, an array of shape (blocks, bytes), to float32 of shape (blocks, elements)"""
    pack: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    """encodes float32 blocks as scales and packed bytes; None if camelid only reads the quantization"""


QUANTIZATIONS: Mapping[int, Quantization] = {
    8: Quantization("q8_0", BLOCK, 34, blocks.unpack_q8_0, blocks.pack_q8_0),
    2: Quantization("q4_0", BLOCK, 18, blocks.unpack_q4_0, blocks.pack_q4_0),
    3: Quantization("q4_1", BLOCK, 20, blocks.unpack_q4_1),
    6: Quantization("q5_0", BLOCK, 22, blocks.unpack_q5_0),
    7: Quantization("q5_1", BLOCK, 24, blocks.unpack_q5_1),
    10: Quantization("q2_k", blocks.SUPER, 84, blocks.unpack_q2_k),
    11: Quantization("q3_k", blocks.SUPER, 110, blocks.unpack_q3_k),
    12: Quantization("q4_k", blocks.SUPER, 144, blocks.unpack_q4_k),
    13: Quantization("q5_k", blocks.SUPER, 176, blocks.unpack_q5_k),
    14: Quantization("q6_k", blocks.SUPER, 210, blocks.unpack_q6_k),
}
BY_NAME = {kind.name: code for code, kind in QUANTIZATIONS.items()}
WRITABLE = tuple(kind.name for kind in QUANTIZATIONS.values() if kind.pack is not None)


def quantize(values: np.ndarray, kind: str) -> np.ndarray:
    """Quantizes an array whose last axis is a multiple of 32, bit for bit as ggml's reference code (ggml-quants.c).

    Returns uint8 of the same leading axes. With m the largest |x| of a block, the error is at most half a scale, which
    is m / 127 in q8_0 and m / 8 in q4_0; in q4_0 it is at most one scale for values whose sign differs from that of m.
    Rounding the scale to float16 adds at most m / 2048, and in blocks of tiny values 127 or 8 times 2**-25. Raises
    UserError if a value is infinite or NaN, or if float16 cannot hold the scale.
    """
    quantization = QUANTIZATIONS[BY_NAME[kind]]
    assert quantization.pack is not None
    with np.errstate(over="ignore", invalid="ignore"):
        scale, packed = quantization.pack(np.ascontiguousarray(values, np.float32).reshape(-1, BLOCK))
        scale = scale.astype("<f2")
    if not np.isfinite(scale).all():
        if not np.isfinite(values).all():
            raise UserError(
                f"a tensor has infinite or NaN values, which {kind} cannot hold",
                "Use another checkpoint; `camelid convert MODEL --check` names the tensor.",
            )
        raise UserError(f"a tensor has values that {kind} cannot hold", "Save it in float32 or bfloat16.")
    raw = np.concatenate([scale.view(np.uint8), packed], 1)
    return raw.reshape(*values.shape[:-1], values.shape[-1] // BLOCK * quantization.bytes)


def dequantize(raw: np.ndarray, kind: str) -> np.ndarray:
    """Decodes rows of quantized bytes to float32, bit for bit as ggml's reference code."""
    quantization = QUANTIZATIONS[BY_NAME[kind]]
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite
        values = quantization.unpack(raw.reshape(-1, quantization.bytes))
    return values.reshape(*raw.shape[:-1], raw.shape[-1] // quantization.bytes * quantization.block)


@dataclass(frozen=True)
class QuantizedTensor(Tensor):
    """A quantized tensor; its shape and its dtype, float32, are those of the decoded values."""

    kind: str

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """As Tensor.read_into; reads and decodes complete rows."""
        *outer, last = self.shape[1:]
        kind = QUANTIZATIONS[BY_NAME[self.kind]]
        raw_shape = (*outer, last // kind.block * kind.bytes)
        row_bytes = math.prod(raw_shape)
        rows = range(*index[0].indices(self.shape[0]))
        step = max(1, CHUNK // row_bytes)
        for start in range(0, len(rows), step):
            count = min(step, len(rows) - start)
            raw = np.empty((count, *raw_shape), np.uint8)
            offset = self.offset + (rows.start + start) * row_bytes
            Tensor(self.file, self.name, offset, raw.shape, raw.dtype).read_into(raw, (slice(None),) * raw.ndim)
            cast(self, dequantize(raw, self.kind)[:, *index[1:]], out[start : start + count])


def bytes_of(shape: Sequence[int], code: int) -> int:
    """The size in bytes of a tensor of a ggml type."""
    count = math.prod(shape)
    return (
        count // QUANTIZATIONS[code].block * QUANTIZATIONS[code].bytes
        if code in QUANTIZATIONS
        else count * PLAIN[code].itemsize
    )
