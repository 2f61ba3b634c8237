"""What the decoder promises beyond the numbers of one plain row, which tests/parity compares with transformers."""

import dataclasses
import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context
from camelid.model.decoder import Decoder, Layer, run_layers
from camelid.model.kv_cache import empty_cache
from camelid.model.params import named
from families import FAMILIES
from tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config()
# Every way in which a token's logits may depend on its place: windows, rotations, both kinds of layers in turn.
KINDS = [
    "llama, grouped queries, heads wider than embed",
    "llama, dynamic scaling beyond the context",
    "mistral, sliding window",
    "qwen2, windows in later layers",
    "gemma2",
    "gemma3",
    "phi",
    "phi3, longrope beyond the original context",
]
# The same sums in another order, float32: differences are near 1e-6 of the largest value.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def params() -> Decoder:
    return tiny_params(CONFIG)


def counted(length: int, rows: int = 1) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length), (rows, length))


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def logits_and_gradients(
    params, tokens, positions, segments, targets, weights, config: ModelConfig, compute: ComputeConfig
):
    def loss(params):
        x, _ = params.hidden(tokens, positions, segments, config, compute)
        return params.loss(x, targets, weights, config)[0], params.logits(x, config, compute)

    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, gradients


def assert_close(ours, reference) -> None:
    ours, reference = np.asarray(ours, np.float32), np.asarray(reference, np.float32)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=CLOSE * np.abs(reference).max())


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> ModelConfig:
    return FAMILIES[request.param].ours


@pytest.fixture(scope="module")
def separate() -> dict[str, np.ndarray]:
    """Three documents, a row each; what follows a document's end is garbage without weight."""
    lengths = np.array([[23], [1], [9]])
    tokens, targets = (tiny_tokens(CONFIG, 3, 23, seed) for seed in (1, 2))
    at = np.broadcast_to(np.arange(23, dtype=np.int32), tokens.shape)
    inside = at < lengths
    rows = {"tokens": tokens, "targets": targets, "positions": at, "weights": np.float32(inside)}
    return rows | {"segments": np.int32(inside)}


@pytest.fixture(scope="module")
def packed(separate) -> dict[str, np.ndarray]:
    """The same documents end to end in one row, with padding in segment 0."""
    segments = np.broadcast_to(np.int32([[1], [2], [3]]), (3, 23))
    inside = separate["weights"] > 0
    rows = {name: x[inside][None] for name, x in (separate | {"segments": segments}).items()}
    return {name: np.pad(x, ((0, 0), (0, 4))) for name, x in rows.items()}


@pytest.fixture(scope="module")
def run_packed(params: Decoder, packed):
    """Logits and gradients of the packed row, once for each ComputeConfig."""
    return functools.cache(lambda compute: logits_and_gradients(params, **packed, config=CONFIG, compute=compute))


def test_packed_documents_equal_separate_documents(kind: ModelConfig, separate, packed):
    """Logits, and the gradients of the loss."""
    params = tiny_params(kind)
    alone, reference = logits_and_gradients(params, **separate, config=kind, compute=ComputeConfig())
    together, gradients = logits_and_gradients(params, **packed, config=kind, compute=ComputeConfig())
    assert_close(together[packed["weights"] > 0], alone[separate["weights"] > 0])
    for path, theirs in named(reference).items():
        assert_close(named(gradients)[path], theirs)


def test_a_token_does_not_change_what_came_before_it(params: Decoder):
    run = jax.jit(lambda tokens: params(tokens, counted(20), None, CONFIG, ComputeConfig())[0])
    tokens = tiny_tokens(CONFIG, 1, 20)
    changed = tokens.copy()
    changed[0, 12] = (changed[0, 12] + 1) % CONFIG.vocab_size
    before, after = run(tokens), run(changed)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert (np.abs(before - after).max(-1)[0, 12:] > 0.01).all()


def test_decoding_with_a_cache_equals_the_full_forward(kind: ModelConfig):
    assert_cached_equals_full(kind, ComputeConfig(), CLOSE)


def test_decoding_in_bfloat16_equals_the_full_forward():
    # The two ways round at other places: 8 bits, through four layers.
    assert_cached_equals_full(CONFIG, ComputeConfig(dtype="bfloat16"), 0.05)


