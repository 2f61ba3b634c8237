"""Complete generations. tests/parity compares greedy ones with transformers."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from camelid.errors import UserError
from camelid.generate import decode
from camelid.generate.config import GenerationConfig
from camelid.generate.decode import Generation
from camelid.generate.sampling import select
from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import abstract
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from generation import generated, sampling
from tiny import tiny_config, tiny_params, tiny_tokens, transformers_twin

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config()
GREEDY = GenerationConfig(max_new_tokens=20)
SAMPLED = GenerationConfig(max_new_tokens=20, temperature=0.8, top_k=40, top_p=0.95)
PROMPTS = [tiny_tokens(CONFIG, 1, length, seed=length)[0].tolist() for length in (1, 9, 30, 5)]
SEEDS = [3, 2**32 + 5, -7, 3]


@pytest.fixture(scope="module")
def params() -> Decoder:
    return tiny_params(CONFIG)


@pytest.fixture(scope="module")
def run(params: Decoder):
    def run(prompts, seeds, options: GenerationConfig, max_new_tokens: int = 30, eos_ids=(), **how) -> list[list[int]]:
        options = replace(options, max_new_tokens=max_new_tokens)
        return generated(params, prompts, seeds, options, eos_ids, CONFIG, ComputeConfig(), one_device(), **how)

    return run


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_of_a_batch_is_what_it_is_alone(run, options: GenerationConfig):
    together = run(PROMPTS, SEEDS, options)
    assert [len(row) for row in together] == [30] * len(PROMPTS)
    for prompt, seed, row in zip(PROMPTS, SEEDS, together, strict=True):
        assert run([prompt], [seed], options) == [row]


def test_a_mesh_generates_what_one_device_does(run, params: Decoder):
    """Three prompts on four data-parallel shards: one shard has only a padding row."""
    mesh, compute = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), ComputeConfig(replicate=("vocab", "vocab_in"))
    specs = abstract(declare_decoder(CONFIG), jnp.float32, mesh, compute.replicate)
    cut = jax.tree.map(lambda array, spec: jax.device_put(array, spec.sharding), params, specs)
    options = replace(SAMPLED, max_new_tokens=30)
    rows = generated(cut, PROMPTS[:3], SEEDS[:3], options, (), CONFIG, compute, mesh)
    assert rows == run(PROMPTS, SEEDS, SAMPLED)[:3]


@pytest.mark.parametrize(("heads", "kv_heads", "tensor"), [(16, 2, 4), (8, 2, 8)])
def test_replicated_key_heads_generate_what_one_device_does(heads: int, kv_heads: int, tensor: int):
    """There are more tensor-parallel devices than key/value heads, so each device holds the complete cache."""
    config = tiny_config(vocab_size=96, num_heads=heads, num_kv_heads=kv_heads)
    params, compute = tiny_params(config), ComputeConfig(replicate=("kv_heads",))
    mesh = make_mesh(MeshConfig(tensor=tensor))
    specs = abstract(declare_decoder(config), jnp.float32, mesh, compute.replicate)
    cut = jax.tree.map(lambda array, spec: jax.device_put(array, spec.sharding), params, specs)
    alone = generated(params, PROMPTS, SEEDS, SAMPLED, (), config, ComputeConfig(), one_device())
    assert generated(cut, PROMPTS, SEEDS, SAMPLED, (), config, compute, mesh) == alone


def test_sampled_tokens_are_those_of_full_forwards_without_a_cache(run, params: Decoder):
    logits = jax.jit(lambda tokens: params(tokens, jnp.arange(64)[None], None, CONFIG, ComputeConfig())[0])
    tokens, settings = list(PROMPTS[1]), sampling(0.8, 40, 0.95)
    for step in range(12):
        row = np.zeros((1, 64), np.int32)
        row[0, : len(tokens)] = tokens
        last = logits(row)[:, len(tokens) - 1]
        tokens += select(last, settings, jnp.uint32([SEEDS[1] % 2**32]), jnp.int32([step])).tolist()
    assert run(PROMPTS[1:2], SEEDS[1:2], SAMPLED, 12) == [tokens[len(PROMPTS[1]) :]]


def test_seeds_differ_and_repeat(run):
    same, other = run([PROMPTS[0]] * 4, [1, 1, 1, 2], SAMPLED)[1:3], run([PROMPTS[0]] * 4, [1, 2, 3, 4], SAMPLED)
    assert same[0] == same[1] == other[0]
    assert len({tuple(row) for row in other}) == 4


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_ends_before_its_first_eos_and_the_others_continue(run, options: GenerationConfig):
    free = run(PROMPTS, SEEDS, options)
    # Any of several ids ends a row; these two are the last that are new to theirs.
    eos = [max(row, key=row.index) for row in free[:2]]
    ends = [next((i for i, token in enumerate(row) if token in eos), len(row)) for row in free]
    assert len(set(ends)) > 2, "rows are to end at different steps"
    assert run(PROMPTS, SEEDS, options, eos_ids=eos) == [row[:end] for row, end in zip(free, ends, strict=True)]


def test_a_row_may_end_at_once(run):
    first = run(PROMPTS, SEEDS, GREEDY)[2][0]
    assert run([PROMPTS[2]], [0], GREEDY, eos_ids=[first]) == [[]]


def test_a_prompt_may_fill_the_context_to_the_last_token(run):
    prompt = tiny_tokens(CONFIG, 1, 60)[0].tolist()
    assert len(run([prompt], [0], GREEDY, 4)[0]) == 4
    assert run([prompt[:50]], [0], GREEDY, 14)[0][:3] == run([prompt[:50]], [0], GREEDY, 3)[0]


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 5, "there is no prompt"),
        ([[1], []], 5, "prompt 1 is empty"),
        ([[1, 97]], 5, "prompt 0 has token 97, and the vocabulary has 97"),
        ([[5], [-1, 5]], 5, "prompt 1 has token -1"),
        (
            [[1] * 40],
            25,
            "prompt 0 has 40 tokens, which with max_new_tokens = 25 exceeds the context of 64\nShorten the prompt, or "
            "request at most 24 new tokens.",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused(run, prompts, max_new_tokens: int, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        run(prompts, [0] * len(prompts), GREEDY, max_new_tokens)


# Dispatches, completions of one prompt, and what ends a row -----------------------------------


@pytest.mark.parametrize("steps", [1, 7])
def test_the_number_of_tokens_per_dispatch_makes_no_difference(run, steps: int):
    eos = [run(PROMPTS, SEEDS, SAMPLED)[1][11]]
    assert run(PROMPTS, SEEDS, SAMPLED, eos_ids=eos, steps=steps) == run(PROMPTS, SEEDS, SAMPLED, eos_ids=eos)


def test_several_completions_of_a_prompt_follow_each_other(run):
    """The first has the prompt's seed; none depends on the other prompts, or on how many there are."""
    three = replace(SAMPLED, n=3)
    rows = run(PROMPTS, SEEDS, three)
    assert len({tuple(row) for row in rows[:3]}) == 3
    assert rows[::3] == run(PROMPTS, SEEDS, SAMPLED)
    assert run(PROMPTS[1:2], SEEDS[1:2], three) == rows[3:6]
    assert run(PROMPTS[1:2], SEEDS[1:2], replace(SAMPLED, n=2)) == rows[3:5]


