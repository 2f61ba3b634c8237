"""As much of protobuf's wire format as MindSpore's files use; raises ValueError for what is damaged.

A message is a run of fields, each a key, 8 x its number + its kind, and a value. Kind 0 is a number; kind 2 is a length
and so many bytes, which are text or another message. Every number is a varint.
"""

import io
from collections.abc import Iterator, Sequence


def varint(file: io.BufferedReader, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    file.seek(at)
    value = 0
    for i, byte in enumerate(file.read(10)):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError(f"no number at byte {at:,}")


def signed(value: int) -> int:
    """What a varint says as an int64."""
    return value - 2**64 if value >= 2**63 else value


def fields(file: io.BufferedReader, span: range) -> Iterator[tuple[int, int | range]]:
    """The fields of a message: each one's number, and its value or where its bytes lie."""
    at = span.start
    while at < span.stop:
        key, at = varint(file, at)
        value, at = varint(file, at)
        if key & 7 == 0:
            yield key >> 3, value
        elif key & 7 == 2:
            if value > span.stop - at:
                raise ValueError(f"{value:,} bytes at byte {at:,} where {max(span.stop - at, 0):,} are left")
            yield key >> 3, range(at, at + value)
            at += value
        else:
            raise ValueError(f"a field of another kind before byte {at:,}")
    if at != span.stop:
        raise ValueError(f"a message that does not end at byte {span.stop:,}")


def once(file: io.BufferedReader, span: range, names: Sequence[str]) -> dict[str, int | range]:
    """The fields of a message by name, for one in which none is repeated; the first of `names` is field 1."""
    found: dict[str, int | range] = {}
    for number, value in fields(file, span):
        if not 1 <= number <= len(names) or names[number - 1] in found:
            raise ValueError(f"an unexpected field {number} at byte {span.start:,}")
        found[names[number - 1]] = value
    return found


def text(file: io.BufferedReader, span: int | range | None) -> str:
    """A field that is a name."""
    if not isinstance(span, range) or len(span) > 4096:
        raise ValueError("a name that is missing, or too long")
    file.seek(span.start)
    if not (name := file.read(len(span)).decode()).isprintable():
        raise ValueError("a name that cannot be printed")
    return name


def numbers(file: io.BufferedReader, span: int | range) -> tuple[int, ...]:
    """A message of one repeated number."""
    if not isinstance(span, range) or len(span) > 1000:
        raise ValueError("a list of numbers that is none, or too long")
    held = list(fields(file, span))
    if not all(number == 1 and isinstance(value, int) for number, value in held):
        raise ValueError(f"no list of numbers at byte {span.start:,}")
    return tuple(signed(value) for _, value in held if isinstance(value, int))


def varint_bytes(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint_bytes(rest) if rest else bytes([low])


def begin_bytes(number: int, count: int) -> bytes:
    """What stands in front of a field of `count` bytes."""
    return varint_bytes(number << 3 | 2) + varint_bytes(count)


def field_bytes(number: int, value: int | bytes) -> bytes:
    """A field; a number below zero is written as an int64."""
    if isinstance(value, int):
        return varint_bytes(number << 3) + varint_bytes(value % 2**64)
    return begin_bytes(number, len(value)) + value
