import gzip
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camelid.data.config import Source
from camelid.data.preparation.store import Writer
from camelid.data.readers import lines
from camelid.data.readers.file_names import list_files, refuse_repeated
from camelid.data.readers.megatron_data import write_indexed
from camelid.data.readers.records import Record
from camelid.data.readers.sources import (
    Tally,
    chunks,
    read_chunk,
    read_records,
    source_files,
)
from camelid.errors import UserError


def records(*files: str, **options: Any) -> list[Record]:
    return list(read_records(Source(files=files, **options)))


def read(*files: str, **options: Any) -> list[Any]:
    return [record.value for record in records(*files, **options)]


def places(*files: str, **options: Any) -> list[str]:
    return [record.location for record in records(*files, **options)]


def write_lines(name: str, *content: str | bytes) -> None:
    Path(name).write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in content))


def zstandard(content: bytes) -> bytes:
    library = pytest.importorskip("zstandard", reason="needs the extra `data`")
    return library.ZstdCompressor().compress(content)


def small_blocks(monkeypatch: pytest.MonkeyPatch, size: int = 16) -> None:
    monkeypatch.setattr(lines, "BLOCK", size)


# Text -----------------------------------------------------------------------------------


def test_a_text_file_is_one_document_kept_to_the_byte():
    Path("a.txt").write_bytes("\none\r\n\ntwo\u2028é\n".encode())
    assert read("a.txt") == ["\none\r\n\ntwo\u2028é\n"]


def test_the_last_ending_decides():
    Path("a.jsonl.txt").write_text("{")
    assert read("a.jsonl.txt") == ["{"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("line", [("one", 2), ("two", 3), (" three ", 5), ("four@@five", 7)]),
        ("blank_line", [("one\r\ntwo", 2), (" three ", 5), ("four@@five", 7)]),
        ("marker:@@", [("one\r\ntwo\n\n three \n \t\nfour", 2), ("five", 7)]),
        ("marker:\n\n three", [("one\r\ntwo", 2), (" \n \t\nfour@@five", 5)]),
    ],
)
def test_text_is_cut_into_documents_that_know_their_lines(
    split: str, expected: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
):
    Path("a.txt").write_bytes(b"\none\r\ntwo\n\n three \n \t\nfour@@five\n")
    expected_records = [Record(text, f"a.txt, line {line}") for text, line in expected]
    assert records("a.txt", split=split) == expected_records
    small_blocks(monkeypatch, 1)
    assert records("a.txt", split=split) == expected_records


def test_articles_of_wikitext_are_documents(monkeypatch: pytest.MonkeyPatch):
    text = " \n = One = \n \n A , b . \n \n = = Part = = \n \n C \n = x = = \n \n = Two = = 2 = \n \n D @-@ e \n"
    Path("a.txt").write_text(text)
    expected = [
        Record("= One =\n\nA, b.\n\n== Part ==\n\nC\n= x ==", "a.txt, line 2"),
        Record("= Two == 2 =\n\nD-e", "a.txt, line 11"),
    ]
    assert records("a.txt", clean="wikitext") == expected
    small_blocks(monkeypatch, 1)
    assert records("a.txt", clean="wikitext") == expected
    assert read("a.txt", clean="wikitext", split="line")[-1] == "D-e"


def test_wikitext_has_sixty_articles(assets: Path):
    found = read(str(assets / "data" / "wikitext-2" / "valid.txt"), clean="wikitext")
    assert len(found) == 60
    assert found[0].startswith("= Homarus gammarus =\n\nHomarus gammarus, known as the European lobster or common")
    assert all(re.match("= [^=]", article) for article in found)


