"""ModelConfig, the architecture of a model, and ComputeConfig, its precision, memory and kernels."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: all rotary frequencies are divided by `factor` (arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """Dynamic NTK-aware scaling: beyond context_length, rope_theta grows with the length of the document."""

    kind: Literal["dynamic"] = "dynamic"
    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: low frequencies are divided by `factor`, high ones are unchanged (arXiv:2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    """frequencies with fewer rotations than this over the original context are divided by the full factor"""
    high_freq_factor: float
    """frequencies with more rotations than this are unchanged; between the two, the divisor is interpolated"""
    original_context: int
    """context length before scaling, in tokens"""

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor = {self.high_freq_factor} is not above low_freq_factor")


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN: low frequencies are divided by `factor`, high ones are not, and scores grow (arXiv:2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    factor: float | None = None
    """None: context_length / original_context"""
    original_context: int
    beta_fast: float = 32.0
    """frequencies with more rotations than this over the original context are unchanged"""
    beta_slow: float = 1.0
    """frequencies with fewer rotations than this are divided by the full factor"""
    truncate: bool = True
    """whether the two bounds are rounded outward to integers"""
    attention_factor: float | None = None
    """factor of queries and of keys; None: 0.1 ln(factor) + 1, or the value that follows from the two mscales"""
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE: a divisor for each frequency, one for short documents and one for long ones (arXiv:2402.13753)."""

    kind: Literal["longrope"] = "longrope"
    short_factor: tuple[float, ...]
    """divisors for documents of at most original_context tokens"""
    long_factor: tuple[float, ...]
    """divisors for longer documents"""
    original_context: int
    factor: float | None = None
    """None: context_length / original_context"""
    attention_factor: float | None = None
    """factor of queries and of keys; None: sqrt(1 + ln(factor) / ln(original_context))"""


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a Llama-like decoder. Defaults are those of Llama."""

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """keys and values are shared by num_heads / num_kv_heads query heads (grouped-query attention, arXiv:2305.13245)"""
    head_dim: int
    context_length: int
    """the longest sequence that the model was trained on, in tokens"""

    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (arXiv:1910.07467), or LayerNorm with a bias (arXiv:1607.06450)"""
    norm_eps: float
    norm_offset: float = 0.0
    """added to the scale of every norm; Gemma stores scales as differences from 1"""
    post_norms: bool = False
    """additional norms of the outputs of attention and MLP, before they are added to the residual stream"""
    parallel_block: bool = False
    """attention and MLP both read the output of one norm, and both outputs are added to the residual stream"""

    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """activation of the MLP; gelu is exact, gelu_tanh its tanh approximation (arXiv:1606.08415)"""
    gated_mlp: bool = True
    """whether the MLP computes activation(gate) x up (arXiv:2002.05202), or activation(up)"""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    """queries and keys are normalized per head before they are rotated"""
    query_pre_attn_scalar: int | None = None
    """attention scores are divided by its square root; None: head_dim"""
    attn_softcap: float | None = None
    """attention scores x become cap tanh(x / cap) (arXiv:2408.00118)"""
    logits_softcap: float | None = None
    """logits x become cap tanh(x / cap)"""
    sliding_window: int | None = None
    """number of tokens that a query attends to: its own and those just before it (arXiv:2310.06825)"""
    window_pattern: tuple[bool, ...] = (True,)
    """whether a layer has the sliding window, repeated over the layers; the others attend to all earlier tokens"""

    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0
    """fraction of the features of a head that is rotated; the first ones"""
    local_rope_theta: float | None = None
    """rope_theta of the layers with a sliding window, to which rope_scaling then does not apply; None: rope_theta"""

    embed_scale: float = 1.0
    """factor of the token embeddings"""
    tie_embeddings: bool = False
    """whether the output head is the embedding table"""
    init_std: float = 0.02
    """standard deviation of newly initialized weights"""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    family: str | None = field(default=None, compare=False)
    """model_type with which the model is saved; None: the first that can express it. The results do not depend on it"""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"head_dim = {self.head_dim} has {self.rotary_dim} rotary features; an even number from 2 to "
                f"{self.head_dim} is needed"
            )
        if self.tie_embeddings and self.head_bias:
            raise ValueError("head_bias cannot be combined with tie_embeddings: the model has no separate head")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window = {self.sliding_window} is below 1")
        if not self.window_pattern or (self.sliding_window is None and self.window_pattern != (True,)):
            raise ValueError("window_pattern is set without a sliding_window")
        if self.local_rope_theta is not None and self.sliding_window is None:
            raise ValueError("local_rope_theta is set without a sliding_window")
        if isinstance(scaling := self.rope_scaling, LongRopeScaling):
            for name in ("short_factor", "long_factor"):
                if len(getattr(scaling, name)) != self.rotary_dim // 2:
                    raise ValueError(
                        f"rope_scaling.{name} has {len(getattr(scaling, name))} values, and {self.rotary_dim // 2} "
                        "pairs of features are rotated"
                    )

    @functools.cached_property
    def axis_sizes(self) -> Mapping[str, int]:
        """The size of each axis name in the declarations of parameters."""
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

    @property
    def rotary_dim(self) -> int:
        """The number of features of a head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def windowed(self) -> tuple[bool, ...]:
        """For each layer, whether it has the sliding window."""
        pattern = self.window_pattern
        return tuple(self.sliding_window is not None and pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def max_length(self) -> int:
        """The longest sequence that the model accepts: its context, as extended by its rope scaling."""
        match self.rope_scaling:
            case LinearScaling(factor=factor) | DynamicScaling(factor=factor):
                return int(self.context_length * factor)
            case YarnScaling(factor=float(factor), original_context=original):
                return max(self.context_length, int(factor * original))
        return self.context_length


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Precision, memory and kernels of a computation; they never change the model."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of matrix products and activations; norms, rotary angles, softmax, logits and loss are always float32.
    Training in float16 scales the loss"""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of stored parameters; float32 in training, because 16 bits would round most updates away"""
    remat: Literal["none", "elementwise", "layer"] = "elementwise"
    """what the backward pass computes again: nothing, all but products and attention (the fastest), or entire layers"""
    attention: Literal["auto", "dense", "blockwise", "cudnn", "splash"] = "auto"
    """attention kernel; auto chooses the fastest that the device supports"""
    replicate: tuple[str, ...] = ()
    """axis names that are not sharded, for example kv_heads if there are fewer than devices along the tensor axis"""
