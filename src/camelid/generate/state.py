"""The state of decoding, and the steps between which a caller acts.

    state, logits, _ = prefill(params, PromptBatch(...), config, compute, slots=...)
    while ...:
        processed = process(logits, state.sampling, state.tokens, state.lengths, state.prompt_lengths, ...)
        tokens = select(processed, state.sampling, state.seeds, state.steps)
        state, logits = advance(params, state, tokens[:, None], config, compute)
        logits = logits[:, -1]

Everything specific acts between `advance` and `select`: streaming, stopping, a mask of the allowed tokens. Beam search
selects rows with `reorder`; speculative decoding advances each row by its own number of tokens and takes back those
that are rejected with `rollback`; a server frees a row with `release` and fills it with another prompt with `admit`.
All are pure functions of arrays, for use inside or outside jax.jit.

Axes: B batch, P tokens of the longest prompt, S tokens of a step, V vocab.
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
    tokens: Int[Array, "B slots"]
    """the tokens of each row; those from its length on have no meaning"""
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts to be continued, and how."""

    tokens: Int[Array, "B P"]
    """ids; each row is padded at its end"""
    lengths: Int[Array, " B"]
    """the number of tokens of each prompt; a row of length 0 is inactive"""
    final_lengths: Int[Array, " B"]
    """the length that each row will have reached at the end"""
    sampling: Sampling
    """settings of each row, or of all"""
    seeds: UInt32[Array, " B"]
    """the seed of each row"""
    adapters: Int[Array, " B"] | None = None
    """for each row the index of its adapter; see DecodeState.adapters"""


def prefill(
    params: Decoder,
    prompts: PromptBatch,
    config: ModelConfig,
    compute: ComputeConfig,
    *,
    slots: int,
    max_rollback: int | None = 1,
    cache: KVCache | None = None,
    top_log_probs: int | None = None,
) -> tuple[DecodeState, Float[Array, "B V"], TokenLogProbs | None]:
    """Processes prompts, and returns the state and the logits (float32) of each row's next token.

    Args:
      params: The parameters.
      prompts: The prompts.
      config: The model.
      compute: Its precision and kernels.
      slots: No row may become longer.
      max_rollback: Bounds `rollback`, and thereby the memory of layers with a sliding window (see empty_cache). None:
        no bound.
      cache: An empty cache of another kind, with at least `slots` slots in each row.
      top_log_probs: The prompts are scored too, with this number of most probable tokens. None: they are not.

    Returns:
      The state; the logits; and what the model predicts for the tokens of the prompts, in arrays of (B, P - 1), or
      None. Element [b, t] is about token t + 1 of prompt b, given the tokens up to t: the first token is not predicted.
      Elements from t = lengths[b] - 1 on are about padding and have no meaning. The logits of all positions are never
      stored (see Decoder.token_log_probs).
    """
    (batch, padded), lengths = prompts.tokens.shape, prompts.lengths
    if cache is None:
        cache = empty_cache(config, batch, slots, jnp.dtype(compute.dtype), compute.replicate, max_rollback)
    positions = jnp.where(jnp.arange(padded) < lengths[:, None], jnp.arange(padded), -1)
    context = Context(phase="prefill", adapters=prompts.adapters)
    x, cache = params.hidden(
        prompts.tokens, positions, None, config, compute, context=context, cache=cache, lengths=prompts.final_lengths
    )
    assert cache is not None
    state = DecodeState(
        cache=cache,
        tokens=_placed(jnp.zeros((batch, slots), jnp.int32), prompts.tokens, positions),
        lengths=lengths,
        prompt_lengths=lengths,
        written=lengths,
        final_lengths=prompts.final_lengths,
        active=lengths > 0,
        sampling=jax.tree.map(lambda setting: jnp.broadcast_to(setting, (batch,)), prompts.sampling),
        seeds=prompts.seeds,
        adapters=prompts.adapters,
    )
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], 1)
    logits = params.logits(last, config, compute, context=context)[:, 0]
    if top_log_probs is None:
        return state, logits, None
    # The last position has no target; it is kept, so that prompts of one token need no case of their own.
    targets = jnp.roll(prompts.tokens, -1, 1)
    predicted = params.token_log_probs(x, targets, config, context=context, top_k=top_log_probs)
    return state, logits, jax.tree.map(lambda statistic: statistic[:, :-1], predicted)


def _placed(
    stored: Int[Array, "B slots"], tokens: Int[Array, "B S"], positions: Int[Array, "B S"]
) -> Int[Array, "B slots"]:
    """The stored tokens with others at their positions; those with negative positions are placed nowhere."""
    slots = jnp.where(positions < 0, stored.shape[1], positions)
    return stored.at[jnp.arange(len(tokens))[:, None], slots].set(tokens, mode="drop")


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
    stored = _placed(state.tokens, tokens, positions)
    return dataclasses.replace(state, cache=cache, tokens=stored, lengths=lengths, written=written), logits


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
    """The state with one row replaced by a row of another state, created with the same `slots` and `max_rollback`."""
    rows = jax.tree.map(lambda x, y: x.at[row].set(y[other_row]), _but_cache(state), _but_cache(other))
    return DecodeState(cache=state.cache.insert(row, other.cache, other_row), **rows)


def _but_cache(state: DecodeState) -> dict[str, Any]:
    """The fields whose arrays have one element per row."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if name != "cache"}
