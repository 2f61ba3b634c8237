"""Text while its ids are still coming: whole characters only, at a constant cost per id."""

import codecs
import os.path
from collections.abc import Iterable
from typing import SupportsIndex

from camelid.text.tokenizer import Tokenizer


class TextStream:
    """The pieces, joined, are what decode(prompt + ids) adds to decode(prompt)."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[SupportsIndex] = ()):
        self._tokenizer = tokenizer
        self._assembler = _Bytes(tokenizer) if tokenizer.engine.is_byte_level else _Pieces(tokenizer)
        self._shown = ""
        for token in prompt_ids:
            self.push(token)
        # A prompt that ends inside a character shows U+FFFD there, until the next id completes it.
        self._shown = self._assembler.rest()

    def push(self, token: SupportsIndex) -> str:
        """Take one id; give the text that is now certain, often none."""
        (known,) = self._tokenizer.checked([token])
        return "" if known in self._tokenizer.engine.special_ids else self._unseen(self._assembler.push(known))

    def flush(self) -> str:
        """What is left at the end; call it once, after the last id."""
        return self._unseen(self._assembler.rest())

    def _unseen(self, text: str) -> str:
        if not text:
            return ""
        seen = len(os.path.commonprefix([self._shown, text]))
        self._shown = ""
        return text[seen:]


class _Bytes:
    """Byte-level BPE: every token is bytes, and characters may begin and end inside tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.engine.token_bytes(token) or b"")

    def rest(self) -> str:
        pending, _ = self._utf8.getstate()
        return pending.decode("utf-8", "replace")


class _Pieces:
    """Pieces of text with a byte fallback: `▁caf <0xC3> <0xA9> ▁!`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._held: list[int] = []
        self._begun = False

    def push(self, token: int) -> str:
        self._held.append(token)
        # One wrong byte turns its whole run into U+FFFD, so the text of a run is certain only at its end.
        if self._tokenizer.engine.token_bytes(token) is not None:
            return ""
        text = self.rest()
        self._begun = self._begun or bool(text)
        # Blanks that the decoder strips from the beginning still decide what it strips next.
        if self._begun:
            self._held.clear()
        return text

    def rest(self) -> str:
        return self._tokenizer.decode_after_text(self._held) if self._begun else self._tokenizer.decode(self._held)