def test_a_byte_order_mark_is_no_text():
    Path("a.txt").write_text("x", encoding="utf-8-sig")
    Path("a.jsonl").write_text('{"text": "y"}', encoding="utf-8-sig")
    Path("a.json").write_text('[{"text": "z"}]', encoding="utf-8-sig")
    assert read("a.txt", "a.jsonl", "a.json") == ["x", "y", "z"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_utf_16_and_utf_32_with_a_byte_order_mark_are_read(
    encoding: str, packed: bool, monkeypatch: pytest.MonkeyPatch
):
    small_blocks(monkeypatch)
    texts = ["Zwölf \U0001f600 Boxkämpfer", "über\r\nden Deich"]
    contents = {
        "a.txt": "\n\n".join(texts),
        "a.jsonl": "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts),
        "a.json": json.dumps([{"text": text} for text in texts], ensure_ascii=False),
        "a.csv": "text,n\r\n" + "".join(f'"{text}",1\r\n' for text in texts),
    }
    for name, content in contents.items():
        data = content.encode(encoding)
        name = f"{name}.gz" if packed else name
        Path(name).write_bytes(gzip.compress(data) if packed else data)
        split = {"split": "blank_line"} if "txt" in name else {}
        assert read(name, **split) == texts, name
    assert places("a.txt.gz" if packed else "a.txt", split="blank_line")[1].endswith("line 3")


def test_utf_16_that_breaks_off_is_named():
    Path("a.txt").write_bytes("one".encode("utf-16") + b"\x00")
    with pytest.raises(UserError, match=r"a\.txt: not utf-16 .*\nSave it as UTF-8"):
        read("a.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\nthr\xffee\n", r"a\.txt, line 3: not UTF-8"),
        (b"one\ntwo\n\0\n", r"a\.txt, line 3: a NUL byte"),
        ("one".encode("utf-16-le"), r"a\.txt, line 1: a NUL byte"),
        (b"one\nt\xf6wo\n", r"a\.txt, line 2: not UTF-8"),
    ],
)
@pytest.mark.parametrize("split", ["file", "line", "blank_line"])
def test_bytes_that_are_no_text_are_named_by_line(content: bytes, message: str, split: str):
    Path("a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("a.txt", split=split)


def test_blank_lines_before_the_first_document_are_no_part_of_it(monkeypatch: pytest.MonkeyPatch):
    Path("a.txt").write_bytes(b" \t\r\n  one\n \ntwo")
    for size in (2**22, 1):
        small_blocks(monkeypatch, size)
        assert records("a.txt", split="blank_line") == [
            Record("  one", "a.txt, line 2"),
            Record("two", "a.txt, line 4"),
        ]


# Tables in text -------------------------------------------------------------------------


def test_the_first_row_of_a_csv_file_names_the_columns():
    text = 'n,text,z\r\n1,"two\nlines, ""quoted""",a\r\n\r\n2,,b\r\n3,plain,"c"'
    Path("a.csv").write_bytes(text.encode("utf-8-sig"))
    assert records("a.csv") == [
        Record('two\nlines, "quoted"', "a.csv, line 2"),
        Record("", "a.csv, line 5"),
        Record("plain", "a.csv, line 6"),
    ]
    Path("a.tsv").write_text(text.replace(",", "\t"))
    assert read("a.tsv")[0] == 'two\nlines\t "quoted"'
    assert read("a.csv", kind="fields", fields="n,z")[1] == {"n": "2", "text": "", "z": "b"}


def test_csv_files_are_read_as_pandas_reads_them(tmp_path: Path):
    pandas = pytest.importorskip("pandas", reason="comes with the extra `data`")
    draw = np.random.default_rng(0)
    pieces = np.array(["a", '"', "\n", ",", "\t", " ", "é", "\U0001f600", "''", "\r\n", "#", "\\"])
    rows = [{"k,1": "".join(draw.choice(pieces, 6)), "text": "x" + "".join(draw.choice(pieces, 9))} for _ in range(200)]
    for name, separator in (("a.csv", ","), ("b.TSV.gz", "\t")):
        pandas.DataFrame(rows).to_csv(name, index=False, sep=separator)
        assert read(name, kind="fields", fields="text") == rows


def test_a_field_of_a_csv_file_may_be_long():
    Path("a.csv").write_text("text\n" + "x" * 200_000)
    assert read("a.csv") == ["x" * 200_000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,text\na,b\n", r"a\.csv has 2 columns named 'text'\nRename"),
        (b"text,n\na,1\nb\n", r"a\.csv, line 3: 1 cells, but the header has 2"),
        (b"text,n\na,1\nb,2,3\n", r"a\.csv, line 3: 3 cells, but the header has 2"),
        (b'text\na\n"b\nc\n', r"a\.csv, line 3: unexpected end of data"),
        (b'text\n"a"b\n', r"a\.csv, line 2: .*\nFix this row: double the quotes"),
        (b"body;text\na;b\n", r"a\.csv, line 2: no field 'text', only 'body;text'"),
        (b"text\na\nb\xff\n", r"a\.csv, from line \d on: not UTF-8"),
        (b"text\n", r"a\.csv is empty"),
    ],
)
def test_a_bad_csv_file_is_named(content: bytes, message: str):
    Path("a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("a.csv")


def test_the_case_of_an_ending_does_not_matter():
    Path("A.JSONL").write_text('{"text": "a"}')
    Path("B.NDJSON").write_text('{"text": "b"}')
    Path("c.ndjson.GZ").write_bytes(gzip.compress(b'{"text": "c"}'))
    Path("D.Json").write_text('[{"text": "d"}]')
    Path("E.TXT").write_text("e")
    Path("F.Csv").write_text("text\nf")
    names = ["A.JSONL", "B.NDJSON", "c.ndjson.GZ", "D.Json", "E.TXT", "F.Csv"]
    assert read(*names) == list("abcdef")
    assert read(*names[:2], "E.TXT", kind="text") == ["a", "b", "e"]


# JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_stands_twice_makes_a_row_unreadable(name: str, monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch)
    rows = ['{"text": "a"}', '{"text": "b", "text": "c"}', '{"text": "d", "more": [{"k": 1, "k": 1}]}', '{"text": "e"}']
    Path(name).write_text("\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]")
    with pytest.raises(UserError, match=r"(line|entry) 2.*: the key 'text' appears twice in one object"):
        read(name)
    tally = Tally(0.5)
    source = Source(files=(name,), max_unreadable=0.5)
    found = [record.value for chunk in chunks(source) for record in read_chunk(source, chunk, tally)]
    assert found == ["a", "e"]
    assert (tally.rows, tally.unreadable) == (4, 2)
    assert "'k' appears twice" in tally.problems[1]


@pytest.mark.parametrize(
    ("row", "kind", "advice"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, "text", 'Set kind = "instruct".'),
        ({"messages": []}, "text", 'Set kind = "chat".'),
        ({"conversations": [], "id": 1}, "text", 'Set kind = "chat".'),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "text", 'Set kind = "preference".'),
        ({"question": "a", "answer": "b"}, "text", 'Set kind = "fields" and fields = "[question],answer"'),
        ({"prompt": "a", "completion": "b"}, "text", 'Set kind = "fields" and fields = "[prompt],completion".'),
        ({"body": "a"}, "text", "Set text_key to the field that holds the text."),
        ({"text": "a"}, "chat", 'Set kind = "text".'),
        ({"text": "a"}, "instruct", 'Set kind = "text".'),
        ({"instruction": "a", "output": "b"}, "chat", 'Set kind = "instruct".'),
        ({"messages": [], "text": "a"}, "instruct", 'Set kind = "chat".'),
        ({"messages": []}, "preference", 'Set kind = "chat".'),
        ({"chosen": "a", "rejected": "b", "messages": []}, "gsm8k", 'Set kind = "chat".'),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_of_another_kind_are_refused_with_their_kind(row: dict[str, Any], kind: str, advice: str, name: str):
    if name == "a.jsonl":
        write_lines(name, json.dumps(row))
    else:
        arrow = pytest.importorskip("pyarrow", reason="needs the extra `data`")
        importlib.import_module("pyarrow.parquet").write_table(arrow.Table.from_pylist([row]), name)
    with pytest.raises(UserError, match=rf"{re.escape(name)}.*\n{re.escape(advice)}"):
        read(name, kind=kind)


def test_rows_that_may_be_of_the_kind_are_left_to_its_reader():
    write_lines("a.jsonl", '{"messages": [], "text": "a"}')
    assert read("a.jsonl", kind="chat") == [{"messages": [], "text": "a"}]
    assert read("a.jsonl") == ["a"]
    assert read("a.jsonl", kind="fields", fields="text") == [{"messages": [], "text": "a"}]


# What is not the file -------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.json.gz", "a.jsonl.zst", "a.bin"])
def test_a_git_lfs_pointer_is_called_one(name: str):
    Path(name).write_bytes(POINTER)
    if name == "a.bin":
        Path("a.idx").write_bytes(b"MMIDIDX\0\0")
    for look in (read, lambda *files, **options: source_files(Source(files=files, **options))):
        with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer, not the file itself\n.*git lfs pull"):
            look(name, **({"kind": "tokens"} if name == "a.bin" else {}))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt.gz"])
@pytest.mark.parametrize(
    "page", ["<!DOCTYPE html>\n<html>", "\ufeff\n <HTML lang=en>", "<?xml version='1.0'?><Error/>"]
)
def test_a_web_page_in_the_place_of_data_is_called_one(name: str, page: str):
    Path(name).write_text(page)
    with pytest.raises(UserError, match=rf"{name} is a web page .*\nDownload it again"):
        read(name)


def test_text_may_be_a_web_page():
    Path("a.txt").write_text("<!DOCTYPE html><p>x")
    write_lines("b.jsonl", '{"text": "<html>"}')
    assert read("a.txt", "b.jsonl") == ["<!DOCTYPE html><p>x", "<html>"]


# JSON and tables, damaged or in parts ----------------------------------------------------


def test_json_lines_are_a_document_each_and_blank_lines_none():
    rows = [{"id": 1, "body": "line\u2028one\n"}, {"body": ""}, {"body": "😀"}]
    content = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_lines("a.jsonl", content[0], "", content[1], "  \r", content[2], "")
    Path("b.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    assert read("a.jsonl", text_key="body") == ["line\u2028one\n", "", "😀"]
    assert read("b.jsonl.gz", text_key="body") == ["line\u2028one\n", "", "😀"]
    assert places("b.jsonl.gz", text_key="body") == [f"b.jsonl.gz, line {line}" for line in (1, 3, 5)]


def test_zstandard_is_read_in_frames(monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch)
    rows = [json.dumps({"text": str(number)}) + "\n" for number in range(3000)]
    packed = [zstandard("".join(part).encode()) for part in (rows[:1000], rows[1000:])]
    Path("a.jsonl.zst").write_bytes(b"".join(packed))
    assert read("a.jsonl.zst") == [str(number) for number in range(3000)]
    assert places("a.jsonl.zst")[-1] == "a.jsonl.zst, line 3000"
    Path("a.jsonl.zst").write_bytes(b"".join(packed)[:-5])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read: it is truncated"):
        read("a.jsonl.zst")
    Path("a.jsonl.zst").write_bytes(packed[0] + b"no frame")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read"):
        read("a.jsonl.zst")


def test_zstandard_of_the_longest_window_is_read():
    library = pytest.importorskip("zstandard", reason="needs the extra `data`")
    parameters = library.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    packer = library.ZstdCompressor(compression_params=parameters).compressobj()
    Path("a.txt.zst").write_bytes(packer.compress(b"x") + packer.flush())
    assert read("a.txt.zst") == ["x"]


@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_a_json_array_is_read_entry_by_entry(block: int, monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, block)
    rows = [{"a": [{"b": "]},\n é"}], "c": 12345}, {}, {"a": None}]
    for name, indent in (("a.json", 2), ("b.json", None)):
        Path(name).write_text(json.dumps(rows, indent=indent, ensure_ascii=False) + "\n", "utf-8")
        assert read(name, kind="chat") == rows
    Path("c.json.gz").write_bytes(gzip.compress(Path("a.json").read_bytes()))
    assert read("c.json.gz", kind="chat") == rows
    assert places("a.json", kind="chat") == [
        f"a.json, entry {n} (line {line})" for n, line in ((1, 2), (2, 10), (3, 11))
    ]


def test_a_number_is_no_entry_even_where_a_block_ends_in_it(monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, 1)
    Path("a.json").write_text("[123, {}]")
    with pytest.raises(UserError, match=r"entry 1 \(line 1\): 123 is not an object"):
        read("a.json", kind="chat")


def test_a_json_file_may_hold_lines():
    write_lines("a.json", "", '{"text": "x"}', '{"text": "y"}')
    assert read("a.json") == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n{"a": }]', r"a\.json, entry 2 \(line 2\): not JSON"),
        (b'[{"a": 1}\n{"a": 2}]', r"""a\.json, line 2: expected ',', found '{"a": 2}\]'"""),
        (b'[{"a": 1},\n{"a": 2}', r"a\.json, line 2: expected ',', found the end"),
        (b'[{"a": 1}]\n[]', r"a\.json, line 2: text follows the array"),
        (b'[{"a": 1},\n3]', r"a\.json, entry 2 \(line 2\): 3 is not an object"),
        (b'[{"a": 1},\n{"a": "\xff"}]', r"a\.json, line 2: not UTF-8"),
        (b"[" * 100_000, r"a\.json, entry 1 \(line 1\): not JSON"),
    ],
)
def test_a_broken_json_array_is_named(content: bytes, message: str):
    Path("a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("a.json", kind="chat")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl, line 3: not JSON in UTF-8"),
        ("[" * 100_000, r"a\.jsonl, line 3: not JSON in UTF-8"),
        ('"text"', r"a\.jsonl, line 3: 'text' is not an object"),
        ('{"body": 1, "id": 2}', r"a\.jsonl, line 3: no field 'text', only 'body', 'id'"),
        ('{"text": null}', r"a\.jsonl, line 3: field 'text' is None, not a string"),
        (b'{"text": "\xff"}', r"a\.jsonl, line 3: not JSON in UTF-8"),
        (b'{"text": "\0"}', r"a\.jsonl, line 3: not JSON in UTF-8"),
        ('{"text": "\\u0000"}', r"a\.jsonl, line 3: field 'text' has a NUL character"),
        ('{"text": "\\ud83d"}', r"a\.jsonl, line 3: field 'text' has an unpaired surrogate"),
    ],
)
def test_a_bad_line_is_named(line: str | bytes, message: str):
    write_lines("a.jsonl", '{"text": "\\ud83d\\ude00"}', "", line)
    with pytest.raises(UserError, match=message):
        read("a.jsonl")


