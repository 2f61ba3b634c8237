"""Sampling settings and whole generations for tests."""

from collections.abc import Sequence
from typing import Any

from camelid.generate import sampling as module
from camelid.generate.config import GenerationConfig
from camelid.generate.decode import STEPS, Generation
from camelid.generate.sampling import Sampling


def sampling(temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, **others: Any) -> Sampling:
    """The settings of a configuration, for all rows."""
    return module.sampling(GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, **others))


def generated(
    params,
    prompts: Sequence[Sequence[int]],
    seeds,
    options: GenerationConfig,
    eos_ids,
    config,
    compute,
    mesh,
    steps=STEPS,
) -> list[list[int]]:
    """The new tokens of each completion."""
    generation = Generation(params, prompts, seeds, options, eos_ids, config, compute, mesh)
    rows: list[list[int]] = [[] for _ in generation.active]
    while generation.active.any():
        continued = generation.active.copy()
        new = generation.advance(steps)
        for row in continued.nonzero()[0]:
            rows[row] += new.tokens[row, : new.counts[row]].tolist()
    return rows
