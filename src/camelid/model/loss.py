"""Logits, the cross-entropy loss and the log-probabilities of tokens, computed in chunks of the sequence.

The logits of a complete batch would be the largest array of a training step; here only those of one chunk exist at a
time. `token_log_probs` computes them again in the backward pass. `summed_loss`, which knows the weight of every token
beforehand, computes the gradients in the forward pass instead.

Axes: B batch, S tokens of a row, C tokens of a row in one chunk, E embed, V vocab, K candidates.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from camelid.model.context import Context
from camelid.model.weights import Weight, beside_dropped, einsum
from camelid.parallel.rules import COMPUTE

# A smaller chunk has less work for each addition to the gradient of the head, which is as large as the head.
MAX_LOGITS = 2**25  # logits of one chunk: 128 MiB in float32


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


class LossSums(NamedTuple):
    """Sums over tokens of weight x a statistic, float32 scalars. `loss` is differentiable, the others are constants."""

    loss: Float[Array, ""]
    """what training minimizes: the cross-entropy, smoothed if that is asked for, and the z-loss"""
    cross_entropy: Float[Array, ""]
    """-log p(target), in nats, without smoothing"""
    z_loss: Float[Array, ""] | None
    """z x logsumexp^2; None if z = 0"""
    correct: Float[Array, ""] | None
    """1 where greedy decoding would choose the target, and 0 elsewhere; None unless it is asked for"""


def project(
    x: Float[Array, "B S E"],
    head: Weight,
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    context: Context = Context(),
) -> Float[Array, "B S V"]:
    """Logits in float32; with `softcap`, softcap x tanh(logits / softcap) (Gemma 2, arXiv:2408.00118, section 2)."""
    return _capped(_uncapped(x, head, bias, context), softcap)


def summed_loss(
    hidden: Float[Array, "B S E"],
    head: Weight,
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk: int | None = None,
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
    context: Context = Context(),
    *,
    z: float = 0.0,
    label_smoothing: float = 0.0,
    accuracy: bool = False,
) -> LossSums:
    """The loss of each token times its weight, summed:

        -(1 - a) log p(target) - a mean over the vocabulary of log p + z logsumexp^2

    with a = `label_smoothing` (arXiv:1512.00567, section 7; defined as in PyTorch) and the z-loss of PaLM
    (arXiv:2204.02311, section 5), which keeps the logits from drifting away from 0. A mean is the quotient of such a
    sum and of that of the weights, taken by the caller after all microbatches and devices are added.

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
      z: Coefficient of the z-loss; PaLM has 1e-4.
      label_smoothing: Probability that the smoothed targets divide equally among all tokens of the vocabulary.
      accuracy: Whether `correct` is wanted.
    """
    hidden, context = beside_dropped(hidden, head, context.at("lm_head"))
    (hidden, targets, weights), chunk = _chunked(chunk, head.shape[0], hidden, targets, weights)
    leaves, tree = jax.tree.flatten((hidden, head, bias, context))
    terms = _Terms(z, label_smoothing, accuracy)
    result: tuple[Array, _Sums] = _weighted_loss(tree, softcap, chunk, terms, leaves, targets, weights)
    loss, sums = result[0], lax.stop_gradient(result[1])
    z_loss = None if sums.logsumexp_squared is None else z * sums.logsumexp_squared
    return LossSums(loss, sums.cross_entropy, z_loss, sums.correct)


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
    """Log-probabilities of `targets` and related statistics of each token's logits; arguments as in `summed_loss`.

    `log_prob`, `logsumexp` and `mean_log_prob` are differentiable with respect to `hidden`, `head` and `bias`, by any
    function of them: the backward pass computes the logits again. Use it where the coefficient of a token is known only
    after the forward pass, as in a preference loss, or is not linear in its log-probability.

    `top_k` > 0 also returns the K most probable tokens, which are not differentiated.
    """
    length = targets.shape[1]
    hidden, context = beside_dropped(hidden, head, context.at("lm_head"))
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

    @property
    def mean_log_prob(self) -> Array:
        return self.logits.mean(-1) - self.logsumexp

    def is_argmax(self, targets: Array) -> Array:
        return jnp.argmax(self.logits, -1) == targets

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


class _Terms(NamedTuple):
    """What `summed_loss` computes; see its arguments."""

    z: float
    label_smoothing: float
    accuracy: bool


class _Sums(NamedTuple):
    """Sums over tokens of weight x a statistic; None where the terms do not need one."""

    cross_entropy: Array
    uniform: Array | None
    logsumexp_squared: Array | None
    correct: Array | None

    def loss(self, terms: _Terms) -> Array:
        loss = self.cross_entropy
        if self.uniform is not None:
            loss = (1 - terms.label_smoothing) * loss + terms.label_smoothing * self.uniform
        if self.logsumexp_squared is not None:
            loss = loss + terms.z * self.logsumexp_squared
        return loss


def _sums(softmax: _Softmax, targets: Array, weights: Array, terms: _Terms) -> _Sums:
    return _Sums(
        jnp.sum(-softmax.log_prob * weights),
        jnp.sum(-softmax.mean_log_prob * weights) if terms.label_smoothing else None,
        jnp.sum(softmax.logsumexp**2 * weights) if terms.z else None,
        jnp.sum(jnp.where(softmax.is_argmax(targets), weights, 0.0)) if terms.accuracy else None,
    )


def _coefficients(softmax: _Softmax, weights: Array, terms: _Terms) -> _Coefficients:
    """The derivatives of the loss, `_Sums.loss`, with respect to the statistics of each token."""
    if not terms.label_smoothing:
        log_prob, mean_log_prob = -weights, None
    else:
        log_prob, mean_log_prob = (terms.label_smoothing - 1) * weights, -terms.label_smoothing * weights
    logsumexp = 2 * terms.z * softmax.logsumexp * weights if terms.z else None
    return _Coefficients(log_prob, logsumexp, mean_log_prob)


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


def _differentiate(tree, softcap, chunk: int, trained: list, frozen: list, of_chunk: Callable, start: Any, arrays: Any):
    """The sums of all chunks, and the gradients of sum(coefficient x statistic) for `trained`, in its dtypes.

    `of_chunk` gives the softmax of a chunk, its sums, which are added to `start`, and its _Coefficients; it is called
    with the logits and the part of `arrays`, a pytree of arrays with tokens on axis 1. The gradients are accumulated in
    float32.
    """
    (hidden, *head), (frozen_hidden, *frozen_head) = trained, frozen

    def one_chunk(carry, chunk_arrays):
        (totals, sums), (x, frozen_x, own) = carry, chunk_arrays

        def uncapped(x, head):
            return _uncapped(*tree.unflatten(_combine([x, *head], [frozen_x, *frozen_head])))

        # Through float32, so that the gradients of a chunk are float32; XLA removes the conversion of the values.
        logits, pull_back = jax.vjp(uncapped, x, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), head))
        softmax, found, coefficients = of_chunk(_capped(logits, softcap), own)
        dx, dhead = pull_back(softmax.gradient(coefficients, softcap))
        return (jax.tree.map(jnp.add, totals, found), jax.tree.map(jnp.add, sums, dhead)), dx

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
    (totals, sums), dx = _scan(one_chunk, (start, zeros), chunk, (hidden, frozen_hidden, arrays))
    return totals, [dx, *jax.tree.map(lambda leaf, own: own.astype(leaf.dtype), head, sums)]


def _no_sums(terms: _Terms) -> _Sums:
    zero = jnp.zeros(())
    return _Sums(zero, *(zero if term else None for term in (terms.label_smoothing, terms.z, terms.accuracy)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _weighted_loss(
    tree, softcap: float | None, chunk: int, terms: _Terms, leaves: list, targets: Array, weights: Array
) -> tuple[Array, _Sums]:
    def one_chunk(sums, arrays):
        x, y, w = arrays
        softmax = _softmax(_capped(_uncapped(*tree.unflatten([x, *leaves[1:]])), softcap), y)
        return jax.tree.map(jnp.add, sums, _sums(softmax, y, w, terms)), None

    sums = _scan(one_chunk, _no_sums(terms), chunk, (leaves[0], targets, weights))[0]
    return sums.loss(terms), sums


def _weighted_loss_forward(tree, softcap, chunk, terms, leaves, targets, weights):
    def of_chunk(logits, arrays):
        y, w = arrays
        softmax = _softmax(logits, y)
        return softmax, _sums(softmax, y, w, terms), _coefficients(softmax, w, terms)

    arrays = targets.value, weights.value
    sums, gradients = _differentiate(tree, softcap, chunk, *_partition(leaves), of_chunk, _no_sums(terms), arrays)
    return (sums.loss(terms), sums), gradients


def _weighted_loss_backward(tree, softcap, chunk, terms, gradients, g):
    loss, _ = g  # the gradients are those of the loss; `summed_loss` makes the sums constants
    return jax.tree.map(lambda x: x * loss.astype(x.dtype), gradients), None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _statistics_of_tokens(
    tree, softcap: float | None, chunk: int, top_k: int, leaves: list, targets: Array
) -> TokenLogProbs:
    def one_chunk(_, arrays):
        x, y = arrays
        softmax = _softmax(_capped(_uncapped(*tree.unflatten([x, *leaves[1:]])), softcap), y)
        logsumexp = softmax.logsumexp
        values, ids = _top(softmax.logits, top_k) if top_k else (None, None)
        top_log_probs = None if values is None else values - logsumexp[..., None]
        statistics = softmax.log_prob, logsumexp, softmax.mean_log_prob, softmax.is_argmax(y)
        return None, TokenLogProbs(*statistics, ids, top_log_probs)

    return _scan(one_chunk, None, chunk, (leaves[0], targets))[1]


def _statistics_forward(tree, softcap, chunk, top_k, leaves, targets):
    trained, frozen = _partition(leaves)
    result = _statistics_of_tokens(tree, softcap, chunk, top_k, _combine(trained, frozen), targets.value)
    return result, (trained, frozen, targets.value)


def _statistics_backward(tree, softcap, chunk, top_k, saved, g: TokenLogProbs):
    cotangents = g.log_prob, g.logsumexp, g.mean_log_prob
    coefficients = _Coefficients(*(None if isinstance(c, SymbolicZero) else c for c in cotangents))
    trained, frozen, targets = saved

    def of_chunk(logits, arrays):
        y, c = arrays
        return _softmax(logits, y), None, c

    return _differentiate(tree, softcap, chunk, trained, frozen, of_chunk, None, (targets, coefficients))[1], None


_statistics_of_tokens.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)
