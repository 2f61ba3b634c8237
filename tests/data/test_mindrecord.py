import gzip
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camelid.data.config import Source
from camelid.data.readers import lines
from camelid.data.readers.mindrecord import decode_integers, open_mindrecord
from camelid.data.readers.sources import chunks, read_records, source_files
from camelid.errors import UserError

HEADER_SIZE, PAGE_SIZE = 4096, 512


def write(name: str, rows: list[dict[str, list[int]]], change: Callable[[dict], Any] = lambda header: None) -> None:
    """A MindRecord as its description has it, with small pages."""
    columns = list(rows[0])
    pages, used = [bytearray()], [0]
    for row in rows:
        parts = [encoded(values) for values in row.values()]
        content = parts[0] if len(parts) == 1 else b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        if len(pages[-1]) + 8 + len(content) > PAGE_SIZE:
            pages.append(bytearray())
            used.append(0)
        pages[-1] += len(content).to_bytes(8, "little") + content
        used[-1] += 1
    ends = np.cumsum(used).tolist()
    header = {
        "header_size": HEADER_SIZE,
        "page_size": PAGE_SIZE,
        "page": [{"page_id": 0, "page_type": "RAW_DATA", "page_size": 0, "start_row_id": 0, "end_row_id": 0}]
        + [
            {
                "page_id": number + 1,
                "page_type": "BLOB_DATA",
                "page_size": len(page),
                "start_row_id": end - count,
                "end_row_id": end,
            }
            for number, (page, count, end) in enumerate(zip(pages, used, ends, strict=True))
        ],
        "schema": [{"blob_fields": columns, "schema": {name: {"type": "int32", "shape": [-1]} for name in columns}}],
        "version": "3.0",
    }
    change(header)
    text = json.dumps(header).encode()
    content = (len(text).to_bytes(8, "little") + text).ljust(HEADER_SIZE + PAGE_SIZE, b"\0")
    Path(name).write_bytes(content + b"".join(bytes(page).ljust(PAGE_SIZE, b"\0") for page in pages))


def encoded(values: list[int]) -> bytes:
    """Integers as MindSpore stores them: the least of 1, 2, 4 and 8 bytes for each."""
    codes = [
        next(code for code in range(4) if -(2 ** (8 * 2**code - 1)) <= value < 2 ** (8 * 2**code - 1))
        for value in values
    ]
    bits = "".join(f"{code:02b}" for code in codes)
    bits += "0" * (-len(bits) % 8)
    bitmap = bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8))
    body = b"".join(value.to_bytes(2**code, "little", signed=True) for value, code in zip(values, codes, strict=True))
    return len(values).to_bytes(4, "big") + bitmap + body


def read(name: str = "x.mindrecord", **options: Any) -> list[tuple]:
    found = read_records(Source(files=(name,), kind="tokens", **options))
    return [
        (record.value[0].tolist(), record.value[1].tolist())
        if isinstance(record.value, tuple)
        else record.value.tolist()
        for record in found
    ]


@pytest.fixture
def golden(assets: Path) -> Path:
    """What MindSpore itself wrote: three rows of ten ids, every label -100."""
    folder = assets / "golden" / "mindspore"
    with gzip.open(folder / "m2.mindrecord.gz") as packed, open("m2.mindrecord", "wb") as file:
        shutil.copyfileobj(packed, file, 2**20)
    shutil.copy(folder / "m2.mindrecord.db", "m2.mindrecord.db")
    return Path("m2.mindrecord")


def test_a_file_of_mindspore_is_read(golden: Path):
    found = open_mindrecord(golden)
    assert found.columns == {"input_ids": "int32", "labels": "int32"}
    assert found.num_rows == 3
    rows = [row for page in found.pages for row in found.rows(page)]
    assert [row["input_ids"].tolist() for row in rows] == [list(range(10))] * 3
    assert [row["labels"].tolist() for row in rows] == [[-100] * 10] * 3
    assert {array.dtype for row in rows for array in row.values()} == {np.dtype("int32")}
    with pytest.raises(UserError, match=r"m2\.mindrecord, row 1: every label is -100, so no token has a loss"):
        read("m2.mindrecord")
    golden.with_name("m2.mindrecord.db").unlink()
    assert len([row for page in found.pages for row in found.rows(page)]) == 3


def test_integers_of_every_width_are_decoded():
    content = bytes.fromhex("00000009 184040 01 c800 70110100 fb ff7c 02 00 7f 8000")
    values = [1, 200, 70000, -5, 31999, 2, 0, 127, 128]
    assert encoded(values) == content
    assert decode_integers(content, np.dtype("int32")).tolist() == values
    assert decode_integers(encoded([]), np.dtype("int32")).tolist() == []
    assert decode_integers(encoded([2**40, -(2**63), 1]), np.dtype("int64")).tolist() == [2**40, -(2**63), 1]
    with pytest.raises(ValueError, match="does not fit int32"):
        decode_integers(encoded([2**31]), np.dtype("int32"))
    for cut in range(len(content)):
        with pytest.raises(ValueError, match="bytes"):
            decode_integers(content[:cut], np.dtype("int32"))
    with pytest.raises(ValueError, match="23 bytes; its elements need 22"):
        decode_integers(content + b"\0", np.dtype("int32"))


