"""Processors and filters of logits, compared with transformers' and with the formulas of those that it lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from camelid.generate.config import GenerationConfig
from camelid.generate.decode import _bias
from camelid.generate.sampling import Sampling, filter_logits, process
from generation import sampling

ROWS, VOCAB, PROMPT, LENGTH = 24, 19, 5, 14
ENDING = np.int32([2, 7])


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """From nearly flat rows to nearly certain ones."""
    spread = np.geomspace(0.1, 10, ROWS)[:, None]
    return (spread * np.random.default_rng(0).normal(size=(ROWS, VOCAB))).astype(np.float32)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Few different ids, so that sequences recur; and another one beyond the length of the rows."""
    recurring = np.random.default_rng(1).integers(0, 3, (ROWS, LENGTH))
    return np.pad(recurring, ((0, 0), (0, 2)), constant_values=9).astype(np.int32)


def processed(logits, tokens, options: Sampling, bias=None, lengths=LENGTH, prompt_lengths=PROMPT) -> np.ndarray:
    lengths, prompt_lengths = np.full(len(logits), lengths), np.full(len(logits), prompt_lengths)
    return np.asarray(_process(logits, options, tokens, lengths, prompt_lengths, bias, ENDING))


_process, _filter = jax.jit(process), jax.jit(filter_logits)


def theirs(processors: list, logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    history = torch.from_numpy(tokens[:, :LENGTH].astype(np.int64))
    return LogitsProcessorList(processors)(history, torch.from_numpy(logits.copy())).numpy()


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_repetition_penalty_equals_transformers(logits, tokens, penalty: float):
    ours = processed(logits, tokens, sampling(repetition_penalty=penalty))
    expected = theirs([RepetitionPenaltyLogitsProcessor(penalty)], logits, tokens)
    np.testing.assert_allclose(ours, expected, rtol=2e-7)  # XLA multiplies by the reciprocal


@pytest.mark.parametrize("size", [1, 2, 3, 4, 14, 15])
def test_no_repeated_ngrams_equals_transformers(logits, tokens, size: int):
    ours = processed(logits, tokens, sampling(no_repeat_ngram_size=size))
    np.testing.assert_array_equal(ours, theirs([NoRepeatNGramLogitsProcessor(size)], logits, tokens))
    assert np.isinf(ours).any() == (size < 14)


@pytest.mark.parametrize("minimum", [LENGTH - PROMPT, LENGTH - PROMPT + 1])
def test_minimum_of_new_tokens_equals_transformers(logits, tokens, minimum: int):
    their_processor = MinNewTokensLengthLogitsProcessor(PROMPT, minimum, ENDING.tolist())
    ours = processed(logits, tokens, sampling(max_new_tokens=20, min_new_tokens=minimum))
    np.testing.assert_array_equal(ours, theirs([their_processor], logits, tokens))


def test_presence_and_frequency_penalties_are_those_of_openais_formula(logits, tokens):
    """Of tokens that were generated; the prompt does not count."""
    ours = processed(logits, tokens, sampling(presence_penalty=0.6, frequency_penalty=-0.3))
    expected = logits.copy()
    for row in range(ROWS):
        for token in range(VOCAB):
            count = (tokens[row, PROMPT:LENGTH] == token).sum()
            expected[row, token] -= count * np.float32(-0.3) + (count > 0) * np.float32(0.6)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_bias_and_excluded_tokens(logits, tokens):
    options = GenerationConfig(logit_bias={3: 2.5, 4: -1.0}, suppress_tokens=(5, 6))
    bias = _bias(options, None, (), (), VOCAB)
    expected = theirs([SuppressTokensLogitsProcessor([5, 6])], logits, tokens)
    expected[:, 3] += np.float32(2.5)
    expected[:, 4] -= np.float32(1.0)
    np.testing.assert_array_equal(processed(logits, tokens, sampling(), bias), expected)


def test_only_allowed_tokens_and_those_that_end_a_row_remain():
    drawable = np.arange(VOCAB) != 4
    bias = _bias(GenerationConfig(allowed_tokens=(3, 4)), drawable, (2,), (2, 7), VOCAB)
    assert bias is not None
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(bias[0])), [2, 3, 7])


