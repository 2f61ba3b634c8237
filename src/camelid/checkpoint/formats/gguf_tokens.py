"""The vocabulary of a tokenizer in llama.cpp's terms, and the metadata of tokens in a GGUF file.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Types of tokens (llama.h, llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"
ADVICE = "Use --without-tokenizer, and llama.cpp opens the file for token ids alone, or use the format hf."
# llama.cpp hardly changes a text before it looks for tokens; the normalizers of other tokenizers may change these.
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
    """The tokens of a model as llama.cpp describes them, by id."""

    model: str
    """llama (SentencePiece BPE) or gpt2 (byte-level BPE)"""
    pre: str
    """name of the pre-tokenizer"""
    texts: dict[int, str]
    types: dict[int, int]
    scores: dict[int, float] = field(default_factory=dict)
    """of the model "llama": of all adjacent pairs that form a token, the one with the highest score is merged first"""
    merges: list[str] = field(default_factory=list)
    """of the model "gpt2", in the order in which they are applied"""
    flags: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, added: Sequence[Mapping[str, Any]]) -> None:
        """Adds the `added_tokens` of a tokenizer.json, which are found in a text before any other token."""
        for token in added:
            special = token["special"]
            text = token["content"] if special or self.model == "gpt2" else token["content"].replace(SPACE, " ")
            self.texts[token["id"]] = text
            self.types[token["id"]] = CONTROL if special else USER_DEFINED
            self.scores[token["id"]] = -1000.0
        if stripping := [t["content"] for t in added if t.get("lstrip") or t.get("rstrip") or t.get("single_word")]:
            self.notes.append(
                f"llama.cpp does not support that {stripping[0]!r} strips adjacent spaces, or matches only single "
                "words: the ids of texts that contain it can differ"
            )

    def note_normalization(self, normalized: Mapping[str, str], prefix: str, file: Path) -> None:
        """Adds a note if the tokenizer normalizes PROBES in another way than llama.cpp, which prepends `prefix`."""
        space = SPACE if self.model == "llama" else " "
        differing = [what for what, text in PROBES.items() if normalized[text] != prefix + text.replace(" ", space)]
        if differing:
            names = " and ".join(filter(None, (", ".join(differing[:-1]), differing[-1])))
            self.notes.append(f"llama.cpp does not normalize texts as {file.name} does: ids differ for {names}")
