"""Prefill and decode: one compiled program a shape, one dispatch a call.

Axes: B batch, P prompt, N new tokens.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from camelid.errors import UserError
from camelid.generate.sample import Sampling, choose
from camelid.model.cache import empty_cache
from camelid.model.config import Compute, ModelConfig
from camelid.model.decoder import Decoder, unstacked
from camelid.parallel.hosts import batch_ways, own_rows, place, to_host

BUCKET = 64  # prompts and new tokens are padded to multiples, so that few shapes are compiled


def generate(
    params: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    how: Sampling,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    config: ModelConfig,
    compute: Compute,
    mesh: Mesh,
) -> list[list[int]]:
    """New tokens after each prompt, up to and without the first EOS; a row's tokens do not depend on the other rows.

    Raises UserError where a prompt is empty, has an id beyond the vocabulary, or leaves no room in the context.
    """
    _check(prompts, max_new_tokens, config)
    longest = max(len(prompt) for prompt in prompts)
    length = min(_round_up(longest), config.max_length)
    room = min(_round_up(max_new_tokens), config.max_length)
    rows = -len(prompts) % batch_ways(mesh) + len(prompts)
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.ones((rows, 1), np.int32)
    row_seeds = np.zeros((rows, 1), np.uint32)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        tokens[i, : len(prompt)], lengths[i], row_seeds[i] = prompt, len(prompt), seed % 2**32
    own = own_rows(rows, mesh)
    local = {"tokens": tokens[own], "lengths": lengths[own], "seeds": row_seeds[own]}
    eos = np.array(eos_ids, np.int32)
    with jax.set_mesh(mesh):
        out, counts = _generate(
            params,
            unstacked(params),
            place(local, own, rows, mesh),
            how,
            eos,
            np.int32(max_new_tokens),
            room,
            config,
            compute,
        )
        out, counts = to_host((out, counts))
    return [row[:count].tolist() for row, count in zip(out[: len(prompts)], counts, strict=False)]


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: ModelConfig) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} is below 1", "Ask for at least one token.")
    if not prompts:
        raise UserError("there is no prompt", "Give at least one.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty", "Give at least one token; BOS is enough.")
        if odd := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise UserError(
                f"prompt {number} has token {odd[0]}, and the vocabulary has {config.vocab_size}",
                "The tokenizer and the model belong to different checkpoints.",
            )
        if len(prompt) + max_new_tokens > config.max_length:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, and {max_new_tokens} new ones are asked for: more than the "
                f"context of {config.max_length}",
                f"Shorten the prompt, or ask for at most {max(0, config.max_length - len(prompt))} new tokens.",
            )


def _round_up(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


@partial(jax.jit, static_argnames=("room", "config", "compute"))
def _generate(
    params: Decoder,
    one_by_one: Decoder,
    rows: dict[str, Array],
    how: Sampling,
    eos: Int[Array, " ids"],
    limit: Int[Array, ""],
    room: int,
    config: ModelConfig,
    compute: Compute,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """At most `limit` new tokens of each row, in a buffer of `room`, and how many come before its EOS.

    `params` read the prompt; `one_by_one` are the same, as decoding wants them.
    """
    tokens: Int[Array, "B P"] = rows["tokens"]
    lengths: Int[Array, " B"] = rows["lengths"][:, 0]
    seeds: UInt32[Array, " B"] = rows["seeds"][:, 0]
    batch, length = tokens.shape
    cache = empty_cache(config, batch, length + room, jnp.dtype(compute.dtype), compute.replicate)
    # A prompt's padding fills slots that its new tokens overwrite before any query can see them.
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    # Where rotations depend on how long a row gets, that is decided here: keys in the cache are not turned again.
    ends = lengths + limit
    x, cache = params.hidden(tokens, positions, None, config, compute, cache, ends)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], 1)
    first = choose(params.logits(last, config, compute)[:, 0], seeds, jnp.int32(0), how)
    out = jnp.zeros((batch, room), jnp.int32)

    def goes_on(carry) -> Array:
        step, _, _, _, done, _ = carry
        return (step < limit) & ~jnp.all(done)

    def one_token(carry):
        step, out, cache, token, done, counts = carry
        done = done | jnp.any(token[:, None] == eos, -1)
        out = lax.dynamic_update_slice_in_dim(out, token[:, None], step, 1)
        counts = counts + jnp.where(done, 0, 1)
        positions = (lengths + step)[:, None]
        logits, cache = one_by_one(token[:, None], positions, None, config, compute, cache, ends)
        return step + 1, out, cache, choose(logits[:, 0], seeds, step + 1, how), done, counts

    start = (jnp.int32(0), out, cache, first, jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32))
    _, out, *_, counts = lax.while_loop(goes_on, one_token, start)
    return out, counts