def assert_cached_equals_full(config: ModelConfig, compute: ComputeConfig, close: float) -> None:
    """Prompts of unequal length are written together, then each row goes on from its own end, a token at a time.

    A window of some kinds ends within the prompt, and moves on while they decode.
    """
    params = tiny_params(config)
    length, lengths, slots = 20, np.array([9, 4, 1], np.int32), 24
    tokens, ends = tiny_tokens(config, 3, length), jnp.full(3, length)
    step = jax.jit(lambda *args: params(*args[:2], None, config, compute, cache=args[2], lengths=ends))
    full, _ = jax.jit(lambda tokens: params(tokens, counted(length, 3), None, config, compute))(tokens)
    cache = empty_cache(config, 3, slots, jnp.dtype(compute.dtype), compute.replicate)
    prompt = np.where(np.arange(lengths.max()) < lengths[:, None], tokens[:, : lengths.max()], 5)
    logits, cache = step(prompt, counted(lengths.max(), 3), cache)
    got = [[(i, logits[row, i]) for i in range(end)] for row, end in enumerate(lengths)]
    for i in range(length - lengths.max()):
        positions = (lengths + i)[:, None]
        logits, cache = step(np.take_along_axis(tokens, positions, 1), positions, cache)
        for row in range(3):
            got[row].append((lengths[row] + i, logits[row, 0]))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(compute.dtype)}
    for row, pairs in enumerate(got):
        for position, values in pairs:
            np.testing.assert_allclose(values, full[row, position], rtol=0, atol=close * np.abs(full).max())


def test_a_write_beyond_the_last_slot_is_dropped():
    cache = empty_cache(CONFIG, 2, 5, jnp.dtype("float32"), ())
    new = jnp.ones((2, 1, CONFIG.num_kv_heads, CONFIG.head_dim))
    cache, _ = cache.update(False, jnp.int32(1), new, 2 * new, jnp.array([[5], [4]]))
    expected = np.zeros(cache.full.k.shape, np.float32)
    expected[1, 1, :, 4] = 1
    np.testing.assert_array_equal(cache.full.k, expected)
    np.testing.assert_array_equal(cache.full.v, 2 * expected)


# Rematerialization --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_rematerialization_changes_neither_logits_nor_gradients(run_packed, remat: str):
    (logits, gradients), (reference, theirs) = (
        run_packed(ComputeConfig(remat=choice)) for choice in (remat, "elementwise")
    )
    assert_close(logits, reference)
    for path, values in named(theirs).items():
        assert_close(named(gradients)[path], values)


def kept_arrays(remat: str, dtype: str = "float32") -> dict[str, int]:
    """How many numbers of each dtype a layer keeps per token for the backward pass, parameters not counted."""
    rows, length = 5, 11
    params = jax.eval_shape(lambda: tiny_params(CONFIG))
    tokens = jnp.zeros((rows, length), jnp.int32)

    def pullback(params):
        compute = ComputeConfig(remat=remat, dtype=dtype, attention="blockwise")
        return jax.vjp(lambda p: p.hidden(tokens, counted(length, rows), None, CONFIG, compute)[0], params)[1]

    kept: dict[str, int] = {}
    for leaf in jax.tree.leaves(jax.eval_shape(pullback, params)):
        if leaf.shape[:2] == (CONFIG.num_layers, rows):
            kept[leaf.dtype.name] = kept.get(leaf.dtype.name, 0) + leaf.size // (CONFIG.num_layers * rows * length)
    return kept


def kept_numbers(remat: str) -> int:
    return sum(kept_arrays(remat).values())


def test_remat_layer_keeps_the_input_of_each_layer_only():
    assert kept_numbers("layer") == CONFIG.embed_dim


def test_remat_elementwise_keeps_products_and_attention_but_not_what_lies_between():
    q, kv = CONFIG.num_heads * CONFIG.head_dim, CONFIG.num_kv_heads * CONFIG.head_dim
    products = q + 2 * kv + CONFIG.embed_dim + 2 * CONFIG.mlp_dim  # q, k, v, o, gate, up; nobody reads down again
    attention = q + CONFIG.num_heads  # the output, and the sum of exponentials
    assert kept_numbers("elementwise") == CONFIG.embed_dim + products + attention
    assert kept_numbers("none") > kept_numbers("elementwise") + 2 * CONFIG.mlp_dim


