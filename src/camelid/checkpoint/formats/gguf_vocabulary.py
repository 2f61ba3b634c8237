"""The tokenizer inside a GGUF file, as tokenizer.json and tokenizer_config.json, which give the ids of llama.cpp.

What they are made of is in gguf_tokenizer.py, which writes it.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from camelid.checkpoint.containers.gguf_file import LazyArray, describe_value
from camelid.checkpoint.formats.gguf_pretokenizers import BY_PRE, pre_tokenizer_json
from camelid.checkpoint.formats.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from camelid.disk.atomic import write_atomically
from camelid.disk.paths import cache_folder
from camelid.errors import UserError

BESIDE = (
    "Put the model's tokenizer.json beside the file and open the folder, or name a tokenizer; "
    "`camelid convert --without-tokenizer` takes the weights alone."
)
# Tokens that llama.cpp takes for ends of a text or of a turn by their names (llama-vocab.cpp, special_eog_ids).
ENDS = frozenset("<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|eom_id|> <EOT> <|end_of_text|>".split())
DEFAULTS: Mapping[str, Mapping[str, int]] = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {}}
# By name in tokenizer_config.json.
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SPECIAL = (*NAMED.values(), "eot", "eom")


def has_tokenizer(held: Mapping[str, Any]) -> bool:
    """Whether a file's metadata has a vocabulary."""
    return "tokenizer.ggml.tokens" in held and held.get("tokenizer.ggml.model", "none") not in ("no_vocab", "none")


