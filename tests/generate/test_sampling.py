"""The selection of the next token, compared with NumPy, transformers and the distributions that draws must follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from camelid.generate.sampling import Sampling, filter_logits, select
from generation import sampling

ROWS, VOCAB = 40, 61


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """From nearly flat rows to nearly certain ones."""
    spread = np.geomspace(0.1, 10, ROWS)[:, None]
    return (spread * np.random.default_rng(0).normal(size=(ROWS, VOCAB))).astype(np.float32)


def kept_in_numpy(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Which tokens of one row may be drawn, as the definition says, best first."""
    allowed, probability_before = [], 0.0
    best_first = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp(logits[best_first].astype(np.float64) / temperature)
    for token, probability in zip(best_first, weights / weights.sum(), strict=True):
        if top_p is None or probability_before < top_p:
            allowed.append(token)
        probability_before += probability
    return np.isin(np.arange(len(logits)), allowed)


KEEP = [(1.0, None, None), (1.0, 5, None), (1.0, VOCAB + 9, None), (1.0, None, 0.7), (0.5, 7, 0.9), (2.5, 20, 0.35)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), KEEP)
def test_kept_tokens_are_those_of_the_definition(logits, temperature: float, top_k: int | None, top_p: float | None):
    """Temperature first, then top-k, then top-p among what is left; the token that crosses top-p is kept."""
    scaled = jnp.asarray(logits) / jnp.float32(temperature)
    options = sampling(temperature, top_k, top_p)
    kept = filter_logits(scaled, options)
    expected = np.stack([kept_in_numpy(row, temperature, top_k, top_p) for row in logits])
    np.testing.assert_array_equal(np.isfinite(kept), expected)
    np.testing.assert_array_equal(kept, np.where(expected, scaled, -np.inf))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), KEEP[1:])
def test_kept_tokens_are_those_of_transformers(logits, temperature: float, top_k: int | None, top_p: float | None):
    theirs = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits))
    theirs = theirs if top_k is None else TopKLogitsWarper(top_k)(None, theirs)
    theirs = theirs if top_p is None else TopPLogitsWarper(top_p)(None, theirs)
    options = sampling(temperature, top_k, top_p)
    ours = filter_logits(jnp.asarray(logits) / options.temperature, options)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5, 20, VOCAB - 1])
def test_top_k_without_sorting_keeps_what_sorting_keeps(logits, k: int):
    """With ties, which are all kept, and with excluded tokens, zeros of both signs and rows of one value."""
    rows = np.concatenate([logits, np.round(logits), np.where(logits > 0, logits, -np.inf), np.zeros((2, VOCAB))])
    rows = np.concatenate([rows, np.where(np.arange(VOCAB) % 2, 0.0, -0.0)[None]]).astype(np.float32)
    threshold = np.sort(rows, -1)[:, [-k]]
    expected = np.where(rows < threshold, -np.inf, rows)
    ours = filter_logits(jnp.asarray(rows), sampling(top_k=k))
    np.testing.assert_array_equal(ours, expected)


def test_no_filter_sorts(logits):
    """Sorting a vocabulary of 128,256 takes several times as long as searching a threshold."""
    assert "sort" not in str(jax.make_jaxpr(filter_logits)(jnp.asarray(logits), sampling(1.0, 5, 0.9, typical_p=0.5)))


def test_the_best_token_is_always_kept(logits):
    kept = filter_logits(jnp.asarray(logits), sampling(top_p=1e-6))
    np.testing.assert_array_equal(np.isfinite(kept).sum(-1), np.ones(ROWS))
    np.testing.assert_array_equal(np.argmax(kept, -1), logits.argmax(-1))


def test_top_p_of_one_keeps_every_token():
    """Of a large vocabulary too, whose probabilities add up to a bit more than 1 in float32."""
    options = sampling(1.0, None, 1.0)
    for seed in range(8):
        logits = jax.random.normal(jax.random.key(seed), (4, 32000))
        assert np.isfinite(filter_logits(logits, options)).all()


def drawn(logits: np.ndarray, seeds, step: int, options: Sampling) -> np.ndarray:
    """A draw from one row's distribution for each seed."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(seeds), len(logits)))
    return np.asarray(jax.jit(select)(rows, options, jnp.asarray(seeds, jnp.uint32), jnp.full(len(seeds), step)))


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Squared standard errors a degree of freedom: near 1 where `counts` follow `probabilities`."""
    expected = counts.sum() * probabilities
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(((counts - expected) ** 2 / expected).sum() / (len(counts) - 1))