def test_a_bad_string_anywhere_in_a_row_is_named():
    for line, message in (
        ('{"messages": [{"content": "\\ud83d"}]}', "an unpaired surrogate"),
        ('{"a": {"\\u0000": 1}}', "a NUL character"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "lists and objects are nested more than 100 deep"),
    ):
        write_lines("a.jsonl", line)
        with pytest.raises(UserError, match=rf"a\.jsonl, line 1: {message}"):
            read("a.jsonl", kind="chat")


# Tables ---------------------------------------------------------------------------------


def test_parquet_is_read_by_row_groups(monkeypatch: pytest.MonkeyPatch):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `data`")
    from pyarrow import parquet

    texts = [f"row {number}" for number in range(2500)]
    parquet.write_table(pyarrow.table({"n": range(2500), "text": texts}), "a.parquet", row_group_size=1200)
    assert read("a.parquet") == texts
    whole = records("a.parquet")
    assert whole[1999] == Record("row 1999", "a.parquet, row 2000")
    for size, stops in ((2**22, [3]), (1, [1, 2, 3])):
        small_blocks(monkeypatch, size)
        spans = [span for chunk in chunks(Source(files=("a.parquet",))) for span in chunk]
        assert [span.stop for span in spans] == stops, "a file is opened for every span"
        assert records("a.parquet") == whole
    assert read("a.parquet", kind="fields", fields="text")[7] == {"n": 7, "text": "row 7"}
    with pytest.raises(UserError, match=r"a\.parquet: no field 'body', only 'n', 'text'"):
        read("a.parquet", text_key="body")
    column = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(np.array([0, 1, 2, 3], "i4")), pyarrow.py_buffer(b"a\xffc")]
    )
    parquet.write_table(pyarrow.table({"text": column}), "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet, row 2: not UTF-8"):
        read("b.parquet")
    assert read("b.parquet", max_unreadable=0.5) == ["a", "c"]
    parquet.write_table(pyarrow.table({"text": ["a", None]}), "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet, row 2: field 'text' is None, not a string"):
        read("c.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet is empty"):
        read("d.parquet")
    Path("e.parquet").write_bytes(Path("a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"e\.parquet is not a Parquet file, or is damaged"):
        read("e.parquet")


def test_text_of_any_parquet_type_is_read_by_its_name():
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `data`")
    from pyarrow import parquet

    texts = pyarrow.array(["a", "b", "a"])
    for column in (texts.dictionary_encode(), texts.cast("large_string")):
        parquet.write_table(pyarrow.table({"text.x": ["no"] * 3, "text": column}), "a.parquet")
        assert read("a.parquet") == ["a", "b", "a"]
    dates = pyarrow.array([1, 2**30], pyarrow.date32())
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "date": dates}), "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet, row 2: a value out of range"):
        read("b.parquet", kind="fields", fields="text")
    parquet.write_table(pyarrow.table([texts, texts], names=["text", "text"]), "c.parquet")
    for kind in ("text", "chat"):
        with pytest.raises(UserError, match=r"c\.parquet has 2 columns named 'text'"):
            read("c.parquet", kind=kind)


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a\.parquet needs pyarrow[^\n]*\nRun: pip install "):
        read("a.parquet")


