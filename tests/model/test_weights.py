"""Products and lookups of every type of weight, compared with jnp.einsum and with PEFT."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from camelid.model.context import Context
from camelid.model.params import Spec
from camelid.model.weights import Adapted, Quantized, Weight, dense, einsum, lookup
from leaves import adapted, quantized

pytestmark = pytest.mark.quick_compile

B, S, E, H, K, D, M = 2, 7, 12, 6, 3, 4, 20
# The products of a layer, with their operands' shapes.
PRODUCTS = {
    "BSE,HDE->BSHD": ((B, S, E), (H, D, E)),
    "BSE,KDE->BSKD": ((B, S, E), (K, D, E)),
    "BSHD,EHD->BSE": ((B, S, H, D), (E, H, D)),
    "BSE,ME->BSM": ((B, S, E), (M, E)),
    "BSM,EM->BSE": ((B, S, M), (E, M)),
}
# Sums of a few products near 1, in float32 and in another order.
CLOSE = 1e-5


def plain(equation: str, x: jax.Array, weight: Weight) -> jax.Array:
    return einsum(equation, x, weight, Context())


def product_and_gradients(run, equation: str, x_dtype, w_dtype) -> list[np.ndarray]:
    x_shape, w_shape = PRODUCTS[equation]
    draw = np.random.default_rng(0)
    # Values of 8 bits, so that x and the weight are the same in both dtypes.
    x, w = (jnp.asarray(draw.normal(size=shape), jnp.bfloat16) for shape in (x_shape, w_shape))
    x, w = x.astype(x_dtype), w.astype(w_dtype)
    out, pullback = jax.vjp(lambda x, w: run(equation, x, w), x, w)
    g = jnp.asarray(draw.normal(size=out.shape), jnp.bfloat16).astype(out.dtype)
    return [out, *pullback(g)]


@pytest.mark.parametrize("equation", PRODUCTS)
def test_products_and_their_gradients_are_einsum(equation: str):
    ours = product_and_gradients(plain, equation, jnp.float32, jnp.float32)
    reference = product_and_gradients(jnp.einsum, equation, jnp.float32, jnp.float32)
    for array, expected in zip(ours, reference, strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("equation", PRODUCTS)
def test_bfloat16_products_are_summed_in_float32(equation: str):
    """Activations are rounded once, after the sum; the gradient of a float32 weight is not rounded at all."""
    out, dx, dw = product_and_gradients(plain, equation, jnp.bfloat16, jnp.float32)
    exact_out, exact_dx, exact_dw = product_and_gradients(jnp.einsum, equation, jnp.float32, jnp.float32)
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for rounded, exact in ((out, exact_out), (dx, exact_dx)):
        np.testing.assert_allclose(rounded.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(dw, exact_dw, rtol=0, atol=1e-5)


def test_a_product_may_be_returned_in_float32():
    """The head's logits of bfloat16 activations are not rounded."""
    draw = np.random.default_rng(0)
    x, w = (jnp.asarray(draw.normal(size=shape), jnp.bfloat16) for shape in ((B, S, E), (M, E)))
    logits = einsum("BSE,VE->BSV", x, w, Context(), jnp.float32)
    exact = np.einsum("BSE,VE->BSV", np.asarray(x, np.float32), np.asarray(w, np.float32))
    np.testing.assert_allclose(logits, exact, rtol=0, atol=CLOSE)


# Adapters ---------------------------------------------------------------------------------


def spec_of(equation: str) -> Spec:
    """The spec of a product's weight, without stacked layers."""
    x_axes, w_axes = equation.split("->")[0].split(",")
    inputs = tuple(axis for axis in w_axes if axis in x_axes)
    outputs = tuple(axis for axis in w_axes if axis not in inputs)
    return Spec((), outputs, inputs, PRODUCTS[equation][1], "normal")


def peft_layer(layer: torch.nn.Module, dora: bool = False) -> Any:
    """The module that PEFT puts in the place of a linear or embedding layer, with random factors of rank 3."""
    settings = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["only"], use_dora=dora)
    model = peft.get_peft_model(torch.nn.ModuleDict({"only": layer}), settings)  # pyright: ignore
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.rand(parameter.shape) - (0 if "magnitude" in name else 0.5))
    return model.base_model.model["only"]  # pyright: ignore