DRAWS = 20_000
LOGITS = np.float32([0.0, 1.0, 2.0, 0.5, -1.0, 1.5, -0.5])


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (0.5, 5, None), (2.0, 6, 0.8)])
def test_draws_follow_the_distribution(temperature: float, top_k: int | None, top_p: float | None):
    """Over seeds at one step, and over steps with one seed."""
    weights = np.exp(LOGITS / temperature) * kept_in_numpy(LOGITS, temperature, top_k, top_p)
    options = sampling(temperature, top_k, top_p)
    over_seeds = drawn(LOGITS, np.arange(DRAWS), 0, options)
    one_row = jnp.asarray(LOGITS)[None]
    steps = jax.jit(jax.vmap(lambda step: select(one_row, options, jnp.uint32([3]), step[None])[0]))
    for draws in (over_seeds, np.asarray(steps(jnp.arange(DRAWS)))):
        # For 3 to 6 degrees of freedom, 5 a degree is passed by chance once in a thousand; seeds are fixed.
        assert chi_square(np.bincount(draws, minlength=len(LOGITS)), weights / weights.sum()) < 5


def test_one_draw_says_nothing_about_the_next_step_or_the_next_seed():
    options, size = sampling(1.0, None, None), len(LOGITS)
    own = np.exp(LOGITS) / np.exp(LOGITS).sum()
    first, next_step = (drawn(LOGITS, np.arange(DRAWS), step, options) for step in (0, 1))
    for second in (next_step, np.roll(first, 1)):
        pairs = np.bincount(first * size + second, minlength=size**2)
        assert chi_square(pairs, np.outer(own, own).ravel()) < 2  # 48 degrees of freedom


def test_a_rows_draws_depend_on_its_seed_and_step_alone(logits):
    options = sampling(1.3, 20, 0.95)
    seeds = jnp.arange(ROWS, dtype=jnp.uint32) + 7
    together = select(jnp.asarray(logits), options, seeds, jnp.full(ROWS, 4))
    others = np.random.default_rng(1).permutation(ROWS)[:13]
    np.testing.assert_array_equal(
        select(jnp.asarray(logits[others]), options, seeds[others], jnp.full(13, 4)), together[others]
    )


def test_temperature_zero_is_greedy(logits):
    options = sampling(0.0, 5, 0.5)
    chosen = select(jnp.asarray(logits), options, jnp.zeros(ROWS, jnp.uint32), jnp.zeros(ROWS, jnp.int32))
    np.testing.assert_array_equal(chosen, logits.argmax(-1))


def test_each_row_has_its_own_settings(logits):
    """A row's token in a mixed batch is the one that it gets where all rows have its settings."""
    settings = [(0.0, None, None), *KEEP, (0.7, None, None)]
    each = [sampling(*settings[row % len(settings)]) for row in range(ROWS)]
    mixed = jax.tree.map(lambda *x: np.concatenate(x), *each)
    seeds, steps = jnp.arange(ROWS, dtype=jnp.uint32), jnp.arange(ROWS) % 5
    together = select(jnp.asarray(logits), mixed, seeds, steps)
    for row, options in enumerate(each):
        assert select(jnp.asarray(logits), options, seeds, steps)[row] == together[row]


def test_programs_do_not_depend_on_the_settings(logits):
    run = jax.jit(lambda *args: select(*args))
    for options in (sampling(0.0, None, None), sampling(1.0, 5, None), sampling(0.5, None, 0.9)):
        run(jnp.asarray(logits), options, jnp.zeros(ROWS, jnp.uint32), jnp.zeros(ROWS, jnp.int32))
    assert run._cache_size() == 1


def test_greedy_rows_neither_sort_nor_draw(logits):
    """What is only needed for rows that draw is in a branch of a conditional."""
    jaxpr = jax.make_jaxpr(select)(
        jnp.asarray(logits), sampling(0.0, None, None), jnp.zeros(ROWS, jnp.uint32), jnp.zeros(ROWS, jnp.int32)
    )
    outside = {equation.primitive.name for equation in jaxpr.jaxpr.eqns}
    assert "cond" in outside
    assert not outside & {"sort", "cumsum", "random_bits", "exp"}
