"""The output head of any weight type, trained or frozen: what the loss computes for its gradient."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from camelid.model.context import Context
from camelid.model.loss import project, summed_loss, token_log_probs
from camelid.model.weights import Adapted, Quantized, dense

pytestmark = pytest.mark.quick_compile

ROWS, LENGTH, EMBED, VOCAB, RANK = 4, 24, 16, 520, 3
Operands = dict[str, Any]


def fused(operands: Operands, targets: jax.Array, context: Context = Context()) -> jax.Array:
    weights = jnp.cos(jnp.arange(targets.size, dtype=jnp.float32)).reshape(targets.shape)
    hidden, head, bias = (operands[name] for name in ("hidden", "head", "bias"))
    return summed_loss(hidden, head, targets, weights, 8, bias, 20.0, context).loss


def per_token(operands: Operands, targets: jax.Array, context: Context = Context()) -> jax.Array:
    hidden, head, bias = (operands[name] for name in ("hidden", "head", "bias"))
    found = token_log_probs(hidden, head, targets, 8, bias, 20.0, context)
    return -jnp.tanh(found.log_prob).sum() + (found.logsumexp**2).sum()


LOSSES = pytest.mark.parametrize("loss", [fused, per_token], ids=lambda f: f.__name__)


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32), dtype)


@pytest.fixture(scope="module")
def targets() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH), np.int32))


def adapted(base: Any, *, magnitude: bool = False) -> Adapted:
    a, b, scale = normal(RANK, EMBED, seed=1), normal(VOCAB, RANK, seed=2), jnp.float32(0.5)
    return Adapted(base, a, b, scale, 1 + jnp.abs(normal(VOCAB, seed=3)) if magnitude else None)


def quantized() -> Quantized:
    codes = np.random.default_rng(4).integers(-127, 128, (VOCAB, EMBED), np.int8)
    return Quantized(jnp.asarray(codes), jnp.abs(normal(VOCAB, 2, seed=5)) / 127)


HEADS: dict[str, Callable[[], Any]] = {
    "adapted": lambda: adapted(normal(VOCAB, EMBED)),
    "adapted, with magnitudes": lambda: adapted(normal(VOCAB, EMBED), magnitude=True),
    "quantized": quantized,
    "adapted, of a quantized base": lambda: adapted(quantized()),
}


def trainable(head: Any) -> Any:
    """The parameters of an adapter, or nothing."""
    if not isinstance(head, Adapted):
        return {}
    return {"a": head.a, "b": head.b} | ({} if head.magnitude is None else {"magnitude": head.magnitude})


def with_trainable(head: Any, values: Any) -> Any:
    return Adapted(head.base, values["a"], values["b"], head.scale, values.get("magnitude")) if values else head


@pytest.mark.parametrize("name", HEADS)
def test_logits_of_any_head_are_those_of_its_dense_equivalent(name: str):
    hidden, head = normal(ROWS, LENGTH, EMBED), HEADS[name]()
    ours, expected = project(hidden, head, None, None, Context()), project(hidden, dense(head), None, None, Context())
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@LOSSES
@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients_of_any_head_are_those_of_the_unchunked_logits(name: str, loss: Callable, targets):
    """Of the hidden states, the bias and the factors of the adapter; the reference is differentiated by JAX."""
    head, bias = HEADS[name](), normal(VOCAB, seed=6)
    operands = {"hidden": normal(ROWS, LENGTH, EMBED), "head": trainable(head), "bias": bias}

    def ours(operands):
        return loss(operands | {"head": with_trainable(head, operands["head"])}, targets)

    def reference(operands):
        head_ = with_trainable(head, operands["head"])
        log_probs = project(operands["hidden"], head_, operands["bias"], 20.0, Context())
        logsumexp = jax.nn.logsumexp(log_probs, axis=-1)
        log_prob = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0] - logsumexp
        if loss is per_token:
            return -jnp.tanh(log_prob).sum() + (logsumexp**2).sum()
        return -(jnp.cos(jnp.arange(targets.size, dtype=jnp.float32)).reshape(targets.shape) * log_prob).sum()

    value, gradients = jax.jit(jax.value_and_grad(ours))(operands)
    expected, theirs = jax.jit(jax.value_and_grad(reference))(operands)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(theirs)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        other = dict(jax.tree_util.tree_leaves_with_path(theirs))[path]
        np.testing.assert_allclose(gradient, other, rtol=0, atol=1e-5 * np.abs(other).max(), err_msg=str(path))


DROPPING = Context("training", adapter_dropout=0.3, dropout_key=jax.random.key(3), rows=jnp.arange(ROWS))


@LOSSES
@pytest.mark.parametrize("name", [name for name in HEADS if name != "quantized"])
def test_inputs_of_an_adapted_head_are_dropped_once_for_all_chunks(name: str, loss: Callable, targets):
    """In the loss, and in the product of the whole rows, whose dropout is PEFT's (tests/parity/test_lora.py)."""
    head = HEADS[name]()
    operands = {"hidden": normal(ROWS, LENGTH, EMBED), "head": trainable(head), "bias": None}

    def ours(operands):
        return loss(operands | {"head": with_trainable(head, operands["head"])}, targets, DROPPING)

    def reference(operands):
        whole = DROPPING.at("lm_head")
        logits = project(operands["hidden"], with_trainable(head, operands["head"]), None, 20.0, whole)
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        log_prob = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - logsumexp
        if loss is per_token:
            return -jnp.tanh(log_prob).sum() + (logsumexp**2).sum()
        return -(jnp.cos(jnp.arange(targets.size, dtype=jnp.float32)).reshape(targets.shape) * log_prob).sum()

    value, gradients = jax.jit(jax.value_and_grad(ours))(operands)
    expected, theirs = jax.jit(jax.value_and_grad(reference))(operands)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        other = dict(jax.tree_util.tree_leaves_with_path(theirs))[path]
        np.testing.assert_allclose(gradient, other, rtol=0, atol=1e-5 * np.abs(other).max(), err_msg=str(path))
    undropped = loss(operands | {"head": head}, targets)
    assert abs(float(value) / float(undropped) - 1) > 1e-3


