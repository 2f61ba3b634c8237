"""Generation: prompts are processed together, then continued by several tokens per dispatch.

Axes: B completions, P prompt, N new tokens of a dispatch, V vocab, K candidates.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from camelid.errors import UserError
from camelid.generate.config import GenerationConfig
from camelid.generate.sampling import Sampling, all_finite, process, sampling, select
from camelid.generate.state import DecodeState, PromptBatch, advance, prefill, reorder
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.decoder import Decoder, decode_params
from camelid.model.tokens import token_row
from camelid.parallel.batch_sharding import BatchSharding, data_parallel_size
from camelid.parallel.hosts import to_host

BUCKET = 64  # lengths of prompts and of new tokens are rounded up to multiples, so that few shapes are compiled
# In 16 bits, XLA's CPU backend converts all weights to float32 once per dispatch, in the time of some seven tokens.
STEPS = 256  # the largest number of tokens that one dispatch generates; fewer need no other program


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What one dispatch has generated."""

    tokens: Int[Array | np.ndarray, "B N"]
    counts: Int[Array | np.ndarray, " B"]
    """how many of the tokens each completion has: those before the one that ended it"""
    ended: Bool[Array | np.ndarray, " B"]
    """whether EOS or a stop token has ended the completion, or no token was left that it may have"""
    finite: Bool[Array | np.ndarray, " B"]
    """False: the completion has ended because its logits were NaN or infinite"""
    log_probs: Float[Array | np.ndarray, "B N"] | None
    """the natural logarithm of the probability of each token, before any option changed it"""
    top_ids: Int[Array | np.ndarray, "B N K"] | None
    """the most probable tokens at each place, the most probable first"""
    top_log_probs: Float[Array | np.ndarray, "B N K"] | None
    """the logarithms of their probabilities"""


class Generation:
    """Prompts in the course of generation: each call of `advance` continues all of them by some tokens.

    The completions of one prompt follow each other, `options.n` of each. A completion's tokens do not depend on the
    other rows, and not on the number of tokens that a call generates.
    """

    def __init__(
        self,
        params: Decoder,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        options: GenerationConfig,
        eos_ids: Sequence[int],
        config: ModelConfig,
        compute: ComputeConfig,
        mesh: Mesh,
        drawable: Bool[np.ndarray, " V"] | None = None,
    ):
        """Checks the prompts; the first call of `advance` processes them.

        `seeds` has one for each prompt, in place of `options.seed`. `drawable` marks the ids that may be generated
        (None: all). Raises UserError as `check_prompts`, or if the options exclude every token or name one that is not
        in the vocabulary.
        """
        check_prompts(prompts, options.max_new_tokens, config)
        if options.top_logprobs > config.vocab_size:
            raise UserError(
                f"top_logprobs = {options.top_logprobs} exceeds the vocabulary of {config.vocab_size}",
                f"Use at most {config.vocab_size}.",
            )
        ending = [*(() if options.ignore_eos else eos_ids), *options.stop_token_ids]
        self._bias = _bias(options, drawable, eos_ids, ending, config.vocab_size)
        self._ending = np.array(ending, np.int32)
        self._params, self._prompts, self._seeds, self._options = params, prompts, seeds, options
        self._config, self._compute, self._mesh = config, compute, mesh
        self._left = options.max_new_tokens
        self._carry: _Carry | None = None
        self.active = np.ones(len(prompts) * options.n, bool)
        """which completions continue; the caller may end others between two calls of `advance`"""

    def advance(self, steps: int = STEPS) -> NewTokens:
        """Generates up to `steps` tokens (at most STEPS) of each active completion; the first call, only one.

        The arrays that it returns are NumPy arrays in every process.
        """
        count, how = len(self.active), {"config": self._config, "compute": self._compute, "top": self._top}
        steps = min(steps, STEPS, self._left)
        with jax.set_mesh(self._mesh):
            if self._carry is None:
                steps = 1
                options, prompts = self._options, self._place_prompts()
                room = _round_up(options.max_new_tokens)
                slots = prompts["tokens"].shape[1] + min(room, self._config.max_length)
                self._step_params = decode_params(self._params)
                self._carry, out = _first_tokens(
                    self._params,
                    prompts,
                    sampling(options),
                    np.int32(options.max_new_tokens),
                    self._bias,
                    self._ending,
                    n=options.n,
                    slots=slots,
                    **how,
                )
            else:
                active = np.zeros(len(self._carry.token), bool)
                active[:count] = self.active
                self._carry, out = _more_tokens(
                    self._step_params, self._carry, active, np.int32(steps), self._bias, self._ending, **how
                )
            out = jax.tree.map(lambda x: x[:count], to_host(out))
        self._left -= steps
        self.active = self.active & ~out.ended & out.finite & (self._left > 0)
        return out

    @property
    def _top(self) -> int | None:
        """The number of most probable tokens that are returned; None: no log-probabilities at all."""
        options = self._options
        return options.top_logprobs if options.logprobs or options.top_logprobs else None

    def _place_prompts(self) -> dict[str, Array]:
        """The prompts on the mesh, padded to buckets, and a seed for each completion."""
        n, prompts = self._options.n, self._prompts
        rows = -len(prompts) % data_parallel_size(self._mesh) + len(prompts)
        padded = min(_round_up(max(map(len, prompts))), self._config.max_length)
        tokens, lengths = np.zeros((rows, padded), np.int32), np.zeros((rows, 1), np.int32)
        seeds = np.zeros((rows, n), np.uint32)
        for row, (prompt, seed) in enumerate(zip(prompts, self._seeds, strict=True)):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
            seeds[row] = _completion_seeds(seed % 2**32, n)
        return BatchSharding(rows, self._mesh).place({"tokens": tokens, "lengths": lengths, "seeds": seeds})


