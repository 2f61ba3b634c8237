"""Kernels that a device brings, and what they share with the others: which keys are seen, and what a score is.

Axes: B batch, S queries, T keys, H query heads, K key/value heads, D head_dim.
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
from camelid.parallel.rules import COMPUTE, partition


@dataclass(frozen=True)
class Scoring:
    """How a query times a key becomes a score: cap tanh(scale x / cap), without a cap scale x."""

    scale: float
    cap: float | None


def visible(
    order: Int[Array, "#B S"],
    keys: Int[Array, " T"],
    q_segments: Int[Array, "B S"] | None,
    k_segments: Int[Array, "B T"] | None,
    window: int | Int[Array, ""] | None,
) -> Bool[Array, "#B S T"]:
    """Which keys each query sees."""
    mask = keys <= order[..., None]
    if window is not None:
        mask = mask & (keys > order[..., None] - window)
    if q_segments is None or k_segments is None:
        return mask
    return mask & (q_segments[:, :, None] == k_segments[:, None, :])


NEEDS = {
    "cudnn": "NVIDIA GPUs of compute capability 8.0 (Ampere) or higher, a 16-bit compute.dtype, a head_dim that is a "
    "multiple of 8 up to 128, an even number of tokens and no attn_softcap",
    "splash": "a TPU, and a head_dim and a number of tokens that are multiples of 128",
}


def choose_kernel(asked: str, dtype: Any, length: int, head_dim: int, own: bool, cap: float | None) -> str:
    """The kernel for these shapes on this process's devices; `own`: the keys are the queries' own tokens.

    Warns where "auto" cannot use the kernel of a GPU or TPU. Raises UserError where `asked` cannot be used.
    """
    if not own:
        # Few queries over a cache: scores are small, and the device's kernels want queries and keys of one length.
        return "dense" if length == 1 else "blockwise"
    if asked in ("dense", "blockwise"):
        return asked
    backend = jax.default_backend()
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(backend, "blockwise") if asked == "auto" else asked
    fits = {
        # JAX cannot train odd lengths with a mask.
        "cudnn": backend == "gpu"
        and all(map(_is_ampere_or_newer, jax.local_devices()))
        and jnp.dtype(dtype).itemsize == 2
        and head_dim in range(8, 129, 8)
        and length % 2 == 0
        and cap is None,
        "splash": backend == "tpu" and head_dim % 128 == 0 and length % 128 == 0,
        "blockwise": True,
    }
    if fits[kernel]:
        return kernel
    device = backend if backend == "cpu" else f"{backend} ({jax.local_devices()[0].device_kind})"
    reason = (
        f"{kernel} needs {NEEDS[kernel]}; here are {device}, {jnp.dtype(dtype).name}, head_dim = {head_dim}, "
        f"{length} tokens and attn_softcap = {cap}"
    )
    if asked != "auto":
        raise UserError(f"compute.attention = {asked!r} cannot be used: {reason}", 'Use compute.attention = "auto".')
    if jax.process_index() == 0:
        warnings.warn(f'compute.attention = "auto" uses the slower blockwise kernel: {reason}', stacklevel=2)
    return "blockwise"


def _is_ampere_or_newer(gpu: Any) -> bool:
    """False for AMD's GPUs too, whose compute capability is a name like gfx90a."""
    major, _, _ = str(getattr(gpu, "compute_capability", "")).partition(".")
    return major.isdigit() and int(major) >= 8


def either(kernel: Callable[..., Array], local: bool | Bool[Array, ""], window: int | None, *qkv: Array) -> Array:
    """A device's kernel, whose window is part of the program: for a traced `local` it is compiled with and without."""
    if window is None or local is True:
        return kernel(*qkv, window=window)
    return lax.cond(local, partial(kernel, window=window), partial(kernel, window=None), *qkv)


def cudnn(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    segments: Int[Array, "B S"] | None,
    scale: float,
    window: int | None,
    replicate: tuple[str, ...],
) -> Float[Array, "B S H D"]:
    """cuDNN's fused kernel; it reads segments as a mask of S x S, one byte-pair for each row of the batch."""

    def on_device(q, k, v, segments):
        mask, sides = None, None if window is None else (window - 1, 0)  # tokens before and after a query's own
        if segments is not None:
            # The mask holds the window too: together they are refused by cuDNN before 9.10.2.
            at = jnp.arange(q.shape[1])
            mask, sides = visible(at[None], at, segments, segments, window)[:, None], None
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scale, is_causal=True, local_window_size=sides, implementation="cudnn"
        )

    # JAX divides the call over devices by itself, but only where queries and keys are cut alike.
    if _cut("heads", replicate) == _cut("kv_heads", replicate):
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
    """TPU's fused kernel; each device runs it on its own rows and heads."""
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
        # One kernel for all kinds of heads: keys and values are repeated for the queries that share them.
        k, v = (jnp.repeat(x, heads // x.shape[1], 1) for x in (k, v))
        out = jax.vmap(kernel)(q.transpose(0, 2, 1, 3), k, v, pallas.SegmentIds(segments, segments))
        assert isinstance(out, Array)  # it gives more only where asked for residuals
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
    """`kernel` on the rows and query heads of each device, with the key/value heads that these queries read."""
    if (mesh := jax.sharding.get_abstract_mesh()).empty:
        return kernel(q, k, v, segments)
    group = q.shape[2] // k.shape[1]
    heads_cut = _cut("heads", replicate)
    apart = heads_cut != _cut("kv_heads", replicate)

    def on_device(q, k, v, segments):
        if apart:
            # All key/value heads are here with some of the query heads, whose local numbers say nothing of their keys:
            #
            #     query heads  0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15     4 on each of 4 devices
            #     key heads    0       | 0       | 1         | 1               2 on every device
            heads = q.shape[2]
            first = 0 if heads_cut is None else lax.axis_index(heads_cut) * heads
            share = math.gcd(heads, group)  # so many query heads in a row read the same key head
            own = (first + jnp.arange(0, heads, share)) // group
            k, v = k[:, own], v[:, own]
        return kernel(q, k, v, segments)

    q_spec, kv_spec, rows = (
        partition(tuple(axes.split()), COMPUTE, (*replicate, "kv_heads") if apart else replicate)
        for axes in ("batch seq heads head_dim", "batch kv_heads seq head_dim", "batch seq")
    )
    specs = (q_spec, kv_spec, kv_spec, rows)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)(q, k, v, segments)


def _cut(axis: str, replicate: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """The mesh axes that activations with this axis word are cut over."""
    return partition((axis,), COMPUTE, replicate)[0]
