"""Decoders whose parameters are not all arrays: adapted and quantized weights, alone and together."""

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import camelid
from camelid.generate.config import GenerationConfig
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context
from camelid.model.decoder import Decoder, declare_decoder, decode_params, specs_of
from camelid.model.finite import not_finite
from camelid.model.params import build, map_specs, named, shardings
from camelid.model.weights import Adapted, Quantized, dense
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from generation import generated
from leaves import adapted, quantized
from tiny import tiny_config, tiny_params, tiny_tokens, transformers_twin

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config(vocab_size=96)
RANKS = [3, 1, 4, 2]
COMPUTE = ComputeConfig()
TOKENS = tiny_tokens(CONFIG, 4, 11)  # 44 tokens: no number of features
POSITIONS = jnp.broadcast_to(jnp.arange(11), TOKENS.shape)
# The same sums in another order, float32: differences are near 1e-6 of the largest value.
CLOSE = 1e-5


def replaced(params: Decoder, config: ModelConfig, leaves: Mapping[str, Any]) -> Decoder:
    specs = declare_decoder(config)
    return build(specs, (named(params) | leaves).values())


def mixed_params(config: ModelConfig = CONFIG) -> Decoder:
    """Adapters of different ranks on the queries, quantized MLPs, both in o_proj, DoRA on the values, all stacked."""
    params, specs = named(tiny_params(config)), named(declare_decoder(config))
    leaves: dict[str, Any] = {}
    for name, groups in (("mlp.gate_proj", 6), ("mlp.up_proj", 1), ("mlp.down_proj", 8), ("attn.o_proj", 4)):
        path = f"layers.{name}"
        leaves[path] = quantized(specs[path], params[path], groups)
    for name, magnitude in (("attn.q_proj", False), ("attn.v_proj", True), ("attn.o_proj", False)):
        path = f"layers.{name}"
        leaves[path] = adapted(specs[path], leaves.get(path, params[path]), RANKS, magnitude=magnitude)
    leaves["lm_head"] = adapted(specs["lm_head"], params["lm_head"], [2])
    leaves["embed"] = quantized(specs["embed"], params["embed"], 4)
    return replaced(tiny_params(config), config, leaves)


def dense_params(params: Decoder) -> Decoder:
    """The plain decoder that computes the same."""

    def one(spec: Any, leaf: Any) -> jax.Array:
        return jax.vmap(dense)(leaf) if spec.stacked else dense(leaf)

    return map_specs(one, declare_decoder(CONFIG), params)


@partial(jax.jit, static_argnames=("config", "compute"))
def logits_of(params: Decoder, tokens, config: ModelConfig = CONFIG, compute: ComputeConfig = COMPUTE) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return params(jnp.asarray(tokens), positions, None, config, compute)[0]


def assert_close(ours: Any, reference: Any, close: float = CLOSE) -> None:
    ours, reference = np.asarray(ours), np.asarray(reference)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=close * np.abs(reference).max())


def is_factor(path: Any, _: Any) -> bool:
    return path[-1].name in ("a", "b", "magnitude")


def split(params: Decoder) -> tuple[Any, Any]:
    """The adapters' factors, and everything else."""
    factors = jax.tree_util.tree_map_with_path(lambda path, x: x if is_factor(path, x) else None, params)
    frozen = jax.tree_util.tree_map_with_path(lambda path, x: None if is_factor(path, x) else x, params)
    return factors, frozen


def join(factors: Any, frozen: Any) -> Decoder:
    return jax.tree.map(lambda a, b: b if a is None else a, factors, frozen, is_leaf=lambda x: x is None)


def squares(factors: Any, frozen: Any, compute: ComputeConfig = COMPUTE) -> jax.Array:
    """A loss of all hidden states."""
    x, _ = join(factors, frozen).hidden(jnp.asarray(TOKENS), POSITIONS, None, CONFIG, compute)
    return jnp.mean(jnp.square(x.astype(jnp.float32)) * jnp.linspace(0.1, 1, CONFIG.embed_dim))


@pytest.fixture(scope="module")
def mixed() -> Decoder:
    return mixed_params()


def test_adapted_and_quantized_weights_give_the_logits_of_their_dense_equivalent(mixed: Decoder):
    ours, reference = logits_of(mixed, TOKENS), logits_of(dense_params(mixed), TOKENS)
    assert_close(ours, reference)
    assert np.abs(ours - logits_of(tiny_params(CONFIG), TOKENS)).max() > 0.1, "the adapters change nothing"


