"""What MindFormers' llama_preprocess.py makes of WikiText and of conversations, token for token, faults included.

Its tokenizer is sentencepiece alone, as in its first Llama release: `<unk>` in a text is five characters. Its records
have sequence_length + 1 tokens, because training takes inputs and targets from one record.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
ANSWERS = " ASSISTANT: "
END = "</s>"
PADDING = 0


def _stripped(found: re.Match[str]) -> str:
    return found[1] + found[2].strip() + found[3]


# In this order, because later ones see what earlier ones wrote. The second finds only what stands between slashes.
WIKITEXT = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"),
    # It strips by the pattern, which takes cubic time where nothing closes.
    *((re.compile(rf"(\{left})([^\{right}]*)(\{right})"), _stripped) for left, right in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


@dataclass(frozen=True, eq=False)
class Sample:
    """A conversation as MindFormers trains on it, without its padding."""

    tokens: Int32[np.ndarray, " n"]
    learnt: Float32[np.ndarray, " n"]
    """1 where its labels keep the token, else 0."""
    lost: bool
    """Whether its masking gave the whole sample up."""


def wiki_records(
    text: str, tokenizer: Tokenizer, sequence_length: int, repeat: int = 1
) -> Int32[np.ndarray, "records n"]:
    """A WikiText file as records of sequence_length + 1 tokens, its `--dataset_type wiki`.

    Every paragraph stands between BOS and EOS, all are laid end to end `repeat` times, and a last part of a record is
    dropped.
    """
    size = sequence_length + 1
    # It opened the file as text, where every kind of line break is one.
    paragraphs = _cleaned(text.replace("\r\n", "\n").replace("\r", "\n")).split("\n\n")
    kept = [paragraph for paragraph in paragraphs if paragraph and not paragraph.strip().startswith("=")]
    encoded = [np.array(ids, np.int32) for ids in tokenizer.encode_batch(kept, bos=True, eos=True)]
    tokens = np.concatenate([np.empty(0, np.int32), *encoded * repeat])
    return tokens[: len(tokens) // size * size].reshape(-1, size)


def qa_text(row: Mapping[str, Any]) -> str:
    """The one text that it makes of a ShareGPT row, as fastchat's vicuna_v1.1; the message at fault is named."""
    messages = row.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise UserError("no conversations", "give each row a list of messages under the key 'conversations'")
    turns = [_turn(message, index) for index, message in enumerate(messages)]
    skipped = 0 if turns[0][0] == "USER" else 1
    text = f"{SYSTEM} "
    for index, (role, words) in enumerate(turns[skipped:]):
        if role != ("USER", "ASSISTANT")[index % 2]:
            raise UserError(
                f"message {index + skipped} of conversations is from {role} where the other should speak",
                "let human and gpt take turns",
            )
        text += f"{role}: {words}{END if index % 2 else ' '}" if words else f"{role}:"
    return text


def qa_samples(texts: Sequence[str], tokenizer: Tokenizer, sequence_length: int) -> list[Sample]:
    """Its `--dataset_type qa`: samples of at most sequence_length + 1 tokens, with the labels of its own masking.

    That masking gives a whole sample up where its two ways of counting tokens disagree: an answer that says
    " ASSISTANT: " or "</s>", a last turn without an answer, a token of id 0. Longer samples are cut, as of release 1.0;
    the first one stopped at them.
    """
    rounds = [_rounds(text) for text in texts]
    prompts = [[_prompt(part) for part in parts] for parts in rounds]
    flat = [text for parts in (*rounds, *prompts) for text in parts if text is not None]
    encoded = iter(tokenizer.encode_batch(flat, bos=False, eos=False))
    bos, eos = tokenizer.encode("", bos=True, eos=True)
    answered = [[[*next(encoded), eos] for _ in parts] for parts in rounds]
    lengths = [[None if part is None else len(next(encoded)) for part in parts] for parts in prompts]
    return [_sample(bos, *pair, sequence_length + 1) for pair in zip(answered, lengths, strict=True)]


def count_lost(rows: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, sequence_length: int) -> int:
    """How many of these ShareGPT rows its masking gives up without a word."""
    return sum(qa_samples([qa_text(row)], tokenizer, sequence_length)[0].lost for row in rows)


def _cleaned(text: str) -> str:
    for pattern, written in WIKITEXT:
        if isinstance(pattern, str) and isinstance(written, str):
            text = text.replace(pattern, written)
        else:
            text = re.sub(pattern, written, text)
    return text


def _turn(message: Any, index: int) -> tuple[str, str]:
    role, words = (message.get("from"), message.get("value")) if isinstance(message, Mapping) else (None, None)
    if not isinstance(role, str) or role not in ROLES or not isinstance(words, str):
        raise UserError(
            f"message {index} of conversations is {message!r:.60}",
            "write {'from': 'human' or 'gpt', 'value': text}; compat = 'mindformers' knows no other roles",
        )
    return ROLES[role], words


def _rounds(text: str) -> list[str]:
    """The parts between ends of turns, up to the first empty one."""
    parts = text.split(END)
    return parts[: parts.index("")] if "" in parts else parts


def _prompt(part: str) -> str | None:
    """What stands before the answer; None if there is not exactly one answer."""
    halves = part.split(ANSWERS)
    return halves[0] + ANSWERS if len(halves) == 2 else None


def _sample(bos: int, rounds: Sequence[list[int]], prompts: Sequence[int | None], size: int) -> Sample:
    tokens = np.array([bos, *(token for ids in rounds for token in ids)], np.int32)
    learnt = np.ones(len(tokens), np.float32)
    learnt[0] = 0
    end = 1
    for ids, prompt in zip(rounds, prompts, strict=True):
        if prompt is None:
            break
        # One less, for the blank that ends the prompt by itself but begins the answer here.
        learnt[end : end + prompt - 1] = 0
        end += len(ids)
    learnt[end:] = 0
    tokens, learnt = tokens[:size], learnt[:size]
    lost = end < size and end != np.count_nonzero(tokens != PADDING)
    return Sample(tokens, learnt * (not lost), bool(lost))
