"""Every optimizer against its formula in NumPy, or against torch; sharded, saved and restored."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.errors import UserError
from camelid.model.decoder import declare_decoder
from camelid.model.params import abstract, build, map_specs, named
from camelid.model.pytree import path_name
from camelid.parallel.mesh import MeshConfig, make_mesh
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OPTIMIZERS, OptimizerConfig
from camelid.train.patterns import select
from camelid.train.schedules import learning_rate
from camelid.train.state import TrainState, abstract_state, start_state
from camelid.train.trainable import make_mask
from tiny import tiny_config

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config(vocab_size=96, num_layers=2)  # eight devices divide it
SPECS = declare_decoder(CONFIG)
UPDATES, RATE = 3, 0.1
Arrays = dict[str, np.ndarray]


def drawn(seed: int, scale: float = 1.0) -> Arrays:
    """Random values for every parameter, of a different size in each layer."""
    draw = np.random.default_rng(seed)
    arrays = {}
    for path, spec in named(SPECS).items():
        layers = np.arange(1, 3).reshape(-1, *[1] * (len(spec.shape) - 1)) if spec.stacked else 1
        arrays[path] = (scale * layers * draw.standard_normal(spec.shape)).astype(np.float32)
    return arrays


PARAMS, GRADS = drawn(0, 0.1), [drawn(seed, 2.0) for seed in range(1, UPDATES + 1)]


def config(name: str, **fields: Any) -> OptimizerConfig:
    """Constant learning rates, all parameters decayed, unless the fields say otherwise."""
    constant = {"learning_rate": RATE, "schedule": "constant", "first_update": "initial"}
    decay = {"decay": ("all",)} if fields.get("weight_decay", OPTIMIZERS[name]["weight_decay"]) else {}
    return OptimizerConfig(name=name, **constant | decay | {"warmup_steps": 0, "warmup_start": 0.0} | fields)  # pyright: ignore[reportArgumentType]


def updated(optimizer: optax.GradientTransformation, params: Arrays = PARAMS, mask: Any = None) -> Arrays:
    """The parameters after all updates."""
    tree, grads = (build(SPECS, map(jnp.asarray, arrays.values())) for arrays in (params, GRADS[0]))
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(tree)
        update = jax.jit(optimizer.update)
        for arrays in GRADS:
            grads = build(SPECS, map(jnp.asarray, arrays.values()))
            updates, state = update(grads if mask is None else mask(grads), state, tree)
            tree = optax.apply_updates(tree, updates if mask is None else mask(updates))
    return {path: np.asarray(leaf) for path, leaf in named(tree).items()}


def computed(one: Callable[[np.ndarray, list[np.ndarray]], np.ndarray], names: Any = None) -> Arrays:
    """The parameters after all updates by `one`, of a parameter and its gradients, for each layer on its own."""
    found = {}
    for path, spec in named(SPECS).items():
        if names is not None and path not in names:
            continue
        param, grads = PARAMS[path].astype(float), [arrays[path].astype(float) for arrays in GRADS]
        if spec.stacked:
            found[path] = np.stack([one(param[layer], [g[layer] for g in grads]) for layer in range(len(param))])
        else:
            found[path] = one(param, grads)
    return found


def assert_equal(found: Arrays, expected: Arrays, rtol: float = 2e-5) -> None:
    for path, array in expected.items():
        moved = np.abs(array - PARAMS[path]).max()
        assert moved > 1e-4, f"{path} hardly moved"
        np.testing.assert_allclose(
            found[path], array, rtol=0, atol=rtol * max(moved, np.abs(array).max()), err_msg=path
        )


def test_adamw_without_bias_correction_is_that_of_mindspore():
    """u = m / (sqrt(v) + eps) + decay x w, with moments that start at 0."""

    def one(w: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
        m = v = 0.0
        for g in grads:
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            w = w - RATE * (m / (np.sqrt(v) + 1e-3) + 0.3 * w)
        return w

    settings = config("adamw", bias_correction=False, eps=1e-3, weight_decay=0.3)
    assert_equal(updated(make_optimizer(settings, 9, SPECS)), computed(one))
    corrected = config("adamw", eps=1e-3, weight_decay=0.3)
    found = updated(make_optimizer(corrected, 9, SPECS))
    assert np.abs(found["embed"] - computed(one)["embed"]).max() > 0.01


def test_adamw_is_that_of_optax_bit_for_bit_with_the_same_state():
    """Checkpoints of runs hold this state."""
    settings = OptimizerConfig(learning_rate=RATE, warmup_steps=2)
    matrices = map_specs(lambda spec: spec.is_matrix, SPECS)
    theirs = optax.adamw(learning_rate(settings, 9), 0.9, 0.95, 1e-8, weight_decay=0.1, mask=matrices)
    ours = make_optimizer(settings, 9, SPECS)
    tree = build(SPECS, map(jnp.asarray, PARAMS.values()))
    states = [jax.eval_shape(each.init, tree) for each in (ours, theirs)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    found, expected = updated(ours), updated(theirs)
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def of_torch(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], names: Any = None) -> Arrays:
    """The parameters after all updates by an optimizer of torch."""

    def one(w: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
        param = torch.nn.Parameter(torch.from_numpy(w.copy()))
        optimizer = make([param])
        for g in grads:
            param.grad = torch.from_numpy(g.copy())
            optimizer.step()
        return param.detach().numpy()

    return computed(one, names)


def test_adamw_is_that_of_torch_with_its_moment_in_bfloat16_too():
    theirs = of_torch(lambda p: torch.optim.AdamW(p, lr=RATE, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.3))
    assert_equal(updated(make_optimizer(config("adamw", eps=1e-3, weight_decay=0.3), 9, SPECS)), theirs)
    rounded = make_optimizer(config("adamw", eps=1e-3, weight_decay=0.3, moment_dtype="bfloat16"), 9, SPECS)
    found = updated(rounded)
    assert_equal(found, theirs, 1e-2)
    assert np.abs(found["embed"] - theirs["embed"]).max() > 1e-5
    state = jax.eval_shape(rounded.init, build(SPECS, map(jnp.asarray, PARAMS.values())))
    dtypes = {name: {leaf.dtype.name for leaf in jax.tree.leaves(getattr(state[0], name))} for name in ("mu", "nu")}
    assert dtypes == {"mu": {"bfloat16"}, "nu": {"float32"}}


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_that_of_torch(momentum: float, nesterov: bool):
    theirs = of_torch(lambda p: torch.optim.SGD(p, lr=RATE, momentum=momentum, nesterov=nesterov))
    found = updated(make_optimizer(config("sgd", momentum=momentum, nesterov=nesterov), 9, SPECS))
    assert_equal(found, theirs)


def test_lion_is_that_of_its_paper():
    """arXiv:2302.06675, algorithm 2."""

    def one(w: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
        m = np.zeros_like(w)
        for g in grads:
            w = w - RATE * (np.sign(0.9 * m + 0.1 * g) + 0.2 * w)
            m = 0.99 * m + 0.01 * g
        return w

    assert_equal(updated(make_optimizer(config("lion", weight_decay=0.2), 9, SPECS)), computed(one))


def adafactor(
    rates: list[float], decay_rate: float, momentum: float, clip: float, decay: float, power: int
) -> Callable:
    """arXiv:1804.04235 without factors, with the root mean squares of one layer; momentum as EasyLM has it."""

    def one(w: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
        v, kept = 0.0, 0.0
        for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
            beta = 1 - t**-decay_rate
            v = beta * v + (1 - beta) * (g * g + 1e-30)
            u = g / np.sqrt(v)
            u = u / max(1, np.sqrt((u * u).mean()) / clip)
            u = rate * max(1e-3, np.sqrt((w * w).mean())) * u
            kept = momentum * kept + (1 - momentum) * u
            w = w - kept - decay * rate**power * w
        return w

    return one


def test_adafactor_is_that_of_its_paper_for_each_layer():
    settings = config("adafactor", weight_decay=0.3)
    expected = computed(adafactor([RATE] * UPDATES, 0.8, 0.0, 1.0, 0.3, 1))
    assert_equal(updated(make_optimizer(settings, 9, SPECS)), expected)


def test_palm_and_uio_are_those_of_easylm_and_ll3m():
    palm = OptimizerConfig(name="palm", warmup_steps=2, learning_rate=RATE, decay=("all",))
    rates = [RATE, RATE, RATE]  # of steps 0, 1 and 2
    expected = computed(adafactor(rates, 0.99, 0.9, np.inf, 1.0, 2))
    assert_equal(updated(make_optimizer(palm, 9, SPECS)), expected)
    uio = OptimizerConfig(name="uio", warmup_steps=2, learning_rate=RATE)
    expected = computed(adafactor([0, RATE / 2, RATE], 0.8, 0.9, np.inf, 0.0, 1))
    assert_equal(updated(make_optimizer(uio, 9, SPECS)), expected)


def test_easylms_adamw_with_parameter_scale_is_expressible():
    settings = config(
        "adafactor", momentum=0.9, decay_rate=0.95, factored=False, update_clip=float("inf"), weight_decay=0.1
    )
    expected = computed(adafactor([RATE] * UPDATES, 0.95, 0.9, np.inf, 0.1, 1))
    assert_equal(updated(make_optimizer(settings, 9, SPECS)), expected)


# Muon ----------------------------------------------------------------------------------------


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz iterations, as Muon's author published them."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.mark.parametrize("scale", ["rms", "width"])
def test_muon_orthogonalizes_the_matrix_of_each_layer_with_all_heads(scale: str):
    outputs = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 1, "gate_proj": 1, "up_proj": 1, "down_proj": 1}
    found = updated(make_optimizer(config("muon", nesterov=False, muon_scale=scale, weight_decay=0.2), 9, SPECS))
    for name, axes in outputs.items():
        (path,) = (path for path in PARAMS if path.endswith(name))

        def one(w: np.ndarray, grads: list[np.ndarray], axes: int = axes) -> np.ndarray:
            m, shape = 0.0, w.shape
            rows = int(np.prod(shape[:axes]))
            for g in grads:
                m = 0.95 * m + 0.05 * g
                u = orthogonalized(m.reshape(rows, -1))
                ins = u.shape[1]
                u = u * (0.2 * np.sqrt(max(rows, ins)) if scale == "rms" else np.sqrt(max(1, rows / ins)))
                w = w - RATE * (u.reshape(shape) + 0.2 * w)
            return w

        assert_equal(found, computed(one, {path}), 1e-4)
    rest = {path for path in PARAMS if not path.endswith("_proj")}
    assert "embed" in rest
    theirs = of_torch(lambda p: torch.optim.AdamW(p, lr=RATE, betas=(0.9, 0.95), weight_decay=0.2), rest)
    assert_equal(found, theirs)


def test_muon_with_nesterov_is_that_of_optax():
    numbers = {"q_proj": ((3,), (1, 2)), "o_proj": ((2, 3), (1,)), "down_proj": ((2,), (1,))}

    def axes(path: Any, leaf: Any) -> Any:
        found = numbers.get(path_name(path).rpartition(".")[2])
        return None if found is None else optax.contrib.MuonDimensionNumbers(*found)

    theirs = optax.contrib.muon(
        RATE,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(axes, params),
    )
    expected, found = updated(theirs), updated(make_optimizer(config("muon", weight_decay=0.0), 9, SPECS))
    for name in numbers:
        (path,) = (path for path in PARAMS if path.endswith(name))
        np.testing.assert_allclose(found[path], expected[path], atol=1e-5, err_msg=path)


# Patterns ------------------------------------------------------------------------------------


def test_patterns_choose_parameters_and_layers():
    def chosen(*patterns: str) -> dict[str, Any]:
        return {path: mask.tolist() for path, mask in select(patterns, SPECS, "f").items() if mask.any()}

    assert chosen("embed") == {"embed": True}
    assert chosen("layers.1.attn.q_proj") == {"layers.attn.q_proj": [False, True]}
    assert chosen("layers.attn.q_proj", "layers.0.attn.q_proj") == {"layers.attn.q_proj": [True, True]}
    assert chosen("*norm").keys() == {"layers.attn_norm.scale", "layers.mlp_norm.scale", "final_norm.scale"}
    assert {tuple(mask) for mask in chosen("layers.1-5").values()} == {(False, True)}
    assert chosen("*").keys() == named(SPECS).keys()
    assert chosen() == {}
    with pytest.raises(UserError, match=r"f: 'q_pro' matches no parameter\n.*embed, .*layers.0 to layers.1"):
        chosen("embed", "q_pro")


def test_weight_decay_reaches_the_parameters_that_are_chosen():
    still = [{path: np.zeros_like(g) for path, g in GRADS[0].items()}]
    for decay, names in (
        (("matrices",), {path for path, spec in named(SPECS).items() if spec.is_matrix}),
        (("all",), set(PARAMS)),
        (("attn", "final_norm"), {path for path in PARAMS if ".attn." in path} | {"final_norm.scale"}),
    ):
        optimizer = make_optimizer(config("adamw", decay=decay), 9, SPECS)
        tree, zeros = (build(SPECS, map(jnp.asarray, arrays.values())) for arrays in (PARAMS, still[0]))
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(tree), tree)
        assert {path for path, update in named(updates).items() if np.any(update)} == names
    with pytest.raises(UserError, match=r"optimizer.decay: 'layers.0' matches layers.\S+ in some layers only"):
        make_optimizer(config("adamw", decay=("layers.0",)), 9, SPECS)


def test_factors_multiply_learning_rates_by_pattern_and_layer():
    plain = updated(make_optimizer(config("sgd"), 9, SPECS))
    settings = config("sgd", factors={"embed": 0.5, "layers.1": 0.1, "q_proj": 3.0})
    found = updated(make_optimizer(settings, 9, SPECS))
    for path, array in plain.items():
        moved, less = array - PARAMS[path], found[path] - PARAMS[path]
        factor = {"embed": np.array(0.5)}.get(path, np.array(1.0))
        if path.startswith("layers."):
            factor = np.array([1.0, 0.1]).reshape(-1, *[1] * (moved.ndim - 1)) * (3 if path.endswith("q_proj") else 1)
        np.testing.assert_allclose(less, factor * moved, rtol=1e-4, atol=1e-6, err_msg=path)
    with pytest.raises(UserError, match=r"optimizer.factors: 'embd' matches no parameter"):
        make_optimizer(config("sgd", factors={"embd": 0.5}), 9, SPECS)


@pytest.mark.parametrize("name", ["adamw", "palm", "muon"])
def test_what_is_frozen_stays_and_has_no_state(name: str):
    freeze = ("embed", "layers.0", "layers.mlp", "lm_head", "*norm")
    optimizer = make_optimizer(OptimizerConfig(name=name, warmup_steps=1), 9, SPECS, freeze)  # pyright: ignore[reportArgumentType]
    found = updated(optimizer, mask=make_mask(freeze, SPECS))
    for path, array in found.items():
        moved = array != PARAMS[path]
        if path.startswith("layers.attn."):
            assert not moved[0].any(), path
            assert moved[1].any(), path
        else:
            assert not moved.any(), path
    state = jax.eval_shape(optimizer.init, build(SPECS, map(jnp.asarray, PARAMS.values())))
    with_state = {path for path in PARAMS for p, _ in jax.tree.leaves_with_path(state) if path_name(p).endswith(path)}
    assert with_state == {path for path in PARAMS if path.startswith("layers.attn.")}


def test_freezing_everything_or_nothing_is_refused():
    with pytest.raises(UserError, match=r"train.freeze = \['\*'\] freezes every parameter"):
        make_mask(("*",), SPECS)
    with pytest.raises(UserError, match=r"train.freeze: 'nothing' matches no parameter"):
        make_optimizer(OptimizerConfig(), 9, SPECS, ("nothing",))
    assert make_mask((), SPECS) is None


# Sharding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "uio"])  # its state is that of palm
def test_the_state_on_eight_devices_is_sharded_saved_and_restored_and_the_result_is_that_of_one(
    tmp_path: Path, name: str
):
    settings = OptimizerConfig(name=name, warmup_steps=2, factors={"layers.1": 0.5})  # pyright: ignore[reportArgumentType]
    optimizer, mesh = make_optimizer(settings, 9, SPECS), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    target = abstract_state(abstract(SPECS, "float32", mesh), optimizer)
    places = jax.tree.map(lambda x: x.sharding, target)

    def placed(arrays: Arrays) -> Any:
        return build(SPECS, [jax.device_put(arrays[path], place) for path, place in named(places.trainable).items()])

    def step(state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return dataclasses.replace(state, step=state.step + 1, trainable=trainable, opt_state=opt_state)

    with (
        jax.set_mesh(mesh),
        jax.numpy_dtype_promotion("standard"),
        contextlib.closing(RunCheckpoints(tmp_path, 1)) as checkpoints,
    ):
        state = jax.jit(lambda p: start_state(p, optimizer), out_shardings=places)(placed(PARAMS))
        compiled = jax.jit(step, out_shardings=places)
        for arrays in GRADS[:2]:
            state = compiled(state, placed(arrays))
        checkpoints.save(2, state)
        checkpoints.wait()
        restored = checkpoints.restore(2, target)
        for (path, old), new in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(restored), strict=True):
            np.testing.assert_array_equal(old, new, err_msg=path_name(path))
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        sharded = compiled(restored, placed(GRADS[2]))
    alone = updated(optimizer)
    for path, leaf in named(sharded.trainable).items():
        np.testing.assert_allclose(leaf, alone[path], rtol=1e-5, atol=1e-5, err_msg=path)
    params = named(sharded.trainable)
    matched = [
        (path, leaf, params[path])
        for place, leaf in jax.tree.leaves_with_path(sharded.opt_state)
        for path in params
        if path_name(place).endswith(f".{path}") and leaf.shape == params[path].shape
    ]
    assert {path for path, *_ in matched} == params.keys()
    assert all(leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim) for _, leaf, param in matched)


# Refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "sgd", "beta1": 0.9}, r"beta1 = 0.9 does not apply to optimizer.name = 'sgd'\n.*adamw, lion, muon"),
        ({"name": "lion", "eps": 1e-8}, "eps = 1e-08 does not apply to optimizer.name = 'lion'"),
        ({"momentum": 0.9}, "momentum = 0.9 does not apply to optimizer.name = 'adamw'"),
        ({"schedule": "constant", "final_fraction": 0.1}, "final_fraction = 0.1 does not apply to optimizer.schedule"),
        ({"power": 2.0}, r"power = 2.0 does not apply to optimizer.schedule = 'cosine'\n.*polynomial, wsd"),
        ({"schedule": "constant", "decay_steps": 9}, "decay_steps = 9 has no effect: .*'constant' does not end"),
        ({"warmup_start": 0.1}, "warmup_start = 0.1 has no effect: there is no warmup"),
        ({"schedule": "inverse_sqrt"}, "schedule = 'inverse_sqrt' has no effect: it continues the warmup"),
        ({"restart_growth": 2.0}, "restart_growth = 2.0 has no effect: restarts is 0"),
        ({"name": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov = True has no effect: momentum is 0"),
        ({"name": "sgd", "decay": ("all",)}, r"decay = \('all',\) has no effect: weight_decay is 0\nSet weight_decay"),
        ({"name": "adafactor", "weight_decay_power": 2}, "weight_decay_power = 2 has no effect: weight_decay is 0"),
        ({"name": "adafactor", "moment_dtype": "bfloat16"}, "moment_dtype = 'bfloat16' has no effect"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "both optimizer.warmup_steps = 1 and optimizer.warmup_ratio = 0.1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio = 1.0\nChoose a number from 0 up to 1"),
        ({"factors": {"embed": 0.0}}, r"factors has 'embed' = 0.0\n.*train.freeze"),
        ({"schedule": "wsd", "cooldown_ratio": 0.0}, "cooldown_ratio = 0.0\nChoose a number above 0 and up to 1"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**fields)
