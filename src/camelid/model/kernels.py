"""The fused kernels of GPUs and TPUs, and the choice between all kernels.

Axes: B batch, S queries, T keys, H query heads, K key/value heads, G query heads per key/value head, D head_dim.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from camelid.errors import UserError
from camelid.model.mask import Mask
from camelid.model.products import dot
from camelid.parallel.rules import COMPUTE, partition


@dataclass(frozen=True)
class Scoring:
    """The score of a query and a key: scale x, or with a cap cap tanh(scale x / cap), of their inner product x."""

    scale: float
    cap: float | None

    def scores(self, q: Float[Array, "B K G S D"], k: Float[Array, "B K T D"]) -> Float[Array, "B K G S T"]:
        """The scores of all queries and keys in float32."""
        scores = dot("BKGSD,BKTD->BKGST", q, k) * self.scale
        return scores if self.cap is None else self.cap * jnp.tanh(scores / self.cap)

    def derivative(self, scores: Float[Array, "B K G S T"]) -> float | Float[Array, "B K G S T"]:
        """The derivative of the scores with respect to the inner products."""
        return self.scale if self.cap is None else self.scale * (1 - jnp.square(scores / self.cap))


NEEDS = {
    "cudnn": "NVIDIA GPUs of compute capability 8.0 (Ampere) or higher, a 16-bit compute.dtype, a head_dim that is a "
    "multiple of 8 up to 128, an even number of tokens, no attn_softcap, no attention dropout and no forgetful mask",
    "splash": "a TPU, a head_dim and a number of tokens that are multiples of 128, no attention dropout and no "
    "forgetful mask",
}


def choose_kernel(
    requested: str,
    dtype: Any,
    length: int,
    head_dim: int,
    *,
    own_keys: bool,
    cap: float | None,
    dropout: float,
    keys_hidden: bool = False,
    required: bool = True,
) -> str:
    """The name of the kernel for `length` queries on this process's devices: dense, blockwise, cudnn or splash.

    `requested` is ComputeConfig.attention. `own_keys`: the keys are of the same tokens as the queries, in the same
    order. `keys_hidden`: some of them are hidden from all queries (View.valid). Warns if "auto" cannot use the fused
    kernel of a GPU or TPU. Raises UserError if `requested` cannot be used.
    Not `required`: blockwise is used instead, without either.
    """
    if not own_keys:
        # Fused kernels expect as many queries as keys. The scores of one query are small enough to be stored.
        return "dense" if length == 1 else "blockwise"
    if requested in ("dense", "blockwise"):
        return requested
    backend = jax.default_backend()
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(backend, "blockwise") if requested == "auto" else requested
    fits = {
        # JAX does not differentiate cuDNN's kernel with a mask for odd lengths. Neither fused kernel can reproduce the
        # dropout of the other kernels, which depends on rows and positions alone, or is given the keys that are hidden.
        "cudnn": backend == "gpu"
        and all(map(_is_ampere_or_newer, jax.local_devices()))
        and jnp.dtype(dtype).itemsize == 2
        and head_dim in range(8, 129, 8)
        and length % 2 == 0
        and cap is None
        and dropout == 0
        and not keys_hidden,
        "splash": backend == "tpu" and head_dim % 128 == 0 and length % 128 == 0 and dropout == 0 and not keys_hidden,
        "blockwise": True,
    }
    if fits[kernel]:
        return kernel
    if not required:
        return "blockwise"
    device = backend if backend == "cpu" else f"{backend} ({jax.local_devices()[0].device_kind})"
    reason = (
        f"{kernel} requires {NEEDS[kernel]}; this run has {device}, {jnp.dtype(dtype).name}, head_dim = {head_dim}, "
        f"{length} tokens, attn_softcap = {cap}, attention dropout = {dropout:g} and "
        f"{'a' if keys_hidden else 'no'} forgetful mask"
    )
    if requested != "auto":
        raise UserError(
            f"compute.attention = {requested!r} cannot be used: {reason}", 'Use compute.attention = "auto".'
        )
    if jax.process_index() == 0:
        warnings.warn(f'compute.attention = "auto" uses the slower blockwise kernel: {reason}', stacklevel=2)
    return "blockwise"


def _is_ampere_or_newer(gpu: Any) -> bool:
    """Also False for AMD's GPUs, whose compute capability is a name such as gfx90a."""
    major, _, _ = str(getattr(gpu, "compute_capability", "")).partition(".")
    return major.isdigit() and int(major) >= 8


