import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import camelid
from camelid.data.config import Source
from camelid.data.preparation import mindformers
from camelid.data.preparation.examples import Example, make_encoder
from camelid.data.readers.records import Record
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer, load_tokenizer
from text.tiny import BOS, EOS, VOCAB_SIZE, save_byte_tokenizer


@pytest.fixture(scope="module")
def llama(assets: Path) -> Tokenizer:
    return load_tokenizer(assets / "tokenizers" / "llama2")


def encode(tokenizer: Tokenizer, values: list[Any], **options: Any) -> list[list[Example]]:
    records = [Record(value, f"x.jsonl, line {number}") for number, value in enumerate(values, start=1)]
    return make_encoder(Source(files=("x",), **options), tokenizer)(records)


def tokens(found: list[list[Example]]) -> list[list[list[int]]]:
    return [[example.tokens.tolist() for example in group] for group in found]


def refused(tokenizer: Tokenizer, values: list[Any], **options: Any) -> tuple[list[int], list[str]]:
    """How many documents each record gave, and what was said of the others."""
    errors: list[UserError] = []
    records = [Record(value, f"line {number}") for number, value in enumerate(values, start=1)]
    found = make_encoder(Source(files=("x",), **options), tokenizer, refuse=errors.append)(records)
    return [len(group) for group in found], [error.problem for error in errors]


# text -----------------------------------------------------------------------------------------


def test_a_text_stands_between_bos_and_eos(tokenizer: Tokenizer):
    found = encode(tokenizer, ["ab", "c"])
    assert tokens(found) == [[[BOS, *b"ab", EOS]], [[BOS, *b"c", EOS]]]
    assert [example.weights.tolist() for (example,) in found] == [[0, 1, 1, 1], [0, 1, 1]]
    assert found[0][0].tokens.dtype == np.int32
    assert found[0][0].weights.dtype == np.float32


def test_bos_and_eos_can_be_chosen(tokenizer: Tokenizer, tmp_path: Path):
    assert tokens(encode(tokenizer, ["ab"], add_bos=False, add_eos=False)) == [[[*b"ab"]]]
    without = load_tokenizer(save_byte_tokenizer(tmp_path / "t", adds_bos=False))
    assert tokens(encode(without, ["ab"])) == [[[*b"ab", EOS]]]
    assert tokens(encode(without, ["ab"], add_bos=True)) == [[[BOS, *b"ab", EOS]]]
    bare = load_tokenizer(save_byte_tokenizer(tmp_path / "u", adds_bos=False, config={}))
    with pytest.raises(UserError, match="EOS was requested"):
        encode(bare, ["ab"])


def test_a_text_without_tokens_gives_no_document(tokenizer: Tokenizer):
    assert tokens(encode(tokenizer, ["", "a", ""])) == [[], [[BOS, *b"a", EOS]], []]
    assert encode(tokenizer, []) == []


def test_the_batch_is_what_the_tokenizer_gives_one_by_one(llama: Tokenizer, assets: Path):
    texts = (assets / "data/wikitext-2/valid.txt").read_text(encoding="utf-8").splitlines()[:200]
    for text, group in zip(texts, encode(llama, texts), strict=True):
        ids = llama.encode(text, bos=True, eos=True)
        assert [example.tokens.tolist() for example in group] == ([ids] if len(ids) > 2 else [])


# EasyLM's run ---------------------------------------------------------------------------------


