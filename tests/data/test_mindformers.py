import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camelid.data.config import Source
from camelid.data.preparation import mindformers
from camelid.data.preparation.examples import make_encoder
from camelid.data.preparation.mindformers import count_lost, qa_samples, qa_text, wiki_records
from camelid.data.readers.records import Record
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer, load_tokenizer
from text.tiny import BOS, EOS

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def llama(assets: Path) -> Tokenizer:
    return load_tokenizer(assets / "tokenizers" / "llama2")


def row(*values: str, first: str = "human") -> dict[str, Any]:
    names = ("human", "gpt") if first == "human" else ("gpt", "human")
    return {"conversations": [{"from": names[i % 2], "value": value} for i, value in enumerate(values)]}


# wiki -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the boys ' hats", "the boys' hats"),
        ("1 @-@ 2 @,@ 3 @.@ 4", "1-2,3.4"),
        ("a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"),
        ("( a ) [ b ] { c } \" d \" ' e '", "(a) [b] {c} \"d\" 'e'"),
        ("= = = = a = = = b = =", "==== a === b =="),
        ("3 \N{DEGREE SIGN} C", "3\N{DEGREE SIGN}C"),
        ("a \n b", "a\nb"),
        ("an N word 's", "an 1 word's"),
        # Its rule for quotes before numbers looks for slashes, so that it never helps.
        ("the ' 90s", "the ' 90s"),
        ("x /' 5/ y", "x /'[0-9]/ y"),
    ],
)
def test_wikitext_is_cleaned_rule_by_rule(text: str, expected: str):
    assert mindformers._cleaned(text) == expected


def test_what_is_not_closed_takes_no_time():
    began = time.thread_time()
    for text in ("(" + " " * 4000 + "x", "'" + "\t" * 4000):
        assert mindformers._cleaned(text) == text
    assert time.thread_time() - began < 2


def test_paragraphs_are_framed_laid_end_to_end_and_cut(tokenizer: Tokenizer):
    text = " \n = Title = \n \n ab \n c \n \n = = Part = = \n \n defg \n"
    stream = [BOS, *b"ab\nc", EOS, BOS, *b"defg\n", EOS]
    records = wiki_records(text, tokenizer, 3)
    assert records.dtype == np.int32
    assert records.tolist() == [stream[0:4], stream[4:8], stream[8:12]]
    assert wiki_records(text.replace("\n", "\r\n"), tokenizer, 3).tolist() == records.tolist()
    twice = stream + stream
    assert wiki_records(text, tokenizer, 4, repeat=2).tolist() == [twice[i : i + 5] for i in (0, 5, 10, 15, 20)]
    assert wiki_records("ab", tokenizer, 9).shape == (0, 10)


