"""Generation: one compiled program per shape processes a batch of prompts and continues it, in one dispatch.

Axes: B batch, P prompt, N new tokens, V vocab.
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
from camelid.generate.sampling import Sampling, all_finite, select
from camelid.generate.state import DecodeState, advance, prefill
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.decoder import Decoder, decode_params
from camelid.model.tokens import token_row
from camelid.parallel.batch_sharding import BatchSharding, data_parallel_size
from camelid.parallel.hosts import to_host

BUCKET = 64  # lengths of prompts and of new tokens are rounded up to multiples, so that few shapes are compiled


def generate(
    params: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    config: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    drawable: Bool[np.ndarray, " V"] | None = None,
) -> tuple[list[list[int]], list[bool]]:
    """Returns the new tokens of each prompt, up to and without the first EOS, and whether its logits stayed finite.

    A row's tokens do not depend on the other rows. `sampling` has settings for each prompt or for all; `drawable` marks
    the ids that may be generated (None: all). A row ends at its first logits that are NaN or infinite. Raises UserError
    if a prompt is empty, has an id outside of the vocabulary, or leaves no room in the context.
    """
    check_prompts(prompts, max_new_tokens, config)
    count, longest = len(prompts), max(len(prompt) for prompt in prompts)
    rows = -count % data_parallel_size(mesh) + count
    tokens = np.zeros((rows, min(_round_up(longest), config.max_length)), np.int32)
    batch = {"lengths": np.zeros((rows, 1), np.int32), "seeds": np.zeros((rows, 1), np.uint32)}
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        tokens[i, : len(prompt)], batch["lengths"][i], batch["seeds"][i] = prompt, len(prompt), seed % 2**32
    for name, setting in vars(sampling).items():
        # Rows that only fill the batch have the settings of the first prompt, so that they turn no filter on.
        batch[name] = np.full((rows, 1), np.asarray(setting)[0])
        batch[name][:count, 0] = setting
    with jax.set_mesh(mesh):
        found = _generate(
            params,
            decode_params(params),
            BatchSharding(rows, mesh).place({"tokens": tokens} | batch),
            np.array(eos_ids, np.int32),
            drawable,
            np.int32(max_new_tokens),
            min(_round_up(max_new_tokens), config.max_length),
            config,
            compute,
        )
        out, counts, finite = (x[:count] for x in to_host(found))
    return [row[:n].tolist() for row, n in zip(out, counts, strict=True)], finite.tolist()


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


def _round_up(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


@partial(jax.jit, static_argnames=("room", "config", "compute"))
def _generate(
    params: Decoder,
    step_params: Decoder,
    batch: dict[str, Array],
    eos: Int[Array, " ids"],
    drawable: Bool[Array, " V"] | None,
    limit: Int[Array, ""],
    room: int,
    config: ModelConfig,
    compute: ComputeConfig,
) -> tuple[Int[Array, "B N"], Int[Array, " B"], Bool[Array, " B"]]:
    """Up to `limit` new tokens of each row in a buffer of `room`, how many precede its end, and `finite`.

    `params` process the prompts; `step_params` are the same parameters in the form that is fast for single tokens.
    """
    tokens: Int[Array, "B P"] = batch["tokens"]
    rows = {name: x[:, 0] for name, x in batch.items() if name != "tokens"}
    sampling = Sampling(**{field.name: rows[field.name] for field in dataclasses.fields(Sampling)})
    lengths, slots = rows["lengths"], tokens.shape[1] + room
    state, logits = prefill(
        params, tokens, lengths, lengths + limit, sampling, rows["seeds"], config, compute, slots=slots
    )

    def next_tokens(state: DecodeState, logits: Float[Array, "B V"], finite: Array) -> tuple[DecodeState, Array, Array]:
        allowed = logits if drawable is None else jnp.where(drawable, logits, -jnp.inf)
        token = select(allowed, state.sampling, state.seeds, state.steps)
        finite = finite & (~state.active | all_finite(logits))
        ended = jnp.any(token[:, None] == eos, -1) | ~finite
        return dataclasses.replace(state, active=state.active & ~ended), token, finite

    def proceeds(carry) -> Array:
        step, state, *_ = carry
        return (step < limit) & jnp.any(state.active)

    def one_step(carry):
        step, state, token, out, counts, finite = carry
        state, logits = advance(step_params, state, token[:, None], config, compute)
        state, token, finite = next_tokens(state, logits[:, 0], finite)
        out = lax.dynamic_update_slice_in_dim(out, token[:, None], step, 1)
        return step + 1, state, token, out, counts + state.active.astype(jnp.int32), finite

    state, token, finite = next_tokens(state, logits, jnp.ones(len(tokens), bool))
    out = jnp.zeros((len(tokens), room), jnp.int32).at[:, 0].set(token)
    start = (jnp.int32(1), state, token, out, state.active.astype(jnp.int32), finite)
    *_, out, counts, finite = lax.while_loop(proceeds, one_step, start)
    return out, counts, finite