def test_several_completions_on_a_mesh_are_those_of_one_device(run, params: Decoder):
    mesh, compute = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), ComputeConfig(replicate=("vocab", "vocab_in"))
    options = replace(SAMPLED, n=3, max_new_tokens=30)
    specs = abstract(declare_decoder(CONFIG), jnp.float32, mesh, compute.replicate)
    cut = jax.tree.map(lambda array, spec: jax.device_put(array, spec.sharding), params, specs)
    rows = generated(cut, PROMPTS[:3], SEEDS[:3], options, (), CONFIG, compute, mesh)
    assert rows == run(PROMPTS[:3], SEEDS[:3], options)


def test_stop_tokens_end_a_row_as_eos_does(run):
    free = run(PROMPTS, SEEDS, GREEDY)
    stop = free[1][5]
    ended = [row[: row.index(stop)] if stop in row else row for row in free]
    assert run(PROMPTS, SEEDS, replace(GREEDY, stop_token_ids=(stop,))) == ended
    ignored = run(PROMPTS, SEEDS, replace(GREEDY, ignore_eos=True), eos_ids=[stop])
    assert [len(row) for row in ignored] == [30] * len(PROMPTS)
    assert all(stop not in row for row in ignored)


def test_a_row_ends_where_its_options_exclude_every_token(run):
    options = GenerationConfig(max_new_tokens=9, allowed_tokens=(3, 4), no_repeat_ngram_size=1)
    rows = run([[5, 6], [3, 6]], [0, 0], options, 9)
    assert [sorted(row) for row in rows] == [[3, 4], [4]]


