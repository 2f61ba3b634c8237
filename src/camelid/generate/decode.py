"""Prefill and decode: one compiled program a shape, one dispatch a call.

Axes: B batch, P prompt, N new tokens, V vocab.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, UInt32

from camelid.errors import UserError
from camelid.generate.sample import Sampling, all_finite, choose
from camelid.model.config import Compute, ModelConfig
from camelid.model.decoder import Decoder, decode_params
from camelid.model.kv_cache import empty_cache
from camelid.model.tokens import token_row
from camelid.parallel.batch_sharding import BatchSharding, data_parallel_size
from camelid.parallel.hosts import to_host

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
    drawable: Bool[np.ndarray, " V"] | None = None,
) -> tuple[list[list[int]], list[bool]]:
    """New tokens after each prompt, up to and without the first EOS; a row's tokens do not depend on the other rows.

    `drawable` says which ids may be drawn (None: all). The second list says for each row whether its logits stayed
    finite: a row ends at the first that are not. Raises UserError where a prompt is empty, has an id beyond the
    vocabulary, or leaves no room in the context.
    """
    _check(prompts, max_new_tokens, config)
    longest = max(len(prompt) for prompt in prompts)
    length = min(_round_up(longest), config.max_length)
    room = min(_round_up(max_new_tokens), config.max_length)
    rows = -len(prompts) % data_parallel_size(mesh) + len(prompts)
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.ones((rows, 1), np.int32)
    row_seeds = np.zeros((rows, 1), np.uint32)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        tokens[i, : len(prompt)], lengths[i], row_seeds[i] = prompt, len(prompt), seed % 2**32
    batch = BatchSharding(rows, mesh).place({"tokens": tokens, "lengths": lengths, "seeds": row_seeds})
    eos = np.array(eos_ids, np.int32)
    with jax.set_mesh(mesh):
        found = _generate(
            params,
            decode_params(params),
            batch,
            how,
            eos,
            drawable,
            np.int32(max_new_tokens),
            room,
            config,
            compute,
        )
        out, counts, finite = (x[: len(prompts)] for x in to_host(found))
    return [row[:count].tolist() for row, count in zip(out, counts, strict=True)], finite.tolist()


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: ModelConfig) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} is below 1", "Ask for at least one token.")
    if not prompts:
        raise UserError("there is no prompt", "Give at least one.")
    for number, prompt in enumerate(prompts):
        length = len(token_row(prompt, f"prompt {number}", config.vocab_size))
        room = config.max_length - length
        if room < 1:
            raise UserError(
                f"prompt {number} has {length} tokens, which leave no room for new ones in the context of "
                f"{config.max_length}",
                f"Shorten the prompt to at most {config.max_length - 1} tokens.",
            )
        if room < max_new_tokens:
            raise UserError(
                f"prompt {number} has {length} tokens, and {max_new_tokens} new ones are asked for: more than the "
                f"context of {config.max_length}",
                f"Shorten the prompt, or ask for at most {room} new token{'s' if room > 1 else ''}.",
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
    drawable: Bool[Array, " V"] | None,
    limit: Int[Array, ""],
    room: int,
    config: ModelConfig,
    compute: Compute,
) -> tuple[Int[Array, "B N"], Int[Array, " B"], Bool[Array, " B"]]:
    """At most `limit` new tokens of each row, in a buffer of `room`, how many come before its end, and `finite`.

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
    x, cache = params.hidden(tokens, positions, None, config, compute, cache=cache, lengths=ends)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], 1)

    def next_token(logits: Array, step: Array) -> tuple[Array, Array]:
        allowed = logits if drawable is None else jnp.where(drawable, logits, -jnp.inf)
        return choose(allowed, seeds, step, how), all_finite(logits)

    first, finite = next_token(params.logits(last, config, compute)[:, 0], jnp.int32(0))
    out = jnp.zeros((batch, room), jnp.int32)

    def goes_on(carry) -> Array:
        step, _, _, _, done, _, _ = carry
        return (step < limit) & ~jnp.all(done)

    def one_token(carry):
        step, out, cache, token, done, finite, counts = carry
        out = lax.dynamic_update_slice_in_dim(out, token[:, None], step, 1)
        counts = counts + jnp.where(done, 0, 1)
        positions = (lengths + step)[:, None]
        logits, cache = one_by_one(token[:, None], positions, None, config, compute, cache=cache, lengths=ends)
        token, sound = next_token(logits[:, 0], step + 1)
        # The logits after the last token are computed, and nobody needs them.
        finite = finite & (done | sound | (step + 1 == limit))
        return step + 1, out, cache, token, done | ends_at(token, finite), finite, counts

    def ends_at(token: Array, finite: Array) -> Array:
        return jnp.any(token[:, None] == eos, -1) | ~finite

    start = (jnp.int32(0), out, cache, first, ends_at(first, finite), finite, jnp.zeros(batch, jnp.int32))
    _, out, _, _, _, finite, counts = lax.while_loop(goes_on, one_token, start)
    return out, counts, finite
