"""What a model is, and how a run computes it: ModelConfig names no machine, Compute no model."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every rotation is `factor` times slower (arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK-aware scaling: beyond context_length, rope_theta grows with the length of the document."""

    kind: Literal["dynamic"] = "dynamic"
    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's: slow rotations are stretched by `factor`, fast ones kept (arXiv:2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    """rotations that turn fewer times than this over the original context are stretched in full"""
    high_freq_factor: float
    """rotations that turn more often than this are left alone; between the two, the stretch fades out"""
    original_context: int
    """tokens the model was first trained on"""

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor = {self.high_freq_factor} is not above low_freq_factor")


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN: slow rotations are stretched by `factor`, fast ones kept, and scores grow a little (arXiv:2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    factor: float | None = None
    """None: context_length / original_context"""
    original_context: int
    beta_fast: float = 32.0
    """rotations that turn more often than this over the original context are left alone"""
    beta_slow: float = 1.0
    """rotations that turn fewer times than this are stretched in full"""
    truncate: bool = True
    """whether the two borders are rounded outwards to whole features"""
    attention_factor: float | None = None
    """of queries and of keys; None: 0.1 ln(factor) + 1, or what the two mscales say"""
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE: each rotation has a divisor of its own, one for short documents and one for long (arXiv:2402.13753)."""

    kind: Literal["longrope"] = "longrope"
    short_factor: tuple[float, ...]
    """for documents of at most original_context tokens"""
    long_factor: tuple[float, ...]
    original_context: int
    factor: float | None = None
    """None: context_length / original_context"""
    attention_factor: float | None = None
    """of queries and of keys; None: sqrt(1 + ln(factor) / ln(original_context))"""


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama kind. Sizes are an axis word and what it counts; defaults are Llama's."""

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

    norm: Literal["rms", "layer"] = "rms"
    """root mean square (arXiv:1910.07467), or mean and variance with a bias (arXiv:1607.06450)"""
    norm_eps: float
    norm_offset: float = 0.0
    """added to every norm's scale; Gemma's scales are stored as the difference from 1"""
    post_norms: bool = False
    """norms also after attention and MLP, before their outputs join the residual stream"""
    parallel_block: bool = False
    """attention and MLP read the same norm, and both add to its input"""

    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """of the MLP; gelu is exact, gelu_tanh its approximation (arXiv:1606.08415)"""
    gated_mlp: bool = True
    """activation(gate) x up (arXiv:2002.05202), or activation(up) alone"""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    """queries and keys are normed head by head before they are rotated"""
    query_pre_attn_scalar: int | None = None
    """scores are divided by its root; None: head_dim"""
    attn_softcap: float | None = None
    """scores x become cap tanh(x / cap) (arXiv:2408.00118)"""
    logits_softcap: float | None = None
    sliding_window: int | None = None
    """a query sees so many tokens, its own and those just before it (arXiv:2310.06825)"""
    window_pattern: tuple[bool, ...] = (True,)
    """which layers have the window, repeated over the layers; the others see everything"""

    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0
    """the first part of a head's features that is rotated"""
    local_rope_theta: float | None = None
    """rope_theta of layers with the window, where it is their own; they are not scaled then"""

    embed_scale: float = 1.0
    """token embeddings are multiplied by it"""
    tie_embeddings: bool = False
    """the output head is the embedding table"""
    init_std: float = 0.02
    """standard deviation of fresh weights"""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    family: str | None = field(default=None, compare=False)
    """the model_type it is saved as (None: the first that can say all of this); nothing computed depends on it"""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"of head_dim = {self.head_dim}, {self.rotary_dim} are rotary; rotary embeddings turn pairs of features"
            )
        if self.tie_embeddings and self.head_bias:
            raise ValueError("head_bias needs a head of its own, and tie_embeddings says there is none")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window = {self.sliding_window} is below 1")
        if not self.window_pattern or (self.sliding_window is None and self.window_pattern != (True,)):
            raise ValueError("window_pattern says which layers have the sliding_window, and there is none")
        if self.local_rope_theta is not None and self.sliding_window is None:
            raise ValueError("local_rope_theta is for layers with a sliding_window, and there is none")
        if isinstance(scaling := self.rope_scaling, LongRopeScaling):
            for name in ("short_factor", "long_factor"):
                if len(getattr(scaling, name)) != self.rotary_dim // 2:
                    raise ValueError(
                        f"rope_scaling.{name} has {len(getattr(scaling, name))} numbers, and {self.rotary_dim // 2} "
                        "pairs of features are rotated"
                    )

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

    @property
    def rotary_dim(self) -> int:
        """How many features of a head are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def windowed(self) -> tuple[bool, ...]:
        """For each layer, whether it sees the sliding window only."""
        pattern = self.window_pattern
        return tuple(self.sliding_window is not None and pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def max_length(self) -> int:
        """The longest sequence the model takes: its context, or what its rope scaling stretches that to."""
        match self.rope_scaling:
            case LinearScaling(factor=factor) | DynamicScaling(factor=factor):
                return int(self.context_length * factor)
            case YarnScaling(factor=float(factor), original_context=original):
                return max(self.context_length, int(factor * original))
        return self.context_length


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a run computes a model; it changes speed, memory and rounding, never what the model is."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of products and activations; norms, rotary angles, softmax, logits and loss are float32 always; not float16 in
    training, which would need loss scaling"""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of stored parameters; float32 in training, since most updates are smaller than the rounding of 16 bits"""
    remat: Literal["none", "elementwise", "layer"] = "elementwise"
    """what the backward pass computes again: nothing, all but products and attention (the fastest), or whole layers"""
    attention: Literal["auto", "dense", "blockwise", "cudnn", "splash"] = "auto"
    """the kernel; auto takes what the device offers"""
    replicate: tuple[str, ...] = ()
    """axis words that every device keeps whole, say kv_heads where they are fewer than the mesh's tensor axis"""
