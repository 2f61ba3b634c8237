"""The kinds of files that rows come from: how each is cut into parts, and how a part is read."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from camelid.data.config import Source, better_kind
from camelid.data.preparation.store import Store, is_store
from camelid.data.readers import lines, tables, wikitext
from camelid.data.readers.megatron_data import is_indexed, open_indexed, pair
from camelid.data.readers.mindrecord import NAME as MINDRECORD
from camelid.data.readers.mindrecord import index_file, open_mindrecord
from camelid.data.readers.separated import separated_rows
from camelid.errors import UserError

IGNORED = -100  # MindFormers' label of a token that does not count
MAX_DEPTH = 100  # of lists and objects in a row; what reads them afterwards calls itself


@dataclass(frozen=True)
class Record:
    """One row of a source, before it is tokenized."""

    value: Any
    """kind text: str; kind tokens: ids int32 (n,), or where the file has weights a pair, ids and weights float32 (n,);
    any other kind: a dict"""
    place: str
    """where it stands, for messages: `chat.jsonl, line 3`"""


Row = Record | UserError
"""a row, or what is wrong with it"""


@dataclass(frozen=True)
class Span:
    """Part of a file or data set."""

    path: Path
    start: int
    """[start, stop) of what it is counted in: bytes, row groups, pages, documents"""
    stop: int
    first: int
    """the number of its first line or row, from 1"""
    size: int
    """bytes, about"""


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    looks: Callable[[Path], bool]
    holds: Literal["text", "rows", "ids"]
    spans: Callable[[Path, Source], Iterable[Span]]
    """its parts; none where it is empty"""
    read: Callable[[Span, Source], Iterator[Row]]
    """the rows of a part, or what is wrong with them"""
    files: Callable[[Path], list[Path]] = lambda path: [path]


def _text_spans(path: Path, source: Source) -> Iterable[Span]:
    if lines.from_the_beginning(path):
        return _whole_span(path, _read_text(_whole(path), source))
    return _cut_spans(path, lines.border(path, source))


def _json_spans(path: Path, source: Source) -> Iterable[Span]:
    if lines.is_array(path) or lines.from_the_beginning(path):
        return _whole_span(path, _read_json(_whole(path), source))
    return _cut_spans(path, lines.LINE)


def _whole_span(path: Path, rows: Iterator[Row]) -> list[Span]:
    """All of a file that can only be read from its beginning, unless it has no rows."""
    return [_whole(path)] if any(True for _ in rows) else []


def _whole(path: Path) -> Span:
    size = path.stat().st_size
    return Span(path, 0, size, 1, size)


def _cut_spans(path: Path, between: re.Pattern[bytes]) -> Iterator[Span]:
    with path.open("rb") as file:
        begin = 0
        for first, data in lines.blocks(file, between, path):
            if not data.isspace():
                yield Span(path, begin, begin + len(data), first, len(data))
            begin += len(data)


def _read_text(span: Span, source: Source) -> Iterator[Row]:
    for first, data in _blocks(span, source):
        for line, content in lines.documents(first, data, lines.border(span.path, source), span.path):
            place, text = lines.text(content, span.path, line)
            yield text if isinstance(text, UserError) else _record(text, place, source)


def _read_json(span: Span, source: Source) -> Iterator[Row]:
    if lines.is_array(span.path):
        with lines.opened(span.path) as file:
            for place, value in lines.entries(file, span.path):
                yield _row(value, place, source)
        return
    for first, data in _blocks(span, source):
        for line, content in lines.documents(first, data, lines.LINE, span.path):
            place = f"{span.path}, line {line}"
            yield _row(lines.row(content, place), place, source)


def _blocks(span: Span, source: Source) -> Iterator[tuple[int, bytes]]:
    if lines.from_the_beginning(span.path):
        with lines.opened(span.path) as file:
            yield from lines.blocks(file, lines.border(span.path, source), span.path)
        return
    with span.path.open("rb") as file:
        file.seek(span.start)
        data = file.read(span.stop - span.start)
    if len(data) != span.stop - span.start:
        raise UserError(f"{span.path} became shorter while it was read", "Let what writes it finish first.")
    yield span.first, data


def _separated_spans(path: Path, source: Source) -> Iterable[Span]:
    # A line break may stand in a quoted field, which only a reader of all before it can know.
    return _whole_span(path, _read_separated(_whole(path), source))


def _read_separated(span: Span, source: Source) -> Iterator[Row]:
    for place, cells in separated_rows(span.path):
        yield _row(cells, place, source)


def _parquet_spans(path: Path, source: Source) -> Iterator[Span]:
    return _joined_spans(path, tables.parquet_groups(path))


def _joined_spans(path: Path, parts: Sequence[tuple[int, int]]) -> Iterator[Span]:
    """Parts of so many rows and bytes, small neighbours in one span: what a file says of itself is read for each."""
    begin, first, rows, size = 0, 1, 0, 0
    for number, (num_rows, num_bytes) in enumerate(parts):
        if rows and size + num_bytes > lines.BLOCK:
            yield Span(path, begin, number, first, size)
            begin, first, rows, size = number, first + rows, 0, 0
        rows, size = rows + num_rows, size + num_bytes
    if rows:
        yield Span(path, begin, len(parts), first, size)


def _read_parquet(span: Span, source: Source) -> Iterator[Row]:
    return _table_rows(tables.parquet_rows(span.path, span.start, span.stop, _column(source)), span, source)


def _dataset_spans(path: Path, source: Source) -> Iterator[Span]:
    for start, stop in tables.dataset_ranges(str(path)):
        yield Span(path, start, stop, start + 1, lines.BLOCK)


def _read_dataset(span: Span, source: Source) -> Iterator[Row]:
    return _table_rows(tables.dataset_rows(str(span.path), span.start, span.stop, _column(source)), span, source)


def _column(source: Source) -> str | None:
    return source.text_key if source.kind == "text" else None


def _table_rows(values: Iterable[Any], span: Span, source: Source) -> Iterator[Row]:
    for number, value in enumerate(values, start=span.first):
        place = f"{span.path}, row {number}"
        if isinstance(value, UserError):
            yield UserError(f"{place}: {value.problem}", value.advice)
        else:
            yield _text(value, place, source) if source.kind == "text" else _row(value, place, source)


def _megatron_spans(path: Path, source: Source) -> Iterator[Span]:
    data = open_indexed(path)
    return _even_spans(path, len(data), len(data.tokens))


def _megatron_files(path: Path) -> list[Path]:
    open_indexed(path)  # or says which of the two is missing
    return list(pair(path))


def _read_megatron(span: Span, source: Source) -> Iterator[Row]:
    data = open_indexed(span.path)
    for index in range(span.start, span.stop):
        if len(ids := data.document(index)):
            yield Record(ids, f"{span.path}, document {index + 1}")


def _store_spans(path: Path, source: Source) -> Iterator[Span]:
    store = Store.open(path)
    return _even_spans(path, store.num_documents, store.tokens.nbytes)


def _read_store(span: Span, source: Source) -> Iterator[Row]:
    store = Store.open(span.path)
    for index in range(span.start, span.stop):
        begin, end = int(store.offsets[index]), int(store.offsets[index + 1])
        ids = store.tokens[begin:end].astype(np.int32)
        yield Record((ids, store.weights(begin, end)), f"{span.path}, document {index + 1}")


def _even_spans(path: Path, count: int, size: int) -> Iterator[Span]:
    step = max(1, count * lines.BLOCK // max(size, 1))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield Span(path, start, stop, start + 1, (stop - start) * size // count)


def _mindrecord_spans(path: Path, source: Source) -> Iterator[Span]:
    record = open_mindrecord(path)
    if set(record.columns) not in ({"input_ids"}, {"input_ids", "labels"}):
        raise UserError(
            f"{path} has columns {', '.join(record.columns)}", "Only input_ids, and labels beside them, can be read."
        )
    return _joined_spans(path, [(page.num_rows, page.size) for page in record.pages])


def _read_mindrecord(span: Span, source: Source) -> Iterator[Row]:
    record = open_mindrecord(span.path)
    for page in record.pages[span.start : span.stop]:
        for number, row in enumerate(record.rows(page), start=page.first_row + 1):
            yield _labelled(row, f"{span.path}, row {number}")


def _labelled(row: dict[str, np.ndarray], place: str) -> Row:
    """MindFormers' labels say which ids are learnt; they are not shifted."""
    ids, labels = row["input_ids"].astype(np.int32), row.get("labels")
    if labels is None:
        return Record(ids, place)
    learnt = labels != IGNORED
    if labels.shape != ids.shape or (labels[learnt] != ids[learnt]).any():
        return UserError(f"{place}: labels are neither the ids nor {IGNORED}", "Make the file anew.")
    if not learnt[1:].any():
        return UserError(
            f"{place}: every label is {IGNORED}, nothing to learn", "Make the file anew, or leave the row out."
        )
    # What follows the last id that is learnt is padding.
    end = int(np.flatnonzero(learnt)[-1]) + 1
    return Record((ids[:end], learnt[:end].astype(np.float32)), place)


