"""Perplexity against numpy on transformers' logits, and on a real model."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import camelid
from camelid.errors import UserError
from camelid.evaluate import perplexity as module
from camelid.evaluate.perplexity import perplexity, windows
from camelid.model.config import ComputeConfig
from camelid.parallel.mesh import one_device
from tiny import tiny_config, tiny_params, tiny_tokens, transformers_twin

CONFIG = tiny_config()


@pytest.mark.parametrize("count", [2, 8, 9, 10, 17, 30])
def test_each_token_but_the_first_is_a_target_once(count: int):
    tokens = np.arange(100, 100 + count)
    rows = windows(tokens, 8)
    assert {x.shape for x in rows.values()} == {(math.ceil((count - 1) / 8), 8)}
    counted = rows["weights"] > 0
    np.testing.assert_array_equal(rows["targets"][counted], tokens[1:])
    np.testing.assert_array_equal(rows["tokens"][counted], tokens[:-1])


def test_perplexity_is_the_plain_computation(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4)  # two batches, the second not full
    params = tiny_params(CONFIG)
    twin = transformers_twin(CONFIG, params)
    tokens = tiny_tokens(CONFIG, 1, 60)[0]
    losses = []
    for start in range(0, 59, 11):
        window = torch.from_numpy(tokens[start : start + 12].astype(np.int64))
        logits = twin(window[None, :-1]).logits[0].detach().double().numpy()
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-log_probabilities[i, target] for i, target in enumerate(window[1:])]
    heard = []
    result = perplexity(
        params, tokens, 200, 11, CONFIG, ComputeConfig(), one_device(), progress=lambda *done: heard.append(done)
    )
    assert result.tokens == len(losses) == 59
    # Sums of float32 losses.
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(np.sum(losses) / np.log(2) / 200, rel=1e-6)
    assert heard == [(4, 6), (6, 6)]


def test_perplexity_of_a_real_model_on_wikitext(stories: Path, assets: Path):
    """200.11 for the first 100,000 tokens of the test text, without BOS, its `<unk>` as text, in windows of 256."""
    model = camelid.load(stories)
    text = (assets / "data" / "wikitext-2" / "test.txt").read_text("utf-8")
    tokens = np.array(model.tokenizer.encode(text[:400_000], bos=False)[:100_000], np.int32)
    assert len(tokens) == 100_000
    result = perplexity(model.params, tokens, 1, 256, model.config, model.compute, model.mesh)
    assert result.tokens == 99_999
    assert result.perplexity == pytest.approx(200.11, abs=0.005)


@pytest.mark.parametrize(
    ("tokens", "length", "message"),
    [
        ([5], 8, "the text has 1 token\n"),
        ([], 8, "the text has no token\n"),
        ([5, 6], 65, "sequence length 65 does not fit the context of 64"),
        ([5, 6], 0, "sequence length 0"),
        ([5, 97], 8, "the text has token 97, and the vocabulary has 97"),
    ],
)
def test_what_cannot_be_scored_is_refused(tokens: list[int], length: int, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        perplexity(tiny_params(CONFIG), np.int32(tokens), 2, length, CONFIG, ComputeConfig(), one_device())