def test_a_declared_parameter_is_one_entry_whatever_its_type(mixed: Decoder):
    specs = declare_decoder(CONFIG)
    assert named(mixed).keys() == named(specs).keys()
    assert isinstance(named(mixed)["layers.attn.q_proj"], Adapted)
    assert isinstance(named(mixed)["layers.mlp.up_proj"], Quantized)
    assert all(
        leaf.shape == spec.shape for leaf, spec in zip(named(mixed).values(), named(specs).values(), strict=True)
    )
    again = build(mixed, named(mixed).values())
    assert jax.tree.structure(again) == jax.tree.structure(mixed)


@pytest.mark.parametrize("remat", ["none", "elementwise", "layer"])
def test_gradients_of_the_adapters_are_those_through_the_dense_equivalent(mixed: Decoder, remat: str):
    factors, frozen = split(mixed)
    gradients = jax.jit(jax.grad(partial(squares, compute=ComputeConfig(remat=remat))))(factors, frozen)

    def by_dense(factors: Any) -> jax.Array:
        return squares(dense_params(join(factors, frozen)), dense_params(join(factors, frozen)))

    reference = named(jax.jit(jax.grad(by_dense))(factors))
    for path in ("layers.attn.q_proj", "layers.attn.o_proj", "layers.attn.v_proj"):
        both = (jax.tree.leaves(tree[path]) for tree in (named(gradients), reference))
        for ours, expected in zip(*both, strict=True):
            assert_close(ours, expected, 1e-4)
    unused = np.arange(max(RANKS)) >= np.array(RANKS)[:, None]
    assert not named(gradients)["layers.attn.q_proj"].b.transpose(0, 3, 1, 2)[unused].any(), "padding would be trained"


# The compiled program ---------------------------------------------------------------------


