"""Meta's tokenizer.model of Llama 3, against tiktoken itself and against transformers."""

import base64
import json
import random
import shutil
from pathlib import Path

import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from camelid.errors import UserError
from camelid.text.tiktoken import PATTERN, special_tokens
from camelid.text.tokenizer import Tokenizer, load_tokenizer, portable

RANKS = "tokenizers/tiny-tiktoken/tiktoken_small.model"
RELEASED = {
    "3": ("meta-llama__Meta-Llama-3-8B.json", "Meta-Llama-3-8B.params.json"),
    "3 Instruct": ("meta-llama__Meta-Llama-3-8B.with-template.json", "Meta-Llama-3-8B-Instruct.params.json"),
    "3.1": ("meta-llama__Llama-3.1-8B.json", "Llama-3.1-8B.params.json"),
    "3.2": ("meta-llama__Llama-3.2-3B-Instruct.json", None),
}


@pytest.fixture
def folder(assets: Path, tmp_path: Path) -> Path:
    shutil.copyfile(assets / RANKS, tmp_path / "tokenizer.model")
    return tmp_path


@pytest.fixture
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def metas(file: Path) -> tiktoken.Encoding:
    """As Meta's code reads it."""
    ranks = load_tiktoken_bpe(str(file))
    specials = {text: len(ranks) + i for i, text in enumerate(special_tokens(file.parent))}
    return tiktoken.Encoding(file.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def texts(assets: Path, count: int) -> list[str]:
    """Lines of an encyclopedia, and random runs of what byte pairs may be made of in more than one way."""
    lines = (assets / "data/wikitext-2/valid.txt").read_text("utf-8").split("\n")
    chance = random.Random(0)
    alphabet = [
        "a",
        "aa",
        "ab",
        "the",
        " the",
        "\n",
        "\r\n",
        "  ",
        "\t",
        "1",
        "23",
        "'S",
        "'re",
        "é",
        "日本",
        "😀",
        "\x00",
        "?!",
    ]
    runs = ["".join(chance.choices(alphabet, k=chance.randrange(1, 60))) for _ in range(count // 2)]
    return [*lines[: count - len(runs)], *runs]


def test_ids_of_1000_texts_are_tiktokens(assets: Path, folder: Path, ours: Tokenizer):
    theirs = metas(folder / "tokenizer.model")
    many = texts(assets, 1000)
    assert len(many) == 1000
    ids = [theirs.encode(text, disallowed_special=()) for text in many]
    assert ours.encode_batch(many, bos=False) == ids
    assert [ours.decode(each) for each in ids] == [theirs.decode(each) for each in ids]


def test_a_text_that_is_a_token_is_that_token_even_if_no_merges_lead_to_it(tmp_path: Path):
    tokens = [*(bytes([byte]) for byte in range(256)), b"xyz"]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    (tmp_path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    theirs, ours = metas(tmp_path / "tokenizer.model"), load_tokenizer(tmp_path)
    for text in ("xyz", "xyzz", "xy", "xyz xyz"):
        assert ours.encode(text, bos=False) == theirs.encode(text)


def test_specials_are_parsed_and_bos_is_added_as_by_metas_code(folder: Path, ours: Tokenizer):
    theirs = metas(folder / "tokenizer.model")
    text = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|reserved_special_token_99|>"
    ids = theirs.encode(text, allowed_special="all")
    assert ours.encode(text, specials=True) == [2000, *ids]
    assert ours.encode(text, bos=False) == theirs.encode(text, disallowed_special=())
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (2000, (2001, 2008, 2009), 2256)
    assert ours.encode("x", eos=True)[-1] == 2001


@pytest.mark.parametrize("release", RELEASED)
def test_special_tokens_have_the_names_of_each_release(assets: Path, tmp_path: Path, release: str):
    config, params = RELEASED[release]
    if params is not None:
        shutil.copyfile(assets / "hf_files/params" / params, tmp_path / "params.json")
    else:
        (tmp_path / "params.json").write_text('{"use_scaled_rope": true, "rope_scaling_factor": 32.0}')
    held = json.loads((assets / "hf_files/chat_templates/tokenizer_configs" / config).read_text("utf-8"))
    expected = [entry["content"] for _, entry in sorted(held["added_tokens_decoder"].items(), key=lambda x: int(x[0]))]
    assert special_tokens(tmp_path) == expected


def test_the_written_tokenizer_json_gives_transformers_the_same_ids(assets: Path, folder: Path, ours: Tokenizer):
    import transformers

    made = folder / "made"
    made.mkdir()
    files = portable(ours.files, made)
    assert [file.name for file in files] == ["tokenizer.json", "tokenizer_config.json"]
    (made / "config.json").write_text('{"model_type": "llama"}')
    theirs, again = transformers.AutoTokenizer.from_pretrained(made), load_tokenizer(made)
    many = [*texts(assets, 100), "<|begin_of_text|>a<|eot_id|> b<|python_tag|>"]
    ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in many]
    assert ours.encode_batch(many, bos=False, specials=True) == ids
    assert again.encode_batch(many, bos=False, specials=True) == ids
    assert theirs("a")["input_ids"] == ours.encode("a") == again.encode("a")
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert len(theirs) == again.vocab_size == ours.vocab_size
    assert theirs.decode(ids[-1], skip_special_tokens=True) == ours.decode(ids[-1])


def test_tokens_of_tokenizer_config_take_the_place_of_metas(folder: Path):
    import transformers

    added = {str(2000 + i): {"content": text, "special": True} for i, text in enumerate(("<s>", "</s>", "<tool>"))}
    config = {"added_tokens_decoder": added, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = "<s>One <tool>day</s>"
    assert ours.encode(text, bos=False, specials=True) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode("x") == theirs("x")["input_ids"]
    assert ours.eos_ids == (2001,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:100] + lines[101:], "is damaged: byte 100 has no token"),
        (lambda lines: lines[:300] + lines[301:], "is damaged: its ranks are not 0 to 1998"),
        (lambda lines: [*lines[:7], b"!!!! 7", *lines[8:]], "tokenizer.model:8 is not a token with its rank"),
        (lambda lines: [*lines[:7], b"AAA= x", *lines[8:]], "tokenizer.model:8 is not a token with its rank"),
        (lambda lines: [*lines, b"AAAA"], "tokenizer.model:2001 is not a token with its rank"),
    ],
)
def test_a_damaged_list_of_ranks_is_named(folder: Path, change, message: str):
    file = folder / "tokenizer.model"
    file.write_bytes(b"\n".join(change(file.read_bytes().splitlines())))
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)
