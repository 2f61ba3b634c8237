"""A tokenizer as metadata of a GGUF file, so that llama.cpp and Ollama need no other file.

llama.cpp has two kinds for Llamas. "llama" is sentencepiece's BPE: of all neighboring pairs that are a token together,
the one with the highest score is merged first. "gpt2" is byte-level BPE: a text is split by patterns (gguf_pre.py), and
the bytes of each part are merged in the order of a list. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camelid.checkpoint.containers.gguf_file import ARRAY, BOOL, FLOAT32, INT32, TEXT, UINT32
from camelid.checkpoint.containers.protobuf import fields
from camelid.checkpoint.folder import read_json
from camelid.checkpoint.formats.gguf_pretokenizers import PRE_TOKENIZERS, patterns_of
from camelid.errors import UserError
from camelid.interrupts import cleaned_up
from camelid.text.backends import TokenizersBackend
from camelid.text.tokenizer import TOKENIZER_FILES, Tokenizer, find_tokenizer

# Types of tokens (llama.h, llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"
NO_VOCABULARY: Mapping[str, tuple[int, Any]] = {"tokenizer.ggml.model": (TEXT, "no_vocab")}
WITHOUT = "Use --without-tokenizer, and llama.cpp opens the file for token ids alone, or use the format hf."
# What llama.cpp does to a text before it looks for tokens is next to nothing; other tokenizers do more.
PROBES: Mapping[str, str] = {
    "repeated spaces": "a  b",
    "a space at the beginning": " a",
    "a space at the end": "a ",
    "letters with combining accents": "e\u0301",
    "compatibility characters": "ﬁ①",
    "capital letters": "Ab",
}


@dataclass
class Vocabulary:
    """The tokens of a model, in llama.cpp's terms, by their ids."""

    model: str
    pre: str
    texts: dict[int, str]
    types: dict[int, int]
    scores: dict[int, float] = field(default_factory=dict)
    merges: list[str] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def tokenizer_metadata(
    companions: Sequence[Path], vocab_size: int
) -> tuple[dict[str, tuple[int, Any]], Tokenizer | None, tuple[str, ...]]:
    """Metadata of the tokenizer among a model's files, by key its type and value; the tokenizer; and notes for users.

    The vocabulary gets the size of the model's: what the tokenizer lacks is called [PAD0] and so on, as llama.cpp's
    converter does. Raises UserError for a tokenizer that llama.cpp would not compute.
    """
    with _loaded(companions) as tokenizer:
        if tokenizer is None:
            note = (
                "the GGUF file has no tokenizer inside, because there is none; llama.cpp opens it for token ids alone"
            )
            return dict(NO_VOCABULARY), None, (note,)
        vocabulary = _vocabulary(tokenizer)
        _fit(vocabulary, tokenizer, vocab_size)
        return _metadata(vocabulary, tokenizer, vocab_size), tokenizer, tuple(vocabulary.notes)


@contextlib.contextmanager
def _loaded(companions: Sequence[Path]) -> Iterator[Tokenizer | None]:
    """The tokenizer that a folder of these files has."""
    files = [file for file in companions if file.name in TOKENIZER_FILES and file.name != "generation_config.json"]
    if len(folders := {file.parent for file in files}) <= 1:
        yield find_tokenizer(folders.pop()) if folders else None
    else:
        with cleaned_up(), tempfile.TemporaryDirectory() as folder:
            for file in files:
                (Path(folder) / file.name).symlink_to(file.absolute())
            yield find_tokenizer(Path(folder))


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    backend, file = tokenizer.backend, _vocabulary_file(tokenizer)
    described = json.loads(backend.serialized) if isinstance(backend, TokenizersBackend) else None
    if file.suffix == ".model" and (pieces := _opened(file)) is not None:
        ids = sorted(backend.special_ids)
        specials = [{"id": token, "content": backend.decode([token]), "special": True} for token in ids]
        return _of_sentencepiece(pieces, specials if described is None else described["added_tokens"], file)
    assert isinstance(backend, TokenizersBackend)
    assert described is not None
    model = described["model"]
    kind = "byte-level BPE" if backend.is_byte_level else "BPE"
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        kind = str(model["type"])
    elif backend.is_byte_level and not model.get("byte_fallback"):
        return _of_byte_level(backend, described, file)
    elif model.get("byte_fallback"):
        return _of_byte_fallback(backend, described, file)
    raise UserError(f"{file} is a tokenizer of a kind that llama.cpp does not have for Llamas: {kind}", WITHOUT)