def from_torch(tensor: Any, *shape: int) -> jax.Array:
    return jnp.asarray(tensor.detach().numpy()).reshape(shape)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("equation", PRODUCTS)
def test_products_of_adapted_weights_and_their_gradients_are_those_of_peft(equation: str, dora: bool):
    spec, x_shape = spec_of(equation), PRODUCTS[equation][0]
    outputs, inputs = spec.shape[: len(spec.outputs)], spec.shape[len(spec.outputs) :]
    width = int(np.prod(inputs))
    theirs = peft_layer(torch.nn.Linear(width, int(np.prod(outputs)), bias=False), dora)
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    magnitude = theirs.lora_magnitude_vector["default"].weight if dora else None
    ours = Adapted(
        from_torch(theirs.base_layer.weight, *spec.shape),
        from_torch(a, 3, *inputs),
        from_torch(b, *outputs, 3),
        jnp.float32(7 / 3),
        None if magnitude is None else from_torch(magnitude, *outputs),
    )
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((B, S, width), np.float32)).requires_grad_()
    out = theirs(x)
    g = torch.from_numpy(np.random.default_rng(1).standard_normal(out.shape, np.float32))
    out.backward(g)
    y, pullback = jax.vjp(lambda x, w: plain(equation, x, w), from_torch(x, *x_shape), ours)
    dx, dw = pullback(from_torch(g, *y.shape))
    expected = {"y": (y, out), "dx": (dx, x.grad), "da": (dw.a, a.grad), "db": (dw.b, b.grad)}
    if magnitude is not None:
        expected["dmagnitude"] = (dw.magnitude, magnitude.grad)
    for name, (array, tensor) in expected.items():
        np.testing.assert_allclose(array, from_torch(tensor, *array.shape), rtol=CLOSE, atol=CLOSE, err_msg=name)
    assert not np.any(dw.scale), "alpha / rank is a constant"


def test_lookups_in_an_adapted_table_are_those_of_peft():
    theirs = peft_layer(torch.nn.Embedding(M, E))
    ours = Adapted(
        from_torch(theirs.base_layer.weight, M, E),
        from_torch(theirs.lora_embedding_B["default"].T, 3, E),
        from_torch(theirs.lora_embedding_A["default"].T, M, 3),
        jnp.float32(7 / 3),
    )
    tokens = np.random.default_rng(0).integers(0, M, (B, S))
    expected = theirs(torch.from_numpy(tokens)).detach().numpy()
    np.testing.assert_allclose(
        lookup(ours, jnp.asarray(tokens), Context(), jnp.float32), expected, rtol=CLOSE, atol=CLOSE
    )


def dense_product(equation: str, x: jax.Array, weight: Weight) -> jax.Array:
    return jnp.einsum(equation, x, dense(weight))


def an_adapted(equation: str, **settings: Any) -> Adapted:
    spec = spec_of(equation)
    return adapted(spec, jnp.asarray(np.random.default_rng(5).standard_normal(spec.shape, np.float32)), [3], **settings)


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_each_row_is_multiplied_by_the_adapter_that_the_context_selects(magnitude: bool):
    """-1 selects the base; products and lookups agree with those of each adapter alone."""
    equation, index = "BSM,EM->BSE", [1, -1, 0, 1]
    weights = [an_adapted(equation, magnitude=magnitude, seed=seed) for seed in (0, 1)]
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    several = Adapted(weights[0].base, several.a, several.b, several.scale, several.magnitude)
    context = Context(adapters=jnp.array(index))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, S, M), np.float32))
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, E, (4, S)))
    y, rows = einsum(equation, x, several, context), lookup(several, tokens, context, jnp.float32)
    for row, chosen in enumerate(index):
        weight = weights[0].base if chosen < 0 else weights[chosen]
        assert weight is not None
        np.testing.assert_allclose(y[row], dense_product(equation, x, weight)[row], rtol=CLOSE, atol=CLOSE)
        np.testing.assert_allclose(rows[row], dense(weight)[tokens[row]], rtol=CLOSE, atol=CLOSE)
    with pytest.raises(ValueError, match=r"context\.adapters"):
        plain(equation, x, several)
    with pytest.raises(ValueError, match="several adapters"):
        dense(several)


