"""Encoding and decoding of the blocks of ggml's quantizations.

Each function takes blocks as rows of bytes (uint8, one block per row) and returns float32, or the reverse. The layouts
are those of ggml-common.h; d and m are float16 scales and offsets, q the packed integers. N is the number of blocks.
The order of the float32 operations is that of ggml's reference code, so that results are equal bit for bit.
"""

import numpy as np

SUPER = 256  # elements in a block of a K-quant


def pack_q8_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    size = np.abs(x * _inverse(scale))
    integer = np.floor(size)
    rounded = np.copysign(integer + (size - integer >= 0.5), x)  # halves away from zero, as C's roundf
    return scale, rounded.astype(np.int8).view(np.uint8)


def pack_q4_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)
    scale = largest / np.float32(-8)  # so that the largest, of either sign, is -8 exactly
    steps = np.minimum((x * _inverse(scale) + np.float32(8.5)).astype(np.uint8), 15)
    low, high = np.split(steps, 2, 1)
    return scale, low | high << 4


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def unpack_q8_0(raw: np.ndarray) -> np.ndarray:
    """d, 32 int8."""
    return _float16(raw[:, :2]) * raw[:, 2:].view(np.int8).astype(np.float32)


def unpack_q4_0(raw: np.ndarray) -> np.ndarray:
    """d, 16 bytes of two q: elements 0 to 15 in the low halves, 16 to 31 in the high ones."""
    return _float16(raw[:, :2]) * (_bits(raw[:, 2:], 16, 4).astype(np.float32) - np.float32(8))


def unpack_q4_1(raw: np.ndarray) -> np.ndarray:
    """d, m, 16 bytes as in q4_0."""
    return _float16(raw[:, :2]) * _bits(raw[:, 4:], 16, 4).astype(np.float32) + _float16(raw[:, 2:4])


def unpack_q5_0(raw: np.ndarray) -> np.ndarray:
    """d, 4 bytes of the fifth bits, 16 bytes as in q4_0."""
    q = _bits(raw[:, 6:], 16, 4) | _fifth_bits(raw[:, 2:6])
    return _float16(raw[:, :2]) * (q.astype(np.float32) - np.float32(16))


def unpack_q5_1(raw: np.ndarray) -> np.ndarray:
    """d, m, 4 bytes of the fifth bits, 16 bytes as in q4_0."""
    q = _bits(raw[:, 8:], 16, 4) | _fifth_bits(raw[:, 4:8])
    return _float16(raw[:, :2]) * q.astype(np.float32) + _float16(raw[:, 2:4])


def unpack_q2_k(raw: np.ndarray) -> np.ndarray:
    """16 bytes of a 4-bit scale and a 4-bit offset for 16 elements each, 64 bytes of four q, d, m."""
    scales, d, m = raw[:, :16], _float16(raw[:, 80:82]), _float16(raw[:, 82:84])
    q = _bits(raw[:, 16:80], 32, 2).reshape(len(raw), 16, 16)
    return _affine(q, d * (scales & 15).astype(np.float32), m * (scales >> 4).astype(np.float32))


def unpack_q3_k(raw: np.ndarray) -> np.ndarray:
    """32 bytes of the third bits, inverted, 64 bytes of the low two bits of q, 12 bytes of 16 6-bit scales, d."""
    low, high = _bits(raw[:, 96:104], 8, 4), _bits(raw[:, 104:108], 4, 2)
    scales = (low | high << 4).astype(np.float32) - np.float32(32)
    q = _bits(raw[:, 32:96], 32, 2) | _bits(raw[:, :32], 32, 1) << 2
    q = q.reshape(len(raw), 16, 16).astype(np.float32) - np.float32(4)
    return ((_float16(raw[:, 108:110]) * scales)[..., None] * q).reshape(len(raw), SUPER)


def unpack_q4_k(raw: np.ndarray) -> np.ndarray:
    """d, m, 12 bytes of 8 scales and 8 offsets, 128 bytes of two q."""
    return _affine(_bits(raw[:, 16:], 32, 4).reshape(len(raw), 8, 32), *_scales_and_offsets(raw))


def unpack_q5_k(raw: np.ndarray) -> np.ndarray:
    """d, m, 12 bytes of 8 scales and 8 offsets, 32 bytes of the fifth bits, 128 bytes of two q."""
    q = _bits(raw[:, 48:], 32, 4) | _bits(raw[:, 16:48], 32, 1) << 4
    return _affine(q.reshape(len(raw), 8, 32), *_scales_and_offsets(raw))


def unpack_q6_k(raw: np.ndarray) -> np.ndarray:
    """128 bytes of the low four bits of two q, 64 bytes of the high two bits of four q, 16 int8 scales, d."""
    q = _bits(raw[:, :128], 64, 4) | _bits(raw[:, 128:192], 32, 2) << 4
    q = q.reshape(len(raw), 16, 16).astype(np.float32) - np.float32(32)
    scales = _float16(raw[:, 208:210]) * raw[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[..., None] * q).reshape(len(raw), SUPER)


def _float16(raw: np.ndarray) -> np.ndarray:
    """float32 (N, 1) of two bytes each."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _bits(raw: np.ndarray, run: int, width: int) -> np.ndarray:
    """Integers of `width` bits, uint8 (N, bytes * 8 / width): of each run of bytes the low bits, then the next bits."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    parts = raw.reshape(len(raw), -1, 1, run) >> shifts & np.uint8(2**width - 1)
    return parts.reshape(len(raw), -1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(raw, axis=1, bitorder="little") << np.uint8(4)


def _scales_and_offsets(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 (N, 8) each, of q4_k and q5_k: six bits, of which the last four keep two above the first four's."""
    first, second, rest = np.split(raw[:, 4:16], 3, 1)
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], 1)
    offsets = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], 1)
    return _float16(raw[:, :2]) * scales.astype(np.float32), _float16(raw[:, 2:4]) * offsets.astype(np.float32)


def _affine(q: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return (scales[..., None] * q.astype(np.float32) - offsets[..., None]).reshape(len(q), SUPER)