def test_no_row_ends_before_the_minimum_of_new_tokens(run):
    free = run(PROMPTS, SEEDS, GREEDY)
    eos = [row[3] for row in free]
    rows = run(PROMPTS, SEEDS, replace(GREEDY, min_new_tokens=9), eos_ids=eos)
    assert all(len(row) >= 9 for row in rows)
    assert not any(token in row[:9] for token in eos for row in rows)
    assert any(len(row) < 9 for row in run(PROMPTS, SEEDS, GREEDY, eos_ids=eos))


def test_log_probabilities_are_those_of_full_forwards(params: Decoder):
    """Of the logits before any option changes them."""
    options = GenerationConfig(max_new_tokens=6, temperature=0.7, logit_bias={3: 5.0}, logprobs=True, top_logprobs=4)
    generation = Generation(params, PROMPTS, SEEDS, options, (), CONFIG, ComputeConfig(), one_device())
    first, rest = generation.advance(), generation.advance()
    assert first.counts.tolist() == [1] * 4
    forward = jax.jit(lambda tokens: params(tokens, jnp.arange(64)[None], None, CONFIG, ComputeConfig())[0])
    for row, prompt in enumerate(PROMPTS):
        tokens = [*prompt, first.tokens[row, 0], *rest.tokens[row, :5]]
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        expected = np.asarray(jax.nn.log_softmax(forward(padded)[0, len(prompt) - 1 : len(tokens) - 1]))
        ours = np.concatenate([first.log_probs[row, :1], rest.log_probs[row, :5]])
        np.testing.assert_allclose(ours, expected[np.arange(6), tokens[len(prompt) :]], rtol=0, atol=2e-5)
        top = np.concatenate([first.top_ids[row, :1], rest.top_ids[row, :5]])
        np.testing.assert_array_equal(top, np.argsort(-expected, kind="stable")[:, :4])


def test_greedy_tokens_with_processors_equal_transformers(params: Decoder, run):
    twin = transformers_twin(CONFIG, params)
    how = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 8, "max_new_tokens": 30}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        eos = run([prompt], [0], GREEDY)[0][4]
        theirs = twin.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, eos_token_id=eos, **how
        )[0, len(prompt) :].tolist()
        ours = run([prompt], [0], GenerationConfig(**how), eos_ids=[eos])[0]
        assert ours == [token for token in theirs if token != eos]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppress_tokens": (97,)}, "suppress_tokens has token 97, and the vocabulary has 97"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has token -1"),
        ({"stop_token_ids": (200,)}, "stop_token_ids has token 200"),
        ({"top_logprobs": 98}, "top_logprobs = 98 exceeds the vocabulary of 97"),
        ({"suppress_tokens": tuple(range(97))}, "the options exclude every token"),
    ],
)
def test_options_that_do_not_fit_the_vocabulary_are_refused(run, options: dict, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        run([[1]], [0], GenerationConfig(**options))


def test_nothing_is_compiled_again_for_other_options_or_lengths(params: Decoder):
    """Prompts and numbers of new tokens within one bucket, and any sampling options."""

    def programs() -> int:
        return decode._first_tokens._cache_size() + decode._more_tokens._cache_size()

    def run(prompts, **options) -> None:
        generated(params, prompts, SEEDS, GenerationConfig(**options), (), CONFIG, ComputeConfig(), one_device())

    run(PROMPTS, max_new_tokens=9)
    before = programs()
    run(PROMPTS[::-1], max_new_tokens=25, temperature=0.9, top_p=0.5, min_p=0.1, typical_p=0.9)
    run(PROMPTS, max_new_tokens=5, repetition_penalty=1.2, no_repeat_ngram_size=2, min_new_tokens=3)
    assert programs() == before


def test_the_cache_is_updated_in_place(params: Decoder):
    """Its memory is handed from one dispatch to the next."""
    options = GenerationConfig(max_new_tokens=9)
    generation = Generation(params, PROMPTS, SEEDS, options, (), CONFIG, ComputeConfig(), one_device())
    places = []
    for _ in range(3):
        generation.advance(steps=4)
        assert generation._carry is not None
        places.append([leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(generation._carry.state.cache)])
    assert places[0] == places[1] == places[2]