@pytest.mark.parametrize("magnitude", [False, True])
def test_rows_may_use_the_base_of_a_single_adapter(magnitude: bool):
    weight = an_adapted("BSE,ME->BSM", magnitude=magnitude)
    assert weight.base is not None
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, S, E), np.float32))
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, M, (2, S)))
    context = Context(adapters=jnp.array([-1, 0]))
    y, rows = einsum("BSE,ME->BSM", x, weight, context), lookup(weight, tokens, context, jnp.float32)
    for row, used in enumerate((weight.base, weight)):
        np.testing.assert_allclose(y[row], dense_product("BSE,ME->BSM", x, used)[row], rtol=CLOSE, atol=CLOSE)
        np.testing.assert_allclose(rows[row], dense(used)[tokens[row]], rtol=CLOSE, atol=CLOSE)


def test_an_output_without_weights_stays_zero_under_dora():
    """Padded rows of a vocabulary are zero; their length is no divisor."""
    weight = an_adapted("BSE,ME->BSM", magnitude=True)
    assert isinstance(weight.base, jax.Array)
    weight = Adapted(weight.base.at[4].set(0), weight.a, weight.b.at[4].set(0), weight.scale, weight.magnitude)
    y = plain("BSE,ME->BSM", jnp.ones((B, S, E)), weight)
    assert np.isfinite(y).all()
    assert not y[..., 4].any()


# Quantization -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("equation", PRODUCTS)
def test_products_of_quantized_weights_are_those_of_their_dense_values(equation: str, dtype: str):
    spec, x_shape = spec_of(equation), PRODUCTS[equation][0]
    values = jnp.asarray(np.random.default_rng(0).standard_normal(spec.shape, np.float32))
    weight = quantized(spec, values, 4, dtype)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(x_shape, np.float32))
    half_step = 0.51 * float(np.abs(values).max()) / {"int8": 127, "int4": 7}[dtype]
    np.testing.assert_allclose(dense(weight), values, rtol=0, atol=half_step)
    for run in (plain, dense_product):
        y, pullback = jax.vjp(lambda x, run=run: run(equation, x, weight), x)
        if run is plain:
            ours = y, pullback(jnp.ones_like(y))[0]
    for array, expected in zip(ours, (y, pullback(jnp.ones_like(y))[0]), strict=True):
        np.testing.assert_allclose(array, expected, rtol=CLOSE, atol=CLOSE)


def test_each_group_of_inputs_has_its_scale():
    """A drawing by hand: two outputs, inputs of two axes, groups that span the first of them."""
    codes = jnp.array([[[1, 2], [3, 4]], [[-1, -2], [-3, -4]]], jnp.int8)
    weight = Quantized(codes, jnp.array([[10.0, 100.0], [1.0, 2.0]]))
    expected = [[[10, 20], [300, 400]], [[-1, -2], [-6, -8]]]
    np.testing.assert_array_equal(weight.dense(), np.float32(expected))


def test_lookups_in_a_quantized_table_are_its_dense_rows_and_only_they_are_dequantized():
    spec = Spec((), ("V",), ("E",), (1000, E), "normal")
    table = quantized(spec, jnp.asarray(np.random.default_rng(0).standard_normal(spec.shape, np.float32)), 3)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 1000, (B, S)))
    found = lookup(table, tokens, Context(), jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, table.dense()[tokens].astype(jnp.bfloat16))
    program = jax.make_jaxpr(lambda w: lookup(w, tokens, Context(), jnp.float32))(table)
    assert not [e for e in program.eqns for v in e.outvars if v.aval.dtype == jnp.float32 and v.aval.size >= 1000 * E]


def test_an_adapter_on_a_quantized_base_is_that_on_its_dense_values():
    equation = "BSHD,EHD->BSE"
    spec = spec_of(equation)
    values = jnp.asarray(np.random.default_rng(0).standard_normal(spec.shape, np.float32))
    for magnitude in (False, True):
        weight = adapted(spec, quantized(spec, values, 4), [3], magnitude=magnitude)
        x = jnp.asarray(np.random.default_rng(1).standard_normal(PRODUCTS[equation][0], np.float32))
        np.testing.assert_allclose(
            plain(equation, x, weight), dense_product(equation, x, weight), rtol=CLOSE, atol=CLOSE
        )
