"""How much arithmetic a model needs, from its declaration."""

from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named


def count_parameters(config: ModelConfig) -> int:
    """Every stored number."""
    return sum(spec.size for spec in named(declare_decoder(config)).values())


def training_flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations a token of a training step over rows of `length`, half of attention masked away.

    Two for each weight of a product, forward, and twice that backward (arXiv:2204.02311, appendix B).
    """
    specs = named(declare_decoder(config))
    weights = sum(spec.size for path, spec in specs.items() if spec.is_matrix and path != "embed")
    if config.tie_embeddings:
        weights += config.vocab_size * config.embed_dim
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * length / 2
    return 3 * 2 * (weights + attention)


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
