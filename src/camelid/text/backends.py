"""The two libraries that tokenize, `tokenizers` and `sentencepiece`, behind two classes with one interface.

`encode` adds neither BOS nor EOS. `decode` includes special tokens. `token_bytes` returns the bytes of a token that can
be part of a character, and None for a token that is text by itself. `encode_with_offsets` takes texts in fragments and
returns the span of each token; a flag of each fragment decides whether strings of special tokens in it are parsed.
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

Fragment = tuple[str, bool]
"""A fragment of a text, and whether strings of special tokens in it are parsed as special tokens."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """The tokens of a text, and the span of characters of each."""

    tokens: np.ndarray
    """int32 (n,)"""
    starts: np.ndarray
    """int64 (n,): index of the first character of each token; the same for several tokens of one character"""
    ends: np.ndarray
    """int64 (n,): index after the last character; equal to the start for a token that the tokenizer inserted"""


class TokenizersBackend:
    """A tokenizer of Hugging Face's `tokenizers`."""

    def __init__(self, file: Path, serialized: str):
        """`serialized` is the content of a tokenizer.json with all added tokens; `file` is named in messages."""
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
        # Pickles of the library lose the setting whether special tokens are parsed.
        return type(self), (self._file, self.serialized)

    def encode(self, texts: list[str], specials: bool) -> list[list[int]]:
        tokenizer = self._parsing if specials else self._plain
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_offsets(self, texts: Sequence[Sequence[Fragment]]) -> list[Encoding]:
        strays = [self._has_stray_special(fragments) for fragments in texts]
        plain = [
            "".join(text for text, _ in fragments) for fragments, stray in zip(texts, strays, strict=True) if not stray
        ]
        encodings = iter(self._parsing.encode_batch(plain, add_special_tokens=False))
        return [
            self._encode_by_names(fragments) if stray else _encoding((found := next(encodings)).ids, found.offsets)
            for fragments, stray in zip(texts, strays, strict=True)
        ]

    def has_special(self, text: str) -> bool:
        return self._special.search(text) is not None

    def decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def normalized(self, text: str) -> str:
        """A text after normalization."""
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
        # Parsing of special tokens is a setting of the object: with a second object, threads do not interfere.
        return self._load(specials=True, framed=False)

    def _has_stray_special(self, fragments: Sequence[Fragment]) -> bool:
        """Whether the text contains strings of special tokens elsewhere than in the fragments where they are parsed."""
        meant, at = [], 0
        for text, specials in fragments:
            if specials:
                meant += [(at + found.start(), found[0]) for found in self._special.finditer(text)]
            at += len(text)
        joined = "".join(text for text, _ in fragments)
        return [(found.start(), found[0]) for found in self._special.finditer(joined)] != meant

    def _encode_by_names(self, fragments: Sequence[Fragment]) -> Encoding:
        """Encodes a text in which some strings of special tokens are text: secret names replace the others first."""
        tokenizer, names, ids = self._with_secret_names
        texts: list[str] = []
        # Starts of the fragments in the text with secret names, and in the original text.
        here, there = [0], [0]
        renamed = 0
        for text, specials in fragments:
            for piece in self._special.split(text) if specials else [text]:
                name = names.get(piece, piece) if specials else piece
                texts.append(name)
                renamed += specials and piece in names
                here.append(here[-1] + len(name))
                there.append(there[-1] + len(piece))
        found = tokenizer.encode("".join(texts), add_special_tokens=False)
        placed = _encoding(found.ids, found.offsets)
        if (placed.tokens != ids[placed.tokens]).sum() != renamed:
            raise UserError(
                f"{self._file} has special tokens that are found in some places only (single_word or normalized is "
                "set), and a text contains strings of special tokens that are meant as text",
                "Remove these strings from the text, or set both flags to false in the added_tokens of the tokenizer.",
            )
        spans = np.stack([placed.starts, placed.ends])
        run = np.searchsorted(here, spans, side="right") - 1
        starts, ends = spans + np.take(there, run) - np.take(here, run)
        return Encoding(ids[placed.tokens], starts, ends)

    @functools.cached_property
    def _with_secret_names(self):
        """A tokenizer whose special tokens have secret names, these names, and a map of its ids to the original ids."""
        import tokenizers

        tokenizer = self._load(specials=False, framed=False)
        added = tokenizer.get_added_tokens_decoder()
        secret = secrets.token_hex(8)
        names = {added[token].content: f"<{secret}{token}>" for token in self.special_ids}
        for entry in map(added.__getitem__, self.special_ids):
            flags = {"single_word": entry.single_word, "lstrip": entry.lstrip, "rstrip": entry.rstrip}
            tokenizer.add_tokens([tokenizers.AddedToken(names[entry.content], normalized=entry.normalized, **flags)])
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        ids = np.arange(1 + max(vocab.values()), dtype=np.int32)
        ids[[vocab[name] for name in names.values()]] = [vocab[special] for special in names]
        return tokenizer, names, ids

    def _load(self, *, specials: bool, framed: bool = True):
        tokenizer = parse_tokenizer_json(self._file, self.serialized)
        # Some files were saved with truncation or padding enabled.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = not specials
        if not framed:
            # The post-processor that prepends BOS may also trim spaces from the spans of tokens.
            tokenizer.post_processor = None
        return tokenizer


def parse_tokenizer_json(file: Path, serialized: str) -> "Tokenizer":
    """The tokenizer of the content of a tokenizer.json; raises UserError if `tokenizers` cannot read it."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(serialized)
    except Exception as error:  # the library raises nothing narrower
        refuse_stand_in(file)
        raise UserError(
            f"{file} is not a tokenizer that tokenizers {tokenizers.__version__} can read: {error}",
            "Give a tokenizer.json, or update tokenizers.",
        ) from error


class SentencePieceBackend:
    """A model of `sentencepiece`, if `tokenizers` cannot encode with the same ids."""

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

    def encode_with_offsets(self, texts: Sequence[Sequence[Fragment]]) -> list[Encoding]:
        return [self._encoding(list(self._runs(fragments))) for fragments in texts]

    def has_special(self, text: str) -> bool:
        return self._special.search(text) is not None

    def decode(self, ids: list[int]) -> str:
        text = ""
        for special, run in itertools.groupby(ids, key=self._texts.__contains__):
            if special:
                text += "".join(self._texts[token] for token in run)
            else:
                # decode() strips the space in front of the first piece; after a special token it has to stay.
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
        substrings = self._special.split(text)
        ids = ([self._specials[part]] if part in self._specials else self._model.encode(part) for part in substrings)
        return list(itertools.chain.from_iterable(ids))

    def _runs(self, fragments: Sequence[Fragment]) -> Iterator[tuple[str, bool]]:
        """Splits a text at its special tokens: (substring, whether it is a special token)."""
        plain = ""
        for text, specials in fragments:
            for piece in self._special.split(text) if specials else [text]:
                if specials and piece in self._specials:
                    yield from [(plain, False)] if plain else []
                    yield piece, True
                    plain = ""
                else:
                    plain += piece
        yield from [(plain, False)] if plain else []

    def _encoding(self, runs: list[tuple[str, bool]]) -> Encoding:
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
        return _encoding(tokens, spans)


def _encoding(tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> Encoding:
    flat = np.fromiter(itertools.chain.from_iterable(spans), np.int64, 2 * len(spans))
    return Encoding(np.array(tokens, np.int32), flat[::2], flat[1::2])


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the strings, the longest first, in a group for `split`."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable bytes stand for themselves, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