@pytest.mark.filterwarnings("ignore")  # its pickler warns of what others leave in memory
def test_a_data_set_of_hugging_face_is_read_from_its_folder():
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    rows = [{"text": f"row {number}", "n": number} for number in range(2500)]
    parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:3])}
    datasets.DatasetDict(parts).save_to_disk("d")
    picture = {"text": "x", "picture": {"bytes": b"none", "path": None}}
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    datasets.Dataset.from_list([picture], features=features).save_to_disk("pictures")
    assert read("pictures", kind="fields", fields="text") == [picture]
    assert read("d/train") == [row["text"] for row in rows]
    assert read("d/test", kind="fields", fields="text") == rows[:3]
    assert places("d/test") == [f"d/test, row {number}" for number in (1, 2, 3)]
    assert [file.suffix for file in source_files(Source(files=("d/train",)))] == [".arrow"]
    with pytest.raises(UserError, match="d has several splits: train, test\nName one, as d/train"):
        read("d")
    with pytest.raises(UserError, match="d/test: no field 'body', only 'text', 'n'"):
        read("d/test", text_key="body")


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_of_the_hub_is_named_with_its_split(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    asked = []

    def load(*names: str, split: str):
        asked.append((*names, split))
        if names[0] == "missing":
            raise FileNotFoundError("no such data set")
        return datasets.Dataset.from_list([{"text": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hf:a/b", "hf:a/c:test", "hf:d:raw:test[:10%]") == ["x"] * 3
    assert set(asked) == {("a/b", "train"), ("a/c", "test"), ("d", "raw", "test[:10%]")}
    with pytest.raises(UserError, match="hf:missing cannot be loaded: no such data set"):
        read("hf:missing")


# Ids ------------------------------------------------------------------------------------


def test_ids_of_megatron_are_documents():
    write_indexed(Path("d/x"), [np.array([1, 2, 3]), np.array([], int), np.array([60000])], np.dtype("u2"))
    for name in ("d/x", "d/x.bin", "d/x.idx", "d/*"):
        found = records(name, kind="tokens")
        assert [(record.value.tolist(), record.location) for record in found] == [
            ([1, 2, 3], "d/x, document 1"),
            ([60000], "d/x, document 3"),
        ]
        assert found[0].value.dtype == np.int32
    assert source_files(Source(files=("d/x",), kind="tokens")) == [Path("d/x.bin"), Path("d/x.idx")]
    write_indexed(Path("d"), [np.array([7])], np.dtype("u2"))  # beside the folder of that name
    assert [ids.tolist() for ids in read("d", kind="tokens")] == [[7]]
    write_indexed(Path("nothing"), [np.array([], int)] * 2, np.dtype("u2"))
    assert read("nothing", kind="tokens") == []


def test_a_store_is_a_source_of_its_tokens_and_weights():
    writer = Writer(Path("s"), 500)
    tokens, weights = np.array([1, 2, 300, 4, 5], np.int32), np.array([0, 0, 1, 0, 0.5], np.float32)
    writer.append(tokens, np.array([3, 2]), weights)
    writer.finish({"tokenizer": "x", "sources": []})
    found = records("s", kind="tokens")
    assert [(ids.tolist(), list(counts)) for ids, counts in (record.value for record in found)] == [
        ([1, 2, 300], [0, 0, 1]),
        ([4, 5], [0, 0.5]),
    ]
    assert [record.location for record in found] == ["s, document 1", "s, document 2"]


def test_a_kind_that_a_file_cannot_hold_is_refused():
    Path("a.txt").write_text("x")
    write_lines("a.jsonl", "{}")
    write_indexed(Path("x"), [np.array([1])], np.dtype("i4"))
    for files, kind, message in (
        ("a.txt", "chat", r"a\.txt is plain text, without the keys that kind = 'chat' needs"),
        ("a.jsonl", "tokens", r"a\.jsonl holds no token ids"),
        ("x", "text", "x holds token ids, which do not fit kind = 'text'"),
    ):
        with pytest.raises(UserError, match=message):
            read(files, kind=kind)


# What is wrong --------------------------------------------------------------------------


def test_unreadable_rows_are_counted_up_to_a_share():
    write_lines("a.jsonl", *["{}", '{"text": "x"}'] * 10)
    assert read("a.jsonl", max_unreadable=0.5) == ["x"] * 10
    with pytest.raises(
        UserError, match=r"10 of 20 records are unreadable, and max_unreadable = 0\.4: a\.jsonl, line 1: no field"
    ):
        read("a.jsonl", max_unreadable=0.4)


def test_a_share_is_what_is_written_not_what_is_near_it():
    write_lines("a.jsonl", *["{}"] * 29, *['{"text": "x"}'] * 71)
    assert len(read("a.jsonl", max_unreadable=0.29)) == 71
    with pytest.raises(UserError, match="29 of 100 records are unreadable"):
        read("a.jsonl", max_unreadable=0.289)


def test_a_tally_keeps_the_first_problems(monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch)
    write_lines("a.jsonl", *['{"text": "x"}', "{}", "{}", "{}"] * 2)
    source = Source(files=("a.jsonl",), max_unreadable=0.75)
    tally, parts = Tally(0.75), chunks(source)
    for chunk in parts:
        own = Tally(0.75)
        list(read_chunk(source, chunk, own))
        tally.add(own)
    assert len(parts) > 1
    assert (tally.rows, tally.unreadable) == (8, 6)
    assert [problem.split(":")[0] for problem in tally.problems] == [f"a.jsonl, line {n}" for n in (2, 3, 4, 6, 7)]
    tally.check()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.txt", b" \n\n"),
        ("a.jsonl", b"\n \n"),
        ("a.json", b"[ ]"),
        ("a.txt.gz", gzip.compress(b"\n", mtime=0)),  # the hour is no part of a test's name
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_an_empty_file_is_named(name: str, content: bytes):
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(name)} is empty"):
        read(name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.txt.gz"])
def test_a_line_of_200_megabytes_is_refused_by_name(name: str):
    with gzip.open(name, "wb", 1) if name.endswith(".gz") else open(name, "wb") as file:
        file.write(
            (b'{"text": "' + b"x" * 2**14 + b'"}\n') * 400
        )  # more than a block, so that the line is not in the first one
        for _ in range(200):
            file.write(b"a" * 2**20)
    with pytest.raises(UserError, match=rf"{re.escape(name)}, line 401: a document of more than 64 MiB\n[^\n]*split"):
        read(name, split="line") if ".txt" in name else read(name)


def test_of_a_large_file_a_few_blocks_are_in_memory(monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, 2**16)
    write_lines("a.jsonl", *[json.dumps({"text": "x" * 10_000})] * 800)
    write_lines("a.txt", *["x" * 10_000] * 800)
    Path("a.json").write_text(json.dumps([{"text": "x" * 10_000}] * 800))
    tracemalloc.start()
    for name in ("a.jsonl", "a.txt", "a.json"):
        tracemalloc.reset_peak()
        assert sum(1 for _ in read_records(Source(files=(name,), split="line"))) == 800
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < 2**21, name  # of 8 MB
    tracemalloc.stop()


def test_a_document_over_the_limit_is_refused_however_it_lies_in_its_block(monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, 64)
    monkeypatch.setattr(lines, "MAX_DOCUMENT", 32)
    for content in (f"one\n{'a' * 33}\nthree", f"one\n{'a' * 200}\nthree"):
        Path("a.txt").write_text(content)
        with pytest.raises(UserError, match=r"a\.txt, line 2: a document of more than"):
            read("a.txt", split="line")
    stream = io.BytesIO(b"a" * 10_000)
    with pytest.raises(UserError, match=r"x, line 1: a document of more than"):
        list(lines.blocks(stream, lines.LINE, "x"))
    assert stream.tell() < 1000
    Path("a.txt").write_text(f"one\n{'a' * 32}\nthree")
    assert read("a.txt", split="line") == ["one", "a" * 32, "three"]


def test_a_file_that_cannot_be_read_is_named():
    Path("a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100)[:-12])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        read("a.jsonl.gz")
    Path("b.jsonl.gz").write_bytes(b'{"text": "x"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl\.gz cannot be read"):
        read("b.jsonl.gz")


def test_a_file_that_became_shorter_is_named():
    write_lines("a.jsonl", '{"text": "x"}', '{"text": "y"}')
    source = Source(files=("a.jsonl",))
    [chunk] = chunks(source)
    write_lines("a.jsonl", '{"text": "x"}')
    with pytest.raises(UserError, match=r"a\.jsonl was truncated while it was read"):
        list(read_chunk(source, chunk))


# Chunks and names -----------------------------------------------------------------------


def test_chunks_are_independent_parts_that_add_up(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(0)
    texts = ["é" * int(size) + "\n" * int(size % 3) for size in generator.integers(1, 40, 500)]
    write_lines("a.jsonl", *(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    Path("b.txt").write_text("\n\n".join(texts))
    Path("c.txt").write_text("<|end|>".join(texts))
    Path("d.json").write_text(json.dumps([{"text": text} for text in texts]))
    for name, split in (("a.jsonl", "file"), ("b.txt", "blank_line"), ("b.txt", "line"), ("c.txt", "marker:<|end|>")):
        source = Source(files=(name, "d.json"), split=split)
        monkeypatch.setattr(lines, "BLOCK", 2**22)
        whole = list(read_records(source))
        small_blocks(monkeypatch, 100)
        parts = pickle.loads(pickle.dumps(chunks(source)))
        assert len(parts) > 50
        read_backwards = [list(read_chunk(source, chunk)) for chunk in reversed(parts)]
        assert [record for part in reversed(read_backwards) for record in part] == whole
    assert [record.value for record in whole[-500:]] == texts


def test_small_files_share_a_chunk(monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, 1000)
    for number in range(10):
        Path(f"{number}.txt").write_text(str(number) * 300)
    source = Source(files=("*.txt",))
    parts = [[record.value[0] for record in read_chunk(source, chunk)] for chunk in chunks(source)]
    assert parts == [["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"], ["9"]]


def test_globs_are_sorted_and_names_are_taken_literally():
    for name in ("b.txt", "a.txt", "[a].txt", "deep/er/c.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    assert read("deep/**/*.txt", "?.txt") == ["deep/er/c.txt", "a.txt", "b.txt"]
    assert read("[a].txt") == ["[a].txt"]


@pytest.mark.parametrize(
    ("folder", "others"),
    [
        ("d [v2]", ("d v",)),
        ("[1]", ("1",)),
        ("a[b]/[c]", ("ab/c",)),
        ("v*", ("vX",)),
        ("what?", ("whats",)),
        ("[!a]", ("b",)),
    ],
)
@pytest.mark.parametrize("pattern", ["*.txt", "**/*.txt", "[x]*.txt", "x?.txt"])
def test_a_folder_that_exists_is_that_folder_in_a_glob(folder: str, others: tuple[str, ...], pattern: str):
    for name in (folder, *others):
        Path(name).mkdir(parents=True)
        Path(name, "x1.txt").write_text(name)
    for begin in ("", "./", f"{Path.cwd()}/"):
        assert read(f"{begin}{folder}/{pattern}") == [folder]


def test_brackets_stand_for_themselves_where_nothing_matches_otherwise():
    for name in ("part[1]-a.txt", "part[1]-b.txt", "part2-a.txt"):
        Path("x", "d [v2]", name).parent.mkdir(parents=True, exist_ok=True)
        Path("x", "d [v2]", name).write_text(name)
    assert read("x/d [v2]/part[1]-*.txt") == ["part[1]-a.txt", "part[1]-b.txt"]
    assert read("x/*/part[1]-a.txt", "*/d [v2]/part2*.txt") == ["part[1]-a.txt", "part2-a.txt"]
    assert read("x/*/part[2]-*.txt") == ["part2-a.txt"]


def test_documents_are_read_one_at_a_time():
    write_lines("a.jsonl", '{"text": "x"}', "broken")
    found = read_records(Source(files=("a.jsonl",)))
    assert next(found).value == "x"
    with pytest.raises(UserError, match=r"^a\.jsonl, line 2: not JSON"):
        next(found)


def test_a_pattern_without_files_is_named(tmp_path: Path):
    Path("folder").mkdir()
    with pytest.raises(UserError, match=r"\*\.txt matches no file in "):
        list_files(["*.txt"])
    with pytest.raises(UserError, match=r"folder matches no file in .*\n.*folder/\*"):
        list_files(["folder"])
    with pytest.raises(UserError, match=r'a list, \["a\.txt", "b\.txt"\]\.$'):
        list_files(["a.txt, b.txt"])


def test_what_is_no_file_is_named_and_never_skipped(monkeypatch: pytest.MonkeyPatch):
    Path("a.txt").write_text("x")
    Path("b.txt").symlink_to("gone")
    Path("folder.txt").mkdir()
    with pytest.raises(UserError, match=r"b\.txt is a broken link"):
        list_files(["*.txt"])
    Path("b.txt").unlink()
    os.mkfifo("b.txt")
    for name in ("*.txt", "b.txt"):
        with pytest.raises(UserError, match=r"b\.txt is not a file, but a pipe or a device"):
            list_files([name])
    Path("b.txt").unlink()
    assert list_files(["*.txt"]) == [Path("a.txt")]

    def refused(path: str) -> bool:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os.path, "isfile", refused)
    with pytest.raises(UserError, match=r"a\.txt cannot be read: .*Permission denied"):
        list_files(["a.txt"])


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/*.txt", "*/*/*.txt", "a/**/*.txt"])
def test_a_folder_that_is_closed_is_named_and_never_skipped(pattern: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("a/b", "a/closed"):
        Path(name).mkdir(parents=True)
        Path(f"{name}/x.txt").write_text("x")
    Path("a/x.txt").write_text("x")
    assert list_files([pattern])
    closed = "a/" if pattern == "*/*.txt" else "a/closed/"
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed)
    with pytest.raises(UserError, match=f"{closed} cannot be listed"):
        list_files([pattern])


def test_an_unknown_kind_of_file_is_named():
    Path("a.tsx").write_text("x")
    with pytest.raises(UserError, match=r"a\.tsx is of an unknown type\n.*\.txt, \.jsonl, .*\.csv, .*\.parquet"):
        list_files(["a.tsx"])


def test_a_file_named_twice_is_refused():
    Path("a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt is named more than once"):
        list_files(["*.txt", str(Path("a.txt").absolute())])
    with pytest.raises(UserError, match="hf:a is named more than once"):
        refuse_repeated(list_files(["hf:a", "hf:a"]), "")


def test_reading_text_loads_no_library_of_tables():
    Path("a.txt").write_text("x")
    code = """
import sys
from camelid.data.config import Source
from camelid.data.readers.sources import read_records
assert [record.value for record in read_records(Source(files=("a.txt",)))] == ["x"]
assert not {"pyarrow", "datasets", "zstandard", "pandas"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
