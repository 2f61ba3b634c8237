"""Reproduces MindFormers' llama_preprocess.py for WikiText and conversations, token for token, including its faults.

Its tokenizer is sentencepiece without special tokens, as in its first Llama release: `<unk>` in a text is five
characters. Its records have sequence_length + 1 tokens, because training takes inputs and targets from one record.
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


# In this order, because later rules apply to the output of earlier ones. The second matches only between slashes.
WIKITEXT = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"),
    # MindFormers strips within the pattern, which takes cubic time if nothing closes.
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
    """A conversation as MindFormers trains on it, without padding."""

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    """1 for tokens that MindFormers' labels keep, otherwise 0."""
    lost: bool
    """Whether its masking excludes the entire sample from the loss."""


def wiki_records(
    text: str, tokenizer: Tokenizer, sequence_length: int, repeat: int = 1
) -> Int32[np.ndarray, "records n"]:
    """Returns a WikiText file as records of sequence_length + 1 tokens, as `--dataset_type wiki` does.

    Each paragraph is enclosed in BOS and EOS, all paragraphs are concatenated `repeat` times, and an incomplete last
    record is dropped.
    """
    size = sequence_length + 1
    # MindFormers opens the file as text, in which every line break becomes \n.
    paragraphs = _cleaned(text.replace("\r\n", "\n").replace("\r", "\n")).split("\n\n")
    kept = [paragraph for paragraph in paragraphs if paragraph and not paragraph.strip().startswith("=")]
    encoded = [np.array(ids, np.int32) for ids in tokenizer.encode_batch(kept, bos=True, eos=True)]
    tokens = np.concatenate([np.empty(0, np.int32), *encoded * repeat])
    return tokens[: len(tokens) // size * size].reshape(-1, size)


def qa_text(record: Mapping[str, Any]) -> str:
    """Returns the text of a ShareGPT record in fastchat's vicuna_v1.1; raises UserError for an invalid message."""
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise UserError("no conversations", "Give each record a list of messages under the key 'conversations'.")
    turns = [_turn(message, index) for index, message in enumerate(messages)]
    skipped = 0 if turns[0][0] == "USER" else 1
    text = f"{SYSTEM} "
    for index, (role, words) in enumerate(turns[skipped:]):
        if role != ("USER", "ASSISTANT")[index % 2]:
            raise UserError(
                f"message {index + skipped} of conversations is from {role}, but roles must alternate",
                "Let human and gpt take turns.",
            )
        text += f"{role}: {words}{END if index % 2 else ' '}" if words else f"{role}:"
    return text


def qa_samples(texts: Sequence[str], tokenizer: Tokenizer, sequence_length: int) -> list[Sample]:
    """Returns samples of at most sequence_length + 1 tokens with MindFormers' masking, as `--dataset_type qa` does.

    The masking excludes an entire sample if its two ways of counting tokens disagree: if an answer contains
    " ASSISTANT: " or "</s>", the last turn has no answer, or a token has id 0. Longer samples are truncated, as since
    release 1.0; the first release failed for them.
    """
    rounds = [_rounds(text) for text in texts]
    prompts = [[_prompt(part) for part in parts] for parts in rounds]
    flat = [text for parts in (*rounds, *prompts) for text in parts if text is not None]
    encoded = iter(tokenizer.encode_batch(flat, bos=False, eos=False))
    bos, eos = tokenizer.encode("", bos=True, eos=True)
    answered = [[[*next(encoded), eos] for _ in parts] for parts in rounds]
    lengths = [[None if part is None else len(next(encoded)) for part in parts] for parts in prompts]
    return [_sample(bos, *pair, sequence_length + 1) for pair in zip(answered, lengths, strict=True)]


def count_lost(records: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, sequence_length: int) -> int:
    """Counts the ShareGPT records that its masking silently excludes from the loss."""
    return sum(qa_samples([qa_text(record)], tokenizer, sequence_length)[0].lost for record in records)


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
            "Write {'from': 'human' or 'gpt', 'value': text}; compat = 'mindformers' supports no other roles.",
        )
    return ROLES[role], words


def _rounds(text: str) -> list[str]:
    """The parts between ends of turns, up to the first empty one."""
    parts = text.split(END)
    return parts[: parts.index("")] if "" in parts else parts


def _prompt(part: str) -> str | None:
    """The text before the answer; None if there is not exactly one answer."""
    halves = part.split(ANSWERS)
    return halves[0] + ANSWERS if len(halves) == 2 else None


def _sample(bos: int, rounds: Sequence[list[int]], prompts: Sequence[int | None], size: int) -> Sample:
    tokens = np.array([bos, *(token for ids in rounds for token in ids)], np.int32)
    weights = np.ones(len(tokens), np.float32)
    weights[0] = 0
    end = 1
    for ids, prompt in zip(rounds, prompts, strict=True):
        if prompt is None:
            break
        # One less: the space that ends the prompt, tokenized by itself, is part of the first token of the answer here.
        weights[end : end + prompt - 1] = 0
        end += len(ids)
    weights[end:] = 0
    tokens, weights = tokens[:size], weights[:size]
    lost = end < size and end != np.count_nonzero(tokens != PADDING)
    return Sample(tokens, weights * (not lost), bool(lost))
