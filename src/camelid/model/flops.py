"""The number of parameters, cache memory and floating-point operations of a model, computed from its config.

Nothing is allocated.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters; a tied output head is counted once, as the embedding table."""
    return sum(spec.size for spec in named(declare_decoder(config)).values())


LLAMA_FORMULA = "2CM + (2N+1)M + 2NMRHK + 2NMHK + 3NMF"
LLAMA_LETTERS = "C vocabulary, M embed, N layers, R query heads per kv head, H kv heads, K head_dim, F mlp"


def llama_formula(config: ModelConfig) -> int | None:
    """The number of parameters by LLAMA_FORMULA; None for a model with parameters that the formula does not count."""
    biased = config.qkv_bias or config.o_bias or config.mlp_bias or config.head_bias or config.norm == "layer"
    normed_otherwise = config.qk_norm or config.post_norms or config.parallel_block
    if biased or normed_otherwise or config.tie_embeddings or not config.gated_mlp:
        return None
    C, M, N, F = config.vocab_size, config.embed_dim, config.num_layers, config.mlp_dim
    H, K = config.num_kv_heads, config.head_dim
    R = config.num_heads // H
    return 2 * C * M + (2 * N + 1) * M + 2 * N * M * R * H * K + 2 * N * M * H * K + 3 * N * M * F


def cache_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes per token of the key/value cache: keys and values of all layers, in `dtype`."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def forward_flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations per token of a forward pass, averaged over a row of `length` tokens.

    Two for each element of a matrix, and two for each element of the keys and values that a query attends to (PaLM,
    arXiv:2204.02311, appendix B). The causal mask and the sliding window are taken into account; norms, biases,
    rotations and the softmax are not counted.
    """
    return _weight_flops(config) + 4 * config.num_heads * config.head_dim * _attended_keys(config, length)


def _weight_flops(config: ModelConfig) -> float:
    """Those of the products with matrices."""
    specs = named(declare_decoder(config))
    weights = sum(spec.size for path, spec in specs.items() if spec.is_matrix and path != "embed")
    if config.tie_embeddings:
        weights += config.vocab_size * config.embed_dim
    return 2.0 * weights


def training_flops(config: ModelConfig, length: int, frozen: bool = False) -> float:
    """Floating-point operations per token of a training step: the backward pass takes twice those of the forward pass.

    With `frozen` matrices, whose gradients are not computed, it takes once those of their products. Adapters are not
    counted.

    Recomputation due to rematerialization is not counted, as usual for model FLOPs utilization.
    """
    weights = _weight_flops(config) if frozen else 0.0
    return 3 * forward_flops(config, length) - weights


def product_flops(jaxpr: core.Jaxpr) -> tuple[float, bool]:
    """Floating-point operations of the products of a traced function, and whether all of its products are counted.

    What the function computes again, such as activations in a backward pass, counts again; loops count as often as
    they run. Not counted are products in compiled kernels, and those in loops whose number of steps depends on values.
    """
    total, complete = 0.0, True
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            product: Any = equation.outvars[0].aval
            total += 2.0 * math.prod(product.shape) * math.prod(left.shape[axis] for axis in contracted)
        inner = [product_flops(each) for each in core.jaxprs_in_params(equation.params)]
        counts = [count for count, _ in inner]
        if name in KERNELS or (name == "while" and any(counts)):
            complete = False
            continue
        complete = complete and all(known for _, known in inner)
        total += max(counts) if name == "cond" else equation.params.get("length", 1) * sum(counts)
    return total, complete


def _attended_keys(config: ModelConfig, length: int) -> float:
    """The number of keys that a query attends to, summed over layers and averaged over a row of `length` tokens."""
    # Query i attends to min(i + 1, window) keys.
    window = min(config.sliding_window or length, length)
    keys = {True: window - window * (window - 1) / (2 * length), False: (length + 1) / 2}
    return sum(keys[windowed] for windowed in config.windowed)


KERNELS = ("pallas_call", "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper")
"""Operations of a jaxpr that compute attention in a compiled kernel: of splash and of cuDNN."""

# Peak FLOPs per second of dense 16-bit matrix products, from the vendors' data sheets, by a substring of device_kind.
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
    """Peak FLOPs per second of one device in 16 bits, given its JAX `device_kind`; None for an unknown device."""
    return next((peak for name, peak in PEAK.items() if name in device_kind), None)
