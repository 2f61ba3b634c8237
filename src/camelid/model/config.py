"""What a model is, and how a run computes it: ModelConfig names no machine, Compute no model."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency scaling: slow rotations are stretched by `factor`, fast ones kept (arXiv:2407.21783)."""

    factor: float
    low_freq_factor: float
    """rotations that turn fewer times than this over the original context are stretched in full"""
    high_freq_factor: float
    """rotations that turn more often than this are left alone; between the two, the stretch fades out"""
    original_context: int
    """tokens the model was first trained on"""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama kind. Sizes are an axis word and what it counts."""

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """keys and values are shared by num_heads / num_kv_heads query heads (grouped-query attention, arXiv:2305.13245)"""
    head_dim: int
    context_length: int
    """the longest sequence the model was trained for"""
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    """the output head is the embedding table"""
    init_std: float = 0.02
    """standard deviation of fresh weights"""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rotary embeddings turn pairs of features")

    @functools.cached_property
    def axis_sizes(self) -> Mapping[str, int]:
        """Sizes by axis word, for parameter declarations and checkpoint tables."""
        return {
            "vocab": self.vocab_size,
            "vocab_in": self.vocab_size,
            "embed": self.embed_dim,
            "embed_in": self.embed_dim,
            "mlp": self.mlp_dim,
            "layers": self.num_layers,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a run computes a model; it changes speed, memory and rounding, never what the model is."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of products and activations; norms, rotary angles, softmax, logits and loss are float32 always"""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of stored parameters"""
    remat: Literal["none", "elementwise", "layer"] = "elementwise"
    """what the backward pass computes again: nothing, all but products and attention (the fastest), or whole layers"""
    attention: Literal["auto", "dense", "blockwise", "cudnn", "splash"] = "auto"
    """the kernel; auto takes what the device offers"""
    replicate: tuple[str, ...] = ()
    """axis words that every device keeps whole, say kv_heads where they are fewer than the mesh's tensor axis"""
