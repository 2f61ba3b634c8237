"""A real model, against numbers that transformers computed and llama2.c's own program confirmed (assets/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest

import camelid


@pytest.fixture(scope="module")
def model(stories: Path) -> camelid.Model:
    return camelid.load(stories)


@pytest.fixture(scope="module")
def reference(stories: Path) -> dict:
    return json.loads((stories.parent / "reference.json").read_text())


@pytest.mark.parametrize("prompt", range(3))
def test_logits_are_the_reference_logits(model: camelid.Model, stories: Path, prompt: int):
    arrays = np.load(stories.parent / "reference.npz")
    logits = model.logits(arrays[f"prompt{prompt}_ids"][None])
    # Both are float32, of scale 10; transformers' own are 1.5e-5 from float64.
    np.testing.assert_allclose(logits[0], arrays[f"prompt{prompt}_logits"], rtol=0, atol=1e-4)


def test_greedy_stories_are_the_reference_stories(model: camelid.Model, reference: dict):
    """64 tokens after each prompt, and 252 after the first, whose text llama2.c printed byte for byte."""
    long = reference["long_greedy"]
    new = long["total_tokens"] - len(reference["prompts"][0]["ids"])
    completions = model.generate([prompt["text"] for prompt in reference["prompts"]], max_new_tokens=new)
    for completion, prompt in zip(completions, reference["prompts"], strict=True):
        assert completion.tokens[:64] == prompt["greedy_ids"]
        assert completion.prompt == prompt["text"]
        assert completion.finish_reason == "length"
    assert reference["prompts"][0]["ids"] + completions[0].tokens == long["ids"]
    assert completions[0].prompt + completions[0].text == long["text"]
