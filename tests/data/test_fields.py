import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camelid.data.config import Source
from camelid.data.preparation.examples import Example, make_encoder
from camelid.data.readers.records import Record
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer, load_tokenizer
from text.tiny import BOS, EOS, VOCAB_SIZE, save_byte_tokenizer

ROW = {
    "q": "ab",
    "a": "cd",
    "empty": "",
    "number": 7,
    "ids": base64.b64encode(np.array([1, 2], "<i4").tobytes()).decode(),
}


def encode(tokenizer: Tokenizer, fields: str | None, row: dict[str, Any] = ROW, **options: Any) -> Example:
    options = {"add_bos": False, "add_eos": False, **options}
    source = Source(files=("x",), kind="fields", fields=fields, **options)
    ((example,),) = make_encoder(source, tokenizer)([Record(row, "x.jsonl, line 3")])
    return example


def spelt(example: Example) -> str:
    """Tokens as characters, those without loss in small print: ^ and $ for BOS and EOS."""
    pairs = zip(example.tokens.tolist(), example.weights.tolist(), strict=True)
    return " ".join(
        {BOS: "^", EOS: "$"}.get(token, chr(token)) + {0.0: "0", 1.0: "1"}[weight] for token, weight in pairs
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("q", "a1 b1"),
        ("q,a", "a1 b1 c1 d1"),
        ("[q],a", "a0 b0 c1 d1"),
        ("q+a", "a1 b1  1 c1 d1"),
        ("[q+a],q", "a0 b0  0 c0 d0 a1 b1"),
        ("q+empty", "a1 b1  1"),
        ("q,empty,a", "a1 b1 c1 d1"),
        ("<|bos|>,[q],a,<|eos|>", "^1 a0 b0 c1 d1 $1"),
        ("[<|bos|>],q,[<|eos|>]", "^0 a1 b1 $0"),
        ("q,<|eos|>,a", "a1 b1 $1 c1 d1"),
        ("<|BOS|>,q,<|Eos|>", "^1 a1 b1 $1"),
        ("q,<|122|>", "a1 b1 z1"),
        ("[<|122|>],q", "z0 a1 b1"),
        ("q,{ids}", "a1 b1 \x011 \x021"),
        ("[{ids}],q", "\x010 \x020 a1 b1"),
        # Ours: text in quotes, beside which no space is put, and blanks around keys.
        ("q,'x'", "a1 b1 x1"),
        ("['x '+q+\"y\"],a", "x0  0 a0 b0 y0 c1 d1"),
        ("q+'+'+a", "a1 b1 +1 c1 d1"),
        (r"q,'\n\t\r\\\'\"'", "a1 b1 \n1 \t1 \r1 \\1 '1 \"1"),
        (" [ q ] , a ", "a0 b0 c1 d1"),
    ],
)
def test_every_clause_of_the_grammar(tokenizer: Tokenizer, fields: str, expected: str):
    assert spelt(encode(tokenizer, fields)) == expected


def test_bos_goes_without_loss_and_eos_with_it(tokenizer: Tokenizer):
    assert spelt(encode(tokenizer, "[q],a", add_bos=True, add_eos=True)) == "^0 a0 b0 c1 d1 $1"
    assert spelt(encode(tokenizer, "[q],a", add_bos=None, add_eos=True)) == "^0 a0 b0 c1 d1 $1"


def test_what_the_template_begins_and_ends_with_is_not_doubled(tokenizer: Tokenizer):
    assert spelt(encode(tokenizer, "[<|bos|>],q,[<|eos|>]", add_bos=True, add_eos=True)) == "^0 a1 b1 $0"
    assert spelt(encode(tokenizer, f"<|{BOS}|>,q,<|{EOS}|>", add_bos=None, add_eos=True)) == "^1 a1 b1 $1"


def test_a_text_is_tokenized_apart_from_the_next(assets: Path):
    real = load_tokenizer(assets / "tokenizers" / "llama2")
    example = encode(real, "[q],a")
    assert example.tokens.tolist() == [*real.encode("ab", bos=False), *real.encode("cd", bos=False)]
    assert example.weights.tolist() == [0.0] * len(real.encode("ab", bos=False)) + [1.0] * len(
        real.encode("cd", bos=False)
    )


def test_specials_in_a_value_are_text(tokenizer: Tokenizer):
    assert BOS not in encode(tokenizer, "q", {"q": "<s>"}).tokens


@pytest.mark.parametrize(("id_type", "ids"), [("u2", [3, 200]), ("i8", [0, VOCAB_SIZE - 1]), ("u4", [5])])
def test_encoded_ids_may_be_of_another_type(tokenizer: Tokenizer, id_type: str, ids: list[int]):
    row = {"x": base64.b64encode(np.array(ids, f"<{id_type}").tobytes()).decode(), "q": "a"}
    assert encode(tokenizer, f"[q],{{x:{id_type}}}", row).tokens.tolist() == [ord("a"), *ids]


