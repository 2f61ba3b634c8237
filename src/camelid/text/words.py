"""Texts by their words, for vocabularies in which no token goes on from one word into the next.

BPE merges two neighbours only where both together are a token. Where no token crosses a border of words, the ids of a
text are those of its words, one after another, and most of these have been seen before:

    ▁Once ▁upon ▁a ▁time, \\n ▁▁a ▁ wolf
"""

import itertools
import json
import re
import threading
from collections.abc import Sequence
from typing import Any

SPACE = "▁"
WORD = re.compile(f"{SPACE}*[^{SPACE}\n]+|{SPACE}+|\n+")
CROSSES = re.compile(f"[^{SPACE}]{SPACE}|\n[^\n]|[^\n]\n")
NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
"""of Llama 2 and Mistral, and of what was made of them"""
METASPACES = [
    {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    for scheme in ("first", "always")
]
"""The pre-tokenizer that transformers' LlamaTokenizer has instead: it puts no space before a text that has one."""
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
PLAIN = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
MOST = 2**18  # words that are remembered, in about 100 MB
LONGEST = 32  # characters of a word that may come again


class Words:
    """What a tokenizer of `tokenizers` makes of texts in which specials are text; may be used from several threads."""

    def __init__(self, engine: Any):
        """`engine` must be one that `has_words`, and is changed: it is asked for words that are normalized already."""
        self._prefixes_all = engine.normalizer is not None
        engine.normalizer = engine.pre_tokenizer = None
        self._engine = engine
        self._known: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        split = [WORD.findall(self._spaced(text)) if text else [] for text in texts]
        with self._lock:
            if len(self._known) > MOST:
                self._known.clear()
            new = list(set(itertools.chain.from_iterable(split)).difference(self._known))
            encoded = self._engine.encode_batch_fast(new, add_special_tokens=False)
            self._known.update((word, found.ids) for word, found in zip(new, encoded, strict=True))
            ids = [list(itertools.chain.from_iterable(map(self._known.__getitem__, words))) for words in split]
            for word in new:
                if len(word) > LONGEST:
                    del self._known[word]
        return ids

    def _spaced(self, text: str) -> str:
        """The text with the tokenizer's letter for a space, and one in front."""
        spaced = text.replace(" ", SPACE)
        return SPACE + spaced if self._prefixes_all or not spaced.startswith(SPACE) else spaced


def has_words(engine: Any) -> bool:
    """Whether texts may be cut into words, by all that the tokenizer is made of."""
    if type(engine.pre_tokenizer).__name__ not in ("NoneType", "Metaspace"):
        return False  # most others; describing one takes a while
    described = json.loads(engine.to_str())
    model, spaces = described["model"], (described["normalizer"], described["pre_tokenizer"])
    return (
        spaces in [(NORMALIZER, None), *((None, metaspace) for metaspace in METASPACES)]
        and all(token["special"] for token in described["added_tokens"])
        and all(model.get(name) == value for name, value in PLAIN.items())
        and not model.get("ignore_merges")
        # Whatever is in no token is bytes; unknowns would join across words.
        and bool(model.get("byte_fallback"))
        and model["vocab"].keys() >= BYTES
        and not any(map(CROSSES.search, model["vocab"]))
    )
