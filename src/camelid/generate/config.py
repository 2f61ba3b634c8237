"""How text is generated: the options of one call, without JAX."""

import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from camelid.errors import UserError

MAX_TOP_K = 2**31 - 1
SMALLEST, LARGEST = 2.0**-126, 3.4e38  # in float32
OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "do_sample": "temperature",
    "stop_strings": "stop",
    "bad_words_ids": "suppress_tokens",
    "min_length": "min_new_tokens",
    "random_seed": "seed",
}
"""What other systems call the options; suggested, never accepted."""


@dataclass(frozen=True)
class GenerationConfig:
    """How completions are generated. The names are those of transformers, or of OpenAI where it has none.

    Raises UserError if a value is out of range, or if two options contradict each other.
    """

    max_new_tokens: int = 64
    """stop after this number of tokens if nothing has ended the completion before"""
    min_new_tokens: int = 0
    """EOS and the stop tokens cannot be generated before this number of tokens"""
    n: int = 1
    """number of completions of each prompt"""
    num_return_sequences: int | None = None
    """another name of n"""
    temperature: float = 0.0
    """the logits are divided by it before a token is drawn; 0: greedy decoding, the most probable token"""
    top_k: int | None = None
    """draw from the K most probable tokens only"""
    top_p: float | None = None
    """draw from the smallest set of tokens whose probabilities sum to P (nucleus sampling, arXiv:1904.09751)"""
    min_p: float | None = None
    """draw from tokens that have at least P times the probability of the most probable one (arXiv:2407.01082)"""
    typical_p: float | None = None
    """draw from the tokens of total probability P whose surprise is closest to the entropy (arXiv:2202.00666)"""
    repetition_penalty: float = 1.0
    """positive logits of tokens that occurred, also in the prompt, are divided by it, negative ones multiplied
    (arXiv:1909.05858)"""
    presence_penalty: float = 0.0
    """subtracted from the logits of all tokens that were generated"""
    frequency_penalty: float = 0.0
    """subtracted from the logit of a token each time that it is generated"""
    no_repeat_ngram_size: int = 0
    """no sequence of N tokens occurs twice, also with the prompt; 0: they may"""
    logit_bias: Mapping[int, float] | None = None
    """numbers that are added to the logits, by token id"""
    suppress_tokens: tuple[int, ...] = ()
    """ids of tokens that are never generated"""
    allowed_tokens: tuple[int, ...] = ()
    """ids of the only tokens that may be generated, besides EOS and the stop tokens; empty: all"""
    stop: tuple[str, ...] = ()
    """texts before which a completion ends"""
    stop_token_ids: tuple[int, ...] = ()
    """ids of tokens that end a completion, besides EOS; they are not part of it"""
    ignore_eos: bool = False
    """EOS does not end a completion, and is never generated"""
    seed: int = 0
    """seed of the random numbers; prompt i uses seed + i"""
    logprobs: bool = False
    """return the natural logarithm of each token's probability, before any of these options changes it"""
    top_logprobs: int = 0
    """return the N most probable tokens at each place, with these logarithms"""

    def __post_init__(self) -> None:
        if self.num_return_sequences is not None:
            if self.n not in (1, self.num_return_sequences):
                raise UserError(
                    f"n = {self.n} and num_return_sequences = {self.num_return_sequences} contradict each other",
                    "They are two names of one option: give one of them.",
                )
            object.__setattr__(self, "n", self.num_return_sequences)
            object.__setattr__(self, "num_return_sequences", None)
        for name in ("max_new_tokens", "min_new_tokens", "n", "no_repeat_ngram_size", "seed", "top_logprobs"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        stop: Any = self.stop
        if not isinstance(stop, str | Sequence):
            raise UserError(f"stop = {stop!r} is not a list of texts", "Give one text, or several.")
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        for name in ("suppress_tokens", "allowed_tokens", "stop_token_ids"):
            object.__setattr__(self, name, tuple(whole_number(name, token) for token in getattr(self, name)))
        for name in ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty"):
            self._check_number(name, getattr(self, name), optional=name in ("top_p", "min_p", "typical_p"))
        for name in ("presence_penalty", "frequency_penalty"):
            self._check_number(name, getattr(self, name))
        self._check_counts()
        self._check_sampling()
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(
                f"repetition_penalty = {self.repetition_penalty} is not in (0, inf)", "Use 1 for none, or more."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} = {getattr(self, name)} is not finite", "Use 0 for none, or more.")
        if not isinstance(self.logit_bias, Mapping | None):
            raise UserError(
                f"logit_bias = {self.logit_bias!r} is not a mapping", "Give numbers by token id: {13: -5.0}."
            )
        for token, bias in (self.logit_bias or {}).items():
            whole_number("logit_bias", token)
            self._check_number(f"logit_bias of token {token}", bias)
            if math.isnan(bias) or bias > LARGEST:
                raise UserError(
                    f"logit_bias of token {token} is {bias}",
                    "Use a number; -inf excludes a token as suppress_tokens does.",
                )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop = {list(self.stop)} has an empty text", "Give texts of at least one character.")

    @staticmethod
    def _check_number(name: str, value: Any, optional: bool = False) -> None:
        if not isinstance(value, int | float) and not (optional and value is None):
            raise UserError(f"{name} = {value!r} is not a number", "Give a float.")

    def _check_counts(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens} is below 1", "Request at least one token.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"min_new_tokens = {self.min_new_tokens} is not in [0, max_new_tokens = {self.max_new_tokens}]",
                "Lower it, or raise max_new_tokens.",
            )
        if self.n < 1:
            raise UserError(f"n = {self.n} is below 1", "Request at least one completion of each prompt.")
        if self.n > 1 and self.temperature == 0:
            raise UserError(
                f"n = {self.n} completions of a prompt would be equal with temperature = 0",
                "Set temperature above 0 to sample them.",
            )
        if self.no_repeat_ngram_size < 0:
            raise UserError(f"no_repeat_ngram_size = {self.no_repeat_ngram_size} is below 0", "Use 0 for none.")
        if self.top_logprobs < 0:
            raise UserError(f"top_logprobs = {self.top_logprobs} is below 0", "Use 0 for none.")

    def _check_sampling(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature = {self.temperature} is not in [0, inf)",
                "Use 0 for greedy decoding, or a positive number.",
            )
        if self.top_k is not None and whole_number("top_k", self.top_k) < 1:
            raise UserError(f"top_k = {self.top_k} is below 1", "Use 1 or more, or leave it out to keep every token.")
        for name in ("top_p", "min_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not SMALLEST <= value <= 1:
                raise UserError(
                    f"{name} = {value} is not in (0, 1]", "Use a fraction of 1, or leave it out to keep every token."
                )


def generation_config(options: GenerationConfig | None, changes: Mapping[str, Any]) -> GenerationConfig:
    """The options (None: the defaults) with some fields changed. Raises UserError if there is no such field."""
    if not isinstance(options, GenerationConfig | None):
        raise UserError(
            f"options = {options!r:.80} is not a GenerationConfig",
            "Give camelid.GenerationConfig(...), or its fields by name: max_new_tokens=100.",
        )
    names = [field.name for field in fields(GenerationConfig)]
    for name in changes:
        if name not in names:
            close = difflib.get_close_matches(OTHER_NAMES.get(name, name), names, 1)
            raise UserError(
                f"there is no option {name!r} of generation",
                f"Did you mean {close[0]!r}?" if close else f"The options are {', '.join(names)}.",
            )
    return replace(options or GenerationConfig(), **changes)


def whole_number(name: str, value: Any) -> int:
    """The value as an int. Raises UserError if it is not an integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} = {value!r} is not a whole number", f"Give {name} as an int.") from None