# Rows of JSON and tables ----------------------------------------------------------------


def _row(value: Any, place: str, source: Source) -> Row:
    if isinstance(value, UserError):
        return value
    if not isinstance(value, dict):
        return UserError(f"{place}: {value!r:.40} is no object", "Write one JSON object on each line.")
    if source.kind != "text":
        if (better := better_kind(source.kind, value)) is not None:
            return UserError(f"{place}: {_keys(value)}, not those of kind = {source.kind!r}", f"Set {better}.")
        wrong = next(_faults(value), None)
        return UserError(f"{place}: {wrong}", "Repair this row.") if wrong else Record(value, place)
    if source.text_key not in value:
        return tables.no_column(place, source.text_key, list(value))
    return _text(value[source.text_key], place, source)


def _keys(value: Mapping[str, Any]) -> str:
    return f"the row has the keys {', '.join(map(repr, value))}"


def _text(text: Any, place: str, source: Source) -> Row:
    if not isinstance(text, str):
        return UserError(
            f"{place}: field {source.text_key!r} is {text!r:.40}, no string", "Store the text in this field."
        )
    if wrong := _fault(text):
        return UserError(f"{place}: field {source.text_key!r} has {wrong}", "Repair this text.")
    if len(text) > lines.MAX_DOCUMENT:
        return lines.too_long(place)
    return _record(text, place, source)


