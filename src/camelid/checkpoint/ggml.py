"""ggml's types of numbers, as GGUF files hold them: plain ones, and the quantisations Q8_0 and Q4_0.

A quantised row is a run of blocks of 32 numbers: a float16 scale, then the multiples of it, packed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from camelid.checkpoint.tensors import CHUNK, DTYPES, Tensor, cast
from camelid.errors import UserError

BLOCK = 32  # numbers that share a scale
# By code (ggml.h, ggml_type).
GGML_TYPES = """
    F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL
    IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0
    """.split()
F32, F16 = 0, 1
PLAIN: Mapping[int, np.dtype] = {F32: DTYPES["F32"], F16: DTYPES["F16"], 30: DTYPES["BF16"]}
CODES = {dtype: code for code, dtype in PLAIN.items()}


def _pack_q8_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    size = np.abs(x * _inverse(scale))
    whole = np.floor(size)
    rounded = np.copysign(whole + (size - whole >= 0.5), x)  # halves away from zero, as C's roundf
    return scale, rounded.astype(np.int8).view(np.uint8)


def _unpack_q8_0(packed: np.ndarray) -> np.ndarray:
    return packed.view(np.int8).astype(np.float32)


def _pack_q4_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)
    scale = largest / np.float32(-8)  # so that the largest, of either sign, is -8 exactly
    steps = np.minimum((x * _inverse(scale) + np.float32(8.5)).astype(np.uint8), 15)
    low, high = np.split(steps, 2, 1)
    return scale, low | high << 4


def _unpack_q4_0(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32) - np.float32(8)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


@dataclass(frozen=True)
class Kind:
    """A quantisation."""

    name: str
    bytes: int
    """of a block"""
    pack: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    """from float32 blocks to scales and packed bytes"""
    unpack: Callable[[np.ndarray], np.ndarray]
    """from packed bytes to multiples"""


KINDS: Mapping[int, Kind] = {
    8: Kind("q8_0", 34, _pack_q8_0, _unpack_q8_0),  # 32 int8
    2: Kind("q4_0", 18, _pack_q4_0, _unpack_q4_0),  # 16 bytes: numbers 0 to 15 low, 16 to 31 high, each plus 8
}
BY_NAME = {kind.name: code for code, kind in KINDS.items()}


def quantise(values: np.ndarray, kind: str) -> np.ndarray:
    """Bytes of rows whose last axis is a multiple of 32, as ggml's reference code (ggml-quants.c) makes them.

    With m the largest |x| of a block, a number is off by at most half a scale, which is m / 127 in q8_0 and m / 8 in
    q4_0; there by a whole one if it stands on the other side of zero than m. Rounding the scale to float16 adds at most
    m / 2048, and in blocks of tiny numbers 127 or 8 times 2**-25. Raises UserError where float16 cannot hold the scale.
    """
    how = KINDS[BY_NAME[kind]]
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):
        scale, packed = how.pack(blocks)
        scale = scale.astype("<f2")
    if not np.isfinite(scale).all():
        raise UserError(f"a tensor has numbers that {kind} cannot hold", "Save it in float32 or bfloat16.")
    raw = np.concatenate([scale.view(np.uint8), packed], 1)
    return raw.reshape(*values.shape[:-1], values.shape[-1] // BLOCK * how.bytes)


def dequantise(raw: np.ndarray, kind: str) -> np.ndarray:
    """Float32 of rows of bytes: scale x multiple."""
    how = KINDS[BY_NAME[kind]]
    blocks = raw.reshape(-1, how.bytes)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    with np.errstate(invalid="ignore"):  # a damaged scale may be infinite
        values = scale * how.unpack(np.ascontiguousarray(blocks[:, 2:]))
    return values.reshape(*raw.shape[:-1], raw.shape[-1] // how.bytes * BLOCK)


@dataclass(frozen=True)
class Quantised(Tensor):
    """A quantised tensor; its shape and its dtype, float32, are those of what it stands for."""

    kind: str

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fills `out`, contiguous and of the shape that `index` cuts, casting to its dtype; reads whole rows."""
        *outer, last = self.shape[1:]
        raw_shape = (*outer, last // BLOCK * KINDS[BY_NAME[self.kind]].bytes)
        row_bytes = math.prod(raw_shape)
        rows = range(*index[0].indices(self.shape[0]))
        step = max(1, CHUNK // row_bytes)
        for start in range(0, len(rows), step):
            count = min(step, len(rows) - start)
            raw = np.empty((count, *raw_shape), np.uint8)
            offset = self.offset + (rows.start + start) * row_bytes
            Tensor(self.file, self.name, offset, raw.shape, raw.dtype).read_into(raw, (slice(None),) * raw.ndim)
            cast(self, dequantise(raw, self.kind)[:, *index[1:]], out[start : start + count])


def bytes_of(shape: Sequence[int], code: int) -> int:
    """How many bytes a tensor takes."""
    count = math.prod(shape)
    return count // BLOCK * KINDS[code].bytes if code in KINDS else count * PLAIN[code].itemsize
