"""The two libraries that read vocabularies, in two classes alike: what the vocabulary's file alone can answer.

`encode` adds neither BOS nor EOS. `decode` spells specials out. `token_bytes` gives the bytes of a token that can be
part of a character, and None for one that is text by itself. `encode_parts` takes texts whose parts say whether special
strings in them are specials, and tells which characters each token stands for.
"""

import functools
import itertools
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from camelid.errors import UserError

Part = tuple[str, bool]
"""a piece of a text, and whether special strings in it are specials"""


@dataclass(frozen=True, eq=False)
class Placed:
    """Tokens, and where they lie in their text."""

    tokens: np.ndarray
    """int32 (n,)"""
    starts: np.ndarray
    """int64 (n,): the first character of each; bytes of one character share it"""
    ends: np.ndarray
    """int64 (n,): one past the last; equal to the start where the tokenizer inserted a token of its own"""


class TokenizersEngine:
    """tokenizer.json, read by Hugging Face's `tokenizers`."""

    def __init__(self, file: Path):
        self._file = file
        self._plain = self._load(specials=False)
        self.vocab_size = 1 + max(self._plain.get_vocab(with_added_tokens=True).values())
        added = self._plain.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._special = _any_of(added[token].content for token in self.special_ids)
        self.bos_id = self._leading_special()
        self.eos_id = None
        decoder = self._plain.decoder
        self.is_byte_level = decoder is not None and decoder.decode(["Ġ"]) == " "

    def encode(self, texts: list[str], specials: bool) -> list[list[int]]:
        engine = self._parsing if specials else self._plain
        return [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_parts(self, texts: Sequence[Sequence[Part]]) -> list[Placed]:
        strays = [self._has_stray_special(parts) for parts in texts]
        plain = ["".join(text for text, _ in parts) for parts, stray in zip(texts, strays, strict=True) if not stray]
        encodings = iter(self._parsing.encode_batch(plain, add_special_tokens=False))
        return [
            self._placed_by_name(parts) if stray else _placed(next(encodings))
            for parts, stray in zip(texts, strays, strict=True)
        ]

    def has_special(self, text: str) -> bool:
        return self._special.search(text) is not None

    def decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def token_bytes(self, token: int) -> bytes | None:
        text = self._plain.id_to_token(token) or ""
        if self.is_byte_level:
            alphabet = _byte_alphabet()
            return bytes(alphabet[char] for char in text) if alphabet.keys() >= set(text) else text.encode()
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
        return bytes.fromhex(byte[1]) if byte else None

    @functools.cached_property
    def _parsing(self):
        # Parsing specials is a switch of the whole object: a second one keeps threads apart.
        return self._load(specials=True)

    def _has_stray_special(self, parts: Sequence[Part]) -> bool:
        """Whether the text as a whole holds other special strings than the parts that may hold them."""
        meant, at = [], 0
        for text, specials in parts:
            if specials:
                meant += [(at + found.start(), found[0]) for found in self._special.finditer(text)]
            at += len(text)
        whole = "".join(text for text, _ in parts)
        return [(found.start(), found[0]) for found in self._special.finditer(whole)] != meant

    def _placed_by_name(self, parts: Sequence[Part]) -> Placed:
        """As if only those specials existed that the parts may hold: under their secret names."""
        engine, names, ids = self._renamed
        texts: list[str] = []
        # Where runs of the text begin, with names in it and without.
        here, there = [0], [0]
        renamed = 0
        for text, specials in parts:
            for piece in self._special.split(text) if specials else [text]:
                name = names.get(piece, piece) if specials else piece
                texts.append(name)
                renamed += specials and piece in names
                here.append(here[-1] + len(name))
                there.append(there[-1] + len(piece))
        placed = _placed(engine.encode("".join(texts), add_special_tokens=False))
        if (placed.tokens != ids[placed.tokens]).sum() != renamed:
            raise UserError(
                f"{self._file} has specials that are found in some places only (single_word or normalized is set), and "
                "a text holds special strings that are meant as text",
                "take the special strings out of the text, or set both to false in the tokenizer's added_tokens",
            )
        spans = np.stack([placed.starts, placed.ends])
        run = np.searchsorted(here, spans, side="right") - 1
        starts, ends = spans + np.take(there, run) - np.take(here, run)
        return Placed(ids[placed.tokens], starts, ends)

    @functools.cached_property
    def _renamed(self):
        """An engine where specials go by names that nobody can guess, these names, and what its ids are in ours."""
        import tokenizers

        engine = self._load(specials=False)
        added = engine.get_added_tokens_decoder()
        secret = secrets.token_hex(8)
        names = {added[token].content: f"<{secret}{token}>" for token in self.special_ids}
        for entry in map(added.__getitem__, self.special_ids):
            how = {"single_word": entry.single_word, "lstrip": entry.lstrip, "rstrip": entry.rstrip}
            engine.add_tokens([tokenizers.AddedToken(names[entry.content], normalized=entry.normalized, **how)])
        vocab = engine.get_vocab(with_added_tokens=True)
        ids = np.arange(1 + max(vocab.values()), dtype=np.int32)
        ids[[vocab[name] for name in names.values()]] = [vocab[special] for special in names]
        return engine, names, ids

    def _load(self, *, specials: bool):
        import tokenizers

        try:
            engine = tokenizers.Tokenizer.from_file(str(self._file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"{self._file} is no tokenizer that tokenizers {tokenizers.__version__} can read: {error}",
                "name a tokenizer.json, or update tokenizers",
            ) from error
        # Some files were saved with the last caller's truncation or padding still on.
        engine.no_truncation()
        engine.no_padding()
        engine.encode_special_tokens = not specials
        return engine

    def _leading_special(self) -> int | None:
        """The token that the file's post-processor puts in front of a text."""
        framed = self._plain.encode("a").ids[:1]
        return framed[0] if framed != self._plain.encode("a", add_special_tokens=False).ids[:1] else None


class SentencePieceEngine:
    """tokenizer.model, read by `sentencepiece`; tokens added to it later are all taken for specials."""

    is_byte_level = False

    def __init__(self, file: Path, added: dict[str, int]):
        self._model = _load_sentencepiece(file)
        self._specials = {self._model.id_to_piece(i): i for i in range(len(self._model)) if self._is_special(i)} | added
        self._texts = {token: text for text, token in self._specials.items()}
        self._letter = self._model.encode("a")
        self._special = _any_of(self._specials)
        self.special_ids = frozenset(self._texts)
        self.vocab_size = max(len(self._model), 1 + max(self._texts, default=0))
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None

    def encode(self, texts: list[str], specials: bool) -> list[list[int]]:
        return [self._parse(text) for text in texts] if specials else self._model.encode(texts)

    def encode_parts(self, texts: Sequence[Sequence[Part]]) -> list[Placed]:
        return [self._placed(list(self._runs(parts))) for parts in texts]

    def has_special(self, text: str) -> bool:
        return self._special.search(text) is not None

    def decode(self, ids: list[int]) -> str:
        text = ""
        # An id in a gap below an added token has no piece and no text.
        known = [token for token in ids if token < len(self._model) or token in self._texts]
        for special, run in itertools.groupby(known, key=self._texts.__contains__):
            if special:
                text += "".join(self._texts[token] for token in run)
            else:
                # The first piece of a text loses its leading space; pieces after a special keep theirs.
                before = self._letter if text else []
                text += self._model.decode([*before, *run])[len(before) :]
        return text

    def token_id(self, token: str) -> int | None:
        if token in self._specials:
            return self._specials[token]
        found = self._model.piece_to_id(token)
        return None if found == self._model.unk_id() else found

    def token_bytes(self, token: int) -> bytes | None:
        is_byte = token < len(self._model) and self._model.is_byte(token)
        return bytes.fromhex(self._model.id_to_piece(token)[3:5]) if is_byte else None

    def _is_special(self, token: int) -> bool:
        return self._model.is_control(token) or self._model.is_unknown(token)

    def _parse(self, text: str) -> list[int]:
        parts = self._special.split(text)
        ids = ([self._specials[part]] if part in self._specials else self._model.encode(part) for part in parts)
        return list(itertools.chain.from_iterable(ids))

    def _runs(self, parts: Sequence[Part]) -> Iterator[tuple[str, bool]]:
        """The specials of a text, and what lies between them, each with whether it is a special."""
        plain = ""
        for text, specials in parts:
            for piece in self._special.split(text) if specials else [text]:
                if specials and piece in self._specials:
                    yield from [(plain, False)] if plain else []
                    yield piece, True
                    plain = ""
                else:
                    plain += piece
        yield from [(plain, False)] if plain else []

    def _placed(self, runs: list[tuple[str, bool]]) -> Placed:
        spans = [np.zeros((0, 3), np.int64)]
        at = 0
        for text, special in runs:
            if special:
                spans.append(np.array([[self._specials[text], at, at + len(text)]]))
            else:
                pieces = _sentence_pieces(self._model.encode(text, out_type="serialized_proto"))
                span = np.array(pieces, np.int64).reshape(-1, 3)
                span[:, 1:] = at + _char_at_byte(text)[span[:, 1:]]
                spans.append(span)
            at += len(text)
        tokens, starts, ends = np.concatenate(spans).T
        return Placed(tokens.astype(np.int32), starts, ends)


def _placed(encoding: Any) -> Placed:
    """What `tokenizers` found."""
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    return Placed(np.array(encoding.ids, np.int32), starts, ends)


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """What finds any of the strings, the longest where several begin, and splits a text around them."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _char_at_byte(text: str) -> np.ndarray:
    """The character that each byte of the text's UTF-8 belongs to, and the text's length at the end."""
    data = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.cumsum((data & 0xC0) != 0x80) - 1, len(text))


def _sentence_pieces(message: bytes) -> list[tuple[int, int, int]]:
    """The id and the span in bytes of every piece of a SentencePieceText, which is a message of protobuf."""
    spans: list[tuple[int, int, int]] = []
    at = 0
    while at < len(message):
        key = message[at]
        if key == 0x1D:  # the score, four bytes
            at += 5
            continue
        size, at = _varint(message, at + 1)
        end = at + size
        if key != 0x12:  # the text itself
            at = end
            continue
        # Numbers that are 0 may be left out.
        token = start = stop = 0
        while at < end:
            key = message[at]
            value, at = _varint(message, at + 1)
            if key == 0x10:
                token = value
            elif key == 0x20:
                start = value
            elif key == 0x28:
                stop = value
            else:  # the piece, and what it stands for
                at += value
        spans.append((token, start, stop))
    return spans


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = message[at]
    if value < 0x80:
        return value, at + 1
    value, shift = value & 0x7F, 7
    while True:
        at += 1
        byte = message[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7


def _load_sentencepiece(file: Path):
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError as error:
        raise UserError(
            f"{file} is no sentencepiece model",
            "take tokenizer.json instead, if this is Llama 3's file: Meta gave another format the same name",
        ) from error


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: the printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
