"""EasyLM's templates: which keys of a row are laid end to end, and which of them are learnt.

    fields  := field (',' field)*
    field   := part | '[' part ']'           brackets: without loss
    part    := '<|bos|>' | '<|eos|>'         in any case
             | '<|' NUMBER '|>'              a token by its id
             | '<|' NAME '|>'                a token of the vocabulary, spelt just so
             | '{' KEY [':' TYPE] '}'        ids, as base64 of integers of numpy's i2 u2 i4 u4 i8 u8; left out, i4
             | word ('+' word)*              one text; keys are joined by a space
    word    := KEY | "'" TEXT "'" | '"' TEXT '"'     in quotes, text as it stands, with \\n \\t \\r \\\\ \\' \\"

EasyLM's options are written here too: its subfield_separator as a+'\n'+b, its base64_token_dtype as {key:u2}. Text in
quotes, beside which no space is put, and other names than bos and eos are ours; so is that blanks around a key mean
nothing.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from camelid.errors import UserError
from camelid.text.tokenizer import HALF_CHARACTER, Tokenizer

Piece = tuple[str | Sequence[int], float]
"""Text or ids, and how much each of its tokens counts in the loss."""

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
SIGNS = ",+[]{}"
ID_TYPES = ("i2", "u2", "i4", "u4", "i8", "u8")
NUMBER_TYPE = re.compile(r"[<>|=]?(i|u|f|int|uint|float)[0-9]+")  # what is meant as one, after a colon


@dataclass(frozen=True)
class Fields:
    """A template, read once and used for many rows."""

    begins: bool
    """Whether BOS is its own first token."""
    ends: bool
    """Whether EOS is its own last token."""
    parts: tuple["_Part", ...]

    def pieces(self, row: Mapping[str, Any]) -> list[Piece]:
        """What a row's tokens are made of; a missing key or a value of another type is an error that names the key."""
        return [(part.content(row), part.weight) for part in self.parts]


def parse(template: str, tokenizer: Tokenizer, prepend_text: str = "") -> Fields:
    """Read a template; an error shows the character at which it stops making sense.

    `prepend_text` stands before the first field, which must then be a text.
    """
    parts = _Reader(template, tokenizer).read()
    if prepend_text:
        first = parts[0]
        if not isinstance(first, _Text):
            raise UserError(
                f"prepend_text = {prepend_text!r} stands before a text, but the first field of {template!r} is none",
                "leave prepend_text out, and write the text in quotes where it belongs",
            )
        parts[0] = _Text(first.weight, (_Literal(prepend_text), *first.words))
    return Fields(
        begins=isinstance(parts[0], _Ids) and parts[0].ids[0] == tokenizer.bos_id,
        ends=isinstance(parts[-1], _Ids) and parts[-1].ids[0] in tokenizer.eos_ids,
        parts=tuple(parts),
    )


def text_of(row: Mapping[str, Any], key: str) -> str:
    """The string that a row has under a key."""
    text = value_of(row, key)
    if not isinstance(text, str):
        raise UserError(f"key {key!r} is {text!r:.40}, no string", "store a string under this key")
    return text


def value_of(row: Mapping[str, Any], key: str) -> Any:
    """What a row has under a key."""
    if key not in row:
        raise UserError(
            f"no key {key!r}, only {', '.join(map(repr, row)) or 'an empty row'}",
            "check the kind of the source, and the keys that its options name",
        )
    return row[key]


@dataclass(frozen=True)
class _Literal:
    text: str


@dataclass(frozen=True)
class _Key:
    name: str


@dataclass(frozen=True)
class _Ids:
    weight: float
    ids: tuple[int, ...]

    def content(self, row: Mapping[str, Any]) -> Sequence[int]:
        return self.ids


@dataclass(frozen=True)
class _Encoded:
    weight: float
    key: str
    id_type: str
    vocab_size: int

    def content(self, row: Mapping[str, Any]) -> Sequence[int]:
        encoded = text_of(row, self.key)
        try:
            ids = np.frombuffer(base64.b64decode(encoded, validate=True), f"<{self.id_type}")
        except ValueError as error:
            raise UserError(
                f"key {self.key!r} holds no base64 of {self.id_type}: {error}",
                f"store base64 of little-endian {self.id_type} under this key, or name their type: {{{self.key}:u2}}",
            ) from error
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            bad = next(token for token in ids.tolist() if not 0 <= token < self.vocab_size)
            raise UserError(
                f"key {self.key!r} holds id {bad}, outside the tokenizer's vocabulary of {self.vocab_size}",
                "use the tokenizer that made these ids",
            )
        return ids.tolist()


@dataclass(frozen=True)
class _Text:
    weight: float
    words: tuple[_Literal | _Key, ...]

    def content(self, row: Mapping[str, Any]) -> str:
        text = ""
        after_key = False
        for word in self.words:
            if isinstance(word, _Key):
                text += f"{' ' if after_key else ''}{text_of(row, word.name)}"
            else:
                text += word.text
            after_key = isinstance(word, _Key)
        return text