def test_each_row_of_the_global_batch_drops_its_own_inputs_of_a_head(targets):
    operands = {"hidden": normal(ROWS, LENGTH, EMBED), "head": HEADS["adapted"](), "bias": None}
    whole = per_token(operands, targets, DROPPING)
    parts = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        own = operands | {"hidden": operands["hidden"][rows]}
        parts += per_token(own, targets[rows], dataclasses.replace(DROPPING, rows=jnp.arange(ROWS)[rows]))
    assert float(parts) == pytest.approx(float(whole), rel=1e-5)


@LOSSES
def test_each_row_of_a_batch_may_have_an_adapter_of_its_own(loss: Callable, targets):
    base, operands = normal(VOCAB, EMBED), {"hidden": normal(ROWS, LENGTH, EMBED), "bias": None}
    both = [Adapted(base, normal(RANK, EMBED, seed=i), normal(VOCAB, RANK, seed=i), jnp.float32(i)) for i in (1, 2)]
    stacked = Adapted(base, *(jnp.stack([getattr(x, name) for x in both]) for name in ("a", "b", "scale")))
    index = jnp.int32([1, 0, -1, 1])
    run = jax.jit(
        jax.grad(
            lambda hidden, head, targets, context: loss(operands | {"hidden": hidden, "head": head}, targets, context)
        )
    )
    found = run(operands["hidden"], stacked, targets, Context(adapters=index))
    alone = [run(operands["hidden"], head, targets, Context()) for head in (*both, base)]
    for row, adapter in enumerate(index):
        np.testing.assert_allclose(found[row], alone[adapter][row], rtol=0, atol=1e-5 * np.abs(alone[adapter]).max())