def unpacked(path: Path, held: Mapping[str, Any]) -> Path:
    """A folder of the cache with tokenizer.json and the files that belong to it, made of what is inside a file.

    Raises UserError for a tokenizer that camelid cannot compute as llama.cpp does.
    """
    files = {name: json.dumps(value).encode() for name, value in tokenizer_files(path, held).items()}
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    folder = cache_folder() / "tokenizers" / digest[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                write_atomically(folder / name, content)
    except OSError as error:
        raise UserError(
            f"the tokenizer inside {path} cannot be unpacked: {error}",
            "Set CAMELID_CACHE to a folder that can be written.",
        ) from error
    return folder


def tokenizer_files(path: Path, held: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The JSON of a tokenizer's files by their names; raises UserError for what camelid does not read."""
    model = held["tokenizer.ggml.model"]
    if model not in DEFAULTS:
        known = " and ".join(DEFAULTS)
        raise UserError(
            f"{path} has tokenizer.ggml.model = {describe_value(model)}; camelid reads {known} in a Llama's file",
            BESIDE,
        )
    texts = _array(path, held, "tokens", str)
    types = _array(path, held, "token_type", int) if "tokenizer.ggml.token_type" in held else [NORMAL] * len(texts)
    if len(types) != len(texts) or not set(types) <= set(range(NORMAL, BYTE + 1)):
        raise UserError(f"{path} has {len(types)} token types for {len(texts)} tokens, or unknown ones", BESIDE)
    if len(set(texts)) != len(texts):
        raise UserError(f"{path} has several tokens of the same text", BESIDE)
    ids = {name: _special(held, model, name, len(texts)) for name in SPECIAL}
    named = [ids[name] for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(i for i in [*named, *_ids(texts, ENDS)] if i is not None))
    for token in [*ids.values(), *ends]:  # some converters leave the end of a turn an ordinary token
        if token is not None and types[token] not in (UNKNOWN, BYTE):
            types[token] = CONTROL
    content = (_sentencepiece if model == "llama" else _byte_level)(path, held, texts, types, ids)
    frame = _framed(held, model, texts, ids)
    added = [
        {
            "id": token,
            "content": texts[token],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for token, kind in enumerate(types)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **content}
    whole["post_processor"] = _post_processor(model, texts, *frame)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": frame[0] is not None,
        "add_eos_token": frame[1] is not None,
        **{ours: texts[token] for ours, name in NAMED.items() if (token := ids[name]) is not None},
    }
    if templates := _templates(path, held):
        config["chat_template"] = templates
    return {
        "tokenizer.json": whole,
        "tokenizer_config.json": config,
        "generation_config.json": {"bos_token_id": ids["bos"], "eos_token_id": ends},
    }


def _ids(texts: Sequence[str], wanted: Collection[str]) -> list[int]:
    return [token for token, text in enumerate(texts) if text in wanted]


def _array(path: Path, held: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> list[Any]:
    items = held.get(f"tokenizer.ggml.{name}")
    values = items.read(path) if isinstance(items, LazyArray) else None
    if values is None or not all(isinstance(value, kind) for value in values):
        raise UserError(f"{path} has tokenizer.ggml.{name} = {describe_value(items)}, which is not readable", BESIDE)
    return values


def _special(held: Mapping[str, Any], model: str, name: str, count: int) -> int | None:
    token = held.get(f"tokenizer.ggml.{name}_token_id", DEFAULTS[model].get(name))
    return token if type(token) is int and 0 <= token < count else None


def _framed(
    held: Mapping[str, Any], model: str, texts: Sequence[str], ids: Mapping[str, int | None]
) -> tuple[int | None, int | None]:
    """The tokens that are put before and after a text."""
    pre = held.get("tokenizer.ggml.pre")
    usual = model == "llama" or (isinstance(pre, str) and pre in BY_PRE and BY_PRE[pre].adds_bos)
    adds_bos = held.get("tokenizer.ggml.add_bos_token", usual) is True
    adds_eos = held.get("tokenizer.ggml.add_eos_token", False) is True
    return ids["bos"] if adds_bos else None, ids["eos"] if adds_eos else None


def _post_processor(model: str, texts: Sequence[str], bos: int | None, eos: int | None) -> dict[str, Any] | None:
    offsets = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    if bos is None and eos is None:
        return offsets if model == "gpt2" else None
    specials = {texts[token]: token for token in (bos, eos) if token is not None}

    def around(name: str) -> list[dict[str, Any]]:
        before, after = (
            [{"SpecialToken": {"id": texts[token], "type_id": 0}}] if token is not None else [] for token in (bos, eos)
        )
        return [*before, {"Sequence": {"id": name, "type_id": 0}}, *after]

    template = {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A") + around("B"),
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in specials.items()},
    }
    return template if model == "llama" else {"type": "Sequence", "processors": [offsets, template]}


# Sentencepiece's BPE --------------------------------------------------------------------


def _sentencepiece(
    path: Path, held: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], ids: Mapping[str, int | None]
) -> dict[str, Any]:
    scores = _array(path, held, "scores", (int, float))
    if len(scores) != len(texts):
        raise UserError(f"{path} has {len(scores)} scores for {len(texts)} tokens", BESIDE)
    pieces = {text: token for token, text in enumerate(texts) if types[token] == NORMAL}
    if len(pieces) > 2 and len({scores[token] for text, token in pieces.items() if len(text) > 1}) == 1:
        # Some converters had only a tokenizer.json, and wrote -1000 for every token.
        raise UserError(f"{path} gives all tokens the same score, so that it does not say what is merged first", BESIDE)
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    prefix = held.get("tokenizer.ggml.add_space_prefix", True) is True
    if prefix:
        spaces.insert(0, {"type": "Prepend", "prepend": SPACE})
    if held.get("tokenizer.ggml.remove_extra_whitespaces") is True:
        odd = {" {2,}": " ", r"\A +": "", rf"[ {SPACE}]+\z": ""}
        spaces[:0] = [{"type": "Replace", "pattern": {"Regex": old}, "content": new} for old, new in odd.items()]
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    unknown = ids["unknown"]
    return {
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            texts,
            types,
            _merges(pieces, scores),
            unk_token=None if unknown is None else texts[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _merges(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every two pieces that are a piece together, those of the highest score first."""
    # Among equals llama.cpp merges from the left, so that a longer left part comes first, as in transformers.
    pairs = (
        (-scores[token], -cut, cut - len(text), text[:cut], text[cut:])
        for text, token in pieces.items()
        for cut in range(1, len(text))
        if text[:cut] in pieces and text[cut:] in pieces
    )
    return [(left, right) for *_, left, right in sorted(pairs)]


def _bpe(texts: Sequence[str], types: Sequence[int], merges: Sequence, **how: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "ignore_merges": False,
        "vocab": {text: token for token, text in enumerate(texts) if types[token] != UNUSED},
        "merges": merges,
        **how,
    }


# Byte-level BPE -------------------------------------------------------------------------


def _byte_level(
    path: Path, held: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], ids: Mapping[str, int | None]
) -> dict[str, Any]:
    name = held.get("tokenizer.ggml.pre")
    if name not in BY_PRE:
        raise UserError(
            f"{path} has tokenizer.ggml.pre = {describe_value(name)}; camelid knows "
            f"the pre-tokenizers {', '.join(BY_PRE)}",
            BESIDE,
        )
    # A space may begin a merge, but does not end its first part.
    merges = [(m[:1] + m[1:].partition(" ")[0], m[1:].partition(" ")[2]) for m in _array(path, held, "merges", str)]
    known = set(texts)
    for left, right in merges:
        if not {left, right, left + right} <= known:
            raise UserError(f"{path} merges {left!r} and {right!r}, and not all of them are tokens", BESIDE)
    pre = BY_PRE[name]
    return {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_json(pre),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(
            texts,
            types,
            merges,
            unk_token=None,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=pre.ignore_merges,
        ),
    }


# Templates ------------------------------------------------------------------------------


def _templates(path: Path, held: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    own, others = held.get("tokenizer.chat_template"), {}
    prefix = "tokenizer.chat_template."
    for key, text in held.items():
        if key.startswith(prefix) and isinstance(text, str):
            others[key.removeprefix(prefix)] = text
    named = ({"default": own} if isinstance(own, str) else {}) | others
    if not named:
        return None
    return own if not others else [{"name": name, "template": text} for name, text in named.items()]
