"""Completions as text: what `camelid.generate` returns, and how it grows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from camelid.generate.config import GenerationConfig
from camelid.generate.decode import STEPS, Generation, NewTokens
from camelid.text.stream import StopStrings, TextStream
from camelid.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    prompt: str
    """the prompt as text; empty for a model without a tokenizer"""
    text: str
    """the generated text, without the prompt; empty for a model without a tokenizer"""
    tokens: list[int]
    """ids of the generated tokens: without EOS or the stop token, but with the token that completes a stop string"""
    finish_reason: Literal["stop", "length", "error"]
    """"stop": EOS, a stop token or a stop string was generated, or the options excluded every token; "length":
    max_new_tokens was reached; "error": the logits became NaN or infinite"""
    prompt_index: int = 0
    """the number of the prompt"""
    logprobs: list[float] | None = None
    """the natural logarithm of the probability of each token, if it was requested"""
    top_logprobs: list[dict[int, float]] | None = None
    """the most probable tokens at each place with these logarithms, if they were requested, most probable first"""


class TextGeneration:
    """Completions in the course of generation.

    It ends completions at stop strings, which the Generation does not know.
    """

    def __init__(
        self,
        generation: Generation,
        prompts: Sequence[str | Sequence[int]],
        ids: Sequence[Sequence[int]],
        options: GenerationConfig,
        tokenizer: Tokenizer | None,
    ):
        """`ids` are the tokens of the prompts. Without a tokenizer, completions have no text."""
        self._generation = generation
        self._rows = [
            _Row(index, prompt, tokens, options, tokenizer)
            for index, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True))
            for _ in range(options.n)
        ]

    def pieces(self, steps: int = STEPS) -> Iterator[list[str]]:
        """Generates until all completions have ended; yields the text that `steps` tokens add to each of them."""
        while self._generation.active.any():
            continued = self._generation.active.copy()
            new = self._generation.advance(steps)
            pieces = [""] * len(self._rows)
            for i in np.flatnonzero(continued):
                row, active = self._rows[i], bool(self._generation.active[i])
                pieces[i] = row.push(new, int(i), active)
                self._generation.active[i] = row.finish_reason is None
            yield pieces

    @property
    def completions(self) -> list[Completion]:
        """The completions, those of one prompt after each other; all have ended."""
        return [row.completion() for row in self._rows]


@dataclass
class _Row:
    """One completion in the course of generation."""

    index: int
    prompt: str | Sequence[int]
    ids: Sequence[int]
    options: GenerationConfig
    tokenizer: Tokenizer | None
    finish_reason: Literal["stop", "length", "error"] | None = None
    _text: list[str] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _top: list[dict[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stops = StopStrings(self.options.stop)
        self._stream = None if self.tokenizer is None else TextStream(self.tokenizer, self.ids)

    def push(self, new: NewTokens, i: int, active: bool) -> str:
        """Adds the new tokens of completion `i`, and returns the text that is now certain."""
        pieces = []
        for step in range(int(new.counts[i])):
            self._add(new, i, step)
            if self._stream is not None:
                pieces.append(self._stops.push(self._stream.push(self._tokens[-1])))
            if self._stops.found:
                self.finish_reason = "stop"
                break
        if self.finish_reason is None and not active:
            if self._stream is not None:
                pieces.append(self._stops.push(self._stream.flush()))
                pieces.append(self._stops.flush())
            stopped = new.ended[i] or self._stops.found
            self.finish_reason = "error" if not new.finite[i] else "stop" if stopped else "length"
        self._text += pieces
        return "".join(pieces)

    def _add(self, new: NewTokens, i: int, step: int) -> None:
        self._tokens.append(int(new.tokens[i, step]))
        if new.log_probs is not None and new.top_ids is not None and new.top_log_probs is not None:
            self._logprobs.append(float(new.log_probs[i, step]))
            top = zip(new.top_ids[i, step].tolist(), new.top_log_probs[i, step].tolist(), strict=True)
            self._top.append(dict(top))

    def completion(self) -> Completion:
        """The completion, which has ended."""
        assert self.finish_reason is not None
        options, prompt = self.options, self.prompt
        if not isinstance(prompt, str):
            prompt = "" if self.tokenizer is None else self.tokenizer.decode(self.ids)
        return Completion(
            prompt,
            "".join(self._text),
            self._tokens,
            self.finish_reason,
            self.index,
            self._logprobs if options.logprobs else None,
            self._top if options.top_logprobs else None,
        )