def _vocabulary_file(tokenizer: Tokenizer) -> Path:
    """The file that holds the tokens: tokenizer.json comes before tokenizer.model."""
    return next(
        (file for name in ("tokenizer.json", "tokenizer.model") for file in tokenizer.files if file.name == name),
        tokenizer.files[0],
    )


def _opened(file: Path) -> Any:
    """A SentencePieceProcessor; None for Llama 3's ranks, a file of the same name."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        return None


# Byte-level BPE -------------------------------------------------------------------------


def _of_byte_level(backend: TokenizersBackend, described: Mapping[str, Any], file: Path) -> Vocabulary:
    model = described["model"]
    patterns, ignores = patterns_of(described["pre_tokenizer"]), bool(model.get("ignore_merges"))
    known = [pre for pre in PRE_TOKENIZERS if pre.patterns == patterns and pre.ignore_merges == ignores]
    if not known:
        raise UserError(
            f"llama.cpp has no name that camelid knows for the pre-tokenizer of {file}: "
            f"{json.dumps(described['pre_tokenizer'])[:500]}" + " with ignore_merges" * ignores,
            WITHOUT,
        )
    texts = {token: text for text, token in model["vocab"].items()}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    vocabulary = Vocabulary("gpt2", known[0].name, texts, dict.fromkeys(texts, NORMAL))
    vocabulary.merges = [" ".join(pair) for pair in pairs]
    _add(vocabulary, described["added_tokens"])
    _note_normalization(vocabulary, {text: backend.normalized(text) for text in PROBES.values()}, "", file)
    return vocabulary


# Sentencepiece's BPE --------------------------------------------------------------------


def _of_byte_fallback(backend: TokenizersBackend, described: Mapping[str, Any], file: Path) -> Vocabulary:
    """Of a tokenizer.json that was made of sentencepiece's file."""
    model, pre_tokenizer = described["model"], described["pre_tokenizer"] or {}
    splits = pre_tokenizer.get("split", True) if pre_tokenizer.get("type") == "Metaspace" else bool(pre_tokenizer)
    if splits or model.get("ignore_merges"):
        raise UserError(
            f"the pre-tokenizer of {file} splits texts where llama.cpp does not: {json.dumps(pre_tokenizer)[:500]}",
            WITHOUT,
        )
    texts = {token: text for text, token in model["vocab"].items()}
    vocabulary = Vocabulary("llama", "default", texts, {token: _type_of_piece(text) for token, text in texts.items()})
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    scores = _scores([(left, right) for left, right in pairs], model["vocab"], described["added_tokens"], file)
    lowest = min(scores.values(), default=0.0) - 1
    vocabulary.scores = {
        token: scores.get(text, lowest) if vocabulary.types[token] == NORMAL else 0.0 for token, text in texts.items()
    }
    _add(vocabulary, described["added_tokens"])
    if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
        vocabulary.types[unknown] = UNKNOWN
    _describe_spaces(vocabulary, {text: backend.normalized(text) for text in ("a", *PROBES.values())}, file)
    special = next((text for text, kind in _added(vocabulary) if kind == CONTROL), None)
    if special is not None:
        [apart], [alone] = backend.encode([f"{special}ab"], True), backend.encode(["ab"], True)
        if apart[1:] != alone:
            vocabulary.notes.append(
                f"llama.cpp puts a space in front of a text that follows a special token, and {file.name} does not: "
                "the ids of chats differ in it"
            )
    return vocabulary