_Part = _Ids | _Encoded | _Text


class _Reader:
    """A template, and how far it has been read."""

    def __init__(self, template: str, tokenizer: Tokenizer):
        self.template = template
        self.tokenizer = tokenizer
        self.at = 0

    def read(self) -> list[_Part]:
        parts = [self._field()]
        while self.at < len(self.template):
            self._expect(",", "a comma or the end")
            parts.append(self._field())
        return parts

    def _field(self) -> _Part:
        self._skip_blanks()
        if not self._sees("["):
            return self._part(1.0)
        self.at += 1
        part = self._part(0.0)
        if self._sees(","):
            self._fail("brackets hold one field", "give each field brackets of its own: [a],[b]")
        self._expect("]", "the closing bracket ]")
        self._skip_blanks()
        return part

    def _part(self, weight: float) -> _Part:
        self._skip_blanks()
        if self._sees("<|"):
            part = _Ids(weight, (self._special(),))
        elif self._sees("{"):
            part = self._encoded(weight)
        else:
            part = _Text(weight, tuple(self._words()))
        self._skip_blanks()
        return part

    def _encoded(self, weight: float) -> _Encoded:
        self.at += 1
        opening = self.at
        key, colon, id_type = self._key().rpartition(":")
        if key and id_type not in ID_TYPES and NUMBER_TYPE.fullmatch(id_type):
            self.at = self.template.rindex(":", opening, self.at) + 1
            self._fail(f"ids of no known type, {id_type}", f"write one of {', '.join(ID_TYPES)}")
        # A colon may also be part of the key.
        key, id_type = (key, id_type) if key and id_type in ID_TYPES else (f"{key}{colon}{id_type}", "i4")
        self._expect("}", "the closing brace }")
        return _Encoded(weight, key, id_type, self.tokenizer.vocab_size)

    def _words(self) -> list[_Literal | _Key]:
        words = [self._word()]
        while self._sees("+"):
            self.at += 1
            words.append(self._word())
        return words

    def _word(self) -> _Literal | _Key:
        self._skip_blanks()
        word = _Literal(self._quoted()) if self._sees("'") or self._sees('"') else _Key(self._key())
        self._skip_blanks()
        return word

    def _key(self) -> str:
        start = self.at
        while self.at < len(self.template) and self.template[self.at] not in SIGNS:
            self.at += 1
        key = self.template[start : self.at].strip()
        if not key:
            self._fail("a key is missing", "name a key of the rows, or take the comma, plus or bracket out")
        return key

    def _quoted(self) -> str:
        opening, quote = self.at, self.template[self.at]
        text = ""
        self.at += 1
        while not self._sees(quote):
            if self.at == len(self.template):
                self.at = opening
                self._fail("the quote is not closed", f"end the text with {quote}")
            if self._sees("\\"):
                self.at += 1
                if self.template[self.at : self.at + 1] not in ESCAPES:
                    self._fail("no such escape", r"write \n, \t, \r, \', \" or \\ (a backslash is \\)")
                text += ESCAPES[self.template[self.at]]
            elif HALF_CHARACTER.match(self.template[self.at]):
                self._fail("half a character", "give both halves of the surrogate pair")
            else:
                text += self.template[self.at]
            self.at += 1
        self.at += 1
        return text

    def _special(self) -> int:
        opening = self.at
        end = self.template.find("|>", self.at + 2)
        if end < 0:
            self._fail("the special token is not closed", "end it with |>")
        spelt = self.template[opening : end + 2]
        token = self._token(spelt)
        if token is None:
            self._fail(f"the tokenizer has no {spelt}", "write <|bos|>, <|eos|>, <|ID|>, or a token of the vocabulary")
        self.at = end + 2
        return token

    def _token(self, spelt: str) -> int | None:
        name = spelt[2:-2].lower()
        if name == "bos":
            return self.tokenizer.bos_id
        if name == "eos":
            return self.tokenizer.eos_id
        if not re.fullmatch(r" *[0-9]{1,9} *", name):
            return self.tokenizer.backend.token_id(spelt)
        return int(name) if int(name) < self.tokenizer.vocab_size else None

    def _skip_blanks(self) -> None:
        while self._sees(" "):
            self.at += 1

    def _sees(self, sign: str) -> bool:
        return self.template.startswith(sign, self.at)

    def _expect(self, sign: str, called: str) -> None:
        if not self._sees(sign):
            self._fail(f"here should be {called}", "fields are laid end to end with commas, as in [prompt],answer")
        self.at += 1

    def _fail(self, what: str, advice: str) -> NoReturn:
        # A line break or a tab in the template would put the caret under another character.
        shown = "".join(char if char.isprintable() else " " for char in self.template)
        raise UserError(f"fields: {what}, at character {self.at + 1}:\n    {shown}\n    {' ' * self.at}^", advice)
