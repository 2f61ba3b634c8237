"""Records: what is read from the files of a source, checked but not tokenized yet."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from camelid.data.config import Source, better_kind
from camelid.data.readers import lines, wikitext
from camelid.errors import UserError

MAX_DEPTH = 100  # of nested lists and objects; the code that reads them later is recursive


@dataclass(frozen=True)
class Record:
    """One record of a source, before it is tokenized."""

    value: Any
    """For kind `text`, a string. For kind `tokens`, ids (int32, shape (n,)), or a pair of ids and loss weights
    (float32, shape (n,)). For the other kinds, a dictionary."""
    location: str
    """Where it was read, for messages: `chat.jsonl, line 3`."""


RecordOrError = Record | UserError
"""A record, or what makes it unreadable."""


def text_record(text: Any, location: str, source: Source) -> RecordOrError:
    """The record of a text from a key or a column; an error if it is not a string that can be tokenized."""
    if not isinstance(text, str):
        return UserError(
            f"{location}: field {source.text_key!r} is {text!r:.40}, not a string", "Store the text in this field."
        )
    if fault := _fault_of_text(text):
        return UserError(f"{location}: field {source.text_key!r} has {fault}", "Fix this text.")
    if len(text) > lines.MAX_DOCUMENT:
        return lines.too_long(location)
    return cleaned_record(text, location, source)


def cleaned_record(text: str, location: str, source: Source) -> Record:
    """The record of a text that needs no checks."""
    return Record(wikitext.clean(text) if source.clean == "wikitext" else text, location)


def object_record(value: Any, location: str, source: Source) -> RecordOrError:
    """The record of a JSON object or a row of a table; an error if it does not fit the kind of the source."""
    if isinstance(value, UserError):
        return value
    if not isinstance(value, dict):
        return UserError(f"{location}: {value!r:.40} is not an object", "Write one JSON object per line.")
    if source.kind == "text":
        if source.text_key not in value:
            return missing_text(location, source.text_key, list(value))
        return text_record(value[source.text_key], location, source)
    if (better := better_kind(source.kind, value)) is not None:
        return UserError(
            f"{location}: {_keys(value)}, which do not fit kind = {source.kind!r}",
            f"Set {better}.",
        )
    if (fault := next(_faults(value), None)) is not None:
        return UserError(f"{location}: {fault}", "Fix this record.")
    return Record(value, location)


def missing_text(location: object, key: str, keys: list[str]) -> UserError:
    """The error for a record or a table without the key or column of the text."""
    better = better_kind("text", keys)
    return UserError(
        f"{location}: no field {key!r}, only {', '.join(map(repr, keys)) or 'none'}",
        "Set text_key to the field that holds the text." if better is None else f"Set {better}.",
    )


def _keys(value: Mapping[str, Any]) -> str:
    return f"the record has the keys {', '.join(map(repr, value))}"


def _fault_of_text(text: str) -> str | None:
    """What makes a text invalid, if anything."""
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"an unpaired surrogate, {text[error.start]!r}"
    return None


def _faults(value: Any, depth: int = 0) -> Iterator[str]:
    """What makes a record invalid, at any depth."""
    if isinstance(value, str):
        if fault := _fault_of_text(value):
            yield fault
    elif isinstance(value, dict | list | tuple):
        if depth == MAX_DEPTH:
            yield f"lists and objects are nested more than {MAX_DEPTH} deep"
            return
        inside = itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value
        for item in inside:
            yield from _faults(item, depth + 1)