def _scores(
    pairs: Sequence[tuple[str, str]], vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], file: Path
) -> dict[str, float]:
    """A score for each token that merges make, by which llama.cpp merges the same pairs in the same order.

    Pairs are listed in the order of the scores that the tokens once had. Tokens whose pairs are listed in turns had
    the same.
    """
    last = {left + right: rank for rank, (left, right) in enumerate(pairs)}
    scores: dict[str, float] = {}
    group, end = 0, -1
    for rank, (left, right) in enumerate(pairs):
        if rank > end:  # no token of the group before has pairs left
            group -= 1
        end = max(end, last[left + right])
        scores.setdefault(left + right, float(group))
    listed, not_merged = set(pairs), {token["content"] for token in added}
    for text in vocab.keys() - not_merged:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair[0] in vocab and pair[1] in vocab and pair not in listed and not not_merged & {*pair}:
                raise UserError(
                    f"{file} does not merge {pair[0]!r} and {pair[1]!r} although {text!r} is a token; llama.cpp would",
                    WITHOUT,
                )
    return scores


def _of_sentencepiece(model: Any, added: Sequence[Mapping[str, Any]], file: Path) -> Vocabulary:
    ids = range(len(model))
    texts = {token: model.id_to_piece(token) for token in ids}
    scores = {token: model.get_score(token) for token in ids}
    types = {token: _type_in(model, token) for token in ids}
    types |= dict.fromkeys(_user_defined(model.serialized_model_proto()), USER_DEFINED)
    if any(not scores[token].is_integer() for token in ids if types[token] == NORMAL):
        # BPE models score tokens by their rank, unigram models by their log-probability.
        raise UserError(f"{file} is a unigram model; llama.cpp reads BPE models for Llamas", WITHOUT)
    vocabulary = Vocabulary("llama", "default", texts, types, scores)
    _add(vocabulary, [token for token in added if types.get(token["id"], NORMAL) == NORMAL])
    for token, kind in vocabulary.types.items():
        if kind == USER_DEFINED:
            vocabulary.texts[token] = vocabulary.texts[token].replace(SPACE, " ")
    _describe_spaces(vocabulary, {text: model.normalize(text) for text in ("a", *PROBES.values())}, file)
    return vocabulary


def _type_in(model: Any, token: int) -> int:
    if model.is_unknown(token):
        return UNKNOWN
    if model.is_control(token):
        return CONTROL
    if model.is_unused(token):
        return UNUSED
    return BYTE if model.is_byte(token) else NORMAL


def _user_defined(proto: bytes) -> Iterator[int]:
    """The ids of user-defined pieces, which the library does not tell (sentencepiece_model.proto, ModelProto)."""
    pieces = (span for number, span in fields(io.BufferedReader(io.BytesIO(proto)), range(len(proto))) if number == 1)
    for token, span in enumerate(pieces):
        if isinstance(span, range) and proto[span.start : span.stop].endswith(b"\x18\x04"):  # type = USER_DEFINED
            yield token


def _type_of_piece(text: str) -> int:
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _describe_spaces(vocabulary: Vocabulary, normalized: Mapping[str, str], file: Path) -> None:
    prefix = SPACE if normalized["a"].startswith(SPACE) else ""
    vocabulary.flags["add_space_prefix"] = bool(prefix)
    if normalized["a  b"] == prefix + "a▁b":
        vocabulary.flags["remove_extra_whitespaces"] = True  # llama.cpp reads and ignores it
    _note_normalization(vocabulary, normalized, prefix, file)


# Both -----------------------------------------------------------------------------------


def _add(vocabulary: Vocabulary, added: Sequence[Mapping[str, Any]]) -> None:
    """Tokens that were added to a vocabulary, which are found in texts before anything else."""
    for token in added:
        special = token["special"]
        text = token["content"] if special or vocabulary.model == "gpt2" else token["content"].replace(SPACE, " ")
        vocabulary.texts[token["id"]] = text
        vocabulary.types[token["id"]] = CONTROL if special else USER_DEFINED
        vocabulary.scores[token["id"]] = -1000.0
    if odd := [t["content"] for t in added if t.get("lstrip") or t.get("rstrip") or t.get("single_word")]:
        vocabulary.notes.append(
            f"llama.cpp does not know that {odd[0]!r} takes the spaces beside it, or is found between words alone: "
            "ids of texts with it can differ"
        )