def _completion_seeds(seed: int, n: int) -> list[int]:
    """The seeds of the n completions of one prompt, the first of which is `seed`."""
    return [seed, *(int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(1, n))]


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: ModelConfig) -> None:
    """Raises UserError if a prompt is empty, has an id outside of the vocabulary, or leaves no room in the context."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} is below 1", "Request at least one token.")
    if not prompts:
        raise UserError("there is no prompt", "Give at least one.")
    for number, prompt in enumerate(prompts):
        length = len(token_row(prompt, f"prompt {number}", config.vocab_size))
        room = config.max_length - length
        if room < 1:
            raise UserError(
                f"prompt {number} has {length} tokens, which leaves no room for new ones in the context of "
                f"{config.max_length}",
                f"Shorten the prompt to at most {config.max_length - 1} tokens.",
            )
        if room < max_new_tokens:
            raise UserError(
                f"prompt {number} has {length} tokens, which with max_new_tokens = {max_new_tokens} exceeds the "
                f"context of {config.max_length}",
                f"Shorten the prompt, or request at most {room} new token{'s' if room > 1 else ''}.",
            )


def _bias(
    options: GenerationConfig,
    drawable: Bool[np.ndarray, " V"] | None,
    eos_ids: Sequence[int],
    ending: Sequence[int],
    vocab: int,
) -> Float[np.ndarray, "1 V"] | None:
    """What is added to the logits of every row, -inf for tokens that must not be generated; None: nothing."""
    named = {
        "logit_bias": options.logit_bias or {},
        "suppress_tokens": options.suppress_tokens,
        "allowed_tokens": options.allowed_tokens,
        "stop_token_ids": options.stop_token_ids,
    }
    for name, ids in named.items():
        for token in ids:
            if not 0 <= token < vocab:
                raise UserError(
                    f"{name} has token {token}, and the vocabulary has {vocab}", f"Use ids from 0 to {vocab - 1}."
                )
    bias = np.zeros(vocab, np.float32)
    if drawable is not None:
        bias[~drawable] = -np.inf
    if options.allowed_tokens:
        bias[~np.isin(np.arange(vocab), [*options.allowed_tokens, *ending])] = -np.inf
    if options.ignore_eos:
        bias[[token for token in eos_ids if token < vocab]] = -np.inf
    bias[list(options.suppress_tokens)] = -np.inf
    for token, value in (options.logit_bias or {}).items():
        bias[token] += value
    if not np.isfinite(bias).any():
        raise UserError("the options exclude every token", "Leave out suppress_tokens, or allow others.")
    return bias[None] if bias.any() else None


def _round_up(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


# Compiled programs ------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """What one dispatch hands to the next."""

    state: DecodeState
    token: Int[Array, " B"]
    """the last token of each row, which is not in the state yet"""
    finite: Bool[Array, " B"]
    """whether the logits of each row have been finite so far"""


@partial(jax.jit, static_argnames=("n", "slots", "config", "compute", "top"))
def _first_tokens(
    params: Decoder,
    prompts: dict[str, Array],
    settings: Sampling,
    max_new_tokens: Int[Array, ""],
    bias: Float[Array, "1 V"] | None,
    ending: Int[Array, " ids"],
    *,
    n: int,
    slots: int,
    config: ModelConfig,
    compute: ComputeConfig,
    top: int | None,
) -> tuple[_Carry, NewTokens]:
    """Processes the prompts, each once, and selects the first token of their `n` completions."""
    lengths = prompts["lengths"][:, 0]
    batch = PromptBatch(prompts["tokens"], lengths, lengths + max_new_tokens, settings, prompts["seeds"][:, 0])
    state, logits, _ = prefill(params, batch, config, compute, slots=slots)
    if n > 1:
        rows = jnp.repeat(jnp.arange(len(lengths)), n)
        state = dataclasses.replace(reorder(state, rows), seeds=prompts["seeds"].reshape(-1))
        logits = logits[rows]
    out = _no_tokens(len(logits), 1, top)
    carry = _Carry(state, jnp.zeros(len(logits), jnp.int32), jnp.ones(len(logits), bool))
    return _select_next(carry, logits, jnp.int32(0), out, bias, ending)


@partial(jax.jit, static_argnames=("config", "compute", "top"), donate_argnames="carry")
def _more_tokens(
    params: Decoder,
    carry: _Carry,
    active: Bool[Array, " B"],
    steps: Int[Array, ""],
    bias: Float[Array, "1 V"] | None,
    ending: Int[Array, " ids"],
    *,
    config: ModelConfig,
    compute: ComputeConfig,
    top: int | None,
) -> tuple[_Carry, NewTokens]:
    """Up to `steps` more tokens of the rows that are active; fewer if all rows end before.

    `params` are the parameters in the form that is fast for single tokens, see `decode_params`.
    """
    state = dataclasses.replace(carry.state, active=carry.state.active & active)
    carry = dataclasses.replace(carry, state=state)

    def proceeds(loop) -> Array:
        step, carry, _ = loop
        return (step < steps) & jnp.any(carry.state.active)

    def one_step(loop):
        step, carry, out = loop
        state, logits = advance(params, carry.state, carry.token[:, None], config, compute)
        carry = dataclasses.replace(carry, state=state)
        return step + 1, *_select_next(carry, logits[:, 0], step, out, bias, ending)

    out = _no_tokens(len(carry.token), STEPS, top)
    _, carry, out = lax.while_loop(proceeds, one_step, (jnp.int32(0), carry, out))
    return carry, out


def _no_tokens(rows: int, steps: int, top: int | None) -> NewTokens:
    nothing = None if top is None else jnp.zeros((rows, steps), jnp.float32)
    return NewTokens(
        tokens=jnp.zeros((rows, steps), jnp.int32),
        counts=jnp.zeros(rows, jnp.int32),
        ended=jnp.zeros(rows, bool),
        finite=jnp.ones(rows, bool),
        log_probs=nothing,
        top_ids=None if top is None else jnp.zeros((rows, steps, top), jnp.int32),
        top_log_probs=None if top is None else jnp.zeros((rows, steps, top), jnp.float32),
    )


def _select_next(
    carry: _Carry,
    logits: Float[Array, "B V"],
    step: Int[Array, ""],
    out: NewTokens,
    bias: Float[Array, "1 V"] | None,
    ending: Int[Array, " ids"],
) -> tuple[_Carry, NewTokens]:
    """Selects the next token of each row, and records it at place `step` of the dispatch."""
    state, settings = carry.state, carry.state.sampling
    processed = process(logits, settings, state.tokens, state.lengths, state.prompt_lengths, bias, ending)
    token = select(processed, settings, state.seeds, state.steps)
    finite = carry.finite & (~state.active | all_finite(logits))
    impossible = jnp.all(processed == -jnp.inf, -1)
    ended = state.active & finite & (jnp.any(token[:, None] == ending, -1) | impossible)
    active = state.active & finite & ~ended

    def put(stored: Array | np.ndarray, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(jnp.asarray(stored), new[:, None], step, 1)

    recorded = {
        "tokens": put(out.tokens, token),
        "counts": out.counts + active.astype(jnp.int32),
        "ended": out.ended | ended,
    }
    if out.log_probs is not None and out.top_ids is not None and out.top_log_probs is not None:
        log_probs = jax.nn.log_softmax(logits, -1)
        top_log_probs, top_ids = lax.top_k(log_probs, out.top_ids.shape[-1])
        chosen = jnp.take_along_axis(log_probs, token[:, None], 1)[:, 0]
        recorded |= {
            "log_probs": put(out.log_probs, chosen),
            "top_ids": put(out.top_ids, top_ids.astype(jnp.int32)),
            "top_log_probs": put(out.top_log_probs, top_log_probs),
        }
    state = dataclasses.replace(state, active=active)
    return _Carry(state, token, finite), dataclasses.replace(out, finite=finite, **recorded)
