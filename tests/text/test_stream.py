import os.path
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from camelid.errors import UserError
from camelid.text.stream import StopStrings, TextStream
from camelid.text.tokenizer import Tokenizer, load_tokenizer
from text.tiny import BOS, VOCAB_SIZE, save_byte_tokenizer

FILES = (
    "models/stories260K/hf/tokenizer.json",
    "models/stories260K/hf/tokenizer.model",
    "tokenizers/llama2/tokenizer.model",
    "tokenizers/mistral-v1/tokenizer.json",
    "tokenizers/phi-2/tokenizer.json",
)
TEXTS = (
    "Once upon a time,  there was\n\n a llama.",
    "   leading spaces",
    "日本語のテキスト、한국어、ไทย、नमस्ते",
    "😀👩‍👩‍👧🇵🇪 é̂ ʘ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "mixed 日 x 😀 y\tz\x00",
)


@pytest.fixture(scope="module", params=FILES)
def tokenizer(request: pytest.FixtureRequest, assets: Path) -> Tokenizer:
    return load_tokenizer(assets / request.param)


@pytest.fixture
def bytewise(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(save_byte_tokenizer(tmp_path))


def stream(tokenizer: Tokenizer, prompt: Iterable[int], ids: Iterable[int]) -> list[str]:
    text = TextStream(tokenizer, prompt)
    return [*(text.push(token) for token in ids), text.flush()]


def added(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """What the ids add to the text of the prompt."""
    before, after = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    return after[len(os.path.commonprefix([before, after])) :]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_are_whole_and_join_to_it(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, [], ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_any_cut_between_prompt_and_answer_loses_nothing(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        prompt, rest = ids[:cut], ids[cut:]
        assert "".join(stream(tokenizer, prompt, rest)) == added(tokenizer, prompt, rest)


def test_random_ids_join_to_what_decoding_adds(tokenizer: Tokenizer):
    chance = random.Random(1)
    blanks = tokenizer.encode(" x  y", bos=False)
    for _ in range(1500):
        # Bytes, specials, blanks and everything else, so that runs of bytes break off anywhere.
        pools = [range(3), range(3, 259), range(tokenizer.vocab_size), blanks]
        ids = [chance.choice(chance.choices(pools, [1, 6, 4, 3])[0]) for _ in range(chance.randrange(16))]
        cut = chance.randrange(len(ids) + 1)
        prompt, rest = ids[:cut], ids[cut:]
        assert "".join(stream(tokenizer, prompt, rest)) == added(tokenizer, prompt, rest), (prompt, rest)


def test_text_comes_as_soon_as_it_is_certain(tokenizer: Tokenizer):
    ids = tokenizer.encode("a 日本 x 😀 y")
    text = TextStream(tokenizer)
    seen = ""
    for count, token in enumerate(ids, start=1):
        seen += text.push(token)
        in_a_run = tokenizer.backend.token_bytes(token) is not None and not tokenizer.backend.is_byte_level
        if not in_a_run:
            assert seen == tokenizer.decode(ids[:count]).rstrip("\ufffd")


def test_bytes_come_with_the_last_byte_of_a_character(bytewise: Tokenizer):
    assert stream(bytewise, [BOS], "é😀".encode()) == ["", "é", "", "", "", "😀", ""]
    assert stream(bytewise, [BOS], [0xC3, 0x41, 0xF0]) == ["", "\ufffdA", "", "\ufffd"]


def test_a_prompt_may_end_inside_a_character(bytewise: Tokenizer):
    first, second = "é".encode()
    assert stream(bytewise, [0x41, first], [second, 0x42]) == ["é", "B", ""]
    assert stream(bytewise, [0x41, first], [0x42]) == ["B", ""]


def test_an_id_costs_the_same_however_long_the_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    decoded: list[int] = []
    decode = tokenizer.backend.decode
    monkeypatch.setattr(tokenizer.backend, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    ids = tokenizer.encode("word 日本 " * 300)
    stream(tokenizer, ids, ids)
    assert sum(decoded) < 8 * len(ids)


def test_ids_outside_the_vocabulary_are_refused(bytewise: Tokenizer):
    with pytest.raises(UserError, match=f"{VOCAB_SIZE} is outside"):
        TextStream(bytewise).push(VOCAB_SIZE)


# Stop strings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_text_ends_before_the_first_stop_wherever_it_is_cut(seed: int):
    """And what is held back is the longest end of the text that could begin a stop, no more."""
    chance = random.Random(seed)
    text = "".join(chance.choice("ab ") for _ in range(60))
    stops = ["".join(chance.choice("ab ") for _ in range(chance.randint(3, 6))) for _ in range(3)]
    found = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    for _ in range(10):
        stream, shown, given = StopStrings(stops), "", 0
        while given < len(text):
            step = chance.randint(1, 5)
            shown += stream.push(text[given : given + step])
            given += step
            if stream.found:
                assert found is not None
                break
            held = text[len(shown) : min(given, len(text))]
            assert not held or any(stop.startswith(held) for stop in stops)
        assert stream.found == (found is not None)
        assert shown + stream.flush() == text[:found]


def test_a_stop_may_lie_across_pieces_and_begin_twice():
    stream = StopStrings(["aab"])
    assert [stream.push(piece) for piece in ("xa", "a", "a", "c", "aa", "by")] == ["x", "", "a", "aac", "", ""]
    assert stream.found
    assert stream.flush() == ""


def test_without_stops_nothing_is_held_back():
    stream = StopStrings([])
    assert stream.push("text") == "text"
