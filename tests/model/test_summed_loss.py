"""The z-loss, label smoothing and accuracy of summed_loss against torch, on one device and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from camelid.model.loss import LossSums, summed_loss
from camelid.parallel.mesh import MeshConfig, make_mesh
from programs import largest_array

pytestmark = pytest.mark.quick_compile

ROWS, LENGTH, EMBED, VOCAB = 4, 13, 16, 48
TERMS = pytest.mark.parametrize(
    ("z", "smoothing"), [(0.0, 0.1), (1e-2, 0.0), (1e-2, 0.1)], ids=["smoothing", "z-loss", "both"]
)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    hidden, head = (draw.normal(size=size).astype(np.float32) for size in ((ROWS, LENGTH, EMBED), (VOCAB, EMBED)))
    targets = draw.integers(0, VOCAB, (ROWS, LENGTH), np.int32)
    # Some targets are the most probable token, which random ones seldom are.
    targets[:, ::2] = np.argmax(3.0 * np.tanh(hidden @ head.T / 3.0), -1)[:, ::2]
    weights = draw.choice([0.0, 1.0, 0.25], (ROWS, LENGTH)).astype(np.float32) * np.float32([[1], [0], [1], [2]])
    return {"hidden": hidden, "head": head, "targets": targets, "weights": weights}


def ours(arrays, z: float, smoothing: float, softcap: float | None, chunk: int | None = 5):
    """The sums, and the gradients of 3 x loss, so that a lost cotangent shows."""

    @jax.jit
    def run(operands, targets, weights):
        def loss(operands) -> tuple[jax.Array, LossSums]:
            terms = {"z": z, "label_smoothing": smoothing, "accuracy": True}
            sums = summed_loss(*operands, targets, weights, chunk, softcap=softcap, **terms)
            return 3 * sums.loss, sums

        return jax.grad(loss, has_aux=True)(operands)

    gradients, sums = run((arrays["hidden"], arrays["head"]), arrays["targets"], arrays["weights"])
    return sums, gradients


@TERMS
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_loss_its_parts_and_its_gradients_equal_torch(arrays, z: float, smoothing: float, softcap: float | None):
    sums, gradients = ours(arrays, z, smoothing, softcap)
    hidden, head = (torch.tensor(arrays[name], dtype=torch.float64, requires_grad=True) for name in ("hidden", "head"))
    logits = (hidden @ head.T).flatten(0, 1)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    targets, weights = (torch.from_numpy(arrays[name]).flatten() for name in ("targets", "weights"))

    def per_token(smoothing: float) -> torch.Tensor:
        cross_entropy = torch.nn.functional.cross_entropy
        return cross_entropy(logits, targets.long(), reduction="none", label_smoothing=smoothing)

    z_loss = (weights * z * torch.logsumexp(logits, -1) ** 2).sum()
    loss = (weights * per_token(smoothing)).sum() + z_loss
    (3 * loss).backward()
    assert float(sums.loss) == pytest.approx(loss.item(), rel=1e-6)
    assert float(sums.cross_entropy) == pytest.approx((weights * per_token(0.0)).sum().item(), rel=1e-6)
    assert float(sums.correct) == pytest.approx((weights * (logits.argmax(-1) == targets)).sum().item(), rel=1e-6)
    assert 0 < float(sums.correct) < weights.sum()
    assert (sums.z_loss is None) == (z == 0)
    if sums.z_loss is not None:
        assert float(sums.z_loss) == pytest.approx(z_loss.item(), rel=1e-6)
    for own, theirs in zip(gradients, (hidden.grad, head.grad), strict=True):
        reference = theirs.numpy()
        np.testing.assert_allclose(own, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_no_chunk_and_no_derivative_changes_the_sums(arrays):
    expected, gradients = ours(arrays, 1e-2, 0.1, None)
    for chunk in (None, 1):
        found, others = ours(arrays, 1e-2, 0.1, None, chunk)
        np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=1e-6)
        for one, other in zip(others, gradients, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    operands = [jnp.asarray(arrays[name]) for name in ("hidden", "head", "targets", "weights")]
    plain = jax.jit(lambda *a: summed_loss(*a, 5, z=1e-2, label_smoothing=0.1, accuracy=True))(*operands)
    np.testing.assert_allclose(jax.tree.leaves(plain), jax.tree.leaves(expected), rtol=1e-6)


def test_all_logits_are_never_held_at_once(arrays):
    targets, weights = (jnp.asarray(arrays[name]) for name in ("targets", "weights"))

    def loss(hidden, head):
        sums = summed_loss(hidden, head, targets, weights, 5, z=1e-2, label_smoothing=0.1, accuracy=True)
        return sums.loss, sums

    run = jax.grad(loss, argnums=(0, 1), has_aux=True)
    head = np.tile(arrays["head"], (10, 1))
    assert largest_array(run, arrays["hidden"], head) == ROWS * 5 * VOCAB * 10


def test_a_sharded_vocabulary_gives_the_same(arrays):
    expected, reference = ours(arrays, 1e-2, 0.1, None)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows, vocab = PartitionSpec(("data", "fsdp")), PartitionSpec("tensor", "fsdp")
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(x, NamedSharding(mesh, vocab if name == "head" else rows))
            for name, x in arrays.items()
        }
        sums, gradients = ours(placed, 1e-2, 0.1, None)
    np.testing.assert_allclose(jax.tree.leaves(sums), jax.tree.leaves(expected), rtol=1e-5)
    for own, other in zip(gradients, reference, strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-5 * np.abs(other).max())