def test_rows_of_many_pages_are_documents_in_order(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 70000, generator.integers(1, 40)).tolist() for _ in range(100)]
    write("x.mindrecord", [{"input_ids": row} for row in rows])
    source = Source(files=("x.mindrecord",), kind="tokens")
    pages = len(open_mindrecord(Path("x.mindrecord")).pages)
    assert pages > 5
    for size, count in ((2**22, 1), (1000, pages // 2), (1, pages)):
        monkeypatch.setattr(lines, "BLOCK", size)
        spans = [span for chunk in chunks(source) for span in chunk]
        assert abs(len(spans) - count) <= 1, "a file is opened for every span"
        assert read() == rows
        assert [record.location for record in read_records(source)] == [
            f"x.mindrecord, row {n + 1}" for n in range(100)
        ]


def test_labels_become_weights_and_padding_goes():
    write(
        "x.mindrecord",
        [
            {"input_ids": [1, 5, 6, 7, 2, 0, 0], "labels": [-100, -100, 6, 7, 2, -100, -100]},
            {"input_ids": [1, 5, 2], "labels": [-100, 5, 2]},
        ],
    )
    assert read() == [([1, 5, 6, 7, 2], [0, 0, 1, 1, 1]), ([1, 5, 2], [0, 1, 1])]


def test_labels_of_other_ids_are_refused():
    write("x.mindrecord", [{"input_ids": [1, 5], "labels": [-100, 5]}, {"input_ids": [1, 5], "labels": [-100, 6]}])
    with pytest.raises(UserError, match=r"x\.mindrecord, row 2: labels are neither the ids nor -100"):
        read()
    assert read(max_unreadable=0.5) == [([1, 5], [0, 1])]


def test_the_index_beside_it_must_agree():
    write("x.mindrecord", [{"input_ids": [1, 2]}, {"input_ids": [3]}])
    assert source_files(Source(files=("*",), kind="tokens")) == [Path("x.mindrecord")]
    with sqlite3.connect("x.mindrecord.db") as database:
        database.execute(
            "CREATE TABLE INDEXES(ROW_ID INT, PAGE_ID_BLOB INT, PAGE_OFFSET_BLOB INT, PAGE_OFFSET_BLOB_END INT)"
        )
        database.executemany("INSERT INTO INDEXES VALUES (?, ?, ?, ?)", [(1, 1, 15, 29), (0, 1, 0, 15)])
    database.close()
    assert read() == [[1, 2], [3]]
    assert source_files(Source(files=("*",), kind="tokens")) == [Path("x.mindrecord"), Path("x.mindrecord.db")]
    with sqlite3.connect("x.mindrecord.db") as database:
        database.execute("DELETE FROM INDEXES WHERE ROW_ID = 0")
    database.close()
    with pytest.raises(UserError, match=r"x\.mindrecord\.db describes other rows of page 1"):
        read()
    Path("x.mindrecord.db").write_bytes(b"no database")
    with pytest.raises(UserError, match=r"x\.mindrecord\.db is not an index of a MindRecord"):
        read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version="4.0"), "is a MindRecord of version '4.0'"),
        (lambda h: h.pop("schema"), r"is not a MindRecord, or is damaged \(KeyError\('schema'\)\)"),
        (
            lambda h: h["schema"][0]["schema"]["input_ids"].update(type="float32"),
            "column 'input_ids' is float32 of shape",
        ),
        (
            lambda h: h["schema"][0]["schema"]["input_ids"].update(shape=[-1, 2]),
            r"'input_ids' is int32 of shape \[-1, 2\]",
        ),
        (lambda h: h["schema"][0]["schema"].update(n={"type": "int32"}), "column 'n' is int32 of shape None"),
        (lambda h: h["schema"][0].update(blob_fields=[]), "column 'input_ids' is int32"),
        (lambda h: h["schema"][0].update(schema=[]), r"is not a MindRecord, or is damaged \(AttributeError"),
        (lambda h: h["page"][1].update(page_size=10**9), "page 1 ends beyond the file"),
        (lambda h: h["page"][1].update(page_size=-1), "-1 is not a count"),
        (lambda h: h["page"][1].update(start_row_id=9), "or holds -7 rows"),
        (lambda h: h["page"][1].update(end_row_id=1), "page 1 holds more than its 1 rows"),
        (lambda h: h["page"][1].update(end_row_id=3), "row 3 ends beyond its page"),
        (lambda h: h["page"][1].update(end_row_id=0), "x.mindrecord is empty"),
    ],
)
def test_a_damaged_header_is_named(change: Callable[[dict], Any], message: str):
    write("x.mindrecord", [{"input_ids": [1, 2]}, {"input_ids": [3]}], change)
    with pytest.raises(UserError, match=message) as caught:
        read()
    assert "x.mindrecord" in caught.value.problem


def test_other_columns_are_refused():
    write("x.mindrecord", [{"input_ids": [1, 2], "attention_mask": [1, 1]}])
    with pytest.raises(UserError, match=r"x\.mindrecord has the columns input_ids, attention_mask"):
        read()


def test_any_cut_or_changed_byte_gives_ids_or_an_error_of_ours():
    write(
        "x.mindrecord",
        [{"input_ids": [1, 70000, 3], "labels": [-100, 70000, 3]}, {"input_ids": [5, 2], "labels": [5, 2]}],
    )
    whole = Path("x.mindrecord").read_bytes()
    interesting = [place for place in range(len(whole)) if whole[place]]
    generator = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole)
        if generator.random() < 0.3:
            content = content[: generator.choice(interesting)]
        else:
            for place in generator.choice(interesting, generator.integers(1, 4)):
                content[place] = generator.integers(256)
        Path("x.mindrecord").write_bytes(content)
        problem = ""
        try:
            found = read()
        except UserError as error:
            found, problem = [], error.problem
        assert all(len(ids) == len(weights) for ids, weights in found)
        assert found or "x.mindrecord" in problem
