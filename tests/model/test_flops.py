from typing import Any

import jax
import jax.numpy as jnp
import pytest

from camelid.model.config import ModelConfig
from camelid.model.flops import (
    cache_bytes,
    count_parameters,
    forward_flops,
    llama_formula,
    peak_flops,
    training_flops,
)
from camelid.model.kv_cache import empty_cache
from camelid.model.params import named
from camelid.model.presets import PRESETS, preset
from tiny import tiny_config, tiny_params


@pytest.mark.parametrize("name", ["llama_7b", "tinyllama_1b", "llama3_1_405b", "gemma3_27b", "phi_2"])
def test_nothing_is_allocated(name: str):
    before = len(jax.live_arrays())
    config = preset(name)
    count_parameters(config)
    cache_bytes(config, "bfloat16")
    training_flops(config, config.context_length)
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("tied", [False, True])
def test_the_count_is_what_a_model_holds(tied: bool):
    config = tiny_config(tie_embeddings=tied)
    assert count_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(tiny_params(config)))


# What has a part that the formula does not count.
UNLIKE_LLAMA = ("qwen2", "qwen3", "gemma", "phi_", "stablelm", "smollm", "llama3_2")


@pytest.mark.parametrize("name", PRESETS)
def test_the_closed_formula_equals_the_tree_of_every_plain_llama(name: str):
    config = preset(name)
    assert llama_formula(config) == (None if name.startswith(UNLIKE_LLAMA) else count_parameters(config))


@pytest.mark.parametrize(
    "part",
    [
        {"tie_embeddings": True},
        {"qkv_bias": True},
        {"o_bias": True},
        {"mlp_bias": True},
        {"head_bias": True},
        {"norm": "layer"},
        {"qk_norm": True},
        {"post_norms": True},
        {"parallel_block": True},
        {"gated_mlp": False},
    ],
    ids=lambda part: next(iter(part)),
)
def test_the_closed_formula_is_silent_where_it_would_be_wrong(part: dict[str, Any]):
    plain, other = tiny_config(), tiny_config(**part)
    assert llama_formula(plain) == count_parameters(plain) != count_parameters(other)
    assert llama_formula(other) is None


def test_the_closed_formula_counts_what_adds_no_parameters():
    config = tiny_config(sliding_window=3, window_pattern=(True, False), rotary_fraction=0.4, norm_offset=1.0)
    assert llama_formula(config) == count_parameters(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_token_takes_its_share_of_the_cache(dtype: str):
    config, slots = tiny_config(), 7
    cache = empty_cache(config, 1, slots, jnp.dtype(dtype), ())
    assert cache_bytes(config, dtype) * slots == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


def by_hand(config: ModelConfig, length: int) -> float:
    """A row, product by product and query by query: two operations for each weight, and for each key and value."""
    embed, mlp, head = config.embed_dim, config.mlp_dim, config.head_dim
    q_and_o = 2 * (2 * embed * config.num_heads * head)
    k_and_v = 2 * (2 * embed * config.num_kv_heads * head)
    total = 0.0
    for query in range(length):
        for local in config.windowed:
            keys = min(query + 1, config.sliding_window or length) if local else query + 1
            scores_and_mixture = 2 * (2 * config.num_heads * head * keys)
            total += q_and_o + k_and_v + scores_and_mixture + (3 if config.gated_mlp else 2) * (2 * embed * mlp)
        total += 2 * embed * config.vocab_size
    return total / length


@pytest.mark.parametrize(
    "parts",
    [
        {"tie_embeddings": False},
        {"tie_embeddings": True},
        {"gated_mlp": False, "mlp_bias": True},
        {"sliding_window": 6},
        {"sliding_window": 6, "window_pattern": (True, False, False)},
        {"sliding_window": 20},
        {"sliding_window": 21},
        {"sliding_window": 1},
    ],
    ids=str,
)
def test_flops_are_those_of_every_product_thrice(parts: dict[str, Any]):
    config = tiny_config(**parts)
    for length in (1, 5, 20):
        assert forward_flops(config, length) == pytest.approx(by_hand(config, length), rel=1e-12)
        assert training_flops(config, length) == 3 * forward_flops(config, length)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_frozen_matrices_are_not_counted(tied: bool):
    config = tiny_config(tie_embeddings=tied)
    matrices = [leaf.size for path, leaf in named(tiny_params(config)).items() if path.endswith("_proj")]
    head = config.vocab_size * config.embed_dim
    fewer = training_flops(config, 20) - training_flops(config, 20, frozen=True)
    assert fewer == 2 * (sum(matrices) + head)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("TPU v5 lite", 197e12), ("cpu", None)],
)
def test_peaks_are_found_by_the_device_kind(kind: str, peak: float | None):
    assert peak_flops(kind) == peak
