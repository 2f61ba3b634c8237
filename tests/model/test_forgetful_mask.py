"""Forgetful causal masking: which keys are hidden, and that attention then gives what transformers gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.model.context import Context
from camelid.model.kernels import choose_kernel
from camelid.model.mask import forgetful_mask
from model.test_attention import on_device as on_device  # a fixture
from tiny import tiny_config, tiny_params, tiny_tokens, transformers_twin

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config(num_layers=2)
ROWS, LENGTH = 4, 24
TOKENS = tiny_tokens(CONFIG, ROWS, LENGTH)


def training(rows=None, low: float = 0.3, high: float = 0.6, seed: int = 0) -> Context:
    rows = jnp.arange(ROWS) if rows is None else rows
    return Context("training", forgetful_ratios=(low, high), dropout_key=jax.random.key(seed), rows=rows)


def visible(context: Context, segments: np.ndarray | None = None, length: int = LENGTH) -> np.ndarray:
    assert context.rows is not None
    found = forgetful_mask(context, None if segments is None else jnp.asarray(segments), len(context.rows), length)
    assert found is not None
    return np.asarray(found)


@functools.partial(jax.jit, static_argnames=("compute", "config"))
def hidden(params, tokens, segments, context, compute=ComputeConfig(), config=CONFIG):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return params.hidden(jnp.asarray(tokens), positions, segments, config, compute, context=context)[0]


@pytest.mark.parametrize("kernel", ["dense", "blockwise"])
def test_a_model_sees_what_transformers_sees_with_the_same_mask(kernel: str):
    params, seen = tiny_params(CONFIG), visible(training())
    compute = ComputeConfig(attention=kernel)
    ours = params.logits(hidden(params, TOKENS, None, training(), compute), CONFIG, compute)
    mask = np.tri(LENGTH, dtype=bool) & seen[:, None, :]
    assert mask.any(-1).all()
    additive = torch.from_numpy(np.where(mask, 0.0, np.finfo(np.float32).min).astype(np.float32))[:, None]
    theirs = transformers_twin(CONFIG, params)(torch.from_numpy(TOKENS).long(), attention_mask=additive).logits
    reference = theirs.detach().numpy()
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
    plain = params.logits(hidden(params, TOKENS, None, Context(), compute), CONFIG, compute)
    assert np.abs(ours - plain).max() > 0.1 * np.abs(reference).max(), "nothing is hidden"


def test_each_row_draws_a_ratio_between_the_two_and_hides_that_fraction_of_its_tokens():
    length = 4000
    hides = 1 - visible(training(jnp.arange(40)), length=length).mean(1)
    error = 4.5 * np.sqrt(0.25 / length)
    assert 0.3 - error < hides.min() < 0.37
    assert 0.53 < hides.max() < 0.6 + error
    assert abs(hides.mean() - 0.45) < 4.5 * 0.3 / np.sqrt(12 * 40)
    fixed = 1 - visible(training(jnp.arange(40), 0.2, 0.2), length=length).mean(1)
    assert np.abs(fixed - 0.2).max() < 4.5 * np.sqrt(0.2 * 0.8 / length)


def test_the_first_token_of_a_document_is_never_hidden():
    segments = np.repeat([[1, 1, 1, 2, 2, 3, 3, 3, 3, 0]], 400, 0)
    seen = visible(training(jnp.arange(400), 0.9, 0.95), segments, 10)
    assert seen[:, [0, 3, 5, 9]].all()
    others = np.delete(seen, [0, 3, 5, 9], 1).mean(0)
    assert ((others > 0.01) & (others < 0.2)).all()
    alone = visible(training(jnp.arange(400), 0.9, 0.95), None, 10)
    assert alone[:, 0].all()
    assert alone[:, 1:].mean() < 0.2


def test_rows_are_known_by_their_numbers_and_steps_by_their_keys():
    all_rows = visible(training())
    np.testing.assert_array_equal(visible(training(jnp.asarray([3, 1]))), all_rows[[3, 1]])
    assert (visible(training(seed=1)) != all_rows).any(1).all()
    assert len({row.tobytes() for row in all_rows}) == ROWS


def test_without_a_ratio_or_a_key_nothing_is_drawn():
    assert forgetful_mask(training(low=0.0, high=0.0), None, ROWS, LENGTH) is None
    assert forgetful_mask(Context(forgetful_ratios=(0.0, 0.5)), None, ROWS, LENGTH) is None


def test_a_window_that_may_hide_every_key_is_refused():
    config = tiny_config(num_layers=2, sliding_window=8)
    with pytest.raises(UserError, match="does not fit a model with a sliding window") as refusal:
        hidden(tiny_params(config), TOKENS, None, training(), config=config)
    assert "dropout.forgetful_max_ratio" in refusal.value.advice


@pytest.mark.parametrize(("platform", "kernel"), [("gpu", "cudnn"), ("tpu", "splash")])
def test_kernels_that_cannot_hide_keys_are_refused(on_device, platform: str, kernel: str):
    on_device(platform, "NVIDIA H200", "9.0")

    def chosen(requested: str, keys_hidden: bool) -> str:
        shapes = ("bfloat16", 512, 128)
        return choose_kernel(requested, *shapes, own_keys=True, cap=None, dropout=0.0, keys_hidden=keys_hidden)

    assert chosen("auto", False) == kernel
    with pytest.raises(
        UserError, match=f"'{kernel}' cannot be used: .* no forgetful mask; this run has .* a forgetful"
    ):
        chosen(kernel, True)
    with pytest.warns(UserWarning, match="slower blockwise kernel: .* a forgetful mask"):
        assert chosen("auto", True) == "blockwise"
