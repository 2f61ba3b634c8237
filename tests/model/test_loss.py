"""summed_loss without other terms against torch's cross_entropy, and that it never holds all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from camelid.model import loss
from camelid.model.loss import summed_loss
from programs import largest_array

pytestmark = pytest.mark.quick_compile

ROWS, LENGTH, EMBED, VOCAB = 3, 13, 17, 41


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "hidden": draw.normal(size=(ROWS, LENGTH, EMBED)).astype(np.float32),
        "head": draw.normal(size=(VOCAB, EMBED)).astype(np.float32),
        "targets": draw.integers(0, VOCAB, (ROWS, LENGTH), np.int32),
        # Weights need not be 0 and 1; a row may have none.
        "weights": draw.choice([0.0, 1.0, 0.25], (ROWS, LENGTH)).astype(np.float32) * np.float32([[1], [0], [1]]),
    }


@pytest.fixture(scope="module")
def reference(arrays) -> dict[str, np.ndarray]:
    """torch in float64."""
    hidden, head = (torch.tensor(arrays[name], dtype=torch.float64, requires_grad=True) for name in ("hidden", "head"))
    logits = (hidden @ head.T).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(arrays["targets"]).long().flatten(), reduction="none"
    )
    total = (losses * torch.from_numpy(arrays["weights"]).flatten()).sum()
    (3 * total).backward()
    return {"total": total.item(), "hidden": hidden.grad.numpy(), "head": head.grad.numpy()}


def ours(arrays, chunk: int | None, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Total and gradients of 3 x total, so that a lost cotangent shows."""

    @jax.jit
    def run(hidden, head):
        targets, weights = (jnp.asarray(arrays[name]) for name in ("targets", "weights"))
        total = summed_loss(hidden, head, targets, weights, chunk).loss
        return 3 * total, total

    (_, total), (hidden, head) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(
        jnp.asarray(arrays["hidden"], dtype), jnp.asarray(arrays["head"])
    )
    return {"total": total, "hidden": hidden, "head": head}


@pytest.mark.parametrize("chunk", [None, 1, 5, LENGTH, 100], ids=["its own choice", "1", "not dividing", "all", "more"])
def test_loss_and_gradients_equal_torch_for_any_chunk(arrays, reference, chunk: int | None):
    result = ours(arrays, chunk)
    assert float(result["total"]) == pytest.approx(reference["total"], rel=1e-6)
    for name in ("hidden", "head"):
        assert result[name].dtype == jnp.float32
        # Sums of some dozens of float32 products.
        np.testing.assert_allclose(result[name], reference[name], rtol=0, atol=2e-6 * np.abs(reference[name]).max())


def test_the_loss_without_its_gradient_is_the_same(arrays, reference):
    run = jax.jit(summed_loss, static_argnums=4)
    total = run(*(arrays[name] for name in ("hidden", "head", "targets", "weights")), 5).loss
    assert float(total) == pytest.approx(reference["total"], rel=1e-6)


def test_bfloat16_activations_lose_no_more_than_their_own_rounding(arrays):
    rounded = {name: np.asarray(jnp.asarray(arrays[name], jnp.bfloat16), np.float32) for name in ("hidden", "head")}
    exact = ours(arrays | rounded, 5)
    result = ours(arrays | rounded, 5, jnp.bfloat16)
    assert result["total"].dtype == result["head"].dtype == jnp.float32
    assert result["hidden"].dtype == jnp.bfloat16
    # Products of 8-bit numbers are exact in float32; gradients are rounded to 8 bits once or twice.
    assert float(result["total"]) == pytest.approx(float(exact["total"]), rel=1e-6)
    np.testing.assert_allclose(result["head"], exact["head"], rtol=0, atol=0.01 * np.abs(exact["head"]).max())
    np.testing.assert_allclose(
        np.float32(result["hidden"]), exact["hidden"], rtol=0, atol=0.01 * np.abs(exact["hidden"]).max()
    )


def test_logits_of_any_size_give_a_finite_loss(arrays):
    result = ours(arrays | {"hidden": arrays["hidden"] * 1e4}, 5)
    assert all(np.isfinite(value).all() for value in result.values())


def test_all_logits_are_never_held_at_once(monkeypatch):
    """Neither with a chunk, nor with the one that it chooses to hold at most MAX_LOGITS."""
    monkeypatch.setattr(loss, "MAX_LOGITS", 12_000)
    rows, length, vocab = 2, 32, 600
    hidden, head = jnp.zeros((rows, length, 8)), jnp.zeros((vocab, 8))
    targets, weights = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))

    def largest(chunk: int | None) -> int:
        run = jax.grad(lambda *args: summed_loss(*args, targets, weights, chunk).loss, argnums=(0, 1))
        return largest_array(run, hidden, head)

    assert largest(length) == rows * length * vocab
    assert largest(4) == rows * 4 * vocab
    assert largest(None) <= 12_000