def _record(text: str, place: str, source: Source) -> Record:
    return Record(wikitext.clean(text) if source.clean == "wikitext" else text, place)


def _fault(text: str) -> str | None:
    """What no text may hold."""
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a character, {text[error.start]!r}"
    return None


def _faults(value: Any, depth: int = 0) -> Iterator[str]:
    """What no row may hold, wherever it stands."""
    if isinstance(value, str):
        if wrong := _fault(value):
            yield wrong
    elif isinstance(value, dict | list | tuple):
        if depth == MAX_DEPTH:
            yield f"lists and objects in one another, more than {MAX_DEPTH} deep"
            return
        inside = itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value
        for item in inside:
            yield from _faults(item, depth + 1)


FORMATS = (
    Format(lambda path: bool(lines.TEXT.search(path.name)), "text", _text_spans, _read_text),
    Format(lambda path: bool(lines.JSON.search(path.name)), "rows", _json_spans, _read_json),
    Format(lambda path: bool(lines.SEPARATED.search(path.name)), "rows", _separated_spans, _read_separated),
    Format(lambda path: path.suffix.lower() == ".parquet", "rows", _parquet_spans, _read_parquet),
    Format(
        lambda path: str(path).startswith(tables.HUB) or tables.is_dataset(path),
        "rows",
        _dataset_spans,
        _read_dataset,
        lambda path: tables.dataset_files(str(path)),
    ),
    Format(
        lambda path: bool(MINDRECORD.search(path.name)),
        "ids",
        _mindrecord_spans,
        _read_mindrecord,
        lambda path: [file for file in (path, index_file(path)) if file.is_file()],
    ),
    Format(is_store, "ids", _store_spans, _read_store, lambda path: sorted(filter(Path.is_file, path.iterdir()))),
    Format(is_indexed, "ids", _megatron_spans, _read_megatron, _megatron_files),
)
