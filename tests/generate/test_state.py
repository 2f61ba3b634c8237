"""The steps of decoding, called from Python, compared with the device loop, fresh runs and transformers."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from camelid.generate.config import GenerationConfig
from camelid.generate.sampling import Sampling, select
from camelid.generate.state import (
    DecodeState,
    PromptBatch,
    admit,
    advance,
    prefill,
    release,
    reorder,
    rollback,
)
from camelid.model import attention, loss
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.kv_cache import empty_cache
from camelid.model.weights import Adapted
from camelid.parallel.mesh import one_device
from families import FAMILIES
from generation import generated, sampling
from leaves import adapted
from programs import largest_array
from tiny import tiny_config, tiny_params, tiny_tokens, transformers_twin

pytestmark = pytest.mark.quick_compile

SLOTS, MAX_ROLLBACK = 64, 4
GREEDY, SAMPLED = sampling(0.0, None, None), sampling(0.8, 40, 0.95)
SEEDS = [3, 2**32 + 5, -7]
# Without a window every cache is dense; the layers of Gemma 2 have, in turns, a window of 7 tokens and none.
CONFIGS = {
    "llama": tiny_config(),
    "mistral": FAMILIES["mistral, sliding window"].ours,
    "gemma2": FAMILIES["gemma2"].ours,
}
# Sums over the same products in another order, in float32; the logits are of scale 1 to 10.
CLOSE = {"rtol": 0, "atol": 2e-5}


@dataclasses.dataclass(frozen=True)
class Steps:
    """The functions of generate/state.py for one model, compiled."""

    config: ModelConfig
    params: Decoder
    max_rollback: int | None = MAX_ROLLBACK

    def prefill(
        self, prompts, seeds=SEEDS, options: Sampling = SAMPLED, new: int = 30
    ) -> tuple[DecodeState, jax.Array]:
        padded = np.zeros((len(prompts), 32), np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
        seeds = jnp.asarray([seed % 2**32 for seed in seeds[: len(prompts)]], jnp.uint32)
        return _prefill(
            self.params, padded, lengths, lengths + new, options, seeds, self.config, ComputeConfig(), self.max_rollback
        )

    def advance(self, state: DecodeState, tokens, counts=None) -> tuple[DecodeState, jax.Array]:
        counts = None if counts is None else jnp.asarray(counts, jnp.int32)
        return _advance(self.params, state, jnp.asarray(tokens, jnp.int32), self.config, ComputeConfig(), counts)

    def decode(self, state: DecodeState, logits, count: int) -> tuple[DecodeState, np.ndarray]:
        """`count` tokens of each row (B, count), whose last is not yet appended."""
        tokens = [_select(logits, state.sampling, state.seeds, state.steps)]
        for _ in range(count - 1):
            state, logits = self.advance(state, tokens[-1][:, None])
            tokens.append(_select(logits[:, -1], state.sampling, state.seeds, state.steps))
        return state, np.stack(tokens, 1)


@partial(jax.jit, static_argnums=(6, 7, 8))
def _prefill(params, prompts, lengths, final, options, seeds, config, compute, max_rollback):
    batch = PromptBatch(prompts, lengths, final, options, seeds)
    return prefill(params, batch, config, compute, slots=SLOTS, max_rollback=max_rollback)[:2]


_advance = jax.jit(advance, static_argnames=("config", "compute"))
_select = jax.jit(select)


@pytest.fixture(scope="module", params=CONFIGS)
def steps(request) -> Steps:
    config = CONFIGS[request.param]
    return Steps(config, tiny_params(config))


def prompts_of(config: ModelConfig) -> list[list[int]]:
    return [tiny_tokens(config, 1, length, seed=length)[0].tolist() for length in (1, 9, 30)]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_loop_in_python_gives_the_tokens_of_the_device_loop(steps: Steps, options: Sampling):
    prompts = prompts_of(steps.config)
    how = {"temperature": 0.8, "top_k": 40, "top_p": 0.95} if options is SAMPLED else {}
    config = GenerationConfig(max_new_tokens=20, **how)
    ours = generated(steps.params, prompts, SEEDS, config, (), steps.config, ComputeConfig(), one_device())
    _, tokens = steps.decode(*steps.prefill(prompts, options=options), 20)
    assert tokens.tolist() == ours


@pytest.mark.parametrize("fused", [False, True], ids=["blockwise", "cudnn"])
def test_a_prompt_attends_to_its_own_keys_and_not_to_the_empty_cache(fused: bool, monkeypatch):
    """So it may use the fused kernel of a device, here cuDNN's call as XLA computes it. The logits are the same."""
    config = CONFIGS["mistral"]
    steps, prompts = Steps(config, tiny_params(config)), prompts_of(config)
    # From the first token on, the cache is read.
    expected = []
    for prompt in prompts:
        state, logits = steps.prefill([prompt[:1]])
        expected.append(logits[0] if len(prompt) == 1 else steps.advance(state, [prompt[1:]])[1][0, -1])
    chosen, plain = [], jax.nn.dot_product_attention

    def choose(*_, own_keys: bool, **__) -> str:
        chosen.append(own_keys)
        return "cudnn" if own_keys and fused else "blockwise"

    monkeypatch.setattr(attention, "choose_kernel", choose)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *qkv, implementation, **how: plain(*qkv, implementation="xla", **how)
    )
    jax.clear_caches()
    state, logits = steps.prefill(prompts)
    assert set(chosen) == {True}
    np.testing.assert_allclose(logits, np.stack(expected), **CLOSE)
    steps.advance(state, [[1], [1], [1]])
    assert set(chosen) == {True, False}
    jax.clear_caches()


