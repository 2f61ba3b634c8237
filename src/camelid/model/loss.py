"""Logits, the cross-entropy loss and the log-probabilities of tokens, computed in chunks of the sequence.

The logits of a complete batch would be the largest array of a training step; here only those of one chunk exist at a
time. `token_log_probs` computes them again in the backward pass. `cross_entropy`, which knows the weight of every token
beforehand, computes the gradients in the forward pass instead.

Axes: B batch, S tokens of a row, C tokens of a row in one chunk, E embed, V vocab, K candidates.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from camelid.model.context import Context
from camelid.model.weights import Weight, einsum
from camelid.parallel.rules import COMPUTE

MAX_LOGITS = 2**24  # logits of one chunk: 64 MiB in float32


class TokenLogProbs(NamedTuple):
    """What a model predicts for given target tokens, in float32.

    Axes: B batch, S tokens, K candidates.
    """

    log_prob: Float[Array, "B S"]
    """natural logarithm of the probability of the target"""
    logsumexp: Float[Array, "B S"]
    """logarithm of the sum of the exponentials of the logits: the log of the softmax's normalizer"""
    mean_log_prob: Float[Array, "B S"]
    """mean of the log-probabilities of all tokens of the vocabulary, for label smoothing"""
    is_argmax: Bool[Array, "B S"]
    """whether greedy decoding would choose the target: no logit is larger, and no lower id has an equal one"""
    top_ids: Int[Array, "B S K"] | None
    """ids of the K most probable tokens, most probable first; None without `top_k`"""
    top_log_probs: Float[Array, "B S K"] | None
    """log-probabilities of `top_ids`; None without `top_k`"""


def project(
    x: Float[Array, "B S E"],
    head: Weight,
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    context: Context = Context(),
) -> Float[Array, "B S V"]:
    """Logits in float32; with `softcap`, softcap x tanh(logits / softcap) (Gemma 2, arXiv:2408.00118, section 2)."""
    return _capped(_uncapped(x, head, bias, context), softcap)


