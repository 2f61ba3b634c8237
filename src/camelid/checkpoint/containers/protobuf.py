"""The subset of protobuf's wire format that MindSpore's files use; functions raise ValueError for damaged data.

A message is a sequence of fields, each with a key, 8 * field number + wire type, and a value. Wire type 0 is an
integer; wire type 2 is a length and that many bytes, which are text or another message. All integers are varints.
"""

import io
from collections.abc import Iterator, Sequence


def varint(file: io.BufferedReader, at: int) -> tuple[int, int]:
    """Reads an integer with seven bits per byte, the lowest first; returns it and the offset of its end."""
    file.seek(at)
    value = 0
    for i, byte in enumerate(file.read(10)):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError(f"no number at byte {at:,}")


def signed(value: int) -> int:
    """Interprets an unsigned 64-bit integer as int64."""
    return value - 2**64 if value >= 2**63 else value


def fields(file: io.BufferedReader, span: range) -> Iterator[tuple[int, int | range]]:
    """Yields the number of each field of a message, and its integer value or the byte range of its contents."""
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
            raise ValueError(f"a field of another wire type before byte {at:,}")
    if at != span.stop:
        raise ValueError(f"a message that does not end at byte {span.stop:,}")


def once(file: io.BufferedReader, span: range, names: Sequence[str]) -> dict[str, int | range]:
    """The fields of a message by name; no field may be repeated. The first of `names` is field 1."""
    found: dict[str, int | range] = {}
    for number, value in fields(file, span):
        if not 1 <= number <= len(names) or names[number - 1] in found:
            raise ValueError(f"an unexpected field {number} at byte {span.start:,}")
        found[names[number - 1]] = value
    return found


def text(file: io.BufferedReader, span: int | range | None) -> str:
    """Reads a field that is a name."""
    if not isinstance(span, range) or len(span) > 4096:
        raise ValueError("a name that is missing, or too long")
    file.seek(span.start)
    if not (name := file.read(len(span)).decode()).isprintable():
        raise ValueError("a name that cannot be printed")
    return name


def numbers(file: io.BufferedReader, span: int | range) -> tuple[int, ...]:
    """Reads a message whose only field is a repeated integer."""
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
    """The header of a field of `count` bytes."""
    return varint_bytes(number << 3 | 2) + varint_bytes(count)


def field_bytes(number: int, value: int | bytes) -> bytes:
    """A field; negative integers are encoded as int64."""
    if isinstance(value, int):
        return varint_bytes(number << 3) + varint_bytes(value % 2**64)
    return begin_bytes(number, len(value)) + value
