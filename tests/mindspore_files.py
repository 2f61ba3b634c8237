"""A second writer of MindSpore's .ckpt files, from the description of the format."""

from collections.abc import Mapping

import numpy as np


def number(value: int) -> bytes:
    out = bytearray()
    value %= 2**64
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def field(key: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return number(key * 8) + number(value)
    return number(key * 8 + 2) + number(len(value)) + value


def record(tag: str, kind: str, dims: tuple[int, ...], data: bytes) -> bytes:
    tensor = b"".join(field(1, n) for n in dims) + field(2, kind.encode()) + field(3, data)
    return field(1, field(1, tag.encode()) + field(2, tensor))


def float32(tag: str, array: np.ndarray) -> bytes:
    return record(tag, "Float32", array.shape, array.astype("<f4").tobytes())


def file(arrays: Mapping[str, np.ndarray]) -> bytes:
    return b"".join(float32(name, array) for name, array in arrays.items())