def cross_entropy(
    hidden: Float[Array, "B S E"],
    head: Weight,
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk: int | None = None,
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
    context: Context = Context(),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted cross-entropy, as two float32 sums: of weight x -log p(target) in nats, and of the weights.

    The loss is the quotient of the two, taken by the caller after all microbatches and devices are added.

    Under differentiation, the gradients are computed with the loss, while the logits of a chunk exist: no product is
    computed twice. They are accumulated in float32, and only for those of `hidden`, `head` and `bias` that are
    differentiated; `targets` and `weights` are constants.

    Args:
      hidden: Output of the last layer, after the final norm.
      head: Weight of the output head, (V, E), of any type.
      targets: Ids of the tokens to predict.
      weights: Weight of each target in the loss; 0 excludes it.
      chunk: Tokens of a row in one chunk. None chooses the largest with at most MAX_LOGITS logits.
      bias: Bias of the logits.
      softcap: See `project`.
      context: Context of the forward pass.
    """
    (hidden, targets, weights), chunk = _chunked(chunk, head.shape[0], hidden, targets, weights)
    leaves, tree = jax.tree.flatten((hidden, head, bias, context))
    return _weighted_loss(tree, softcap, chunk, leaves, targets, weights), weights.sum()


def token_log_probs(
    hidden: Float[Array, "B S E"],
    head: Weight,
    targets: Int[Array, "B S"],
    chunk: int | None = None,
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
    context: Context = Context(),
    top_k: int = 0,
) -> TokenLogProbs:
    """Log-probabilities of `targets` and related statistics of each token's logits; arguments as in `cross_entropy`.

    `log_prob`, `logsumexp` and `mean_log_prob` are differentiable with respect to `hidden`, `head` and `bias`, by any
    function of them: the backward pass computes the logits again. Use it where the coefficient of a token is known only
    after the forward pass, as in a preference loss, or is not linear in its log-probability. Examples, per token:

      label smoothing  -(1 - a) log_prob - a mean_log_prob    (arXiv:1512.00567, section 7)
      z-loss           z logsumexp^2                          (arXiv:2204.02311, section 5)

    `top_k` > 0 also returns the K most probable tokens, which are not differentiated.
    """
    length = targets.shape[1]
    (hidden, targets), chunk = _chunked(chunk, head.shape[0], hidden, targets)
    leaves, tree = jax.tree.flatten((hidden, head, bias, context))
    result = _statistics_of_tokens(tree, softcap, chunk, top_k, leaves, targets)
    return jax.tree.map(lambda x: x[:, :length], result)


# The arithmetic of one chunk --------------------------------------------------------------------------------


def _uncapped(x, head, bias, context) -> Array:
    logits = einsum("BSE,VE->BSV", x, head, context, jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)


def _capped(logits: Array, softcap: float | None) -> Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


class _Softmax(NamedTuple):
    """The logits of a chunk, (B, C, V), and what the softmax makes of them; (B, C, 1) where reduced."""

    logits: Array
    top: Array
    exp: Array
    total: Array
    hit: Array

    @property
    def log_prob(self) -> Array:
        return jnp.sum(jnp.where(self.hit, self.logits - self.top, 0.0), -1) - jnp.log(self.total[..., 0])

    @property
    def logsumexp(self) -> Array:
        return (self.top + jnp.log(self.total))[..., 0]

    def gradient(self, coefficients: "_Coefficients", softcap: float | None) -> Array:
        """The derivative of sum(coefficient x statistic) with respect to the logits before the softcap."""
        probabilities = self.exp / self.total
        gradient = jnp.zeros_like(probabilities)
        log_prob, logsumexp, mean_log_prob = (None if c is None else c[..., None] for c in coefficients)
        if log_prob is not None:
            gradient = (self.hit.astype(self.exp.dtype) - probabilities) * log_prob
        if logsumexp is not None:
            gradient = gradient + probabilities * logsumexp
        if mean_log_prob is not None:
            gradient = gradient + (1 / self.logits.shape[-1] - probabilities) * mean_log_prob
        return gradient if softcap is None else gradient * (1 - (self.logits / softcap) ** 2)


class _Coefficients(NamedTuple):
    """The derivatives of a loss with respect to the statistics of each token; None where it does not depend on one."""

    log_prob: Array | None
    logsumexp: Array | None = None
    mean_log_prob: Array | None = None


def _softmax(logits: Array, targets: Array) -> _Softmax:
    top = logits.max(-1, keepdims=True)
    exp = jnp.exp(logits - top)
    # A comparison, not a gather: each device compares its own part of a sharded vocabulary.
    hit = targets[..., None] == jnp.arange(logits.shape[-1])
    return _Softmax(logits, top, exp, exp.sum(-1, keepdims=True), hit)


def _top(logits: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest logits and their ids; of equal ones the lower id comes first.

    Where the vocabulary is sharded, each device selects from its own part first: only candidates are communicated.
    """
    mesh, vocab = jax.sharding.get_abstract_mesh(), logits.shape[-1]
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in COMPUTE["vocab"])
    if parts == 1 or vocab % parts or count > vocab // parts:
        values, ids = lax.top_k(logits, count)
        return values, ids
    values, ids = lax.top_k(logits.reshape(*logits.shape[:-1], parts, vocab // parts), count)
    ids = ids + jnp.arange(parts)[:, None] * (vocab // parts)
    values, chosen = lax.top_k(values.reshape(*logits.shape[:-1], -1), count)
    return values, jnp.take_along_axis(ids.reshape(*logits.shape[:-1], -1), chosen, -1)


# Chunks of the sequence --------------------------------------------------------------------------------
#
# The arguments of `_uncapped` are passed as a list of their arrays, the hidden states first, and their tree structure.
# JAX marks the arrays that are differentiated (`symbolic_zeros`); `trained` and `frozen` are lists of the same length,
# each None where the other has the array.


def _chunked(chunk: int | None, vocab: int, *arrays: Array) -> tuple[list[Array], int]:
    """The arrays, padded on axis 1 to a multiple of the tokens of a chunk, and that number."""
    batch, length = arrays[0].shape[:2]
    if chunk is None:
        count = -(-length * batch * vocab // MAX_LOGITS)
        chunk = -(-length // count)
    missing = -length % chunk
    if not missing:
        return list(arrays), chunk
    return [jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in arrays], chunk


def _scan(one_chunk, start, chunk: int, arrays: Any):
    """lax.scan over the chunks of axis 1 of `arrays`; what is stacked is put together along that axis again."""
    count = jax.tree.leaves(arrays)[0].shape[1] // chunk

    def body(carry, i):
        return one_chunk(carry, jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1), arrays))

    carry, stacked = lax.scan(body, start, jnp.arange(count))
    return carry, jax.tree.map(_joined, stacked)


def _joined(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _partition(primals: list) -> tuple[list, list]:
    """The values of arrays that are differentiated, and those of the others."""
    return [x.value if x.perturbed else None for x in primals], [None if x.perturbed else x.value for x in primals]


def _combine(trained: list, frozen: list) -> list:
    return [b if a is None else a for a, b in zip(trained, frozen, strict=True)]


def _differentiate(tree, softcap, chunk: int, trained: list, frozen: list, targets: Array, coefficients: _Coefficients):
    """The sum of coefficient x log_prob over all tokens, and the gradients of sum(coefficient x statistic).

    The gradients are those of `trained`, in its dtypes; they are accumulated in float32.
    """
    (hidden, *head), (frozen_hidden, *frozen_head) = trained, frozen

    def one_chunk(carry, arrays):
        (total, sums), (x, frozen_x, y, c) = carry, arrays

        def uncapped(x, head):
            return _uncapped(*tree.unflatten(_combine([x, *head], [frozen_x, *frozen_head])))

        # Through float32, so that the gradients of a chunk are float32; XLA removes the conversion of the values.
        logits, pull_back = jax.vjp(uncapped, x, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), head))
        softmax = _softmax(_capped(logits, softcap), y)
        dx, dhead = pull_back(softmax.gradient(c, softcap))
        total = total if c.log_prob is None else total + jnp.sum(softmax.log_prob * c.log_prob)
        return (total, jax.tree.map(jnp.add, sums, dhead)), dx

    start = jnp.zeros(()), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
    (total, sums), dx = _scan(one_chunk, start, chunk, (hidden, frozen_hidden, targets, coefficients))
    return total, [dx, *jax.tree.map(lambda leaf, own: own.astype(leaf.dtype), head, sums)]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _weighted_loss(tree, softcap: float | None, chunk: int, leaves: list, targets: Array, weights: Array) -> Array:
    def one_chunk(total, arrays):
        x, y, w = arrays
        logits = _capped(_uncapped(*tree.unflatten([x, *leaves[1:]])), softcap)
        return total + jnp.sum(-_softmax(logits, y).log_prob * w), None

    return _scan(one_chunk, jnp.zeros(()), chunk, (leaves[0], targets, weights))[0]


def _weighted_loss_forward(tree, softcap, chunk, leaves, targets, weights):
    coefficients = _Coefficients(-weights.value)
    return _differentiate(tree, softcap, chunk, *_partition(leaves), targets.value, coefficients)


def _weighted_loss_backward(tree, softcap, chunk, gradients, g):
    return jax.tree.map(lambda x: x * g.astype(x.dtype), gradients), None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _statistics_of_tokens(
    tree, softcap: float | None, chunk: int, top_k: int, leaves: list, targets: Array
) -> TokenLogProbs:
    def one_chunk(_, arrays):
        x, y = arrays
        softmax = _softmax(_capped(_uncapped(*tree.unflatten([x, *leaves[1:]])), softcap), y)
        logsumexp, mean = softmax.logsumexp, softmax.logits.mean(-1)
        is_argmax = jnp.argmax(softmax.logits, -1) == y
        values, ids = _top(softmax.logits, top_k) if top_k else (None, None)
        top_log_probs = None if values is None else values - logsumexp[..., None]
        return None, TokenLogProbs(softmax.log_prob, logsumexp, mean - logsumexp, is_argmax, ids, top_log_probs)

    return _scan(one_chunk, None, chunk, (leaves[0], targets))[1]


def _statistics_forward(tree, softcap, chunk, top_k, leaves, targets):
    trained, frozen = _partition(leaves)
    result = _statistics_of_tokens(tree, softcap, chunk, top_k, _combine(trained, frozen), targets.value)
    return result, (trained, frozen, targets.value)


def _statistics_backward(tree, softcap, chunk, top_k, saved, g: TokenLogProbs):
    cotangents = g.log_prob, g.logsumexp, g.mean_log_prob
    coefficients = _Coefficients(*(None if isinstance(c, SymbolicZero) else c for c in cotangents))
    trained, frozen, targets = saved
    return _differentiate(tree, softcap, chunk, trained, frozen, targets, coefficients)[1], None


_statistics_of_tokens.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)