def test_the_batches_of_easylms_run_are_reproduced(assets: Path, stories: Path):
    import sentencepiece

    golden = json.loads((assets / "golden/easylm/training_run.json").read_text())
    told = golden["data"]
    texts = [json.loads(line)["text"] for line in (assets / "golden/easylm/train.jsonl").read_text().splitlines()]
    found = encode(load_tokenizer(stories), [{"text": text} for text in texts], kind="fields", fields=told["fields"])
    steps, size = len(golden["steps"]), told["batch_size"] * told["seq_length"]
    stream = np.resize(np.concatenate([example.tokens for (example,) in found]), steps * size + 1)
    weights = np.resize(np.concatenate([example.weights for (example,) in found]), steps * size + 1)

    # Its own rules, on the library that it used.
    model = sentencepiece.SentencePieceProcessor(model_file=str(stories / "tokenizer.model"))
    once = [[model.bos_id(), *model.encode(text), model.eos_id()] for text in texts]
    assert stream.tolist() == np.resize([token for ids in once for token in ids], steps * size + 1).tolist()
    assert (
        weights.tolist() == np.resize([float(i > 0) for ids in once for i, _ in enumerate(ids)], len(stream)).tolist()
    )

    # The loss and the accuracy that it logged for its first batch, whose parameters are those of this model.
    batch = [
        array.reshape(told["batch_size"], -1) for array in (stream[:size], stream[1 : size + 1], weights[1 : size + 1])
    ]
    held, targets, learnt = batch
    logits = np.asarray(camelid.load(stories).logits(held), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, targets[..., None], -1)[..., 0]
    right = logits.argmax(-1) == targets
    first = golden["steps"][0]
    means = [np.mean((values * learnt).sum(-1) / learnt.sum(-1)) for values in (losses, right)]
    np.testing.assert_allclose(means, [first["loss"], first["accuracy"]], rtol=1e-5)


# GSM8K ----------------------------------------------------------------------------------------


def test_gsm8k_is_what_llama_2_jax_trains_on(llama: Tokenizer, assets: Path):
    lines = (assets / "data/gsm8k/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:300]]
    for row, (example,) in zip(rows, encode(llama, rows, kind="gsm8k"), strict=True):
        prompt = llama.encode(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{row['question']}\n\n### Response:\n",
            bos=True,
        )
        answer = llama.encode(row["answer"].replace("#### ", "Final answer:\n"), bos=False, eos=True)
        assert example.tokens.tolist() == prompt + answer
        assert example.weights.tolist() == [0.0] * len(prompt) + [1.0] * len(answer)
    assert "Final answer:\n72" in llama.decode(encode(llama, rows[:1], kind="gsm8k")[0][0].tokens)


# chats ----------------------------------------------------------------------------------------


def learnt(tokenizer: Tokenizer, example: Example) -> list[str]:
    """The text of each run of tokens that the loss counts."""
    runs = np.split(example.tokens, np.flatnonzero(np.diff(example.weights > 0)) + 1)
    return [tokenizer.decode(ids, skip_specials=False) for ids in runs[1 - (example.weights[0] > 0) :: 2]]


def test_no_row_of_the_instruction_data_is_masked(llama: Tokenizer, assets: Path):
    rows = json.loads((assets / "data/instruct/rasbt-instruction-data.json").read_text())[::3]
    found = encode(llama, rows, kind="instruct", template="alpaca")
    assert [len(group) for group in found] == [1] * len(rows)
    for row, (example,) in zip(rows, found, strict=True):
        assert learnt(llama, example) == [f"{row['output']}</s>"]
        assert row["instruction"] in llama.decode(example.tokens)
        assert row["input"] in llama.decode(example.tokens)


def test_no_chat_is_masked(llama: Tokenizer, assets: Path):
    rows = json.loads((assets / "data/chat/dummy_conversation.json").read_text())
    for template, some in (("vicuna_v1.1", rows), ("llama2", rows[::9]), ("mistral", rows[::9])):
        for row, (example,) in zip(some, encode(llama, some, kind="chat", template=template), strict=True):
            said = [message["value"] for message in row["conversations"] if message["from"] == "gpt"]
            runs = learnt(llama, example)
            assert [text.removesuffix("</s>").strip() for text in runs] == [text.strip() for text in said]
            assert all(text.endswith("</s>") for text in runs)


def test_the_default_learns_what_mindformers_learns_and_loses_nothing(llama: Tokenizer, assets: Path):
    rows = json.loads((assets / "data/chat/dummy_conversation.json").read_text())[::5]
    theirs = mindformers.qa_samples([mindformers.qa_text(row) for row in rows], llama, 2048)
    for (ours,), sample in zip(encode(llama, rows, kind="chat", template="vicuna_v1.1"), theirs, strict=True):
        assert learnt(llama, ours) == learnt(llama, Example(sample.tokens, sample.weights))
    lost = {"conversations": [turn("human", "Who speaks?"), turn("gpt", "Here: ASSISTANT: me.")]}
    assert mindformers.count_lost([lost], llama, 2048) == 1
    ((ours,),) = encode(llama, [lost], kind="chat", template="vicuna_v1.1")
    assert learnt(llama, ours) == ["Here: ASSISTANT: me.</s>"]


def turn(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def test_the_loss_can_be_of_all_words_and_messages_weigh_what_they_say(tokenizer: Tokenizer):
    row = chat("ab", "cd")
    (everything,) = encode(tokenizer, [row], kind="chat", template="chatml", loss="all")[0]
    assert everything.weights.all()
    row["messages"][1]["weight"] = 0.25
    (example,) = encode(tokenizer, [row], kind="chat", template="chatml")[0]
    assert set(example.weights.tolist()) == {0.0, 0.25}
    row["messages"][1]["weight"] = 0
    with pytest.raises(UserError, match=r"x\.jsonl, line 1: none of the .* tokens has a loss"):
        encode(tokenizer, [row], kind="chat", template="chatml")


def test_the_checkpoints_own_template_is_the_default(tmp_path: Path):
    own = "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": own}
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path / "t", config=config))
    (example,) = encode(tokenizer, [chat("x", "y")], kind="chat")[0]
    assert example.tokens.tolist() == [*b"ux", EOS, *b"ay", EOS]
    assert example.weights.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_template_that_asks_for_the_date_gives_the_same_every_day(tmp_path: Path):
    own = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": own}
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path / "t", config=config))
    (example,) = encode(tokenizer, [chat("x", "y")], kind="chat")[0]
    assert example.tokens.tolist() == [*b"2024-07-26x", EOS, *b"y", EOS]