# What the compiled program computes --------------------------------------------------------------------


def in_a_step(differentiated: Callable, operands: Operands) -> jax.stages.Compiled:
    """A training step of three microbatches: gradients are added up in float32 in a scan."""

    def step(trained: Operands, frozen: Operands, batches: jax.Array):
        def one_microbatch(carry, targets):
            value, gradients = jax.value_and_grad(lambda x: differentiated(x | frozen, targets))(trained)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), carry, (value, gradients)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
        return lax.scan(one_microbatch, (jnp.zeros(()), zeros), batches)[0]

    trained = {name: x for name, x in operands.items() if name in operands["trains"]}
    frozen = {name: x for name, x in operands.items() if name not in trained and name != "trains"}
    return jax.jit(step).lower(trained, frozen, jnp.zeros((3, ROWS, LENGTH), jnp.int32)).compile()


def products(program: jax.stages.Compiled) -> int:
    """How many matrix products the program has; a loop counts as one."""
    return len(re.findall(r" dot\(", program.as_text()))


def float32_heads(program: jax.stages.Compiled) -> bool:
    """Whether the program has a float32 array of the size of the head."""
    return bool(re.search(rf"= f32\[({VOCAB},{EMBED}|{EMBED},{VOCAB})\]", program.as_text()))


@pytest.mark.parametrize(("loss", "forward"), [(fused, 1), (per_token, 2)], ids=["fused", "per token"])
def test_nothing_is_computed_for_the_gradient_of_a_frozen_head(loss: Callable, forward: int):
    """`forward` products give the logits, once more in the backward pass of per_token; one each for the gradients."""
    hidden, head = normal(ROWS, LENGTH, EMBED, dtype=jnp.bfloat16), normal(VOCAB, EMBED, dtype=jnp.bfloat16)
    operands = {"hidden": hidden, "head": head, "bias": normal(VOCAB)}
    for trains, gradients in [
        ({"hidden"}, 1),
        ({"head"}, 1),
        ({"hidden", "bias"}, 1),
        ({"hidden", "head"}, 2),
        ({"hidden", "head", "bias"}, 2),
    ]:
        program = in_a_step(loss, operands | {"trains": trains})
        assert products(program) == forward + gradients, trains
        assert float32_heads(program) == ("head" in trains), trains


def test_only_the_factors_of_an_adapted_head_are_differentiated():
    """The base is bfloat16, so that a float32 array of its size would be its gradient."""
    head = adapted(normal(VOCAB, EMBED, dtype=jnp.bfloat16))
    operands = {"hidden": normal(ROWS, LENGTH, EMBED, dtype=jnp.bfloat16), "head": trainable(head), "bias": None}

    def loss(operands, targets):
        return fused(operands | {"head": with_trainable(head, operands["head"])}, targets)

    program = in_a_step(loss, operands | {"trains": {"hidden", "head"}})
    # Logits: the base and both factors. Gradients: two of the hidden states, one of the rank's axis, one per factor.
    assert products(program) == 3 + 5
    assert not float32_heads(program)


@LOSSES
def test_gradients_of_a_bfloat16_head_are_added_in_float32(loss: Callable):
    """Each chunk adds the same, which after 256 chunks is below bfloat16's resolution."""
    length = 2048
    operands = {"hidden": jnp.ones((1, length, 4), jnp.bfloat16), "bias": None}
    targets = jnp.zeros((1, length), jnp.int32)

    def run(head):
        hidden = operands["hidden"]
        if loss is fused:
            return summed_loss(hidden, head, targets, jnp.ones((1, length)), 1).loss
        return -token_log_probs(hidden, head, targets, 1).log_prob.sum()

    gradient = jax.jit(jax.grad(run))(jnp.zeros((3, 4), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    expected = length * np.array([[-2 / 3], [1 / 3], [1 / 3]]) * np.ones((1, 4))
    np.testing.assert_allclose(np.float32(gradient), expected, rtol=0.005)
