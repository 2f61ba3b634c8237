"""The content of a tokenizer.model of sentencepiece: its pieces with their scores and types, and its settings.

Source: sentencepiece_model.proto of github.com/google/sentencepiece. Only the fields that determine ids are read.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces."""
UNIGRAM, BPE = 1, 2
SPACE = "▁"


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """A sentencepiece model."""

    pieces: tuple[Piece, ...]
    """In the order of their ids."""
    model_type: int
    byte_fallback: bool
    add_dummy_prefix: bool
    """Whether a space is prepended to every text."""
    remove_extra_whitespaces: bool
    """Whether spaces at both ends of a text, and all but one of several spaces, are removed."""
    charsmap: bytes
    """A compiled table of replacements, such as those of NFKC; empty if there are none."""

    def ids(self, *types: int) -> list[int]:
        """The ids of the pieces of these types."""
        return [i for i, piece in enumerate(self.pieces) if piece.type in types]

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The merges of a BPE model, from the first to be applied to the last.

        sentencepiece merges two neighbors if their concatenation is a piece, in the order of descending scores, and
        leftmost first for equal scores. In Llama's and Mistral's models, runs of spaces have equal scores; the
        leftmost merge is then the one with the longest left part.
        """
        # Control pieces, such as <s>, never result from text.
        plain = [piece for piece in self.pieces if piece.type in (NORMAL, USER_DEFINED)]
        texts = {piece.text for piece in plain}
        found = [
            (-piece.score, -at, at - len(piece.text), piece.text[:at], piece.text[at:])
            for piece in plain
            for at in range(1, len(piece.text))
            if piece.text[:at] in texts and piece.text[at:] in texts
        ]
        return [(left, right) for *_, left, right in sorted(found)]


def read_sentencepiece_model(proto: bytes) -> SentencePieceModel:
    """Parses a serialized model, as returned by `SentencePieceProcessor.serialized_model_proto`."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(proto):
        if number == 1 and isinstance(value, bytes):
            held = dict(_fields(value))
            text, score = held.get(1, b""), held.get(2, bytes(4))
            assert isinstance(text, bytes)
            assert isinstance(score, bytes)
            pieces.append(Piece(text.decode(), struct.unpack("<f", score)[0], int(held.get(3, NORMAL))))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    charsmap = normalizer.get(2, b"")
    assert isinstance(charsmap, bytes)
    return SentencePieceModel(
        tuple(pieces),
        model_type=int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, False)),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
        charsmap=charsmap,
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: (field number, value as an integer or bytes)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind: Literal[0, 1, 2, 5] | int = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[kind]
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A varint (seven bits per byte, least significant first), and the offset after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
