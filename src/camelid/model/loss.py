"""Cross-entropy as a sum and a weight, a chunk of the sequence at a time.

Axes: B batch, S tokens, E embed, V vocab, C tokens of a row in one chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from camelid.model.weights import dot, weight_gradient

LOGITS = 2**24  # logits held at once: 64 MiB in float32


def cross_entropy(
    hidden: Float[Array, "B S E"],
    head: Float[Array, "V E"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of weight x -log p(target), and the sum of weights, both float32.

    Logits of the whole batch are never stored: each chunk of `chunk` tokens a row (None: as many as LOGITS allows)
    is finished, with its share of both gradients, before the next.
    """
    batch, length = targets.shape
    if chunk is None:
        count = -(-length * batch * head.shape[0] // LOGITS)
        chunk = -(-length // count)
    more = -length % chunk
    if more:
        hidden = jnp.pad(hidden, ((0, 0), (0, more), (0, 0)))
        targets, weights = (jnp.pad(x, ((0, 0), (0, more))) for x in (targets, weights))
    return _total(hidden, head, targets, weights, chunk), weights.sum()


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _total(hidden, head, targets, weights, chunk):
    def one_chunk(total, i):
        x, y, w = _chunk(i, chunk, hidden, targets, weights)
        return total + _losses(x, y, w, head)[0], None

    return lax.scan(one_chunk, jnp.zeros(()), jnp.arange(targets.shape[1] // chunk))[0]


def _forward(hidden, head, targets, weights, chunk):
    """The loss with its gradients: the logits are at hand here, and to compute them again would cost a product."""

    def one_chunk(carry, i):
        total, dhead = carry
        x, y, w = _chunk(i, chunk, hidden, targets, weights)
        loss, dlogits = _losses(x, y, w, head)
        dlogits = dlogits.astype(x.dtype)
        dx = dot("BCV,VE->BCE", dlogits, head.astype(x.dtype)).astype(x.dtype)
        return (total + loss, dhead + weight_gradient(dlogits, x)), dx

    start = jnp.zeros(()), jnp.zeros(head.shape, jnp.float32)
    (total, dhead), dx = lax.scan(one_chunk, start, jnp.arange(targets.shape[1] // chunk))
    return total, (jnp.moveaxis(dx, 0, 1).reshape(hidden.shape), dhead.astype(head.dtype))


def _backward(chunk, saved, g):
    dx, dhead = saved
    return dx * g.astype(dx.dtype), dhead * g.astype(dhead.dtype), None, None


_total.defvjp(_forward, _backward)


def _chunk(i, size, *arrays):
    return [lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in arrays]


def _losses(
    x: Float[Array, "B C E"], targets: Int[Array, "B C"], weights: Float[Array, "B C"], head: Float[Array, "V E"]
) -> tuple[Float[Array, ""], Float[Array, "B C V"]]:
    """The weighted loss of a chunk and its gradient by the logits."""
    logits = dot("BCE,VE->BCV", x, head.astype(x.dtype))
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    exp = jnp.exp(logits - top)
    total = exp.sum(-1, keepdims=True)
    # A comparison, not a gather: it stays on its device where the vocabulary is cut.
    hit = targets[..., None] == jnp.arange(logits.shape[-1])
    chosen = jnp.sum(jnp.where(hit, logits - top, 0.0), -1)
    losses = jnp.log(total[..., 0]) - chosen
    return jnp.sum(losses * weights), (exp / total - hit.astype(exp.dtype)) * weights[..., None]
