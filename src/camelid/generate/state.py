"""The state of decoding, and the steps between which a caller acts.

    state, logits = prefill(params, prompts, lengths, ...)
    while ...:
        tokens = select(logits, state.sampling, state.seeds, state.steps)
        state, logits = advance(params, state, tokens[:, None], config, compute)
        logits = logits[:, -1]

Everything specific acts between `advance` and `select`: streaming, stopping, a mask of the allowed tokens. Beam search
selects rows with `reorder`; speculative decoding advances each row by its own number of tokens and takes back those
that are rejected with `rollback`; a server frees a row with `release` and fills it with another prompt with `admit`.
All are pure functions of arrays, for use inside or outside jax.jit.

Axes: B batch, P tokens of the longest prompt, S tokens of a step, E embed, V vocab.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, UInt32

from camelid.generate.sampling import Sampling
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context
from camelid.model.decoder import Decoder
from camelid.model.kv_cache import KVCache, empty_cache
from camelid.model.loss import TokenLogProbs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Rows in the course of decoding."""

    cache: KVCache
    """keys and values of the tokens of each row"""
    lengths: Int[Array, " B"]
    """the number of tokens of each row in the cache, which is the position of its next token"""
    prompt_lengths: Int[Array, " B"]
    """how many of these are the prompt"""
    written: Int[Array, " B"]
    """the largest value that `lengths` has had; after a rollback, larger than `lengths`"""
    final_lengths: Int[Array, " B"]
    """the length that each row will have reached at the end: some rope scalings depend on it, and keys in the cache are
    not rotated again"""
    active: Bool[Array, " B"]
    """whether the row is in use. Nothing is written for the others, and their logits have no meaning"""
    sampling: Sampling
    """settings of each row; fields of shape (B,)"""
    seeds: UInt32[Array, " B"]
    """the seed of each row"""
    adapters: Int[Array, " B"] | None = None
    """for each row the index of its adapter, -1 for none (see Context.adapters); None: the weights have no adapters, or
    one for all rows"""

    @property
    def steps(self) -> Int[Array, " B"]:
        """The number of tokens after the prompt, which `select` takes: a row that is rolled back repeats its draws."""
        return self.lengths - self.prompt_lengths


