"""EasyLM's templates: which keys of a record are concatenated, and which of them have a loss.

    fields  := field (',' field)*
    field   := part | '[' part ']'           in brackets: no loss
    part    := '<|bos|>' | '<|eos|>'         in any case
             | '<|' NUMBER '|>'              a token by its id
             | '<|' NAME '|>'                a token of the vocabulary, by its exact name
             | '{' KEY [':' TYPE] '}'        ids, as base64 of integers of numpy's i2 u2 i4 u4 i8 u8; default i4
             | word ('+' word)*              one text; keys are joined by a space
    word    := KEY | "'" TEXT "'" | '"' TEXT '"'     in quotes: literal text, with the escapes \\n \\t \\r \\\\ \\' \\"

EasyLM's options are part of the template here: its subfield_separator as a+'\n'+b, its base64_token_dtype as {key:u2}.
Camelid adds quoted text, next to which no space is inserted, and names of other tokens than bos and eos, and ignores
spaces around a key.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from camelid.errors import UserError
from camelid.text.tokenizer import HALF_CHARACTER, Tokenizer

Content = tuple[str | Sequence[int], float]
"""A text or ids, and the loss weight of each of its tokens."""

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
SIGNS = ",+[]{}"
ID_TYPES = ("i2", "u2", "i4", "u4", "i8", "u8")
NUMBER_TYPE = re.compile(r"[<>|=]?(i|u|f|int|uint|float)[0-9]+")  # looks like a type after a colon


@dataclass(frozen=True)
class Template:
    """A parsed template, which is applied to many records."""

    has_bos: bool
    """Whether the template itself starts with BOS."""
    has_eos: bool
    """Whether the template itself ends with EOS."""
    fields: tuple["_Field", ...]

    def contents(self, record: Mapping[str, Any]) -> list[Content]:
        """Returns the contents of the fields of a record; raises UserError for a missing key or a wrong type."""
        return [(field.content(record), field.weight) for field in self.fields]


def parse(template: str, tokenizer: Tokenizer, prepend_text: str = "") -> Template:
    """Parses a template; raises UserError that points to the character of a syntax error.

    `prepend_text` is inserted before the first field, which must then be a text.
    """
    fields = _Parser(template, tokenizer).parse()
    if prepend_text:
        first = fields[0]
        if not isinstance(first, _Text):
            raise UserError(
                f"prepend_text = {prepend_text!r} needs a text after it, but {template!r} does not start with a text",
                "Leave prepend_text out, and write the text in quotes where it belongs.",
            )
        fields[0] = _Text(first.weight, (_Literal(prepend_text), *first.words))
    return Template(
        has_bos=isinstance(fields[0], _Ids) and fields[0].ids[0] == tokenizer.bos_id,
        has_eos=isinstance(fields[-1], _Ids) and fields[-1].ids[0] in tokenizer.eos_ids,
        fields=tuple(fields),
    )


def text_of(record: Mapping[str, Any], key: str) -> str:
    """Returns the string under a key of a record; raises UserError if it is missing or not a string."""
    text = value_of(record, key)
    if not isinstance(text, str):
        raise UserError(f"key {key!r} is {text!r:.40}, not a string", "Store a string under this key.")
    return text


def value_of(record: Mapping[str, Any], key: str) -> Any:
    """Returns the value under a key of a record; raises UserError if it is missing."""
    if key not in record:
        raise UserError(
            f"no key {key!r}, only {', '.join(map(repr, record)) or 'an empty record'}",
            "Check the kind of the source, and the keys in its options.",
        )
    return record[key]


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

    def content(self, record: Mapping[str, Any]) -> Sequence[int]:
        return self.ids


@dataclass(frozen=True)
class _Encoded:
    weight: float
    key: str
    id_type: str
    vocab_size: int

    def content(self, record: Mapping[str, Any]) -> Sequence[int]:
        encoded = text_of(record, self.key)
        try:
            ids = np.frombuffer(base64.b64decode(encoded, validate=True), f"<{self.id_type}")
        except ValueError as error:
            raise UserError(
                f"key {self.key!r} is not base64 of {self.id_type}: {error}",
                f"Store base64 of little-endian {self.id_type} under this key, or name its type: {{{self.key}:u2}}.",
            ) from error
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            bad = next(token for token in ids.tolist() if not 0 <= token < self.vocab_size)
            raise UserError(
                f"key {self.key!r} holds id {bad}, outside of the vocabulary of {self.vocab_size} tokens",
                "Use the tokenizer that created these ids.",
            )
        return ids.tolist()


@dataclass(frozen=True)
class _Text:
    weight: float
    words: tuple[_Literal | _Key, ...]

    def content(self, record: Mapping[str, Any]) -> str:
        text = ""
        after_key = False
        for word in self.words:
            if isinstance(word, _Key):
                text += f"{' ' if after_key else ''}{text_of(record, word.name)}"
            else:
                text += word.text
            after_key = isinstance(word, _Key)
        return text


_Field = _Ids | _Encoded | _Text


class _Parser:
    """A template, and the position of the parser in it."""

    def __init__(self, template: str, tokenizer: Tokenizer):
        self.template = template
        self.tokenizer = tokenizer
        self.at = 0

    def parse(self) -> list[_Field]:
        fields = [self._field()]
        while self.at < len(self.template):
            self._expect(",", "a comma or the end")
            fields.append(self._field())
        return fields

    def _field(self) -> _Field:
        self._skip_spaces()
        if not self._at("["):
            return self._content(1.0)
        self.at += 1
        field = self._content(0.0)
        if self._at(","):
            self._fail("brackets contain more than one field", "Put each field in brackets of its own: [a],[b].")
        self._expect("]", "the closing bracket ]")
        self._skip_spaces()
        return field

    def _content(self, weight: float) -> _Field:
        self._skip_spaces()
        if self._at("<|"):
            field = _Ids(weight, (self._special(),))
        elif self._at("{"):
            field = self._encoded(weight)
        else:
            field = _Text(weight, tuple(self._words()))
        self._skip_spaces()
        return field

    def _encoded(self, weight: float) -> _Encoded:
        self.at += 1
        opening = self.at
        key, colon, id_type = self._key().rpartition(":")
        if key and id_type not in ID_TYPES and NUMBER_TYPE.fullmatch(id_type):
            self.at = self.template.rindex(":", opening, self.at) + 1
            self._fail(f"unknown type of ids, {id_type}", f"Write one of {', '.join(ID_TYPES)}.")
        # A colon may also be part of the key.
        key, id_type = (key, id_type) if key and id_type in ID_TYPES else (f"{key}{colon}{id_type}", "i4")
        self._expect("}", "the closing brace }")
        return _Encoded(weight, key, id_type, self.tokenizer.vocab_size)

    def _words(self) -> list[_Literal | _Key]:
        words = [self._word()]
        while self._at("+"):
            self.at += 1
            words.append(self._word())
        return words

    def _word(self) -> _Literal | _Key:
        self._skip_spaces()
        word = _Literal(self._quoted()) if self._at("'") or self._at('"') else _Key(self._key())
        self._skip_spaces()
        return word

    def _key(self) -> str:
        start = self.at
        while self.at < len(self.template) and self.template[self.at] not in SIGNS:
            self.at += 1
        key = self.template[start : self.at].strip()
        if not key:
            self._fail("a key is missing", "Name a key of the records, or remove the comma, plus or bracket.")
        return key

    def _quoted(self) -> str:
        opening, quote = self.at, self.template[self.at]
        text = ""
        self.at += 1
        while not self._at(quote):
            if self.at == len(self.template):
                self.at = opening
                self._fail("the quote is not closed", f"End the text with {quote}.")
            if self._at("\\"):
                self.at += 1
                if self.template[self.at : self.at + 1] not in ESCAPES:
                    self._fail("unknown escape", r"Write \n, \t, \r, \', \" or \\ (a backslash is \\).")
                text += ESCAPES[self.template[self.at]]
            elif HALF_CHARACTER.match(self.template[self.at]):
                self._fail("an unpaired surrogate", "Write both halves of the surrogate pair.")
            else:
                text += self.template[self.at]
            self.at += 1
        self.at += 1
        return text

    def _special(self) -> int:
        opening = self.at
        end = self.template.find("|>", self.at + 2)
        if end < 0:
            self._fail("the special token is not closed", "End it with |>.")
        name = self.template[opening : end + 2]
        token = self._token(name)
        if token is None:
            self._fail(f"the tokenizer has no {name}", "Write <|bos|>, <|eos|>, <|ID|>, or a token of the vocabulary.")
        self.at = end + 2
        return token

    def _token(self, special: str) -> int | None:
        name = special[2:-2].lower()
        if name == "bos":
            return self.tokenizer.bos_id
        if name == "eos":
            return self.tokenizer.eos_id
        if not re.fullmatch(r" *[0-9]{1,9} *", name):
            return self.tokenizer.backend.token_id(special)
        return int(name) if int(name) < self.tokenizer.vocab_size else None

    def _skip_spaces(self) -> None:
        while self._at(" "):
            self.at += 1

    def _at(self, sign: str) -> bool:
        return self.template.startswith(sign, self.at)

    def _expect(self, sign: str, expected: str) -> None:
        if not self._at(sign):
            self._fail(f"expected {expected}", "Separate fields by commas, as in [prompt],answer.")
        self.at += 1

    def _fail(self, what: str, advice: str) -> NoReturn:
        # A line break or a tab in the template would move the caret to another character.
        shown = "".join(char if char.isprintable() else " " for char in self.template)
        raise UserError(f"fields: {what}, at character {self.at + 1}:\n    {shown}\n    {' ' * self.at}^", advice)
