"""Complete generations. tests/parity compares greedy ones with transformers."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camelid.errors import UserError
from camelid.generate.config import GenerationConfig
from camelid.generate.sampling import select
from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import abstract
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from generation import generated, sampling
from tiny import tiny_config, tiny_params, tiny_tokens

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