def shapes_of(program: str, operation: str) -> set[tuple[int, ...]]:
    """The shapes of the results of an operation in the text of a compiled program."""
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* {operation}\(", program)
    return {tuple(map(int, shape.split(","))) for shape in found if shape}


@pytest.mark.parametrize("remat", ["none", "elementwise", "layer"])
def test_no_product_computes_the_gradient_of_a_frozen_weight(remat: str):
    """In the layers' scan, with rematerialization, only adapters' gradients are computed and accumulated."""
    params, specs = tiny_params(CONFIG), named(declare_decoder(CONFIG))
    path = "layers.attn.q_proj"
    params = replaced(params, CONFIG, {path: adapted(specs[path], named(params)[path], RANKS)})
    factors, frozen = split(params)
    compute = ComputeConfig(remat=remat)
    text = jax.jit(jax.grad(partial(squares, compute=compute))).lower(factors, frozen).compile().as_text()
    heads, kv, mlp, embed = 60, 20, CONFIG.mlp_dim, CONFIG.embed_dim
    weights = {(heads, embed), (kv, embed), (embed, heads), (mlp, embed), (embed, mlp)}
    assert not shapes_of(text, "dot") & weights
    # With all weights trained, the same program has these products.
    text = jax.jit(jax.grad(lambda p: squares(p, p, compute))).lower(tiny_params(CONFIG)).compile().as_text()
    assert shapes_of(text, "dot") >= weights


@pytest.mark.parametrize("remat", ["none", "elementwise"])
def test_the_backward_pass_keeps_no_dense_copy_of_a_quantized_weight(mixed: Decoder, remat: str):
    factors, frozen = split(mixed)
    compute = ComputeConfig(remat=remat)
    saved = jax.eval_shape(lambda f: jax.vjp(lambda f: squares(f, frozen, compute), f)[1], factors)
    matrices = {spec.shape for spec in named(declare_decoder(CONFIG).layers).values() if spec.is_matrix}
    kept = {leaf.shape for leaf in jax.tree.leaves(saved) if leaf.dtype == jnp.float32}
    quantized_shapes = {named(mixed)[f"layers.mlp.{name}"].shape for name in ("gate_proj", "up_proj", "down_proj")}
    assert quantized_shapes <= matrices
    assert not kept & quantized_shapes


# Meshes, donation, decoding ---------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_logits_and_gradients_on_a_mesh_are_those_of_one_device(mixed: Decoder, sizes: dict[str, int]):
    mesh = make_mesh(MeshConfig(**sizes))
    places = shardings(declare_decoder(CONFIG), mixed, mesh)
    placed = jax.device_put(mixed, places)
    for leaf, sharding in zip(jax.tree.leaves(placed), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == sharding
    factors, frozen = split(placed)
    tokens = np.tile(TOKENS, (2, 1))
    with jax.set_mesh(mesh):
        ours = logits_of(jax.lax.with_sharding_constraint(placed, places), tokens)
        gradients = jax.jit(jax.grad(squares))(factors, frozen) if sizes == {"fsdp": 8} else None
    assert_close(ours[:4], logits_of(mixed, TOKENS))
    if gradients is not None:
        reference = jax.jit(jax.grad(squares))(*split(mixed))
        for leaf, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(reference), strict=True):
            assert_close(leaf, expected, 1e-4)


def test_adapted_parameters_can_be_donated(mixed: Decoder):
    before = jax.tree.map(np.asarray, mixed)
    copy = jax.tree.map(lambda x: jnp.array(x, copy=True), mixed)
    double = jax.jit(lambda p: jax.tree.map(lambda x: x * jnp.asarray(2, x.dtype), p), donate_argnums=0)(copy)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copy))
    for leaf, expected in zip(jax.tree.leaves(double), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(leaf, expected * np.asarray(2, expected.dtype))


def test_decoding_with_adapted_and_quantized_weights_gives_the_tokens_of_the_dense_equivalent(mixed: Decoder):
    unstacked = decode_params(mixed)
    assert isinstance(unstacked.layers, tuple)
    assert isinstance(unstacked.layers[2].attn.q_proj, Adapted)
    prompts = [[5, 7, 11], [3], [90, 1, 2, 8, 4]]
    found = [
        generated(params, prompts, [0, 1, 2], GenerationConfig(max_new_tokens=9), (), CONFIG, COMPUTE, one_device())
        for params in (mixed, dense_params(mixed))
    ]
    assert found[0] == found[1]
    assert len({tuple(row) for row in found[0]}) == 3


def test_each_row_of_a_batch_uses_the_adapters_that_the_context_selects(mixed: Decoder):
    specs, path = named(declare_decoder(CONFIG)), "layers.attn.q_proj"
    base = named(mixed)[path].base
    weights = [adapted(specs[path], base, RANKS, seed=seed) for seed in (1, 2)]
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *(dataclasses.replace(w, base=None) for w in weights))
    params = replaced(mixed, CONFIG, {path: dataclasses.replace(several, base=base)})
    context = Context(adapters=jnp.array([1, 0, -1, 1]))
    ours = jax.jit(lambda p: p(jnp.asarray(TOKENS), POSITIONS, None, CONFIG, COMPUTE, context=context)[0])(params)
    # A negative index turns all adapters off, also those of weights that have a single one.
    bases = {name: leaf.base for name, leaf in named(mixed).items() if isinstance(leaf, Adapted)}
    for row, leaves in enumerate(({path: weights[1]}, {path: weights[0]}, bases, {path: weights[1]})):
        assert_close(ours[row], logits_of(replaced(mixed, CONFIG, leaves), TOKENS)[row])


def test_saving_merges_adapters_and_dequantizes(mixed: Decoder, tmp_path: Path):
    model = camelid.Model(CONFIG, mixed, None, COMPUTE, one_device())
    model.save(tmp_path / "merged")
    assert_close(camelid.load(tmp_path / "merged").logits(TOKENS), model.logits(TOKENS))


def test_saving_a_tied_model_with_an_adapted_head_unties_it(tmp_path: Path):
    config = tiny_config(tie_embeddings=True)
    params, spec = tiny_params(config), named(declare_decoder(CONFIG))["lm_head"]
    head = adapted(dataclasses.replace(spec, shape=params.embed.shape), params.embed, [2])
    params = dataclasses.replace(params, lm_head=dataclasses.replace(head, base=None))
    model = camelid.Model(config, params, None, COMPUTE, one_device())
    model.save(tmp_path / "merged")
    again = camelid.load(tmp_path / "merged")
    assert not again.config.tie_embeddings
    assert_close(again.logits(TOKENS), model.logits(TOKENS))


def test_a_factor_that_is_not_finite_is_found(mixed: Decoder):
    leaf = named(mixed)["layers.attn.q_proj"]
    broken = replaced(mixed, CONFIG, {"layers.attn.q_proj": dataclasses.replace(leaf, b=leaf.b.at[2, 0].set(np.nan))})
    assert "layers.attn.q_proj of layer 2" in str(not_finite(broken, COMPUTE, "the logits are"))


# PEFT -------------------------------------------------------------------------------------