def test_all_processors_together_are_in_the_order_of_transformers(logits, tokens):
    options = sampling(max_new_tokens=20, repetition_penalty=1.4, no_repeat_ngram_size=3, min_new_tokens=12)
    bias = np.zeros((1, VOCAB), np.float32)
    bias[0, :4] = 3, -3, 1, -1
    expected = theirs(
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            NoRepeatNGramLogitsProcessor(3),
            MinNewTokensLengthLogitsProcessor(PROMPT, 12, ENDING.tolist()),
        ],
        logits + bias,
        tokens,
    )
    np.testing.assert_allclose(processed(logits, tokens, options, bias), expected, rtol=2e-7)


def test_each_row_has_its_own_settings_and_length(logits, tokens):
    """A row in a mixed batch is what it is where all rows have its settings."""
    each = [
        sampling(),
        sampling(repetition_penalty=1.5),
        sampling(presence_penalty=1.0),
        sampling(frequency_penalty=0.5),
        sampling(no_repeat_ngram_size=2),
        sampling(no_repeat_ngram_size=3),
        sampling(min_new_tokens=9),
    ]
    of_row = [each[row % len(each)] for row in range(ROWS)]
    mixed = jax.tree.map(lambda *x: np.concatenate(x), *of_row)
    lengths = PROMPT + np.arange(ROWS) % (LENGTH - PROMPT)
    prompt_lengths = np.full(ROWS, PROMPT)
    together = np.asarray(_process(logits, mixed, tokens, lengths, prompt_lengths, None, ENDING))
    for row, options in enumerate(of_row):
        alone = processed(logits[[row]], tokens[[row]], options, lengths=lengths[row])
        np.testing.assert_array_equal(together[row], alone[0])


FILTERS = {
    "min_p": ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
    "min_p of 1": ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    "typical_p": ({"typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
    "typical_p, nearly all": ({"typical_p": 0.99}, [TypicalLogitsWarper(0.99)]),
    "all": (
        {"temperature": 0.7, "top_k": 12, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.8},
        [
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.95),
            MinPLogitsWarper(0.02),
            TypicalLogitsWarper(0.8),
        ],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_transformers(logits, tokens, name: str):
    settings, their_filters = FILTERS[name]
    options = sampling(**{"temperature": 1.0} | settings)
    ours = _filter(jnp.asarray(logits) / options.temperature, options)
    np.testing.assert_allclose(ours, theirs(their_filters, logits, tokens), rtol=1e-6)


def test_filters_that_keep_everything_change_nothing(logits):
    """Also for a row whose probabilities add up to 1 before its last token, and beside rows that use the filters."""
    certain = np.concatenate([logits, np.where(np.arange(VOCAB) == 3, 40.0, logits[-1:])]).astype(np.float32)
    off, on = sampling(1.0, VOCAB, 1.0, typical_p=1.0), sampling(1.0, 3, 0.5, min_p=0.3, typical_p=0.5)
    np.testing.assert_array_equal(_filter(certain, off), certain)
    mixed = jax.tree.map(lambda *x: np.concatenate(x), *[on] * ROWS, off)
    np.testing.assert_array_equal(_filter(certain, mixed)[-1], certain[-1])


def test_what_no_row_uses_is_not_computed(logits, tokens):
    """Everything but the bias is in a branch of a conditional."""
    rows = np.full(ROWS, LENGTH)
    jaxpr = jax.make_jaxpr(process)(logits, sampling(), tokens, rows, rows, None, ENDING)
    outside = {equation.primitive.name for equation in jaxpr.jaxpr.eqns}
    assert "cond" in outside
    assert not outside & {"scatter", "scatter-add", "while", "gather", "exp", "div", "mul"}
