"""Incremental decoding: complete characters only, at a constant cost per token."""

import codecs
import os.path
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

from camelid.text.tokenizer import Tokenizer


class TextStream:
    """Decodes tokens one by one; the concatenated results are what decode(prompt + ids) adds to decode(prompt)."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[SupportsIndex] = ()):
        self._tokenizer = tokenizer
        self._decoder = (
            _ByteLevelDecoder(tokenizer) if tokenizer.backend.is_byte_level else _ByteFallbackDecoder(tokenizer)
        )
        self._shown = ""
        for token in prompt_ids:
            self.push(token)
        # The text of a prompt that ends inside a character ends with U+FFFD, until the next token completes it.
        self._shown = self._decoder.remaining()

    def push(self, token: SupportsIndex) -> str:
        """Adds a token and returns the text that is now certain, which may be empty."""
        (known,) = self._tokenizer.checked([token])
        return "" if known in self._tokenizer.backend.special_ids else self._unseen(self._decoder.push(known))

    def flush(self) -> str:
        """The remaining text; call it once, after the last token."""
        return self._unseen(self._decoder.remaining())

    def _unseen(self, text: str) -> str:
        if not text:
            return ""
        seen = len(os.path.commonprefix([self._shown, text]))
        self._shown = ""
        return text[seen:]


class StopStrings:
    """Ends a text that arrives in pieces before the first occurrence of one of some texts.

    Text is held back as long as it could be the beginning of one of them, and no longer.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found = False
        """whether one of the texts has occurred"""

    def push(self, text: str) -> str:
        """Adds a piece, and returns the text that is now certain; none after a stop was found."""
        if self.found:
            return ""
        text = self._held + text
        first = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if first is not None:
            self.found, self._held = True, ""
            return text[:first]
        certain = len(text) - max((self._begun(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text that is still held back; call it once, at the end."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """The length of the longest end of `text` with which `stop` begins."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _ByteLevelDecoder:
    """Byte-level BPE: every token is a sequence of bytes, and a character may span several tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.backend.token_bytes(token) or b"")

    def remaining(self) -> str:
        pending, _ = self._utf8.getstate()
        return pending.decode("utf-8", "replace")


class _ByteFallbackDecoder:
    """SentencePieceModel of text with a byte fallback: `▁caf <0xC3> <0xA9> ▁!`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._started = False

    def push(self, token: int) -> str:
        self._pending.append(token)
        # One invalid byte turns its entire run into U+FFFD, so the text of a run is certain only at its end.
        if self._tokenizer.backend.token_bytes(token) is not None:
            return ""
        text = self.remaining()
        self._started = self._started or bool(text)
        # Spaces that the decoder strips from the start still determine what it strips next.
        if self._started:
            self._pending.clear()
        return text

    def remaining(self) -> str:
        return (
            self._tokenizer.decode_after_text(self._pending) if self._started else self._tokenizer.decode(self._pending)
        )