@pytest.mark.parametrize("remat", ["layer", "elementwise"])
def test_what_cpus_keep_in_bfloat16_are_integers(remat: str, monkeypatch: pytest.MonkeyPatch):
    """XLA's CPU backend would convert all layers' arrays of 16-bit floats to float32 and back in every layer."""
    scores = CONFIG.num_heads if remat == "elementwise" else 0  # the sums of exponentials are float32 in any case
    expected = {"uint16": kept_numbers(remat) - scores} | ({"float32": scores} if scores else {})
    assert kept_arrays(remat, "bfloat16") == expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "uint16" not in kept_arrays(remat, "bfloat16")


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_gradients_in_bfloat16_are_those_without_integers(param_dtype: str, monkeypatch: pytest.MonkeyPatch):
    params = jax.tree.map(lambda x: x.astype(param_dtype), tiny_params(CONFIG))
    tokens, compute = jnp.asarray(tiny_tokens(CONFIG, 2, 20)), ComputeConfig(dtype="bfloat16", attention="blockwise")
    factors = jax.random.normal(jax.random.key(0), (2, 20, CONFIG.embed_dim))

    def gradients() -> dict[str, np.ndarray]:
        def loss(params: Decoder) -> jax.Array:
            x, _ = params.hidden(tokens, counted(20, 2), None, CONFIG, compute)
            return jnp.sum(x.astype(jnp.float32) * factors)

        found = jax.jit(jax.grad(loss))(params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {param_dtype}
        return {path: np.asarray(g, np.float32) for path, g in named(found).items()}

    ours = gradients()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for path, expected in gradients().items():
        np.testing.assert_allclose(ours[path], expected, rtol=0, atol=0.03 * np.abs(expected).max(), err_msg=path)


# Layers ---------------------------------------------------------------------------------


def layers_one_by_one(params: Decoder) -> list[Layer]:
    assert isinstance(params.layers, Layer)
    return [jax.tree.map(lambda x, i=i: x[i], params.layers) for i in range(CONFIG.num_layers)]


def hidden_states(config: ModelConfig) -> tuple[Decoder, jax.Array, dict]:
    params = tiny_params(config)
    x = params.embed_tokens(jnp.asarray(tiny_tokens(config, 2, 20)), config, ComputeConfig(), Context())
    inputs = {"positions": counted(20, 2), "segments": None, "lengths": None}
    return params, x, inputs | {"config": config, "compute": ComputeConfig(), "context": Context()}


def test_slices_of_the_layers_run_in_turn_give_what_all_layers_give(kind: ModelConfig):
    """A pipeline's stages: each knows the numbers of its layers, and with them which have the window."""
    params, x, inputs = hidden_states(kind)
    whole, _ = run_layers(params.layers, x, **inputs)
    for first, stop in ((0, 1), (1, 3), (3, kind.num_layers)):
        stage = jax.tree.map(lambda leaf, span=slice(first, stop): leaf[span], params.layers)
        x, _ = run_layers(stage, x, **inputs, first=first)
    assert_close(x, whole)


def test_unrolled_layers_give_what_stacked_ones_give_and_only_one_is_read_at_a_time(params: Decoder):
    _, x, inputs = hidden_states(CONFIG)
    held = []

    def read(index: int) -> Layer:
        assert all(each() is None for each in held)
        layer = jax.tree.map(lambda stack: stack[index], params.layers)
        held.append(weakref.ref(layer))
        return layer

    unrolled, _ = run_layers(map(read, range(CONFIG.num_layers)), x, **inputs)
    assert len(held) == CONFIG.num_layers
    stacked, _ = run_layers(params.layers, x, **inputs)
    assert_close(unrolled, stacked)


def test_segments_and_a_cache_together_are_refused(params: Decoder):
    _, x, inputs = hidden_states(CONFIG)
    cache = empty_cache(CONFIG, 2, 20, jnp.dtype("float32"), ())
    with pytest.raises(ValueError, match="have no segments"):
        run_layers(params.layers, x, **inputs | {"segments": jnp.ones((2, 20), jnp.int32)}, cache=cache)


def test_unrolled_layers_are_rematerialized_as_stacked_ones_are(params: Decoder):
    tokens = jnp.asarray(tiny_tokens(CONFIG, 2, 20))
    unrolled = dataclasses.replace(params, layers=tuple(layers_one_by_one(params)))

    def saved(params: Decoder, remat: str) -> int:
        """Elements that are saved for the backward pass, in all layers."""

        def pullback(params):
            compute = ComputeConfig(remat=remat)
            return jax.vjp(lambda p: p.hidden(tokens, counted(20, 2), None, CONFIG, compute)[0], params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback, params)))

    for remat in ("layer", "elementwise"):
        assert abs(saved(unrolled, remat) / saved(params, remat) - 1) < 0.01
    assert saved(unrolled, "none") > 1.2 * saved(unrolled, "layer")
