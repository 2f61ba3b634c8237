"""What a model costs: parameters, memory of its cache, arithmetic; all from its declaration."""

import jax.numpy as jnp

from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named


def count_parameters(config: ModelConfig) -> int:
    """Every stored number."""
    return sum(spec.size for spec in named(declare_decoder(config)).values())


# C vocab, M embed, N layers, R query heads for each key/value head, H key/value heads, K head_dim, F mlp
LLAMA_FORMULA = "2CM + (2N+1)M + 2NMRHK + 2NMHK + 3NMF"


def llama_formula(config: ModelConfig) -> int | None:
    """LLAMA_FORMULA, the number of parameters of a plain Llama; None for a model with parts that it does not count."""
    biased = config.qkv_bias or config.o_bias or config.mlp_bias or config.head_bias or config.norm == "layer"
    normed_otherwise = config.qk_norm or config.post_norms or config.parallel_block
    if biased or normed_otherwise or config.tie_embeddings or not config.gated_mlp:
        return None
    C, M, N, F = config.vocab_size, config.embed_dim, config.num_layers, config.mlp_dim
    H, K = config.num_kv_heads, config.head_dim
    R = config.num_heads // H
    return 2 * C * M + (2 * N + 1) * M + 2 * N * M * R * H * K + 2 * N * M * H * K + 3 * N * M * F


def cache_bytes(config: ModelConfig, dtype: str) -> int:
    """What a token takes in the cache: its keys and values in every layer."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def forward_flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations a token, on average over rows of `length`.

    Two for each weight of a product and for each product with a key or a value that is seen
    (arXiv:2204.02311, appendix B); norms, biases and rotations are left out.
    """
    specs = named(declare_decoder(config))
    weights = sum(spec.size for path, spec in specs.items() if spec.is_matrix and path != "embed")
    if config.tie_embeddings:
        weights += config.vocab_size * config.embed_dim
    return 2 * (weights + 2 * config.num_heads * config.head_dim * _keys_seen(config, length))


def training_flops(config: ModelConfig, length: int) -> float:
    """The same for a training step: the backward pass takes twice what the forward pass does."""
    return 3 * forward_flops(config, length)


def _keys_seen(config: ModelConfig, length: int) -> float:
    """How many keys a query sees, summed over the layers, on average over a row of `length`."""
    # Query i sees min(i + 1, window) keys: the window is full but for its first steps.
    window = min(config.sliding_window or length, length)
    seen = {True: window - window * (window - 1) / (2 * length), False: (length + 1) / 2}
    return sum(seen[local] for local in config.windowed)


# Peak products a second in 16 bits, dense, from the makers' data sheets; by a part of JAX's device_kind.
PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """What one device can do in 16 bits, where it is known."""
    return next((peak for name, peak in PEAK.items() if name in device_kind), None)
