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
from typing import TYPE_CHECKING, Any

import numpy as np

from camelid.errors import UserError
from camelid.inputs import refuse_stand_in

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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

    def __init__(self, file: Path, serialized: str):
        """`serialized` is the tokenizer as tokenizer.json holds it, with all added tokens; `file` is for messages."""
        self._file = file
        self.serialized = serialized
        self._plain = self._load(specials=False)
        self.token_ids = frozenset(self._plain.get_vocab(with_added_tokens=True).values())
        self.vocab_size = 1 + max(self.token_ids)
        added = self._plain.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._special = _any_of(added[token].content for token in self.special_ids)
        decoder = self._plain.decoder
        self.is_byte_level = decoder is not None and decoder.decode(["Ġ"]) == " "

    def __reduce__(self):
        # The library's own pickles forget whether specials are parsed.
        return type(self), (self._file, self.serialized)

    def encode(self, texts: list[str], specials: bool) -> list[list[int]]:
        engine = self._parsing if specials else self._plain
        return [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_parts(self, texts: Sequence[Sequence[Part]]) -> list[Placed]:
        strays = [self._has_stray_special(parts) for parts in texts]
        plain = ["".join(text for text, _ in parts) for parts, stray in zip(texts, strays, strict=True) if not stray]
        encodings = iter(self._parsing.encode_batch(plain, add_special_tokens=False))
        return [
            self._placed_by_name(parts) if stray else _placed((found := next(encodings)).ids, found.offsets)
            for parts, stray in zip(texts, strays, strict=True)
        ]

    def has_special(self, text: str) -> bool:
        return self._special.search(text) is not None

    def decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def normalized(self, text: str) -> str:
        """A text as the vocabulary sees it, before it is split."""
        normalizer, split = self._plain.normalizer, self._plain.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return (
            text if split is None or self.is_byte_level else "".join(part for part, _ in split.pre_tokenize_str(text))
        )

    def token_bytes(self, token: int) -> bytes | None:
        text = self._plain.id_to_token(token) or ""
        if self.is_byte_level:
            alphabet = byte_alphabet()
            return bytes(alphabet[char] for char in text) if alphabet.keys() >= set(text) else text.encode()
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
        return bytes.fromhex(byte[1]) if byte else None

    @functools.cached_property
    def _parsing(self):
        # Parsing specials is a switch of the whole object: a second one keeps threads apart.
        return self._load(specials=True, framed=False)

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
        found = engine.encode("".join(texts), add_special_tokens=False)
        placed = _placed(found.ids, found.offsets)
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

        engine = self._load(specials=False, framed=False)
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

    def _load(self, *, specials: bool, framed: bool = True):
        engine = parsed(self._file, self.serialized)
        # Some files were saved with the last caller's truncation or padding still on.
        engine.no_truncation()
        engine.no_padding()
        engine.encode_special_tokens = not specials
        if not framed:
            # What puts BOS in front may also cut blanks off the spans of tokens.
            engine.post_processor = None
        return engine


def parsed(file: Path, serialized: str) -> "Tokenizer":
    """The library's tokenizer of a file in the form of tokenizer.json; raises UserError if it cannot be read."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(serialized)
    except Exception as error:  # the library raises nothing narrower
        refuse_stand_in(file)
        raise UserError(
            f"{file} is no tokenizer that tokenizers {tokenizers.__version__} can read: {error}",
            "name a tokenizer.json, or update tokenizers",
        ) from error


class SentencePieceEngine:
    """tokenizer.model, read by `sentencepiece`, for models that `tokenizers` cannot encode with equal ids."""

    is_byte_level = False

    def __init__(self, model: Any):
        self._model = model
        self._specials = {self._model.id_to_piece(i): i for i in range(len(self._model)) if self._is_special(i)}
        self._texts = {token: text for text, token in self._specials.items()}
        self._letter = self._model.encode("a")
        self._special = _any_of(self._specials)
        self.special_ids = frozenset(self._texts)
        self.token_ids = frozenset(range(len(self._model)))
        self.vocab_size = len(self._model)

    def encode(self, texts: list[str], specials: bool) -> list[list[int]]:
        return [self._parse(text) for text in texts] if specials else self._model.encode(texts)

    def encode_parts(self, texts: Sequence[Sequence[Part]]) -> list[Placed]:
        return [self._placed(list(self._runs(parts))) for parts in texts]

    def has_special(self, text: str) -> bool:
        return self._special.search(text) is not None

    def decode(self, ids: list[int]) -> str:
        text = ""
        for special, run in itertools.groupby(ids, key=self._texts.__contains__):
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
        return bytes.fromhex(self._model.id_to_piece(token)[3:5]) if self._model.is_byte(token) else None

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
        tokens: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for text, special in runs:
            if special:
                tokens.append(self._specials[text])
                spans.append((at, at + len(text)))
            else:
                found = self._model.encode(text, out_type="offset_mapping")
                tokens += found["ids"]
                spans += [(at + start, at + end) for start, end in found["offsets"]]
            at += len(text)
        return _placed(tokens, spans)


def _placed(tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> Placed:
    flat = np.fromiter(itertools.chain.from_iterable(spans), np.int64, 2 * len(spans))
    return Placed(np.array(tokens, np.int32), flat[::2], flat[1::2])


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """What finds any of the strings, the longest where several begin, and splits a text around them."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: the printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