def either(kernel: Callable[..., Array], windowed: bool | Bool[Array, ""], window: int | None, *qkv: Array) -> Array:
    """The output of a kernel whose window is a constant; for a traced `windowed`, both variants are compiled."""
    if window is None or windowed is True:
        return kernel(*qkv, window=window)
    return lax.cond(windowed, partial(kernel, window=window), partial(kernel, window=None), *qkv)


def cudnn(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    segments: Int[Array, "B S"] | None,
    scale: float,
    window: int | None,
    replicate: tuple[str, ...],
) -> Float[Array, "B S H D"]:
    """cuDNN's fused kernel. Segments are passed as a mask of S x S elements for each row."""

    def on_device(q, k, v, segments):
        mask, sides = None, None if window is None else (window - 1, 0)  # keys before and after the query's own
        if segments is not None:
            # The mask includes the window: cuDNN before 9.10.2 does not accept both.
            positions = jnp.arange(q.shape[1])[None]
            mask, sides = Mask(positions, positions, segments, segments, window).visible()[:, None], None
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scale, is_causal=True, local_window_size=sides, implementation="cudnn"
        )

    # JAX distributes the call over devices by itself, but only if queries and keys are sharded alike.
    if _mesh_axes("heads", replicate) == _mesh_axes("kv_heads", replicate):
        return on_device(q, k, v, segments)
    return _on_each_device(on_device, q, k, v, segments, replicate)


def splash(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    segments: Int[Array, "B S"] | None,
    scoring: Scoring,
    window: int | None,
    replicate: tuple[str, ...],
    interpret: bool = False,
) -> Float[Array, "B S H D"]:
    """The fused kernel of TPUs, which each device runs on its own rows and heads."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    segments = jnp.ones(q.shape[:2], jnp.int32) if segments is None else segments

    def on_device(q, k, v, segments):
        length, heads = q.shape[1:3]
        square = (length, length)
        mask = pallas.CausalMask(square) if window is None else pallas.LocalMask(square, (window - 1, 0), 0)
        kernel = pallas.make_splash_mha(
            mask=pallas.MultiHeadMask([mask] * heads),
            attn_logits_soft_cap=scoring.cap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        # Keys and values are repeated for the queries that share them, so that one kernel serves any number of groups.
        k, v = (jnp.repeat(x, heads // x.shape[1], 1) for x in (k, v))
        out = jax.vmap(kernel)(q.transpose(0, 2, 1, 3), k, v, pallas.SegmentIds(segments, segments))
        assert isinstance(out, Array)  # a tuple only if residuals are requested
        return out.transpose(0, 2, 1, 3)

    return _on_each_device(on_device, (q * scoring.scale).astype(q.dtype), k, v, segments, replicate)


def _on_each_device(
    kernel: Callable[..., Array],
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    segments: Int[Array, "B S"] | None,
    replicate: tuple[str, ...],
) -> Float[Array, "B S H D"]:
    """Runs `kernel` on the rows and query heads of each device, with the key/value heads that these queries read."""
    if (mesh := jax.sharding.get_abstract_mesh()).empty:
        return kernel(q, k, v, segments)
    group = q.shape[2] // k.shape[1]
    heads_axes = _mesh_axes("heads", replicate)
    sharded_differently = heads_axes != _mesh_axes("kv_heads", replicate)

    def on_device(q, k, v, segments):
        if sharded_differently:
            # Each device has some of the query heads and all key/value heads, and selects those that its queries read:
            #
            #     query heads      0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15     4 on each of 4 devices
            #     key/value heads  0       | 0       | 1         | 1               2 on every device
            heads = q.shape[2]
            first = 0 if heads_axes is None else lax.axis_index(heads_axes) * heads
            shared = math.gcd(heads, group)  # the number of consecutive query heads that read the same key/value head
            selected = (first + jnp.arange(0, heads, shared)) // group
            k, v = k[:, selected], v[:, selected]
        return kernel(q, k, v, segments)

    q_spec, kv_spec, rows = (
        partition(tuple(axes.split()), COMPUTE, (*replicate, "kv_heads") if sharded_differently else replicate)
        for axes in ("batch seq heads head_dim", "batch kv_heads seq head_dim", "batch seq")
    )
    specs = (q_spec, kv_spec, kv_spec, rows)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)(q, k, v, segments)


def _mesh_axes(axis: str, replicate: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """The mesh axes that an axis of the activations is sharded over."""
    return partition((axis,), COMPUTE, replicate)[0]
