"""Logits, and cross-entropy as a sum and a weight, a chunk of the sequence at a time.

Axes: B batch, S tokens, E embed, V vocab, C tokens of a row in one chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from camelid.model.context import Context
from camelid.model.weights import Weight, dot, einsum, weight_gradient

LOGITS = 2**24  # logits held at once: 64 MiB in float32


def project(
    x: Float[Array, "B S E"],
    head: Weight,
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    context: Context = Context(),
) -> Float[Array, "B S V"]:
    """Logits in float32; with a softcap, cap tanh(logits / cap) (arXiv:2408.00118)."""
    logits = einsum("BSE,VE->BSV", x, head, context, jnp.float32)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def cross_entropy(
    hidden: Float[Array, "B S E"],
    head: Float[Array, "V E"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk: int | None = None,
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of weight x -log p(target), and the sum of weights, both float32.

    Logits of the whole batch are never stored: each chunk of `chunk` tokens a row (None: as many as LOGITS allows)
    is finished, with its share of the gradients, before the next.
    """
    batch, length = targets.shape
    if chunk is None:
        count = -(-length * batch * head.shape[0] // LOGITS)
        chunk = -(-length // count)
    more = -length % chunk
    if more:
        hidden = jnp.pad(hidden, ((0, 0), (0, more), (0, 0)))
        targets, weights = (jnp.pad(x, ((0, 0), (0, more))) for x in (targets, weights))
    return _total(hidden, head, bias, targets, weights, chunk, softcap), weights.sum()


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _total(hidden, head, bias, targets, weights, chunk, softcap):
    def one_chunk(total, i):
        x, y, w = _chunk(i, chunk, hidden, targets, weights)
        return total + _losses(x, y, w, head, bias, softcap)[0], None

    return lax.scan(one_chunk, jnp.zeros(()), jnp.arange(targets.shape[1] // chunk))[0]


def _forward(hidden, head, bias, targets, weights, chunk, softcap):
    """The loss with its gradients: the logits are at hand here, and to compute them again would cost a product."""

    def one_chunk(carry, i):
        total, dhead, dbias = carry
        x, y, w = _chunk(i, chunk, hidden, targets, weights)
        loss, dlogits = _losses(x, y, w, head, bias, softcap)
        dbias = dbias if bias is None else dbias + dlogits.sum((0, 1))
        dlogits = dlogits.astype(x.dtype)
        dx = dot("BCV,VE->BCE", dlogits, head.astype(x.dtype)).astype(x.dtype)
        return (total + loss, dhead + weight_gradient(dlogits, x), dbias), dx

    start = jnp.zeros(()), jnp.zeros(head.shape, jnp.float32), jnp.zeros(head.shape[:1])
    (total, dhead, dbias), dx = lax.scan(one_chunk, start, jnp.arange(targets.shape[1] // chunk))
    dx = jnp.moveaxis(dx, 0, 1).reshape(hidden.shape)
    return total, (dx, dhead.astype(head.dtype), None if bias is None else dbias.astype(bias.dtype))


def _backward(chunk, softcap, saved, g):
    return *(None if x is None else x * g.astype(x.dtype) for x in saved), None, None


_total.defvjp(_forward, _backward)


def _chunk(i, size, *arrays):
    return [lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in arrays]


def _losses(
    x: Float[Array, "B C E"],
    targets: Int[Array, "B C"],
    weights: Float[Array, "B C"],
    head: Float[Array, "V E"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
) -> tuple[Float[Array, ""], Float[Array, "B C V"]]:
    """The weighted loss of a chunk, and its gradient by what the head gives, before the softcap."""
    logits = project(x, head, bias, softcap)
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    exp = jnp.exp(logits - top)
    total = exp.sum(-1, keepdims=True)
    # A comparison, not a gather: it stays on its device where the vocabulary is cut.
    hit = targets[..., None] == jnp.arange(logits.shape[-1])
    chosen = jnp.sum(jnp.where(hit, logits - top, 0.0), -1)
    losses = jnp.log(total[..., 0]) - chosen
    dlogits = (exp / total - hit.astype(exp.dtype)) * weights[..., None]
    if softcap is not None:
        dlogits = dlogits * (1 - (logits / softcap) ** 2)
    return jnp.sum(losses * weights), dlogits
