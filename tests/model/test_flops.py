import jax
import pytest

from camelid.model.config import ModelConfig
from camelid.model.flops import count_parameters, peak_flops, training_flops
from tiny import tiny_config, tiny_params

LLAMA_7B = ModelConfig(
    vocab_size=32000,
    embed_dim=4096,
    mlp_dim=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    context_length=2048,
    norm_eps=1e-6,
    rope_theta=10_000.0,
)
TINY_LLAMA = ModelConfig(
    vocab_size=32000,
    embed_dim=2048,
    mlp_dim=5632,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    context_length=2048,
    norm_eps=1e-5,
    rope_theta=10_000.0,
)


@pytest.mark.parametrize(("config", "count"), [(LLAMA_7B, 6_738_415_616), (TINY_LLAMA, 1_100_048_384)])
def test_counts_are_the_published_ones_and_nothing_is_allocated(config: ModelConfig, count: int):
    before = len(jax.live_arrays())
    assert count_parameters(config) == count
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("tied", [False, True])
def test_the_count_is_what_a_model_holds(tied: bool):
    config = tiny_config(tie_embeddings=tied)
    assert count_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(tiny_params(config)))


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_every_product_thrice(tied: bool):
    """A token, product by product: two for each weight, and scores and mixtures over half a row on average."""
    config, length = tiny_config(tie_embeddings=tied), 20
    embed, mlp, head = config.embed_dim, config.mlp_dim, config.head_dim
    q_and_o = 2 * (2 * embed * config.num_heads * head)
    k_and_v = 2 * (2 * embed * config.num_kv_heads * head)
    scores_and_mixture = 2 * (2 * config.num_heads * head * length / 2)
    layer = q_and_o + k_and_v + scores_and_mixture + 3 * (2 * embed * mlp)
    forward = config.num_layers * layer + 2 * embed * config.vocab_size
    assert training_flops(config, length) == 3 * forward


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("TPU v5 lite", 197e12), ("cpu", None)],
)
def test_peaks_are_found_by_the_device_kind(kind: str, peak: float | None):
    assert peak_flops(kind) == peak