def test_a_whole_wikitext_is_what_sentencepiece_makes_of_it(assets: Path, llama: Tokenizer):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(assets / "tokenizers/llama2/tokenizer.model"))
    text = (assets / "data/wikitext-2/valid.txt").read_text(encoding="utf-8")[:100_000]
    stream = []
    for paragraph in mindformers._cleaned(text).split("\n\n"):
        if paragraph and not paragraph.strip().startswith("="):
            stream += [model.bos_id(), *model.encode(paragraph), model.eos_id()]
    records = wiki_records(text, llama, 512)
    assert records.shape == (len(stream) // 513, 513)
    assert records.ravel().tolist() == stream[: records.size]


# qa -------------------------------------------------------------------------------------------


def test_a_conversation_is_written_as_vicuna_does():
    assert qa_text(row("a", "b", "c", "d")) == f"{SYSTEM} USER: a ASSISTANT: b</s>USER: c ASSISTANT: d</s>"
    assert qa_text(row("a")) == f"{SYSTEM} USER: a "
    assert qa_text(row("hello", "a", "b", first="gpt")) == f"{SYSTEM} USER: a ASSISTANT: b</s>"
    assert qa_text(row("", "b")) == f"{SYSTEM} USER: ASSISTANT: b</s>".replace("USER: A", "USER:A")


def test_rounds_keep_their_eos_and_prompts_are_masked(tokenizer: Tokenizer):
    (sample,) = qa_samples([qa_text(row("a", "bc", "d", "e"))], tokenizer, 400)
    first, second = f"{SYSTEM} USER: a ASSISTANT: ".encode(), b"USER: d ASSISTANT: "
    assert sample.tokens.tolist() == [BOS, *first, *b"bc", EOS, *second, *b"e", EOS]
    # The blank before an answer is a byte of its own here, which its masking leaves to the answer.
    weights = [0] * len(first) + [1] * 4 + [0] * (len(second) - 1) + [1] * 3
    assert sample.weights.tolist() == weights
    assert not sample.lost


def test_answers_and_their_ends_are_learnt_with_the_real_tokenizer(assets: Path, llama: Tokenizer):
    rows = json.loads((assets / "data/chat/dummy_conversation.json").read_text())
    samples = qa_samples([qa_text(each) for each in rows], llama, 2048)
    for each, sample in zip(rows, samples, strict=True):
        answers = [message["value"] for message in each["conversations"] if message["from"] == "gpt"]
        learnt = np.split(sample.tokens, np.flatnonzero(np.diff(sample.weights)) + 1)[1::2]
        assert [llama.decode(ids) for ids in learnt] == answers
        assert all(ids[-1] == llama.eos_ids[0] for ids in learnt)
        assert not sample.lost
    assert count_lost(rows, llama, 2048) == 0


LOST = [
    row("Who speaks?", "Here: ASSISTANT: me."),
    row("How does it end?", "With </s> in a template."),
    row("Say nothing.", "Well.", "And you?"),
    row("hello", first="gpt"),
]


def test_its_masking_loses_whole_samples(llama: Tokenizer):
    samples = qa_samples([qa_text(each) for each in LOST], llama, 2048)
    assert [sample.lost for sample in samples] == [True] * len(LOST)
    assert not any(sample.weights.any() for sample in samples)
    assert count_lost([*LOST, row("a", "b")], llama, 2048) == len(LOST)


def test_a_token_of_id_zero_loses_the_sample(tokenizer: Tokenizer):
    (sample,) = qa_samples([qa_text(row("a", "x\0y"))], tokenizer, 400)
    assert sample.lost


def test_two_faults_may_outweigh_each_other(tokenizer: Tokenizer):
    unanswered = b"USER: c "
    (sample,) = qa_samples([qa_text(row("a", "\0" * (len(unanswered) + 1), "c"))], tokenizer, 400)
    assert not sample.lost
    assert sample.tokens[-len(unanswered) - 1 :].tolist() == [*unanswered, EOS]
    assert not sample.weights[-len(unanswered) - 1 :].any()


def test_only_tokens_within_the_row_are_counted(tokenizer: Tokenizer):
    # Its last round is zeros, which do not count, and the EOS that the row has no room for.
    answered = qa_text(row("a", "b"))
    end = len(answered) - len("</s>") + 2
    text = answered + "\0" * 3
    (whole,) = qa_samples([text], tokenizer, end + 3)
    assert len(whole.tokens) == end + 4
    assert whole.lost
    (cut,) = qa_samples([text], tokenizer, end + 2)
    assert not cut.lost
    assert cut.weights.any()


def test_a_sample_that_reaches_beyond_the_row_is_cut_and_kept(tokenizer: Tokenizer):
    text = qa_text(row("a", "bcdef"))
    length = len(text) - len("</s>") + 2
    (whole,) = qa_samples([text], tokenizer, length - 1)
    assert len(whole.tokens) == length
    (cut,) = qa_samples([text], tokenizer, length - 4)
    assert cut.tokens.tolist() == whole.tokens[:-3].tolist()
    assert cut.weights.tolist() == whole.weights[:-3].tolist()
    # What would lose it in a longer row does not where the counted tokens fill the row.
    (lucky,) = qa_samples([qa_text(row("a", "x\0y" + "z" * 50))], tokenizer, 200)
    assert not lucky.lost
    assert lucky.weights.any()


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({}, "no conversations"),
        ({"conversations": []}, "no conversations"),
        ({"conversations": ["x"]}, "message 0 of conversations is 'x'"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "message 0 of conversations is {'from': 'system'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "message 0 of"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "message 0 of"),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "human", "value": "y"}]},
            "message 1 of conversations is from USER",
        ),
    ],
)
def test_a_bad_conversation_is_named(bad: dict[str, Any], what: str):
    with pytest.raises(UserError, match=what):
        qa_text(bad)


# as a source ----------------------------------------------------------------------------------


def test_a_source_of_wikitext_gives_its_records(tokenizer: Tokenizer):
    source = Source(files=("x",), compat="mindformers")
    (found,) = make_encoder(source, tokenizer, sequence_length=3)([Record("= T =\n\nab\n\ncd", "x")])
    assert [example.tokens.tolist() for example in found] == [[BOS, *b"ab", EOS], [BOS, *b"cd", EOS]]
    assert [example.weights.tolist() for example in found] == [[0, 1, 1, 1]] * 2


def test_a_source_of_conversations_gives_its_samples_lost_ones_too(llama: Tokenizer):
    source = Source(files=("x",), kind="chat", compat="mindformers")
    records = [Record(each, f"x, row {i}") for i, each in enumerate([row("a", "b"), LOST[0]])]
    (kept,), (lost,) = make_encoder(source, llama, sequence_length=256)(records)
    assert llama.decode(kept.tokens[kept.weights > 0]) == "b"
    assert not lost.weights.any()
    with pytest.raises(UserError, match="x, row 1: message 0"):
        make_encoder(source, llama, sequence_length=256)([records[0], Record({"conversations": [1]}, "x, row 1")])


def test_what_would_be_ignored_is_refused(tokenizer: Tokenizer):
    with pytest.raises(UserError, match="no sequence_length"):
        make_encoder(Source(files=("x",), compat="mindformers"), tokenizer)
    lines, cleaned = Source(files=("x",), split="line"), Source(files=("x",), clean="wikitext")
    for source in (lines, cleaned):
        with pytest.raises(UserError, match="Leave both out"):
            make_encoder(replace(source, compat="mindformers"), tokenizer, sequence_length=3)