# PEFT speaks of heads that are tied, and calls deprecated functions of transformers.
def quiet(test: Any) -> Any:
    for warning in ("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning"):
        test = pytest.mark.filterwarnings(warning)(test)
    return test


def peft_twin(config: ModelConfig, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """PEFT's model on transformers' with random adapters, and the adapters' parameters by name."""
    twin = transformers_twin(config, tiny_params(config))
    lora = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)
    model = peft.get_peft_model(twin, lora).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.rand(parameter.shape) - 0.5) / 2)
    return model, {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


def peft_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def only(parameters: Mapping[str, torch.Tensor], *words: str) -> np.ndarray:
    (found,) = (p.numpy() for name, p in parameters.items() if all(word in name for word in words))
    return found


@quiet
def test_ranks_and_scales_that_differ_from_layer_to_layer_give_the_logits_of_peft():
    """PEFT's rank_pattern and alpha_pattern."""
    model, parameters = peft_twin(
        CONFIG,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={r"layers\.1\..*q_proj": 5, "down_proj": 2, r"layers\.3\.self_attn\.q_proj": 1},
        alpha_pattern={r"layers\.0\.self_attn\.q_proj": 7, r"layers\.2\.mlp\.down_proj": 1},
    )
    specs, params = named(declare_decoder(CONFIG)), named(tiny_params(CONFIG))
    ranks = {"q_proj": [3, 5, 3, 1], "down_proj": [2, 2, 2, 2]}
    alphas = {"q_proj": [7, 6, 6, 6], "down_proj": [6, 6, 1, 6]}
    leaves = {}
    for path in ("layers.attn.q_proj", "layers.mlp.down_proj"):
        name, most = path.split(".")[-1], max(ranks[path.split(".")[-1]])
        factors = {"lora_A": [], "lora_B": []}
        for layer, rank in enumerate(ranks[name]):
            a = only(parameters, f"layers.{layer}.", name, "lora_A")
            assert a.shape[0] == rank
            factors["lora_A"].append(np.pad(a, ((0, most - rank), (0, 0))))
            b = only(parameters, f"layers.{layer}.", name, "lora_B")
            factors["lora_B"].append(np.pad(b, ((0, 0), (0, most - rank))))
        outputs = specs[path].shape[1 : 1 + len(specs[path].outputs)]
        leaves[path] = Adapted(
            params[path],
            jnp.asarray(np.stack(factors["lora_A"])),
            jnp.asarray(np.stack(factors["lora_B"])).reshape(4, *outputs, most),
            jnp.float32(alphas[name]) / jnp.float32(ranks[name]),
        )
    ours = logits_of(replaced(tiny_params(CONFIG), CONFIG, leaves), TOKENS)
    # Four layers add up in another order than transformers'.
    assert_close(ours, peft_logits(model, TOKENS))


@quiet
@pytest.mark.parametrize("uses", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")], ids=" and ".join)
def test_an_adapter_of_a_tied_table_belongs_to_one_of_its_uses_as_in_peft(uses: tuple[str, ...]):
    config = tiny_config(tie_embeddings=True)
    model, parameters = peft_twin(config, target_modules=["q_proj", *uses])
    params, specs = tiny_params(config), named(declare_decoder(config))
    path = "layers.attn.q_proj"
    a, b = (
        np.stack([only(parameters, f"layers.{layer}.", "q_proj", factor) for layer in range(config.num_layers)])
        for factor in ("lora_A", "lora_B")
    )
    q_proj = Adapted(
        params.layers.attn.q_proj,
        jnp.asarray(a),
        jnp.asarray(b).reshape(*specs[path].shape[:3], 3),
        jnp.full(config.num_layers, 2.0),
    )
    params = replaced(params, config, {path: q_proj})
    if "lm_head" in uses:
        a, b = (jnp.asarray(only(parameters, "lm_head", factor)) for factor in ("lora_A", "lora_B"))
        params = dataclasses.replace(params, lm_head=Adapted(None, a, b, jnp.float32(2)))
    if "embed_tokens" in uses:
        a, b = (jnp.asarray(only(parameters, "embed_tokens", f"lora_embedding_{x}").T) for x in "BA")
        params = dataclasses.replace(params, embed=Adapted(params.embed, a, b, jnp.float32(2)))
    tokens = tiny_tokens(config, 3, 11)
    assert_close(logits_of(params, tokens, config), peft_logits(model, tokens))
    places = shardings(specs_of(params, config), params, one_device())
    assert jax.tree.structure(places) == jax.tree.structure(params)
