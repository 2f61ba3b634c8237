import gzip
import json
from pathlib import Path

import pytest

from camelid.data.sources import list_files, read_documents
from camelid.errors import UserError


def read(*patterns: str, text_key: str = "text") -> list[str]:
    return list(read_documents(list_files(patterns), text_key))


def write_lines(name: str, *lines: str | bytes) -> None:
    Path(name).write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))


def test_a_text_file_is_one_document_kept_to_the_byte():
    Path("a.txt").write_bytes("one\r\n\ntwo\u2028é\n".encode())
    assert read("a.txt") == ["one\r\n\ntwo\u2028é\n"]


def test_the_last_ending_decides():
    Path("a.jsonl.txt").write_text("{")
    assert read("a.jsonl.txt") == ["{"]


def test_json_lines_are_a_document_each_and_blank_lines_none():
    records = [{"id": 1, "body": "line\u2028one\n"}, {"body": ""}, {"body": "😀"}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_lines("a.jsonl", lines[0], "", lines[1], "  \r", lines[2], "")
    with gzip.open("b.jsonl.gz", "wb") as file:
        file.write(Path("a.jsonl").read_bytes())
    assert read("a.jsonl", text_key="body") == ["line\u2028one\n", "", "😀"]
    assert read("b.jsonl.gz", text_key="body") == ["line\u2028one\n", "", "😀"]


def test_a_byte_order_mark_is_no_text():
    Path("a.txt").write_text("x", encoding="utf-8-sig")
    Path("a.jsonl").write_text('{"text": "y"}', encoding="utf-8-sig")
    assert read("a.txt", "a.jsonl") == ["x", "y"]


def test_globs_are_sorted_and_names_are_taken_literally():
    for name in ("b.txt", "a.txt", "[a].txt", "deep/er/c.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    assert read("deep/**/*.txt", "?.txt") == ["deep/er/c.txt", "a.txt", "b.txt"]
    assert read("[a].txt") == ["[a].txt"]


def test_documents_are_read_one_at_a_time():
    write_lines("a.jsonl", '{"text": "x"}', "broken")
    documents = read_documents(list_files(["a.jsonl"]), "text")
    assert next(documents) == "x"
    with pytest.raises(UserError):
        next(documents)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl, line 3: no JSON in UTF-8"),
        ('"text"', r"a\.jsonl, line 3: 'text' is no object"),
        ('{"body": 1, "id": 2}', r"a\.jsonl, line 3: no field 'text', only 'body', 'id'"),
        ('{"text": null}', r"a\.jsonl, line 3: field 'text' is None, no string"),
        (b'{"text": "\xff"}', r"a\.jsonl, line 3: no JSON in UTF-8"),
        ('{"text": "\\ud83d"}', r"a\.jsonl, line 3: field 'text' has half a character"),
    ],
)
def test_a_bad_line_is_named(line: str | bytes, message: str):
    write_lines("a.jsonl", '{"text": "\\ud83d\\ude00"}', "", line)
    with pytest.raises(UserError, match=message):
        read("a.jsonl")


def test_a_text_that_is_not_utf8_is_named_by_line():
    Path("a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    with pytest.raises(UserError, match=r"a\.txt, line 3: not UTF-8"):
        read("a.txt")


def test_a_file_that_cannot_be_read_is_named():
    Path("a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100)[:-12])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        read("a.jsonl.gz")
    Path("b.jsonl.gz").write_bytes(b'{"text": "x"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl\.gz cannot be read"):
        read("b.jsonl.gz")


def test_a_pattern_without_files_is_named(tmp_path: Path):
    Path("folder").mkdir()
    with pytest.raises(UserError, match=r"\*\.txt matches no file in "):
        list_files(["*.txt"])
    with pytest.raises(UserError, match=r"folder matches no file in .*\n.*folder/\*"):
        list_files(["folder"])


def test_an_unknown_kind_of_file_is_named():
    Path("a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a\.json ends in none of \.txt, \.jsonl, \.jsonl\.gz"):
        list_files(["a.json"])


def test_a_file_named_twice_is_refused():
    Path("a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt is named more than once"):
        list_files(["*.txt", str(Path("a.txt").absolute())])
