import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camelid.model.context import Context
from camelid.model.weights import einsum

B, S, E, H, K, D, M = 2, 7, 12, 6, 3, 4, 20
# The products of a layer, with their operands' shapes.
PRODUCTS = {
    "BSE,HDE->BSHD": ((B, S, E), (H, D, E)),
    "BSE,KDE->BSKD": ((B, S, E), (K, D, E)),
    "BSHD,EHD->BSE": ((B, S, H, D), (E, H, D)),
    "BSE,ME->BSM": ((B, S, E), (M, E)),
    "BSM,EM->BSE": ((B, S, M), (E, M)),
}


def plain(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return einsum(equation, x, weight, Context())


def product_and_gradients(run, equation: str, x_dtype, w_dtype) -> list[np.ndarray]:
    x_shape, w_shape = PRODUCTS[equation]
    draw = np.random.default_rng(0)
    # Numbers of 8 bits, so that x and the weight are the same in both dtypes.
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