def _added(vocabulary: Vocabulary) -> Iterator[tuple[str, int]]:
    return ((vocabulary.texts[token], kind) for token, kind in vocabulary.types.items() if kind != NORMAL)


def _note_normalization(vocabulary: Vocabulary, normalized: Mapping[str, str], prefix: str, file: Path) -> None:
    space = SPACE if vocabulary.model == "llama" else " "
    odd = [what for what, text in PROBES.items() if normalized[text] != prefix + text.replace(" ", space)]
    if odd:
        vocabulary.notes.append(f"llama.cpp does not normalize texts as {file.name} does: ids differ for {_and(odd)}")


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _fit(vocabulary: Vocabulary, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Makes it as large as the model's; llama.cpp ends where it is not, or where two tokens are alike."""
    texts, types, scores = vocabulary.texts, vocabulary.types, vocabulary.scores
    if beyond := sorted(token for token in texts if token >= vocab_size):
        vocabulary.notes.append(
            f"{tokenizer.files[0]} has {len(beyond)} tokens more than the model's vocabulary of {vocab_size}; "
            f"{texts[beyond[0]]!r} and those after it are left out"
        )
        for token in beyond:
            del texts[token], types[token]
    for token in range(vocab_size):
        if token not in texts:
            texts[token], types[token], scores[token] = f"[PAD{token}]", UNUSED, -10000.0
    seen: dict[str, int] = {}
    for token, text in texts.items():
        if (other := seen.setdefault(text, token)) != token:
            raise UserError(
                f"{tokenizer.files[0]} has the token {text!r} twice, as {other} and {token}, which llama.cpp refuses",
                WITHOUT,
            )


def _metadata(vocabulary: Vocabulary, tokenizer: Tokenizer, vocab_size: int) -> dict[str, tuple[int, Any]]:
    ids = range(vocab_size)
    held: dict[str, tuple[int, Any]] = {
        "model": (TEXT, vocabulary.model),
        "pre": (TEXT, vocabulary.pre),
        "tokens": (ARRAY, (TEXT, [vocabulary.texts[token] for token in ids])),
        "token_type": (ARRAY, (INT32, [vocabulary.types[token] for token in ids])),
    }
    if vocabulary.model == "llama":
        held["scores"] = ARRAY, (FLOAT32, [vocabulary.scores[token] for token in ids])
    else:
        held["merges"] = ARRAY, (TEXT, vocabulary.merges)
    named = {name: tokenizer.backend.token_id(text) for name, text in tokenizer.named_specials.items()}
    unknown = next((token for token, kind in vocabulary.types.items() if kind == UNKNOWN), named.get("unk_token"))
    for name, token in (("unknown", unknown), ("padding", named.get("pad_token"))):
        if token is not None and token < vocab_size:
            held[f"{name}_token_id"] = UINT32, token
    flags = {"add_bos_token": tokenizer.adds_bos, "add_eos_token": _adds_eos(tokenizer), **vocabulary.flags}
    held |= {name: (BOOL, value) for name, value in flags.items()}
    return {f"tokenizer.ggml.{name}": value for name, value in held.items()} | _templates(tokenizer)


def _adds_eos(tokenizer: Tokenizer) -> bool:
    config = next((read_json(file) for file in tokenizer.files if file.name == "tokenizer_config.json"), {})
    return config.get("add_eos_token") is True and tokenizer.eos_id is not None


def _templates(tokenizer: Tokenizer) -> dict[str, tuple[int, Any]]:
    """The chat template, and the others under their names."""
    others = {name: text for name, text in tokenizer.chat_templates.items() if name != "default"}
    held: dict[str, tuple[int, Any]] = {
        f"tokenizer.chat_template.{name}": (TEXT, text) for name, text in others.items()
    }
    if others:
        held["tokenizer.chat_templates"] = ARRAY, (TEXT, list(others))
    if "default" in tokenizer.chat_templates:
        held["tokenizer.chat_template"] = TEXT, tokenizer.chat_templates["default"]
    return held
