"""Detects of which kind the records in files are, from the types of the files and the keys of their first records."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camelid.data.config import KEYS, Kind, Source
from camelid.data.readers.file_names import list_files
from camelid.data.readers.file_types import FILE_TYPES
from camelid.data.readers.records import Record
from camelid.data.readers.sources import read_records
from camelid.errors import UserError

EXAMINED = 100  # records of each file
ANSWER = "#### "  # before the result of an answer of GSM8K

Candidates = Mapping[Kind, frozenset[str]]
"""The kinds that records can be of, with the keys by which each is recognized, in the order of KEYS."""


def detect(name: str, preference: bool = False) -> dict[str, Any]:
    """Returns the options of a source that reads the files of a name or glob: `kind`, and `fields` or `text_key`.

    With `preference`, the files have to hold pairs of a chosen and a rejected answer; without it, such pairs are
    refused, unless the records are also of another kind. Raises UserError that names the file if its kind cannot be
    detected, or if the files are of several kinds.
    """
    found = [(path, _of_file(path, preference)) for path in list_files([name])]
    first, options = found[0]
    for path, others in found[1:]:
        if others != options:
            raise UserError(
                f"{first} and {path} are of different kinds: {described(options)}, and {described(others)}",
                "Name the files of each kind separately.",
            )
    return options


def described(options: Mapping[str, Any]) -> str:
    """Options of a source as they are written in a recipe."""
    return ", ".join(f"{name} = {value!r}" for name, value in options.items())


def _of_file(path: Path, preference: bool) -> dict[str, Any]:
    content = next(known.content for known in FILE_TYPES if known.matches(path))
    if content == "ids":
        return {"kind": "tokens"}
    if content == "text":
        if preference:
            raise _no_pairs(path, "it is plain text")
        return {"kind": "text"}
    # Records of kind `fields` may have any keys.
    source = Source(files=(str(path),), kind="fields", fields="text")
    records = list(itertools.islice(read_records(source), EXAMINED))
    return _options(path, records, _candidates(records), preference)


def _candidates(records: Sequence[Record]) -> Candidates:
    """The kinds that all of the records can be of; raises UserError if there is none, though each is of a known one."""
    shared: dict[Kind, frozenset[str]] = {}
    for number, record in enumerate(records):
        known: dict[Kind, frozenset[str]] = {}
        for kind, keys, _ in KEYS:
            if keys <= record.value.keys():
                known.setdefault(kind, keys)
        before = shared
        shared = {kind: keys for kind, keys in known.items() if number == 0 or kind in before}
        if known and before and not shared:
            raise UserError(
                f"{record.location}: the record is of kind {next(iter(known))!r} by its keys "
                f"{', '.join(map(repr, record.value))}, and those before it are of kind {next(iter(before))!r}",
                "Put the records of each kind into a file of their own.",
            )
    return shared


def _options(path: Path, records: Sequence[Record], kinds: Candidates, preference: bool) -> dict[str, Any]:
    keys = list(dict.fromkeys(key for record in records for key in record.value))
    if preference:
        if "preference" not in kinds:
            raise _no_pairs(path, f"its records have the keys {', '.join(map(repr, keys))}")
        return {"kind": "preference"}
    kind = next((kind for kind in kinds if kind != "preference"), None)
    if kind == "gsm8k" and not all(ANSWER in str(record.value["answer"]) for record in records):
        return {"kind": "fields", "fields": "[question],answer"}
    if kind == "fields":
        (answer,) = kinds[kind] - {"prompt"}
        return {"kind": "fields", "fields": f"[prompt],{answer}"}
    if kind is not None:
        return {"kind": kind}
    if "preference" in kinds:
        raise UserError(
            f"{path} holds pairs of a chosen and a rejected answer",
            "Add --dpo to train on preferences. To train on the chosen answers alone, set --fields '[prompt],chosen'.",
        )
    if len(keys) == 1 and all(isinstance(value, str) for record in records for value in record.value.values()):
        return {"kind": "text", "text_key": keys[0]}
    first, last = keys[0], keys[-1]
    raise UserError(
        f"{path}: its records have the keys {', '.join(map(repr, keys))}, which are of no known kind",
        f"Set --text-key {first} to train on that text, or --fields '[{first}],{last}' to train on {last!r} as the "
        f"answer to {first!r}.",
    )


def _no_pairs(path: Path, seen: str) -> UserError:
    return UserError(
        f"{path} holds no preferences: {seen}",
        "--dpo needs records with the keys prompt, chosen and rejected; leave it out to train on texts or answers.",
    )
