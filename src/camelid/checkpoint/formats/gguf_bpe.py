"""Builds llama.cpp's vocabulary from a byte-level BPE or a SentencePiece BPE tokenizer.

llama.cpp has two tokenizer models for Llamas. "llama" is SentencePiece BPE: of all adjacent pairs that form a token,
the one with the highest score is merged first. "gpt2" is byte-level BPE: a text is split by patterns
(gguf_pretokenizers.py), and the bytes of each part are merged in the order of a list.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from camelid.checkpoint.containers.protobuf import fields
from camelid.checkpoint.formats.gguf_pretokenizers import PRE_TOKENIZERS, patterns_of
from camelid.checkpoint.formats.gguf_tokens import (
    ADVICE,
    BYTE,
    CONTROL,
    NORMAL,
    PROBES,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)
from camelid.errors import UserError
from camelid.text.backends import TokenizersBackend

# Byte-level BPE -------------------------------------------------------------------------


def from_byte_level(backend: TokenizersBackend, described: Mapping[str, Any], file: Path) -> Vocabulary:
    """Returns the vocabulary of a byte-level tokenizer.json (`described`).

    Raises UserError if llama.cpp has no pre-tokenizer that splits texts in the same way.
    """
    model = described["model"]
    patterns, ignore_merges = patterns_of(described["pre_tokenizer"]), bool(model.get("ignore_merges"))
    known = [pre for pre in PRE_TOKENIZERS if pre.patterns == patterns and pre.ignore_merges == ignore_merges]
    if not known:
        raise UserError(
            f"the pre-tokenizer of {file} has no equivalent in llama.cpp that camelid knows: "
            f"{json.dumps(described['pre_tokenizer'])[:500]}" + " with ignore_merges" * ignore_merges,
            ADVICE,
        )
    texts = {token: text for text, token in model["vocab"].items()}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    vocabulary = Vocabulary("gpt2", known[0].name, texts, dict.fromkeys(texts, NORMAL))
    vocabulary.merges = [" ".join(pair) for pair in pairs]
    vocabulary.add(described["added_tokens"])
    vocabulary.note_normalization({text: backend.normalized(text) for text in PROBES.values()}, "", file)
    return vocabulary


# SentencePiece BPE ----------------------------------------------------------------------


def from_byte_fallback(backend: TokenizersBackend, described: Mapping[str, Any], file: Path) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.json that was converted from a SentencePiece model.

    Raises UserError if it splits texts before merging, or does not merge all pairs that llama.cpp would merge.
    """
    model, pre_tokenizer = described["model"], described["pre_tokenizer"] or {}
    splits = pre_tokenizer.get("split", True) if pre_tokenizer.get("type") == "Metaspace" else bool(pre_tokenizer)
    if splits or model.get("ignore_merges"):
        raise UserError(
            f"the pre-tokenizer of {file} splits texts, and llama.cpp's does not: {json.dumps(pre_tokenizer)[:500]}",
            ADVICE,
        )
    texts = {token: text for text, token in model["vocab"].items()}
    vocabulary = Vocabulary("llama", "default", texts, {token: _type_from_text(text) for token, text in texts.items()})
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    scores = _scores([(left, right) for left, right in pairs], model["vocab"], described["added_tokens"], file)
    lowest = min(scores.values(), default=0.0) - 1
    vocabulary.scores = {
        token: scores.get(text, lowest) if vocabulary.types[token] == NORMAL else 0.0 for token, text in texts.items()
    }
    vocabulary.add(described["added_tokens"])
    if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
        vocabulary.types[unknown] = UNKNOWN
    _describe_spaces(vocabulary, {text: backend.normalized(text) for text in ("a", *PROBES.values())}, file)
    control = (token for token, token_type in vocabulary.types.items() if token_type == CONTROL)
    special = next((vocabulary.texts[token] for token in control), None)
    if special is not None:
        [apart], [alone] = backend.encode([f"{special}ab"], True), backend.encode(["ab"], True)
        if apart[1:] != alone:
            vocabulary.notes.append(
                f"llama.cpp prepends a space to a text after a special token, and {file.name} does not: the ids of "
                "chats differ by it"
            )
    return vocabulary


