"""The kind of records is detected from their keys; what cannot be detected is an error that names the file."""

import json
from pathlib import Path
from typing import Any

import pytest

from camelid.data.config import Source
from camelid.data.detection import detect
from camelid.data.readers.sources import read_records
from camelid.errors import UserError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
INSTRUCT = {"instruction": "a", "input": "", "output": "b"}


def written(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("record", "preference", "options"),
    [
        ({"messages": CHAT}, False, {"kind": "chat"}),
        ({"id": "1", "conversations": [{"from": "human", "value": "a"}]}, False, {"kind": "chat"}),
        (INSTRUCT, False, {"kind": "instruct"}),
        (INSTRUCT | {"text": "a b"}, False, {"kind": "instruct"}),
        (INSTRUCT | {"chosen": "b", "rejected": "c"}, False, {"kind": "instruct"}),
        (INSTRUCT | {"chosen": "b", "rejected": "c"}, True, {"kind": "preference"}),
        (PAIR, True, {"kind": "preference"}),
        ({"question": "a", "answer": "1 + 1 = 2\n#### 2"}, False, {"kind": "gsm8k"}),
        ({"question": "a", "answer": "b"}, False, {"kind": "fields", "fields": "[question],answer"}),
        ({"prompt": "a", "completion": "b"}, False, {"kind": "fields", "fields": "[prompt],completion"}),
        ({"prompt": "a", "response": "b"}, False, {"kind": "fields", "fields": "[prompt],response"}),
        ({"text": "a", "meta": {"id": 1}}, False, {"kind": "text"}),
        ({"content": "a"}, False, {"kind": "text", "text_key": "content"}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_records_are_of_the_kind_that_their_keys_have(
    record: dict[str, Any], preference: bool, options: dict[str, Any], tmp_path: Path
):
    name = written(tmp_path / "a.jsonl", record, record)
    assert detect(name, preference) == options
    assert len(list(read_records(Source(files=(name,), **options)))) == 2


def test_the_type_of_a_file_counts_where_it_has_no_keys(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Once upon a time")
    assert detect(str(tmp_path / "a.txt")) == {"kind": "text"}
    (tmp_path / "b.csv").write_text("prompt,response\na,b\n")
    assert detect(str(tmp_path / "b.csv"))["fields"] == "[prompt],response"


@pytest.mark.parametrize(
    ("records", "preference", "problem", "advice"),
    [
        ([PAIR], False, "a.jsonl holds pairs of a chosen and a rejected answer", "Add --dpo"),
        ([INSTRUCT], True, "a.jsonl holds no preferences: its records have the keys 'instruction'", "prompt, chosen"),
        ([{"q": "a", "a": "b"}], False, "a.jsonl: its records have the keys 'q', 'a'", "--fields '[q],a'"),
        ([{"q": "a", "a": "b"}], False, "no known kind", "--text-key q"),
        ([INSTRUCT, {"messages": CHAT}], False, "a.jsonl, line 2: the record is of kind 'chat'", "a file of their own"),
    ],
)
def test_what_cannot_be_detected_is_an_error_that_names_the_file_and_the_option(
    records: list[Any], preference: bool, problem: str, advice: str, tmp_path: Path
):
    with pytest.raises(UserError) as raised:
        detect(written(tmp_path / "a.jsonl", *records), preference)
    assert problem in raised.value.problem
    assert advice in raised.value.advice


def test_files_of_a_glob_are_of_one_kind(tmp_path: Path):
    written(tmp_path / "a.jsonl", {"messages": CHAT})
    written(tmp_path / "b.jsonl", INSTRUCT)
    with pytest.raises(
        UserError, match=r"a\.jsonl and .*b\.jsonl are of different kinds: kind = 'chat', and kind = 'i"
    ):
        detect(str(tmp_path / "*.jsonl"))
    (tmp_path / "b.jsonl").unlink()
    assert detect(str(tmp_path / "*.jsonl")) == {"kind": "chat"}
