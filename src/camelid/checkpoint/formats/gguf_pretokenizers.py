"""The pre-tokenizers of byte-level BPE that llama.cpp knows by name (`tokenizer.ggml.pre`), with their patterns.

A GGUF file only names its pre-tokenizer; the patterns are in llama.cpp's source (llama-vocab.cpp). So a tokenizer can
be written if its patterns are in this table, and a file can be read if its name is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Regular expressions, as they are written in the tokenizer.json files of these models.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = _CASED % ("", "") + r"|\p{N}" + _REST_WITH_SLASH
GPT4O = _CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _REST_WITH_SLASH


@dataclass(frozen=True)
class PreTokenizer:
    """How llama.cpp splits a text before it merges the bytes of each part (llama-vocab.cpp, llm_tokenizer_bpe)."""

    name: str
    patterns: tuple[str, ...]
    """applied in order; every match becomes a separate part, and so does the text between matches"""
    ignore_merges: bool = False
    """whether a part that is in the vocabulary becomes one token without merging"""
    adds_bos: bool = False
    """whether llama.cpp prepends BOS if the file does not specify it"""
    aliases: tuple[str, ...] = ()
    """other names of the same pre-tokenizer in llama.cpp"""


PRE_TOKENIZERS = (
    PreTokenizer(
        "llama-bpe",
        (LLAMA3,),
        ignore_merges=True,
        adds_bos=True,
        aliases=("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    PreTokenizer("smaug-bpe", (LLAMA3,), aliases=("dbrx",)),
    PreTokenizer("qwen2", (QWEN2,), aliases=("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan")),
    PreTokenizer("tekken", (TEKKEN,), ignore_merges=True, adds_bos=True),
    PreTokenizer("gpt-4o", (GPT4O,), aliases=("llama4",)),
    PreTokenizer("gpt-2", (GPT2,), aliases=("phi-2", "mpt", "olmo", "jais")),
    PreTokenizer("smollm", (DIGIT, GPT2), aliases=("starcoder", "refact", "command-r", "codeshell", "exaone")),
)
BY_PRE = {name: pre for pre in PRE_TOKENIZERS for name in (pre.name, *pre.aliases)}


def patterns_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Returns the patterns of a tokenizer.json's `pre_tokenizer`, or None if it does more than split by patterns."""
    if pre_tokenizer is None:
        return None
    match pre_tokenizer.get("type"):
        case "Sequence":
            parts = [patterns_of(part) for part in pre_tokenizer["pretokenizers"]]
            return None if None in parts else tuple(pattern for part in parts if part for pattern in part)
        case "ByteLevel" if not pre_tokenizer.get("add_prefix_space"):
            return (GPT2,) if pre_tokenizer.get("use_regex", True) else ()
        case "Digits" if pre_tokenizer.get("individual_digits"):
            return (DIGIT,)
        case "Split":
            # These patterns match every character, so removing the rest ("Removed", inverted) removes nothing.
            behavior = (pre_tokenizer.get("behavior"), pre_tokenizer.get("invert", False))
            pattern = pre_tokenizer.get("pattern", {}).get("Regex")
            if behavior not in (("Isolated", False), ("Removed", True)) or not isinstance(pattern, str):
                return None
            return (pattern.replace("\r", r"\r").replace("\n", r"\n"),)
    return None


def pre_tokenizer_json(pre: PreTokenizer) -> dict[str, Any]:
    """Returns the `pre_tokenizer` of a tokenizer.json that splits texts as llama.cpp does."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, bytes_only]}