def test_a_key_may_hold_a_colon_and_blanks(tokenizer: Tokenizer):
    row = {"x:y": ROW["ids"], "x:part2": ROW["ids"], "the question": "ab"}
    for key in ("x:y", "x:part2"):
        assert spelt(encode(tokenizer, f"{{{key}}},the question", row)) == "\x011 \x021 a1 b1"


def test_a_row_brings_its_own_template(tokenizer: Tokenizer):
    source = Source(files=("x",), kind="fields", fields_from_example="how", add_bos=False, add_eos=False)
    rows = [{"how": "[q],a", "q": "ab", "a": "c"}, {"how": "t", "t": "xy"}]
    encoded = make_encoder(source, tokenizer)([Record(row, "x") for row in rows])
    assert [spelt(example) for (example,) in encoded] == ["a0 b0 c1", "x1 y1"]


def test_prepended_text_is_part_of_the_first_text(tokenizer: Tokenizer):
    assert spelt(encode(tokenizer, "[q+a],a", prepend_text="> ")) == ">0  0 a0 b0  0 c0 d0 c1 d1"
    with pytest.raises(UserError, match=r"does not start with a text"):
        encode(tokenizer, "<|bos|>,q", prepend_text="> ")


@pytest.mark.parametrize(
    ("fields", "column", "what"),
    [
        ("", 1, "a key is missing"),
        ("q,,a", 3, "a key is missing"),
        ("q,", 3, "a key is missing"),
        ("q+", 3, "a key is missing"),
        ("[]", 2, "a key is missing"),
        ("{}", 2, "a key is missing"),
        ("[q,a]", 3, "brackets contain more than one field"),
        ("[q", 3, "closing bracket"),
        ("q]", 2, "a comma or the end"),
        ("[q]a", 4, "a comma or the end"),
        ("{ids", 5, "closing brace"),
        ("{ids:u9}", 6, "unknown type of ids, u9"),
        ("q,{a:b:int32}", 8, "unknown type of ids, int32"),
        ("{ids}+q", 6, "a comma or the end"),
        ("<|bos|>+q", 8, "a comma or the end"),
        ("q,<|bos", 3, "not closed"),
        ("q,<|nonsense|>", 3, r"no <\|nonsense\|>"),
        ("<|258|>", 1, r"no <\|258\|>"),
        ("<|-1|>", 1, r"no <\|-1\|>"),
        (f"<|{'9' * 5000}|>", 1, "the tokenizer has no"),
        ("q,'ab", 3, "not closed"),
        (r"q,'a\x'", 6, "unknown escape"),
        ("q,'a\\", 6, "unknown escape"),
        ("q,'\ud83d'", 4, "an unpaired surrogate"),
        ("q\n,,a", 4, "a key is missing"),
    ],
)
def test_an_error_points_at_the_character(tokenizer: Tokenizer, fields: str, column: int, what: str):
    with pytest.raises(UserError, match=what) as caught:
        encode(tokenizer, fields)
    problem, shown, caret = caught.value.problem.splitlines()
    assert f"character {column}:" in problem
    assert caret == " " * (4 + column - 1) + "^"
    assert len(shown) == 4 + len(fields)


def test_specials_that_the_tokenizer_lacks_are_named(tmp_path: Path):
    bare = load_tokenizer(save_byte_tokenizer(tmp_path / "bare", adds_bos=False, config={}))
    for special in ("<|bos|>", "<|eos|>"):
        with pytest.raises(UserError, match="the tokenizer has no"):
            encode(bare, special)


@pytest.mark.parametrize(
    ("fields", "row", "what"),
    [
        ("q", {"p": "x"}, "no key 'q', only 'p'"),
        ("q", {}, "no key 'q', only an empty record"),
        ("number", ROW, "key 'number' is 7, not a string"),
        ("{q}", {"q": "%%"}, "key 'q' is not base64 of i4"),
        ("{q}", {"q": "AAA="}, "key 'q' is not base64 of i4"),
        ("{q}", {"q": "/////w=="}, "key 'q' holds id -1"),
        ("{q:u2}", {"q": "AgE="}, "key 'q' holds id 258"),
        ("q", {"q": "\ud83d"}, "half a character"),
        ("[q]", {"q": "ab"}, "none of the .* tokens has a loss"),
        ("<|bos|>,[q]", {"q": "ab"}, "none of the .* tokens has a loss"),
        ("[q],a", {"q": "ab", "a": ""}, "none of the .* tokens has a loss"),
    ],
)
def test_a_bad_row_is_named(tokenizer: Tokenizer, fields: str, row: dict[str, Any], what: str):
    with pytest.raises(UserError, match=f"x.jsonl, line 3: .*{what}"):
        encode(tokenizer, fields, row)


def test_a_bad_template_of_a_row_is_named_with_its_place(tokenizer: Tokenizer):
    with pytest.raises(UserError, match=r"x.jsonl, line 3: fields: .*character 2"):
        encode(tokenizer, None, {"how": "q]"}, fields_from_example="how")