def _scores(
    pairs: Sequence[tuple[str, str]], vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], file: Path
) -> dict[str, float]:
    """Returns a score for each merged token, such that llama.cpp merges the same pairs in the same order.

    The pairs are in the order of the scores of the original model. Tokens whose pairs alternate had the same score.
    """
    last = {left + right: rank for rank, (left, right) in enumerate(pairs)}
    scores: dict[str, float] = {}
    group, end = 0, -1
    for rank, (left, right) in enumerate(pairs):
        if rank > end:  # all pairs of the tokens in the previous group have passed
            group -= 1
        end = max(end, last[left + right])
        scores.setdefault(left + right, float(group))
    listed, not_merged = set(pairs), {token["content"] for token in added}
    for text in vocab.keys() - not_merged:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair[0] in vocab and pair[1] in vocab and pair not in listed and not not_merged & {*pair}:
                raise UserError(
                    f"{file} does not merge {pair[0]!r} and {pair[1]!r}, although {text!r} is a token; llama.cpp does",
                    ADVICE,
                )
    return scores


def from_sentencepiece(model: Any, added: Sequence[Mapping[str, Any]], file: Path) -> Vocabulary:
    """Returns the vocabulary of a SentencePieceProcessor and of tokens that were added to it.

    Raises UserError if it is not a BPE model.
    """
    ids = range(len(model))
    texts = {token: model.id_to_piece(token) for token in ids}
    scores = {token: model.get_score(token) for token in ids}
    types = {token: _type_of(model, token) for token in ids}
    types |= dict.fromkeys(_user_defined(model.serialized_model_proto()), USER_DEFINED)
    if any(not scores[token].is_integer() for token in ids if types[token] == NORMAL):
        # The scores of BPE models are negated ranks, those of unigram models are log-probabilities.
        raise UserError(f"{file} is a unigram model; llama.cpp supports BPE models for Llamas", ADVICE)
    vocabulary = Vocabulary("llama", "default", texts, types, scores)
    vocabulary.add([token for token in added if types.get(token["id"], NORMAL) == NORMAL])
    for token, token_type in vocabulary.types.items():
        if token_type == USER_DEFINED:
            vocabulary.texts[token] = vocabulary.texts[token].replace(SPACE, " ")
    _describe_spaces(vocabulary, {text: model.normalize(text) for text in ("a", *PROBES.values())}, file)
    return vocabulary


def _type_of(model: Any, token: int) -> int:
    if model.is_unknown(token):
        return UNKNOWN
    if model.is_control(token):
        return CONTROL
    if model.is_unused(token):
        return UNUSED
    return BYTE if model.is_byte(token) else NORMAL


def _user_defined(proto: bytes) -> Iterator[int]:
    """Yields the ids of user-defined tokens, which the library does not expose (sentencepiece_model.proto)."""
    pieces = (span for number, span in fields(io.BufferedReader(io.BytesIO(proto)), range(len(proto))) if number == 1)
    for token, span in enumerate(pieces):
        if isinstance(span, range) and proto[span.start : span.stop].endswith(b"\x18\x04"):  # type = USER_DEFINED
            yield token


def _type_from_text(text: str) -> int:
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _describe_spaces(vocabulary: Vocabulary, normalized: Mapping[str, str], file: Path) -> None:
    """Sets the flags for spaces, and notes what llama.cpp does not normalize."""
    prefix = SPACE if normalized["a"].startswith(SPACE) else ""
    vocabulary.flags["add_space_prefix"] = bool(prefix)
    if normalized["a  b"] == prefix + "a▁b":
        vocabulary.flags["remove_extra_whitespaces"] = True  # which llama.cpp reads and ignores
    vocabulary.note_normalization(normalized, prefix, file)
