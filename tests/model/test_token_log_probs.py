"""token_log_probs against torch and transformers, on one device and sharded."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from camelid.model.config import ComputeConfig
from camelid.model.loss import TokenLogProbs, summed_loss, token_log_probs
from camelid.parallel.mesh import MeshConfig, make_mesh
from families import FAMILIES
from programs import largest_array
from tiny import tiny_params, tiny_tokens, transformers_twin

pytestmark = pytest.mark.quick_compile

ROWS, LENGTH, EMBED, VOCAB = 4, 13, 16, 48
CHUNKS = pytest.mark.parametrize("chunk", [None, 1, 5, LENGTH], ids=["default", "1", "not dividing", "all"])
HEADS = pytest.mark.parametrize(("biased", "softcap"), [(False, None), (True, 3.0)], ids=["plain", "bias, softcap"])


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "hidden": draw.normal(size=(ROWS, LENGTH, EMBED)).astype(np.float32),
        "head": draw.normal(size=(VOCAB, EMBED)).astype(np.float32),
        "bias": draw.normal(size=VOCAB).astype(np.float32),
        "targets": draw.integers(0, VOCAB, (ROWS, LENGTH), np.int32),
    }


def ours(arrays: dict[str, np.ndarray], biased: bool, softcap: float | None, chunk=None, top_k=0) -> TokenLogProbs:
    bias = jnp.asarray(arrays["bias"]) if biased else None
    run = partial(token_log_probs, chunk=chunk, bias=bias, softcap=softcap, top_k=top_k)
    return jax.jit(run)(arrays["hidden"], arrays["head"], arrays["targets"])


def torch_logits(hidden, head, bias, softcap: float | None) -> torch.Tensor:
    logits = hidden @ head.T if bias is None else hidden @ head.T + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@CHUNKS
@HEADS
def test_every_statistic_equals_torch(arrays, biased: bool, softcap: float | None, chunk: int | None):
    exact = {name: torch.tensor(x, dtype=torch.float64) for name, x in arrays.items() if name != "targets"}
    logits = torch_logits(exact["hidden"], exact["head"], exact["bias"] if biased else None, softcap)
    log_probs, targets = torch.log_softmax(logits, -1), torch.from_numpy(arrays["targets"]).long()
    # Some targets are the most probable token, which random ones seldom are.
    targets[:, ::2] = logits.argmax(-1)[:, ::2]
    result = ours(arrays | {"targets": targets.int().numpy()}, biased, softcap, chunk, top_k=5)
    expected = {
        "log_prob": log_probs.gather(-1, targets[..., None])[..., 0],
        "logsumexp": torch.logsumexp(logits, -1),
        "mean_log_prob": log_probs.mean(-1),
        "top_log_probs": log_probs.topk(5).values,
    }
    for name, values in expected.items():
        # Sums of some dozens of float32 products.
        np.testing.assert_allclose(getattr(result, name), values.numpy(), rtol=0, atol=1e-5, err_msg=name)
        assert getattr(result, name).dtype == jnp.float32
    np.testing.assert_array_equal(result.is_argmax, (logits.argmax(-1) == targets).numpy())
    np.testing.assert_array_equal(result.top_ids, log_probs.topk(5).indices.numpy())
    assert result.is_argmax.sum() >= ROWS * LENGTH // 2
    assert not result.is_argmax.all()


def test_of_equal_logits_the_lowest_id_is_the_argmax_and_comes_first(arrays):
    head = np.concatenate([arrays["head"], arrays["head"]])
    winner = np.argmax(arrays["hidden"] @ arrays["head"].T, -1).astype(np.int32)
    for targets, is_argmax in ((winner, True), (winner + VOCAB, False)):
        result = ours(arrays | {"head": head, "targets": targets}, False, None, 5, top_k=2)
        assert (np.asarray(result.is_argmax) == is_argmax).all()
        np.testing.assert_array_equal(result.top_ids, np.stack([winner, winner + VOCAB], -1))


# Gradients --------------------------------------------------------------------------------
#
# Each is a function of (log_prob, logsumexp, mean_log_prob) and the targets' number of tokens, in jax or torch.


def z_loss(xp, log_prob, logsumexp, mean_log_prob):
    return (-log_prob + 1e-1 * logsumexp**2).sum()


def normalizer_alone(xp, log_prob, logsumexp, mean_log_prob):
    return (logsumexp**2).sum()


def label_smoothing(xp, log_prob, logsumexp, mean_log_prob):
    return -(0.9 * log_prob + 0.1 * mean_log_prob).sum()


def preference(xp, log_prob, logsumexp, mean_log_prob):
    """DPO without its reference model (arXiv:2305.18290): rows are pairs of chosen and rejected texts."""
    chosen, rejected = log_prob[::2].sum(-1), log_prob[1::2].sum(-1)
    return -xp.log(1 / (1 + xp.exp(-0.1 * (chosen - rejected)))).sum()


OBJECTIVES = [z_loss, normalizer_alone, label_smoothing, preference]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda f: f.__name__)
@HEADS
def test_gradients_of_any_function_equal_torch(arrays, objective: Callable, biased: bool, softcap: float | None):
    names = ("hidden", "head", "bias") if biased else ("hidden", "head")
    exact = {name: torch.tensor(arrays[name], dtype=torch.float64, requires_grad=True) for name in names}
    logits = torch_logits(exact["hidden"], exact["head"], exact.get("bias"), softcap)
    log_probs, targets = torch.log_softmax(logits, -1), torch.from_numpy(arrays["targets"]).long()
    log_prob = log_probs.gather(-1, targets[..., None])[..., 0]
    expected = objective(torch, log_prob, torch.logsumexp(logits, -1), log_probs.mean(-1))
    expected.backward()

    @jax.jit
    def run(operands, targets):
        def loss(operands):
            bias = operands.get("bias")
            found = token_log_probs(operands["hidden"], operands["head"], targets, 5, bias, softcap)
            return objective(jnp, found.log_prob, found.logsumexp, found.mean_log_prob)

        return jax.value_and_grad(loss)(operands)

    value, gradients = run({name: arrays[name] for name in names}, arrays["targets"])
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    for name in names:
        reference = exact[name].grad.numpy()
        assert gradients[name].dtype == jnp.float32
        np.testing.assert_allclose(
            gradients[name], reference, rtol=0, atol=5e-6 * np.abs(reference).max(), err_msg=name
        )


def test_label_smoothing_equals_torchs_own(arrays):
    found = ours(arrays, True, None, 5)
    logits = torch_logits(*(torch.from_numpy(arrays[name]) for name in ("hidden", "head", "bias")), None)
    targets = torch.from_numpy(arrays["targets"]).long().flatten()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=0.1, reduction="sum")
    smoothed = label_smoothing(jnp, found.log_prob, found.logsumexp, found.mean_log_prob)
    assert float(smoothed) == pytest.approx(expected.item(), rel=1e-5)


def test_a_weighted_sum_is_the_fused_loss_to_the_last_bit_of_its_gradients(arrays):
    """They share their arithmetic: only the order in which the losses of the chunks are added differs."""
    targets = jnp.asarray(arrays["targets"])
    weights = jnp.asarray(np.random.default_rng(1).random((ROWS, LENGTH), np.float32))

    def per_token(hidden, head):
        return -(token_log_probs(hidden, head, targets, 5).log_prob * weights).sum()

    def fused(hidden, head):
        return summed_loss(hidden, head, targets, weights, 5).loss

    value, gradients = jax.jit(jax.value_and_grad(per_token, (0, 1)))(arrays["hidden"], arrays["head"])
    expected, reference = jax.jit(jax.value_and_grad(fused, (0, 1)))(arrays["hidden"], arrays["head"])
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for ours, theirs in zip(gradients, reference, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_all_logits_are_never_held_at_once(arrays):
    targets = jnp.asarray(arrays["targets"])

    def loss(hidden, head):
        return jnp.tanh(token_log_probs(hidden, head, targets, 5).log_prob).sum()

    run = jax.grad(loss, argnums=(0, 1))
    assert largest_array(run, arrays["hidden"], np.tile(arrays["head"], (10, 1))) == ROWS * 5 * VOCAB * 10


# A model, and a mesh --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_the_log_probabilities_of_a_model_equal_transformers(family: str):
    """One with a softcap and a tied head, and one with a bias."""
    config = FAMILIES[family].ours
    params = tiny_params(config)
    tokens = tiny_tokens(config, 2, 21)
    logits = transformers_twin(config, params, FAMILIES[family].theirs())(torch.from_numpy(tokens).long()).logits
    reference = torch.log_softmax(logits.double(), -1).detach().numpy()

    @jax.jit
    def run(params, tokens, targets):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, _ = params.hidden(tokens, positions, None, config, ComputeConfig())
        return params.token_log_probs(x, targets, config, top_k=3)

    targets = np.roll(tokens, -1, 1)
    found = run(params, tokens, targets)
    expected = np.take_along_axis(reference, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.log_prob, expected, rtol=0, atol=1e-5 * np.abs(reference).max())
    np.testing.assert_array_equal(found.top_ids[..., 0], reference.argmax(-1))


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_sharded_vocabulary_gives_the_same_and_its_logits_stay_on_their_devices(arrays, sizes: dict[str, int]):
    mesh = make_mesh(MeshConfig(**sizes))

    def loss(hidden, head, bias, targets):
        found = token_log_probs(hidden, head, targets, 5, bias, 3.0, top_k=4)
        return preference(jnp, found.log_prob, None, None) + z_loss(jnp, found.log_prob, found.logsumexp, None), found

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    operands = [arrays[name] for name in ("hidden", "head", "bias", "targets")]
    (value, found), gradients = jax.jit(run)(*operands)
    specs = [PartitionSpec(("data", "fsdp")), PartitionSpec("tensor", "fsdp"), PartitionSpec("tensor")]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, [*specs, specs[0]], strict=True)]
        program = jax.jit(run).lower(*placed).compile()
        (sharded_value, sharded), sharded_gradients = program(*placed)
    assert float(sharded_value) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_array_equal(sharded.is_argmax, found.is_argmax)
    np.testing.assert_array_equal(sharded.top_ids, found.top_ids)
    for name in ("log_prob", "logsumexp", "mean_log_prob", "top_log_probs"):
        np.testing.assert_allclose(getattr(sharded, name), getattr(found, name), rtol=0, atol=1e-5, err_msg=name)
    for ours, theirs in zip(sharded_gradients, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", program.as_text())
    assert not [shape for shape in gathered if str(VOCAB) in shape.split(",")], gathered
