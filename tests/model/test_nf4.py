"""NF4 and int8 weights: equal to those of bitsandbytes; products and decoders equal to those of the dense values."""

from typing import Any

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

from camelid.model.context import Context
from camelid.model.decoder import Decoder, declare_decoder, specs_of
from camelid.model.nf4 import DYNAMIC_VALUES, NF4, quantize_nf4
from camelid.model.params import Spec, build, map_specs, named, shardings
from camelid.model.quantize import Bits, quantize, quantize_parameter
from camelid.model.weights import Quantized, Weight, dense, einsum, lookup
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from model.test_adapted_decoder import assert_close, logits_of
from tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.quick_compile
# Its matrices have 128 and 192 inputs, which are multiples of a block.
CONFIG = tiny_config(embed_dim=128, mlp_dim=192, num_heads=4, num_kv_heads=2, head_dim=32, num_layers=2, vocab_size=96)
SHAPES = {  # number of outputs' axes, shape
    "two axes": (1, (256, 192)),
    "heads of outputs": (2, (4, 32, 128)),
    "heads of inputs": (1, (128, 4, 32)),
    "fewer blocks than a nested block": (1, (8, 64)),
}


def values(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return 0.02 * np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("name", SHAPES)
def test_codes_and_magnitudes_equal_bitsandbytes(name: str):
    """Its CPU kernel for magnitudes rounds through a table of 2^16 entries, and that for float64 to the nearest."""
    outputs, shape = SHAPES[name]
    matrix = values(shape)
    theirs, state = bnb.quantize_4bit(torch.tensor(matrix), blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = jax.jit(quantize_nf4, static_argnums=1)(matrix, outputs)
    np.testing.assert_array_equal(DYNAMIC_VALUES, state.state2.code)
    np.testing.assert_array_equal(ours.codes.reshape(-1), theirs.numpy().reshape(-1))
    # A mean, which the two libraries sum in different orders.
    np.testing.assert_allclose(ours.absmax_offset, state.offset, rtol=1e-6)
    np.testing.assert_allclose(ours.absmax_scale, state.state2.absmax, rtol=0, atol=1e-6 * float(state.offset))
    centered = torch.tensor(np.abs(matrix.reshape(-1, 64)).max(1)) - state.offset
    exact, _ = torch.ops.bitsandbytes.quantize_blockwise.default(centered.double(), state.state2.code, 256)
    np.testing.assert_array_equal(ours.absmax.reshape(-1), exact)
    assert np.abs(np.int32(ours.absmax).reshape(-1) - state.absmax.numpy()).max() <= 1
    state.absmax, state.shape = exact, torch.Size((shape[0], matrix.size // shape[0]))
    dequantized = bnb.dequantize_4bit(theirs, state).reshape(shape)
    np.testing.assert_allclose(ours.dense(), dequantized, rtol=0, atol=1e-6 * matrix.max())
    np.testing.assert_allclose(ours.dense(), matrix, rtol=0, atol=0.16 * matrix.max())


def test_blocks_of_other_numbers_of_inputs_end_with_their_output():
    """Each output as if it were a matrix of its own, apart from the magnitudes, which are quantized together."""
    matrix = values((3, 150))
    matrix[1] *= 100
    ours = quantize_nf4(jnp.asarray(matrix), 1)
    assert (ours.absmax.shape, ours.shape) == ((3, 3), (3, 150))
    for row, codes in zip(matrix, ours.codes, strict=True):
        theirs, _ = bnb.quantize_4bit(torch.tensor(row), blocksize=64, quant_type="nf4")
        np.testing.assert_array_equal(codes, theirs.reshape(-1))
    # Half of the largest step between two values is 0.152 of the block's magnitude, which has an error of its own.
    np.testing.assert_allclose(ours.dense(), matrix, rtol=0, atol=0.16 * np.abs(matrix).max())


def test_zeros_stay_zeros():
    weight = quantize_nf4(jnp.zeros((4, 64)), 1)
    np.testing.assert_array_equal(weight.dense(), np.zeros((4, 64)))


def test_nf4_takes_little_more_than_four_bits_per_element():
    weight = jax.eval_shape(lambda x: quantize_nf4(x, 1), jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    bits = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight)) / 4096**2
    assert 4 < bits < 4.13


def test_int8_is_rounded_to_the_nearest_of_255_steps_for_each_output():
    spec = Spec((), ("O",), ("I",), (7, 40), "normal")
    matrix = values(spec.shape)
    weight = quantize(jnp.asarray(matrix), spec, "int8")
    assert isinstance(weight, Quantized)
    assert weight.codes.dtype == jnp.int8
    largest = np.abs(matrix).max(1, keepdims=True)
    assert np.abs(np.asarray(weight.codes)).max(1).tolist() == [127] * 7
    assert (np.abs(weight.dense() - matrix) <= 0.501 * largest / 127).all()


@pytest.mark.parametrize(
    ("equation", "outputs", "shape"), [("BSE,HDE->BSHD", 2, (3, 4, 70)), ("BSHD,EHD->BSE", 1, (70, 3, 4))]
)
def test_products_and_lookups_are_those_of_the_dense_matrix(equation: str, outputs: int, shape: tuple[int, ...]):
    weight = quantize_nf4(jnp.asarray(values(shape)), outputs)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, *shape[outputs:]), np.float32))
    ours, pullback = jax.vjp(lambda x: einsum(equation, x, weight, Context()), x)
    reference, their_pullback = jax.vjp(lambda x: jnp.einsum(equation, x, dense(weight)), x)
    assert_close(ours, reference)
    assert_close(pullback(ours)[0], their_pullback(ours)[0])