def test_a_chat_without_a_template_or_of_an_unknown_one_says_so_before_any_row(tokenizer: Tokenizer):
    with pytest.raises(UserError, match="has no chat template"):
        encode(tokenizer, [], kind="chat")
    with pytest.raises(UserError, match="'vicuna'"):
        encode(tokenizer, [], kind="instruct", template="vicuna")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "none of the .* tokens has a loss"),
        ({"messages": [{"role": "user", "content": "x", "name": "Tim"}]}, r"messages\[0\] has name = 'Tim'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role is 'robot'"),
        ({"messages": []}, "messages is"),
        ({"text": "x"}, "no field 'messages' or 'conversations'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "none of the .* tokens has a loss"),
        ("x", "'x' has no keys"),
    ],
)
def test_a_bad_chat_is_named_with_its_place(tokenizer: Tokenizer, row: Any, what: str):
    with pytest.raises(UserError, match=f"x.jsonl, line 2: .*{what}"):
        encode(tokenizer, [chat("a", "b"), row, chat("a", "b")], kind="chat", template="chatml")


# preference -----------------------------------------------------------------------------------


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ask", "chosen": "good", "rejected": "bad"},
        {"instruction": "ask", "input": "", "output": "other", "chosen": "good", "rejected": "bad"},
        {"prompt": [message("user", "ask")], "chosen": "good", "rejected": "bad"},
        {
            "prompt": [message("user", "ask")],
            "chosen": [message("assistant", "good")],
            "rejected": [message("assistant", "bad")],
        },
        {
            "prompt": "ask",
            "chosen": [message("user", "ask"), message("assistant", "good")],
            "rejected": [message("user", "ask"), message("assistant", "bad")],
        },
        {
            "chosen": [message("user", "ask"), message("assistant", "good")],
            "rejected": [message("user", "ask"), message("assistant", "bad")],
        },
    ],
)
def test_a_preference_is_two_documents_and_its_prompt_is_not_learnt(tokenizer: Tokenizer, row: dict[str, Any]):
    (pair,) = encode(tokenizer, [row], kind="preference", template="zephyr")
    expected = encode(tokenizer, [chat("ask", "good"), chat("ask", "bad")], kind="chat", template="zephyr")
    for example, (alike,) in zip(pair, expected, strict=True):
        assert example.tokens.tolist() == alike.tokens.tolist()
        assert example.weights.tolist() == alike.weights.tolist()
    assert [learnt(tokenizer, example) for example in pair] == [["good</s>"], ["bad</s>"]]


def test_answers_in_a_preferences_prompt_are_not_learnt(tokenizer: Tokenizer):
    prompt = chat("ask", "told", "again")["messages"]
    (pair,) = encode(
        tokenizer, [{"prompt": prompt, "chosen": "x", "rejected": "y"}], kind="preference", template="zephyr"
    )
    assert [learnt(tokenizer, example) for example in pair] == [["x</s>"], ["y</s>"]]


