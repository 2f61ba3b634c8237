"""One training step: microbatches, clipping, AdamW, beside torch where torch can say what is right."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from camelid.data.rows.batch import Batch
from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import Spec, abstract, named
from camelid.parallel.mesh import one_device
from camelid.train.config import DropoutConfig
from camelid.train.objective import NextTokenLoss
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.schedules import learning_rate
from camelid.train.state import TrainState, abstract_state, start_state
from camelid.train.step import TrainStep, global_norm
from camelid.train.trainable import make_mask
from tiny import tiny_config, tiny_params, tiny_tokens, to_transformers, transformers_twin

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config()
STEPS = 6
# AdamW divides a gradient by its own size: with the usual eps, one of 1e-9 moves as far as one of 1, and rounding
# decides which way. A large eps lets the comparisons below be narrow.
EPS = 1e-3


def trainer(
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
    accumulate: int = 1,
    compute: ComputeConfig = ComputeConfig(),
    seed: int = 0,
) -> TrainStep:
    return TrainStep(
        NextTokenLoss(config=CONFIG, compute=compute),
        make_optimizer(optimizer, STEPS, declare_decoder(CONFIG)),
        learning_rate(optimizer, STEPS),
        optimizer.clip_norm,
        accumulate,
        seed,
    )


def plain_descent(clip_norm: float) -> TrainStep:
    """params - gradient: what is applied can be read from the parameters."""
    return TrainStep(
        NextTokenLoss(config=CONFIG, compute=ComputeConfig()), optax.sgd(1.0), lambda count: 1.0, clip_norm
    )


def batch(seed: int, rows: int = 8, length: int = 12) -> dict[str, jax.Array]:
    """Weights that differ much between rows; the last row, and with four microbatches one of these, has none."""
    tokens = tiny_tokens(CONFIG, rows, length + 1, seed)
    weights = np.random.default_rng(seed).uniform(0, 1, (rows, length)).astype(np.float32)
    weights *= np.array([4.0, 0.01, 1.0, 0.0] * (rows // 4), np.float32)[:, None]
    made = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=weights,
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segments=np.ones((rows, length), np.int32),
    )
    return {name: jnp.asarray(x) for name, x in vars(made).items()}


def train(step: TrainStep, params: Decoder, steps: int = STEPS) -> tuple[TrainState, list[dict[str, float]]]:
    state, compiled, seen = start_state(params, step.optimizer), jax.jit(step), []
    for seed in range(steps):
        state, metrics = compiled(state, batch(seed))
        seen.append({name: float(value) for name, value in metrics.items()})
    return state, seen


def test_training_equals_torch():
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.5, weight_decay=0.3, beta2=0.9, eps=EPS)
    params = tiny_params(CONFIG)
    state, seen = train(trainer(optimizer), params)

    twin = transformers_twin(CONFIG, params)
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    norms = [p for p in twin.parameters() if p.ndim == 1]
    assert len(norms) == 2 * CONFIG.num_layers + 1
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": norms, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.9), eps=EPS)
    rates = [5e-3, 1e-2, *(1e-3 + 9e-3 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(1, 5))]
    for seed, (rate, metrics) in enumerate(zip(rates, seen, strict=True)):
        given = {name: torch.from_numpy(np.array(x)) for name, x in batch(seed).items()}
        logits = twin(given["tokens"].long()).logits
        losses = torch.nn.functional.cross_entropy(logits.mT, given["targets"].long(), reduction="none")
        loss = (losses * given["weights"]).sum() / given["weights"].sum()
        theirs.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        # float32 sums in another order: 1e-5 a step, and these models are steep.
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert metrics["learning_rate"] == pytest.approx(rate, rel=1e-5)
        assert metrics["weight"] == pytest.approx(given["weights"].sum().item(), rel=1e-5)
    assert norm > 0.5, "nothing was clipped"
    for name, array in to_transformers(state.trainable).items():
        final = twin.get_parameter(name).detach().numpy()
        np.testing.assert_allclose(array.reshape(final.shape), final, atol=2e-5, err_msg=name)
        assert np.abs(final - to_transformers(params)[name].reshape(final.shape)).max() > 5e-3, "hardly moved"


def test_microbatches_change_nothing_however_uneven_their_weights():
    params = tiny_params(CONFIG)
    optimizer = OptimizerConfig(learning_rate=1e-3, eps=EPS)
    (whole, seen), (cut, seen_cut) = (train(trainer(optimizer, n), params, 3) for n in (1, 4))
    # The same sums in another order.
    for one, other in zip(seen, seen_cut, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    for path, array in named(whole.trainable).items():
        np.testing.assert_allclose(named(cut.trainable)[path], array, rtol=1e-5, atol=1e-6, err_msg=path)


def test_microbatches_share_the_rows_without_loss():
    given = batch(0)
    cut = trainer(accumulate=4).microbatches(given)
    for name, x in given.items():
        assert cut[name].shape == (4, 2, 12)
        rows = np.asarray(cut[name]).reshape(8, 12)
        assert sorted(map(bytes, rows)) == sorted(map(bytes, np.asarray(x)))
        assert not np.array_equal(rows, x) or name in ("positions", "segments")


def test_gradients_are_those_of_the_mean_over_all_weights():
    params, given, step = tiny_params(CONFIG), batch(0), trainer(accumulate=4)
    (_, weight, _), summed = jax.jit(step.summed_gradients)(params, None, given, jax.random.key(0))
    grads = step.mean_gradients(summed, weight)

    def mean(params: Decoder) -> jax.Array:
        total, weight, _ = trainer().objective(params, given, None)
        return total / weight

    expected = jax.jit(jax.grad(mean))(params)
    assert float(weight) == pytest.approx(float(given["weights"].sum()), rel=1e-6)
    for path, grad in named(grads).items():
        assert grad.dtype == jnp.float32
        largest = np.abs(named(expected)[path]).max()
        np.testing.assert_allclose(grad, named(expected)[path], atol=1e-5 * largest, err_msg=path)


@pytest.mark.parametrize(("clip", "applied"), [(0.25, 0.25), (1e6, None), (math.inf, None)])
def test_gradients_are_scaled_down_to_the_norm_and_never_up(clip: float, applied: float | None):
    params = tiny_params(CONFIG)
    state, metrics = jax.jit(plain_descent(clip))(start_state(params, optax.sgd(1.0)), batch(0))
    moved = jax.tree.map(lambda new, old: old - new, state.trainable, params)
    norm = float(metrics["gradient_norm"])
    assert norm > 0.25
    # Parameters of about 1 lose digits of a difference of 1e-2.
    assert float(optax.tree.norm(moved)) == pytest.approx(norm if applied is None else applied, rel=1e-4)


def test_a_batch_of_padding_alone_moves_nothing():
    params = tiny_params(CONFIG)
    given = batch(0) | {"weights": jnp.zeros((8, 12))}
    state, metrics = jax.jit(plain_descent(1.0))(start_state(params, optax.sgd(1.0)), given)
    assert float(metrics["loss"]) == float(metrics["weight"]) == 0
    assert all(map(np.array_equal, jax.tree.leaves(state.trainable), jax.tree.leaves(params)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_are_float32_and_parameters_keep_their_dtype(dtype: str):
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype)
    step = trainer(compute=compute)
    params = jax.tree.map(lambda p: p.astype(dtype), tiny_params(CONFIG))
    state = start_state(params, step.optimizer)
    after, metrics = jax.jit(step)(state, batch(0))
    for made in (state, after):
        assert {leaf.dtype for leaf in jax.tree.leaves(made.trainable)} == {jnp.dtype(dtype)}
        moments = [leaf for leaf in jax.tree.leaves(made.opt_state) if leaf.ndim]
        assert len(moments) == 2 * len(jax.tree.leaves(params))
        assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
    assert all(value.dtype == jnp.float32 for value in metrics.values())
    assert int(after.step) == 1
    # Before anything is allocated, the same is known of the state.
    told = abstract_state(abstract(declare_decoder(CONFIG), dtype, one_device()), step.optimizer)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), told) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


def test_updates_of_bfloat16_parameters_are_computed_in_float32():
    step = trainer(OptimizerConfig(learning_rate=1e-2, eps=EPS), compute=ComputeConfig(param_dtype="bfloat16"))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tiny_params(CONFIG))
    masters = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    rounded, _ = train(step, params, 1)
    exact, _ = train(
        dataclasses.replace(step, objective=NextTokenLoss(config=CONFIG, compute=ComputeConfig())), masters, 1
    )
    for path, leaf in named(rounded.trainable).items():
        # One rounding of the parameter, and that of its gradient, which moves it by less than 1e-2.
        reference = named(exact.trainable)[path]
        np.testing.assert_allclose(leaf.astype(jnp.float32), reference, rtol=2**-8, atol=1e-4, err_msg=path)


# Objectives and randomness ---------------------------------------------------------------------


def weighted_tokens(params: Decoder, rows: dict[str, jax.Array], key: jax.Array | None):
    """An objective whose metrics can be computed by hand."""
    total, weight, _ = NextTokenLoss(config=CONFIG, compute=ComputeConfig())(params, rows, None)
    assert key is not None
    numbers = rows["rows"][:, None] + jnp.zeros_like(rows["tokens"])
    metrics = {
        "token": (jnp.sum(rows["weights"] * rows["tokens"].astype(jnp.float32)), weight),
        "row_times_token": (jnp.sum(numbers * rows["tokens"]).astype(jnp.float32), jnp.float32(numbers.size)),
        "draw": (jax.random.uniform(key), jnp.float32(1)),
    }
    return total, weight, metrics


@pytest.mark.parametrize("accumulate", [1, 4])
def test_metrics_of_an_objective_are_means_that_no_microbatch_changes(accumulate: int):
    step = dataclasses.replace(trainer(accumulate=accumulate, seed=7), objective=weighted_tokens)
    state = start_state(tiny_params(CONFIG), step.optimizer)
    given = batch(3)
    tokens, weights = np.asarray(given["tokens"]), np.asarray(given["weights"], np.float64)
    for number in range(2):
        state, metrics = jax.jit(step)(state, given)
        assert float(metrics["token"]) == pytest.approx((weights * tokens).sum() / weights.sum(), rel=1e-5)
        # A row keeps its number within the global batch, in whichever microbatch it is.
        expected = (np.arange(8)[:, None] * tokens).mean()
        assert float(metrics["row_times_token"]) == pytest.approx(expected, rel=1e-6)
        key = jax.random.fold_in(jax.random.key(7), number)
        assert float(metrics["draw"]) == pytest.approx(float(jax.random.uniform(key)), rel=1e-6)


RATES = ("embedding", "attention", "residual", "mlp")


@pytest.mark.parametrize("rate", RATES)
def test_dropout_changes_the_loss_of_training_from_step_to_step_and_never_that_of_validation(rate: str):
    params, given = tiny_params(CONFIG), batch(0) | {"rows": jnp.arange(8)}
    plain = NextTokenLoss(config=CONFIG, compute=ComputeConfig())
    drops = dataclasses.replace(plain, dropout=DropoutConfig(**{rate: 0.3}))
    dropped = jax.jit(drops)
    first, second = (float(dropped(params, given, jax.random.key(step))[0]) for step in range(2))
    without = float(plain(params, given, jax.random.key(0))[0])
    assert len({first, second, without}) == 3
    assert float(drops(params, given, None)[0]) == without


def test_dropout_is_the_same_for_any_number_of_microbatches():
    """All rates at once: one that depended on the microbatches would change the loss."""
    params = tiny_params(CONFIG)
    optimizer = OptimizerConfig(learning_rate=1e-3, eps=EPS)
    seen = []
    for accumulate in (1, 2):
        step = trainer(optimizer, accumulate)
        dropout = DropoutConfig(**dict.fromkeys(RATES, 0.3))
        step = dataclasses.replace(step, objective=dataclasses.replace(step.objective, dropout=dropout))
        seen.append(train(step, params, 3)[1])
    for one, other in zip(*seen, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_param_norm_is_that_of_the_parameters_that_are_trained():
    specs = {"w": Spec((), ("mlp",), ("embed",), (6, 8), "normal"), "b": Spec((), ("embed",), (), (8,), "zeros")}

    def objective(params: dict, rows: dict, key: jax.Array | None):
        return jnp.sum(rows["x"] @ params["w"] + params["b"]), jnp.float32(4), {}

    optimizer = optax.sgd(0.1)
    step = TrainStep(objective, optimizer, lambda n: 0.1, 9.0, param_norm=True, mask=make_mask(["w"], specs))
    state = start_state({"w": jnp.ones((6, 8)), "b": jnp.ones(8)}, optimizer)
    state, metrics = jax.jit(step)(state, {"x": jnp.ones((4, 6))})
    assert float(metrics["param_norm"]) == pytest.approx(np.linalg.norm(state.trainable["b"]), rel=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_global_norm_is_that_of_all_elements(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    chance, shapes = np.random.default_rng(0), ((3, 5, 48), (16,), (7, 9), (1000, 16), ())
    tree = {str(shape): chance.standard_normal(shape, np.float32) for shape in shapes[:-1]} | {"scalar": np.float32(3)}
    expected = np.linalg.norm(np.concatenate([np.ravel(x) for x in tree.values()]).astype(np.float64))
    assert float(jax.jit(lambda tree: global_norm(tree))(tree)) == pytest.approx(expected, rel=3e-7)