def test_a_lookup_dequantizes_the_rows_of_its_tokens():
    table = quantize_nf4(jnp.asarray(values((500, 70))), 1)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 500, (2, 5)))
    np.testing.assert_array_equal(lookup(table, tokens, Context(), jnp.float32), table.dense()[tokens])
    program = jax.make_jaxpr(lambda w: lookup(w, tokens, Context(), jnp.float32))(table)
    assert not [e for e in program.eqns for v in e.outvars if v.aval.dtype == jnp.float32 and v.aval.size >= 500 * 70]


def dense_twin(params: Any) -> Any:
    def one(spec: Spec, leaf: Weight) -> Any:
        return jax.vmap(dense)(leaf) if spec.stacked else dense(leaf)

    return map_specs(one, declare_decoder(CONFIG), params)


def quantize_layers(params: Decoder, bits: Bits, mesh: Mesh) -> Decoder:
    specs, leaves = specs_of(params, CONFIG), named(params)
    return build(specs, [quantize_parameter(path, leaves[path], s, bits, mesh) for path, s in named(specs).items()])


@pytest.mark.parametrize(("bits", "weight_type"), [("nf4", NF4), ("int8", Quantized)])
def test_a_decoder_with_quantized_layers_on_one_device_and_on_eight(bits: Any, weight_type: type):
    params = tiny_params(CONFIG)
    kept = jax.tree.map(jnp.copy, params)
    quantized = quantize_layers(kept, bits, one_device())
    specs = specs_of(params, CONFIG)
    for path, spec in named(specs).items():
        leaf = named(quantized)[path]
        if spec.stacked and spec.is_matrix:
            assert isinstance(leaf, weight_type)
            assert named(kept)[path].is_deleted()
            last = quantize(named(params)[path][-1], _unstacked(spec), bits)
            for ours, alone in zip(jax.tree.leaves(leaf), jax.tree.leaves(last), strict=True):
                np.testing.assert_allclose(ours[-1], alone, rtol=1e-6)
        else:
            np.testing.assert_array_equal(leaf, named(params)[path])
    tokens = tiny_tokens(CONFIG, 4, 9)
    logits = logits_of(quantized, tokens, CONFIG)
    assert_close(logits, logits_of(dense_twin(quantized), tokens, CONFIG))

    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    placed = jax.device_put(params, shardings(specs, params, mesh))
    sharded = quantize_layers(placed, bits, mesh)
    q_proj = named(sharded)["layers.attn.q_proj"]
    assert q_proj.codes.sharding.shard_shape(q_proj.codes.shape)[1:] == (2, 32, q_proj.codes.shape[-1] // 4)
    for ours, alone in zip(jax.tree.leaves(sharded), jax.tree.leaves(quantized), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(alone, np.float32), rtol=1e-6)
    with jax.set_mesh(mesh):
        assert_close(logits_of(sharded, tokens, CONFIG), logits)


def _unstacked(spec: Spec) -> Spec:
    return Spec((), spec.outputs, spec.inputs, spec.shape[1:], spec.init)