def prefill(
    params: Decoder,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    final_lengths: Int[Array, " B"],
    sampling: Sampling,
    seeds: UInt32[Array, " B"],
    config: ModelConfig,
    compute: ComputeConfig,
    *,
    slots: int,
    max_rollback: int | None = 1,
    cache: KVCache | None = None,
    adapters: Int[Array, " B"] | None = None,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Processes prompts, and returns the state and the logits (float32) of each row's next token.

    Row b of `prompts` has `lengths[b]` tokens, then padding; a row of length 0 is inactive. No row may become longer
    than `slots`. `max_rollback` bounds `rollback`, and thereby the memory of layers with a sliding window (see
    empty_cache); None: no bound. `cache` is an empty cache of another kind, with at least `slots` slots in each row.
    `adapters` selects an adapter for each row.
    """
    rows = prompts, lengths, final_lengths, sampling, seeds
    state, x = _process(params, *rows, config, compute, slots, max_rollback, cache, adapters)
    return state, _next_logits(params, state, x, config, compute)


def prefill_with_log_probs(
    params: Decoder,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    final_lengths: Int[Array, " B"],
    sampling: Sampling,
    seeds: UInt32[Array, " B"],
    config: ModelConfig,
    compute: ComputeConfig,
    *,
    slots: int,
    max_rollback: int | None = 1,
    cache: KVCache | None = None,
    adapters: Int[Array, " B"] | None = None,
    top_k: int = 0,
) -> tuple[DecodeState, Float[Array, "B V"], TokenLogProbs]:
    """As `prefill`, and also what the model predicts for the tokens of the prompts, in arrays of (B, P - 1).

    Element [b, t] is about the token prompts[b, t + 1], given the tokens up to t: the first token is not predicted.
    Those from t = lengths[b] - 1 on are about padding and have no meaning. `top_k` > 0 adds the most probable tokens.
    The logits of all positions are never stored (see Decoder.token_log_probs).
    """
    rows = prompts, lengths, final_lengths, sampling, seeds
    state, x = _process(params, *rows, config, compute, slots, max_rollback, cache, adapters)
    context = Context(phase="prefill", adapters=adapters)
    # The last position has no target; it is kept, so that prompts of one token need no case of their own.
    predicted = params.token_log_probs(x, jnp.roll(prompts, -1, 1), config, context=context, top_k=top_k)
    predicted = jax.tree.map(lambda statistic: statistic[:, :-1], predicted)
    return state, _next_logits(params, state, x, config, compute), predicted


def _process(
    params: Decoder,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    final_lengths: Int[Array, " B"],
    sampling: Sampling,
    seeds: UInt32[Array, " B"],
    config: ModelConfig,
    compute: ComputeConfig,
    slots: int,
    max_rollback: int | None,
    cache: KVCache | None,
    adapters: Int[Array, " B"] | None,
) -> tuple[DecodeState, Float[Array, "B P E"]]:
    """The state after the prompts, and the output of `Decoder.hidden` for all their tokens."""
    batch, padded = prompts.shape
    if cache is None:
        cache = empty_cache(config, batch, slots, jnp.dtype(compute.dtype), compute.replicate, max_rollback)
    positions = jnp.where(jnp.arange(padded) < lengths[:, None], jnp.arange(padded), -1)
    context = Context(phase="prefill", adapters=adapters)
    x, cache = params.hidden(
        prompts, positions, None, config, compute, context=context, cache=cache, lengths=final_lengths
    )
    assert cache is not None
    rows = jax.tree.map(lambda setting: jnp.broadcast_to(setting, (batch,)), sampling)
    state = DecodeState(cache, lengths, lengths, lengths, final_lengths, lengths > 0, rows, seeds, adapters)
    return state, x


def _next_logits(
    params: Decoder, state: DecodeState, x: Float[Array, "B P E"], config: ModelConfig, compute: ComputeConfig
) -> Float[Array, "B V"]:
    """The logits of the token after each prompt."""
    last = jnp.take_along_axis(x, jnp.maximum(state.lengths - 1, 0)[:, None, None], 1)
    return params.logits(last, config, compute, context=Context(phase="prefill", adapters=state.adapters))[:, 0]


def advance(
    params: Decoder,
    state: DecodeState,
    tokens: Int[Array, "B S"],
    config: ModelConfig,
    compute: ComputeConfig,
    counts: Int[Array, " B"] | None = None,
) -> tuple[DecodeState, Float[Array, "B S V"]]:
    """Appends tokens to each active row, and returns the logits (float32) of the token after each of them.

    With `counts`, row b is advanced by the first counts[b] of its tokens, 0 to S. The others are padding: they leave no
    trace in the state, and their logits have no meaning. The logits of the row's next token are
    logits[b, counts[b] - 1]. Counts are not part of the compiled program.

    Raises ValueError if a count is not in 0 to S. Under jax.jit counts have no values yet, and this is the caller's
    responsibility.
    """
    size = tokens.shape[1]
    if counts is None:
        counts = jnp.full_like(state.lengths, size)
    elif not isinstance(counts, Tracer):
        for row in np.flatnonzero((counts < 0) | (counts > size)):
            raise ValueError(f"row {row} has {size} tokens and cannot be advanced by {counts[row]} of them")
    counts = jnp.where(state.active, counts, 0)
    offsets = jnp.arange(size)
    positions = jnp.where(offsets < counts[:, None], state.lengths[:, None] + offsets, -1)
    context = Context(phase="decode", adapters=state.adapters)
    logits, cache = params(
        tokens, positions, None, config, compute, context=context, cache=state.cache, lengths=state.final_lengths
    )
    assert cache is not None
    lengths = state.lengths + counts
    written = jnp.maximum(state.written, lengths)
    return dataclasses.replace(state, cache=cache, lengths=lengths, written=written), logits


def reorder(state: DecodeState, rows: Int[Array, " N"]) -> DecodeState:
    """The state whose row i is row `rows[i]` of this one; rows may be repeated or left out."""
    return DecodeState(cache=state.cache.reorder(rows), **jax.tree.map(lambda x: x[rows], _but_cache(state)))


def rollback(state: DecodeState, lengths: Int[Array, " B"]) -> DecodeState:
    """The state with each row truncated to `lengths[b]` tokens, at least 1.

    Raises ValueError if a row is not so long, or if the rings of layers with a sliding window do not hold the tokens
    that the remaining ones see: with the `max_rollback` of `prefill`, lengths may be `written` - max_rollback or more.
    Under jax.jit lengths have no values yet, and this is the caller's responsibility.
    """
    if not any(isinstance(x, Tracer) for x in (lengths, state.lengths)):
        shortest = jnp.maximum(state.cache.shortest_rollback(state.written), 1)
        impossible = state.active & ((lengths < shortest) | (lengths > state.lengths))
        for row in np.flatnonzero(impossible):
            raise ValueError(
                f"row {row} has {state.lengths[row]} tokens and cannot be rolled back to {lengths[row]}: at least "
                f"{shortest[row]}"
            )
    prompt_lengths = jnp.minimum(state.prompt_lengths, lengths)
    return dataclasses.replace(state, lengths=lengths, prompt_lengths=prompt_lengths)


def release(state: DecodeState, row: int | Int[Array, ""]) -> DecodeState:
    """The state with one row free."""
    return dataclasses.replace(state, active=state.active.at[row].set(False))


def admit(
    state: DecodeState, row: int | Int[Array, ""], other: DecodeState, other_row: int | Int[Array, ""] = 0
) -> DecodeState:
    """The state with one row replaced by a row of another state, whose cache was created with the same `slots` and
    `max_rollback`.
    """
    rows = jax.tree.map(lambda x, y: x.at[row].set(y[other_row]), _but_cache(state), _but_cache(other))
    return DecodeState(cache=state.cache.insert(row, other.cache, other_row), **rows)


def _but_cache(state: DecodeState) -> dict[str, Any]:
    """The fields whose arrays have one element per row."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if name != "cache"}
