"""From logits to the next token of each row.

Axes: B batch, V vocab, L the tokens of the longest row.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from camelid.generate.config import MAX_TOP_K, GenerationConfig
from camelid.generate.filters import keep_min_p, keep_top_k, keep_top_p, keep_typical_p
from camelid.generate.processors import (
    count_tokens,
    forbid_repeated_ngrams,
    forbid_tokens,
    penalize_counts,
    penalize_repetition,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token of each row is selected. Fields of shape (1,) apply to all rows. See GenerationConfig."""

    temperature: Shaped[Array | np.ndarray, " #B"]
    """float32; 0: greedy, the token of the largest logit"""
    top_k: Shaped[Array | np.ndarray, " #B"]
    """int32; 0: off"""
    top_p: Shaped[Array | np.ndarray, " #B"]
    """float32; 1: off"""
    min_p: Shaped[Array | np.ndarray, " #B"]
    """float32; 0: off"""
    typical_p: Shaped[Array | np.ndarray, " #B"]
    """float32; 1: off"""
    repetition_penalty: Shaped[Array | np.ndarray, " #B"]
    """float32; 1: off"""
    presence_penalty: Shaped[Array | np.ndarray, " #B"]
    """float32; 0: off"""
    frequency_penalty: Shaped[Array | np.ndarray, " #B"]
    """float32; 0: off"""
    no_repeat_ngram_size: Shaped[Array | np.ndarray, " #B"]
    """int32; 0: off"""
    min_new_tokens: Shaped[Array | np.ndarray, " #B"]
    """int32"""


def sampling(config: GenerationConfig) -> Sampling:
    """The settings of a configuration, for all rows."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    values = {}
    for field in dataclasses.fields(Sampling):
        value = getattr(config, field.name)
        value = off[field.name] if value is None else value
        whole = field.name in ("top_k", "no_repeat_ngram_size", "min_new_tokens")
        values[field.name] = np.array([min(value, MAX_TOP_K) if whole else value], np.int32 if whole else np.float32)
    return Sampling(**values)


def process(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    prompt_lengths: Int[Array, " B"],
    bias: Float[Array, "#B V"] | None,
    ending: Int[Array, " ids"],
) -> Float[Array, "B V"]:
    """The logits from which the next token is selected, changed by what each row consists of so far.

    The order is that of transformers: bias, repetition penalty, presence and frequency penalty, repeated n-grams, and
    at last the minimum of new tokens. Each costs nothing where no row uses it.

    Args:
      logits: Of the next token of each row.
      sampling: Settings of each row, or of all.
      tokens: Of each row, the prompt and what was generated.
      lengths: How many tokens each row has; the others are not read.
      prompt_lengths: How many of these are the prompt.
      bias: What is added to the logits; -inf excludes a token. None: nothing.
      ending: Ids of the tokens that end a row, which are excluded before `min_new_tokens`.
    """
    index, vocab = jnp.arange(tokens.shape[1]), logits.shape[-1]
    present = index < lengths[:, None]

    def repetition(logits: Array) -> Array:
        return penalize_repetition(logits, count_tokens(tokens, present, vocab) > 0, repetition_penalty)

    def counts(logits: Array) -> Array:
        generated = count_tokens(tokens, present & (index >= prompt_lengths[:, None]), vocab)
        return penalize_counts(logits, generated, presence_penalty, frequency_penalty)

    def ngrams(logits: Array) -> Array:
        return forbid_repeated_ngrams(logits, tokens, lengths, ngram_size)

    def minimum(logits: Array) -> Array:
        return forbid_tokens(logits, ending, short)

    repetition_penalty, ngram_size = map(jnp.asarray, (sampling.repetition_penalty, sampling.no_repeat_ngram_size))
    presence_penalty, frequency_penalty = map(jnp.asarray, (sampling.presence_penalty, sampling.frequency_penalty))
    short = lengths - prompt_lengths < sampling.min_new_tokens
    if bias is not None:
        logits = logits + bias
    logits = _where_used(repetition_penalty != 1, repetition, logits)
    logits = _where_used((presence_penalty != 0) | (frequency_penalty != 0), counts, logits)
    logits = _where_used(ngram_size > 0, ngrams, logits)
    return _where_used(short, minimum, logits)


def select(
    logits: Float[Array, "B V"], sampling: Sampling, seeds: UInt32[Array, " B"], steps: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of each row, int32.

    A drawn token depends on the row's logits, settings, seed and step (the number of its tokens before this one) alone,
    not on the other rows.
    """
    greedy = jnp.argmax(logits, -1).astype(jnp.int32)
    random = jnp.asarray(sampling.temperature) > 0

    def draw(seed: Array, step: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    def drawn() -> Array:
        scaled = logits / jnp.where(random, sampling.temperature, 1.0)[:, None]
        kept = filter_logits(scaled, sampling)
        return jnp.where(random, jax.vmap(draw)(seeds, steps, kept).astype(jnp.int32), greedy)

    return lax.cond(jnp.any(random), drawn, lambda: greedy)


def all_finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Whether each row has neither NaN nor infinity; -inf is allowed, since it only excludes a token."""
    return ~jnp.any(jnp.isnan(logits) | (logits == jnp.inf), -1)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits, already divided by the temperature, with -inf for the tokens that are not to be drawn.

    The order is that of transformers: top-k, top-p, min-p, typical-p, each among what the one before has kept.
    """
    k, p, min_p, typical_p = map(jnp.asarray, (sampling.top_k, sampling.top_p, sampling.min_p, sampling.typical_p))
    logits = _where_used((k > 0) & (k < logits.shape[-1]), lambda x: keep_top_k(x, k), logits)
    logits = _where_used(p < 1, lambda x: keep_top_p(x, p), logits)
    logits = _where_used(min_p > 0, lambda x: keep_min_p(x, min_p), logits)
    return _where_used(typical_p < 1, lambda x: keep_typical_p(x, typical_p), logits)


def _where_used(used: Bool[Array, " #B"], change, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The changed logits if any row uses the change; otherwise it is not computed."""
    return lax.cond(jnp.any(used), change, lambda logits: logits, logits)
