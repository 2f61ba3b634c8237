"""Words give what the library gives for whole texts, of every vocabulary for which they are used."""

import copy
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from camelid.text import words
from camelid.text.tokenizer import Tokenizer, load_tokenizer
from camelid.text.words import has_words

ALPHABET = [
    *" ▁\n\t.,'",
    "  ",
    "\n\n",
    " \n ",
    "the",
    " and",
    "</s>",
    "<unk>",
    "<0x0A>",
    "é",
    "你好",
    "🙂",
    "\u200b",
    "\0",
]


@pytest.fixture(scope="module")
def file(assets: Path) -> Path:
    return assets / "tokenizers" / "mistral-v1" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Tokenizer:
    return load_tokenizer(file)


@pytest.fixture(scope="module")
def texts(assets: Path) -> list[str]:
    names = (
        "wikitext-2/test.txt",
        "tinyshakespeare/input.txt",
        "gsm8k/test.jsonl",
        "tinystories/tinystories_sample.txt",
    )
    real = [(assets / "data" / name).read_text()[start : start + 20_000] for name in names for start in (0, 50_000)]
    real += [file.read_text() for file in sorted(assets.glob("evals/xcopa/*/val.*.jsonl"))]
    chance = random.Random(0)
    made = ["".join(chance.choices(ALPHABET, k=chance.randrange(40))) for _ in range(3000)]
    return ["", " ", "\n", "x" * 5000, *real, *made]


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def by_words(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    assert tokenizer.engine._words is not None
    return tokenizer.engine._words.encode(texts)


def test_the_ids_of_words_are_those_of_the_text(tokenizer: Tokenizer, texts: list[str], one_core: None):
    whole = [found.ids for found in tokenizer.engine._plain.encode_batch_fast(texts, add_special_tokens=False)]
    assert tokenizer.encode_batch(texts, bos=False) == whole
    assert by_words(tokenizer, texts) == whole


@pytest.mark.parametrize("legacy", [False, True])
def test_words_of_the_class_llama_are_its_texts(file: Path, texts: list[str], tmp_path: Path, legacy: bool):
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    llama = load_tokenizer(tmp_path)
    some = [*texts[:40], *texts[-800:], "  x", "▁x"]
    whole = [found.ids for found in llama.engine._plain.encode_batch_fast(some, add_special_tokens=False)]
    assert by_words(llama, some) == whole


@pytest.mark.parametrize(("most", "longest"), [(10, 32), (2**18, 2), (0, 0)])
def test_what_is_forgotten_is_found_again(
    tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch, most: int, longest: int
):
    whole = by_words(tokenizer, texts)
    monkeypatch.setattr(words, "MOST", most)
    monkeypatch.setattr(words, "LONGEST", longest)
    few = load_tokenizer(tokenizer.files[0])
    with ThreadPoolExecutor(4) as pool:
        batches = [texts[start : start + 50] for start in range(0, len(texts), 50)]
        assert [ids for found in pool.map(lambda batch: by_words(few, batch), batches) for ids in found] == whole
    known = few.engine._words._known
    assert all(len(word) <= longest for word in known)
    assert len(known) <= most + max(len(set(words.WORD.findall(" ".join(batch)))) for batch in batches) + 50


def change(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def changed(described: dict[str, Any]) -> None:
        for key in path[:-1]:
            described = described[key]
        described[path[-1]] = to

    return changed


@pytest.mark.parametrize(
    "changed",
    [
        change("normalizer", to=None),
        change("normalizer", "normalizers", to=[{"type": "Prepend", "prepend": "▁"}]),
        change("pre_tokenizer", to={"type": "Whitespace"}),
        change("model", "dropout", to=0.1),
        change("model", "byte_fallback", to=False),
        change("model", "ignore_merges", to=True),
        change("model", "vocab", "a▁b", to=32000),
        change("model", "vocab", "a\n", to=32000),
        change("model", "vocab", "\n▁", to=32000),
        lambda described: described["model"]["vocab"].pop("<0x0A>"),
        lambda described: described["added_tokens"][0].update(special=False),
    ],
)
def test_another_tokenizer_has_no_words(file: Path, changed: Callable[[dict[str, Any]], None]):
    sound = json.loads(file.read_bytes())
    assert has_words(tokenizers.Tokenizer.from_str(json.dumps(sound)))
    other = copy.deepcopy(sound)
    changed(other)
    assert not has_words(tokenizers.Tokenizer.from_str(json.dumps(other)))


def test_tokenizers_of_other_kinds_have_no_words(assets: Path, stories: Path):
    for path in (assets / "tokenizers" / "phi-2" / "tokenizer.json", stories / "tokenizer.json"):
        assert not has_words(tokenizers.Tokenizer.from_file(str(path)))