def test_no_row_of_the_preference_data_is_masked(llama: Tokenizer, assets: Path):
    rows = json.loads((assets / "data/instruct/rasbt-instruction-data-with-preference.json").read_text())
    rows = [row for index, row in enumerate(rows) if index % 5 == 0 or row["chosen"] == row["rejected"]]
    counts, problems = refused(llama, rows, kind="preference", template="alpaca")
    same = [row["chosen"] == row["rejected"] for row in rows]
    assert True in same
    assert counts == [0 if alike else 2 for alike in same]
    assert len(problems) == sum(same)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "chosen": "b"}, "no key 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "no key 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": 7}, "rejected: .*7"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen: .*empty"),
        ({"prompt": 7, "chosen": "a", "rejected": "b"}, "chosen: .*7"),
        ({"prompt": "a", "chosen": [], "rejected": []}, "chosen and rejected are equal"),
        (
            {"prompt": "q", "chosen": [message("user", "p"), message("assistant", "a")], "rejected": "b"},
            r"messages\[1\]",
        ),
    ],
)
def test_a_bad_preference_is_named(tokenizer: Tokenizer, row: dict[str, Any], what: str):
    with pytest.raises(UserError, match=f"x.jsonl, line 1: .*{what}"):
        encode(tokenizer, [row], kind="preference", template="zephyr")


# ids ------------------------------------------------------------------------------------------


def test_ids_are_taken_as_they_are(tokenizer: Tokenizer):
    found = encode(tokenizer, [np.array([5, 6, 7], np.uint16), np.empty(0, np.int64)], kind="tokens")
    assert tokens(found) == [[[5, 6, 7]], []]
    assert found[0][0].weights.tolist() == [0, 1, 1]
    assert found[0][0].tokens.dtype == np.int32


def test_weights_of_ids_are_taken_too(tokenizer: Tokenizer):
    ids, weights = np.array([1, 5, 6], np.int32), np.array([0, 0.5, 2], np.float32)
    ((example,),) = encode(tokenizer, [(ids, weights)], kind="tokens")
    assert example.tokens.tolist() == [1, 5, 6]
    assert example.weights.tolist() == [0, 0.5, 2]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("text", "'text' is not an array of ids"),
        (np.array([1.5]), "not an array of ids"),
        (np.array([[1, 2]]), "not an array of ids"),
        (np.array([1, VOCAB_SIZE]), f"ids from 1 to {VOCAB_SIZE}"),
        (np.array([-1, 2]), "ids from -1 to 2"),
    ],
)
def test_bad_ids_are_named(tokenizer: Tokenizer, value: Any, what: str):
    with pytest.raises(UserError, match=f"x.jsonl, line 2: .*{what}"):
        encode(tokenizer, [np.array([1, 2]), value], kind="tokens")


# bad rows -------------------------------------------------------------------------------------


def test_a_bad_row_is_named_among_good_ones(tokenizer: Tokenizer):
    rows = [{"question": "a", "answer": "b"}] * 7
    for bad, what in (
        ({"question": "a"}, "no key 'answer'"),
        ({"question": "a", "answer": "\udc00"}, "half a char"),
        (["x"], "has no keys"),
    ):
        with pytest.raises(UserError, match=f"x.jsonl, line 6: .*{what}"):
            encode(tokenizer, [*rows[:5], bad, *rows[5:]], kind="gsm8k")


def test_refused_rows_give_no_documents_and_the_others_theirs(tokenizer: Tokenizer):
    rows = [{"question": "a", "answer": str(number)} for number in range(100)]
    for bad in (3, 4, 50, 99):
        rows[bad] = {"question": "a"}
    counts, problems = refused(tokenizer, rows, kind="gsm8k")
    assert [number for number, count in enumerate(counts) if count == 0] == [3, 4, 50, 99]
    assert [problem.split(":")[0] for problem in problems] == ["line 4", "line 5", "line 51", "line 100"]
    assert set(counts) == {0, 1}


def test_a_row_that_teaches_nothing_is_named(tokenizer: Tokenizer):
    row = {"question": "a", "answer": ""}
    assert encode(tokenizer, [row], kind="gsm8k")
    with pytest.raises(UserError, match="line 1: none of the 142 tokens has a loss"):
        encode(tokenizer, [row], kind="gsm8k", add_eos=False)