def test_several_tokens_at_once_are_as_many_single_ones(steps: Steps):
    state, _ = steps.prefill(prompts_of(steps.config))
    tokens = tiny_tokens(steps.config, 3, 12, seed=4)
    one, single = state, []
    for i in range(12):
        one, logits = steps.advance(one, tokens[:, i : i + 1])
        single.append(logits[:, 0])
    # 3 and 4 fit into a ring beside the window, 5 do not.
    several, parts = state, []
    for part in (tokens[:, :3], tokens[:, 3:7], tokens[:, 7:]):
        several, logits = steps.advance(several, part)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), np.stack(single, 1), **CLOSE)
    np.testing.assert_array_equal(several.lengths, one.lengths)
    following = [steps.advance(each, tokens[:, :1])[1] for each in (several, one)]
    np.testing.assert_allclose(*following, **CLOSE)


# 4 tokens fit into a ring of 10 slots beside the window of 7, and 9 do not.
@pytest.mark.parametrize(("size", "counts"), [(4, [4, 0, 2]), (9, [1, 9, 0])], ids=str)
def test_rows_that_advance_by_different_numbers_of_tokens_are_as_each_alone(steps: Steps, size: int, counts: list[int]):
    """As in speculation, where each row accepts another number: padding leaves no trace in any part of the state."""
    state, logits = steps.prefill(prompts_of(steps.config))
    state, _ = steps.decode(state, logits, 5)
    tokens, other = (tiny_tokens(steps.config, 3, size, seed) for seed in (4, 5))
    padding = np.arange(size) >= np.array(counts)[:, None]
    ragged, logits = steps.advance(state, tokens, counts)
    again, _ = steps.advance(state, np.where(padding, other, tokens), counts)
    for ours, theirs in zip(*map(jax.tree.leaves, (ragged, again)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ragged.lengths, state.lengths + jnp.asarray(counts))
    np.testing.assert_array_equal(ragged.written, ragged.lengths)
    _, following = steps.advance(ragged, other[:, :1])
    for row, count in enumerate(counts):
        alone, single = reorder(state, jnp.asarray([row])), []
        for token in tokens[row, :count]:
            alone, expected = steps.advance(alone, [[token]])
            single.append(expected[0])
        if count:
            np.testing.assert_allclose(logits[row, :count], np.concatenate(single), **CLOSE)
        else:
            for before, after in zip(*map(jax.tree.leaves, (state.cache, ragged.cache)), strict=True):
                np.testing.assert_array_equal(after[:, row], before[:, row])
        _, expected = steps.advance(alone, other[row : row + 1, :1])
        np.testing.assert_allclose(following[row], expected[0], **CLOSE)


def test_counts_are_not_part_of_the_program():
    steps = Steps(CONFIGS["llama"], tiny_params(CONFIGS["llama"]))
    state, _ = steps.prefill(prompts_of(steps.config))
    tokens = tiny_tokens(steps.config, 3, 6)
    steps.advance(state, tokens, [6, 0, 2])
    compiled = _advance._cache_size()
    for counts in ([1, 1, 1], [0, 0, 0], [6, 6, 6]):
        steps.advance(state, tokens, counts)
    assert _advance._cache_size() == compiled


@pytest.mark.parametrize("wrong", [7, -1])
def test_counts_out_of_range_are_refused(wrong: int):
    steps = Steps(CONFIGS["llama"], tiny_params(CONFIGS["llama"]))
    state, _ = steps.prefill(prompts_of(steps.config))
    tokens = jnp.asarray(tiny_tokens(steps.config, 3, 6))
    with pytest.raises(ValueError, match=f"row 1 has 6 tokens and cannot be advanced by {wrong} of them"):
        advance(steps.params, state, tokens, steps.config, ComputeConfig(), jnp.asarray([0, wrong, 6]))


def scored_prefill(steps: Steps, prompts, lengths) -> tuple:
    seeds = jnp.asarray([3, 5, 7], jnp.uint32)
    batch = PromptBatch(jnp.asarray(prompts, jnp.int32), lengths, lengths + 30, SAMPLED, seeds)
    return _scored_prefill(steps.params, batch, steps.config, ComputeConfig())


@partial(jax.jit, static_argnums=(2, 3))
def _scored_prefill(*args):
    return prefill(*args, slots=SLOTS, max_rollback=MAX_ROLLBACK, top_log_probs=3)


def test_prompts_are_scored_while_they_are_processed(steps: Steps):
    """The log-probabilities are those of a forward pass without a cache; the rest is as without them."""
    prompts = prompts_of(steps.config)
    padded = np.zeros((3, 32), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    *rest, predicted = scored_prefill(steps, padded, jnp.asarray([len(prompt) for prompt in prompts]))
    for ours, theirs in zip(*map(jax.tree.leaves, (rest, steps.prefill(prompts, [3, 5, 7]))), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    assert predicted.log_prob.shape == (3, 31)
    assert predicted.top_ids is not None
    forward = jax.jit(lambda params, *args: params(*args, None, steps.config, ComputeConfig())[0])
    whole = forward(steps.params, padded, jnp.broadcast_to(jnp.arange(32), (3, 32)))
    for row, prompt in enumerate(prompts):
        end = len(prompt) - 1
        expected = np.asarray(jax.nn.log_softmax(whole[row, :end]))
        np.testing.assert_allclose(predicted.log_prob[row, :end], expected[np.arange(end), prompt[1:]], **CLOSE)
        np.testing.assert_array_equal(predicted.top_ids[row, :end], np.argsort(-expected, kind="stable")[:, :3])
        np.testing.assert_array_equal(predicted.is_argmax[row, :end], expected.argmax(-1) == prompt[1:])


def test_scores_of_prompts_are_those_of_transformers():
    config, params = CONFIGS["mistral"], tiny_params(CONFIGS["mistral"])
    twin = transformers_twin(config, params, FAMILIES["mistral, sliding window"].theirs())
    prompts = tiny_tokens(config, 3, 32)
    predicted = scored_prefill(Steps(config, params), prompts, jnp.full(3, 32))[2]
    tokens = torch.from_numpy(prompts.astype(np.int64))
    with torch.no_grad():
        theirs = twin(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].numpy()
    np.testing.assert_allclose(predicted.log_prob, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_scoring_prompts_stores_the_logits_of_a_chunk_at_a_time(monkeypatch):
    """And without scores there are logits of the last tokens only."""
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=4096)
    params, rows, length = jax.eval_shape(lambda: tiny_params(config)), 2, 32
    last, chunk, whole = (tokens * rows * config.vocab_size for tokens in (1, 4, length))
    monkeypatch.setattr(loss, "MAX_LOGITS", chunk)
    args = jax.ShapeDtypeStruct((rows, length), jnp.int32), *(jax.ShapeDtypeStruct((rows,), jnp.int32),) * 2

    def largest(top_log_probs: int | None) -> int:
        def run(params, *prompts):
            batch = PromptBatch(*prompts, GREEDY, jnp.zeros(rows, jnp.uint32))
            return prefill(params, batch, config, ComputeConfig(), slots=SLOTS, top_log_probs=top_log_probs)

        return largest_array(run, params, *args)

    assert last <= largest(None) < chunk <= largest(0) < whole


def test_a_row_that_was_rolled_back_is_as_if_nothing_had_happened(steps: Steps):
    """Rejected tokens, as in speculation: for each row another number, up to what the rings hold."""
    state, logits = steps.prefill(prompts_of(steps.config))
    state, tokens = steps.decode(state, logits, 14)
    state, logits = steps.advance(state, tokens[:, -1:])
    fresh, expected = steps.decode(state, logits[:, -1], 9)
    wrong, _ = steps.advance(state, tiny_tokens(steps.config, 3, MAX_ROLLBACK, seed=9))
    back = rollback(wrong, state.lengths + jnp.asarray([0, 1, 2]))
    np.testing.assert_array_equal(back.lengths, state.lengths + jnp.asarray([0, 1, 2]))
    back = rollback(back, state.lengths)
    back, ours = steps.decode(back, logits[:, -1], 9)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(back.lengths, fresh.lengths)


def test_a_rollback_into_the_prompt_is_a_shorter_prompt():
    """The shared beginning of two prompts is processed once; any length is allowed without rings."""
    for config in CONFIGS.values():
        steps = Steps(config, tiny_params(config), max_rollback=None)
        first, second = (tiny_tokens(config, 1, 20, seed)[0].tolist() for seed in (1, 2))
        second[:12] = first[:12]
        expected = steps.decode(*steps.prefill([second], [8]), 9)[1]
        state, _ = steps.prefill([first], [8])
        state, logits = steps.advance(rollback(state, jnp.asarray([12])), [second[12:]])
        state = dataclasses.replace(state, prompt_lengths=state.lengths)
        assert steps.decode(state, logits[:, -1], 9)[1].tolist() == expected.tolist()


def test_a_rollback_that_is_too_long_is_refused(steps: Steps):
    state, logits = steps.prefill(prompts_of(steps.config))
    state, _ = steps.decode(state, logits, 10)
    with pytest.raises(ValueError, match=re.escape("row 1 has 18 tokens and cannot be rolled back to 19")):
        rollback(state, jnp.asarray([10, 19, 39]))
    too_far = jnp.asarray([5, 9, 38])
    if steps.config.sliding_window is None:
        assert rollback(state, too_far).lengths.tolist() == too_far.tolist()
    else:  # the ring of row 0, with 10 slots, is not full and still has every token
        with pytest.raises(ValueError, match="row 1 has 18 tokens and cannot be rolled back to 9: at least 14"):
            rollback(state, too_far)
        again = rollback(state, jnp.asarray([5, 14, 35]))
        with pytest.raises(ValueError, match="row 1 has 14 tokens and cannot be rolled back to 13: at least 14"):
            rollback(again, jnp.asarray([5, 13, 35]))


def test_a_second_rollback_counts_from_the_longest_length():
    """What was overwritten stays overwritten, also when the row grows again."""
    steps = Steps(CONFIGS["mistral"], tiny_params(CONFIGS["mistral"]))
    state, logits = steps.prefill(prompts_of(steps.config))
    state, tokens = steps.decode(state, logits, 11)
    np.testing.assert_array_equal(state.lengths, [11, 19, 40])
    state = rollback(state, state.lengths - 4)
    state, _ = steps.advance(state, tokens[:, :1])
    np.testing.assert_array_equal(state.written, [11, 19, 40])
    with pytest.raises(ValueError, match="row 0 has 8 tokens and cannot be rolled back to 6: at least 7"):
        rollback(state, state.lengths - 2)


def test_reordered_rows_continue_as_fresh_ones(steps: Steps):
    """Rows that are repeated, moved and left out, as in beam search; they then take different tokens."""
    prompts, rows = prompts_of(steps.config), [2, 0, 2, 1]
    state, logits = steps.prefill(prompts)
    state, tokens = steps.decode(state, logits, 11)
    chosen = tiny_tokens(steps.config, 4, 3, seed=5)
    _, ours = steps.advance(reorder(state, jnp.asarray(rows)), chosen)
    sequences = [[*prompts[row], *tokens[row, :-1], *chosen[i]] for i, row in enumerate(rows)]
    for i, sequence in enumerate(sequences):
        fresh, _ = steps.prefill([sequence[:1]])
        _, alone = steps.advance(fresh, [sequence[1:]])
        np.testing.assert_allclose(ours[i], alone[0, -3:], **CLOSE)


def test_a_row_that_is_admitted_later_gives_what_it_gives_alone(steps: Steps):
    """Continuous batching: row 1 is released, and another prompt continues in its place beside the others."""
    prompts = prompts_of(steps.config)
    late = tiny_tokens(steps.config, 1, 17, seed=6)[0].tolist()
    _, expected = steps.decode(*steps.prefill(prompts), 24)
    _, alone = steps.decode(*steps.prefill([late], [11]), 12)
    state, logits = steps.prefill(prompts)
    state, first = steps.decode(state, logits, 8)
    state, logits = steps.advance(state, first[:, -1:])
    state = release(state, 1)
    held = [np.asarray(leaf) for leaf in jax.tree.leaves(state.cache)]
    state, idle = steps.decode(state, logits[:, -1], 4)
    for before, after in zip(held, jax.tree.leaves(state.cache), strict=True):
        np.testing.assert_array_equal(after[:, 1], before[:, 1])  # nothing is written for a free row
    state, logits = steps.advance(state, idle[:, -1:])
    other, its_logits = steps.prefill([late], [11])
    state = admit(state, 1, other)
    state, rest = steps.decode(state, logits[:, -1].at[1].set(its_logits[0]), 12)
    assert rest[1].tolist() == alone[0].tolist()
    for row in (0, 2):
        assert [*first[row], *idle[row], *rest[row]] == expected[row].tolist()


# Layers with and without a window -----------------------------------------------------------------------------------


def test_each_row_decodes_with_its_own_adapter():
    """Rows of adapters 0 and 1 and of the base alone give what models with that one weight give, also after a swap."""
    config, params = CONFIGS["llama"], Steps(CONFIGS["llama"], tiny_params(CONFIGS["llama"])).params
    spec = declare_decoder(config).layers.attn.q_proj
    base = params.layers.attn.q_proj
    assert isinstance(base, jax.Array)
    ranks = [2] * config.num_layers
    single = [adapted(spec, base, ranks, seed=seed) for seed in (1, 2)]
    factors = ("a", "b", "scale")
    several = Adapted(base, *(jnp.stack([getattr(one, name) for one in single], 1) for name in factors))
    prompts, index = jnp.asarray(tiny_tokens(config, 3, 9)), jnp.array([1, -1, 0])
    rows = jnp.full(3, 9), jnp.full(3, 20), GREEDY, jnp.zeros(3, jnp.uint32)

    def with_q_proj(weight) -> Decoder:
        attn = dataclasses.replace(params.layers.attn, q_proj=weight)
        return dataclasses.replace(params, layers=dataclasses.replace(params.layers, attn=attn))

    def decoded(weight, adapters=None, swap: bool = False) -> np.ndarray:
        batch = PromptBatch(prompts, *rows, adapters)
        state, logits, _ = prefill(with_q_proj(weight), batch, config, ComputeConfig(), slots=SLOTS)
        state, more = advance(with_q_proj(weight), state, jnp.asarray(prompts[:, :2]), config, ComputeConfig())
        if swap:
            state = reorder(state, jnp.array([2, 1, 0]))
            state, more = advance(with_q_proj(weight), state, jnp.asarray(prompts[::-1, 2:4]), config, ComputeConfig())
            more = more[::-1]
        return np.concatenate([np.asarray(logits)[:, None], more], 1)

    for swap in (False, True):
        found = decoded(several, index, swap)
        for row, weight in enumerate((single[1], base, single[0])):
            np.testing.assert_allclose(found[row], decoded(weight, None, swap)[row], **CLOSE)


def test_a_kernel_that_cannot_process_a_prompt_is_not_used_for_it():
    """cuDNN, requested for training, needs a GPU and an even length; the prompt falls back to the blockwise kernel."""
    config = CONFIGS["llama"]
    params = Steps(config, tiny_params(config)).params
    prompts = jnp.asarray(tiny_tokens(config, 1, 9))
    batch = PromptBatch(prompts, jnp.array([9]), jnp.array([20]), GREEDY, jnp.zeros(1, jnp.uint32))
    _, logits, _ = prefill(params, batch, config, ComputeConfig(attention="cudnn"), slots=SLOTS)
    np.testing.assert_array_equal(logits, prefill(params, batch, config, ComputeConfig(), slots=SLOTS)[1])


def test_gemma2_with_a_ring_for_its_local_layers_equals_transformers():
    """Logits and greedy tokens past the window of 7, layers scanned and unrolled."""
    family = FAMILIES["gemma2"]
    config, params = family.ours, tiny_params(family.ours)
    twin = transformers_twin(config, params, family.theirs())
    steps, prompts = Steps(config, params, max_rollback=1), tiny_tokens(config, 2, 9)
    state, logits = steps.prefill(prompts.tolist(), options=GREEDY)
    assert state.cache.windowed.k.shape[3] == 7
    ours = [logits]
    for _ in range(31):
        state, logits = steps.advance(state, select(ours[-1], state.sampling, state.seeds, state.steps)[:, None])
        ours.append(logits[:, 0])
    ours = np.stack(ours, 1)
    tokens = ours.argmax(-1)
    with torch.no_grad():
        whole = torch.from_numpy(np.concatenate([prompts, tokens[:, :-1]], 1).astype(np.int64))
        theirs = twin(whole).logits.numpy()[:, 8:]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    options = GenerationConfig(max_new_tokens=32)
    unrolled = generated(params, prompts.tolist(), [0, 0], options, (), config, ComputeConfig(), one_device())
    assert unrolled == tokens.tolist() == theirs.argmax(-1).tolist()


def test_a_ring_takes_the_memory_of_its_window():
    config, dtype = CONFIGS["gemma2"], jnp.dtype("bfloat16")
    slot = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize  # bytes of a key and a value in one layer
    local, rows = sum(config.windowed), 3
    assert (local, config.num_layers, config.sliding_window) == (3, 5, 7)

    def nbytes(max_rollback: int | None) -> int:
        cache = empty_cache(config, rows, SLOTS, dtype, (), max_rollback)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

    assert nbytes(None) == slot * rows * SLOTS * config.num_layers
    for back in (1, 4):
        assert nbytes(back) == slot * rows * (local * (7 - 1 + back) + (5 - local) * SLOTS)


def test_a_prompt_longer_than_the_ring_may_come_in_chunks(steps: Steps):
    """Not only a first chunk may be longer than the ring: 1, then 29 tokens beside a ring of 10 slots."""
    prompt = prompts_of(steps.config)[2]
    _, expected = steps.decode(*steps.prefill([prompt]), 10)
    state, _ = steps.prefill([prompt[:1]])
    state, logits = steps.advance(state, [prompt[1:]])
    state = dataclasses.replace(state, prompt_lengths=state.lengths)
    assert steps.decode(state, logits[:, -1], 10)[1].tolist() == expected.tolist()
