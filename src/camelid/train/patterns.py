"""Parameters chosen by patterns of their names.

The name of a parameter is its dotted path, `layers.attn.q_proj`, or in one layer `layers.3.attn.q_proj`. A pattern is a
part of a name between dots: `embed`, `attn`, `attn.q_proj`, `layers.3`. In a pattern, `*` stands for any characters
(`*_norm`), and `0-3` for the numbers from 0 to 3 (`layers.0-3.mlp`).
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from camelid.errors import UserError
from camelid.model.params import Spec
from camelid.model.pytree import path_name
from camelid.model.weights import Adapted


def specs_by_path(specs: Any) -> dict[str, Spec]:
    """The declared arrays of a tree by path; the factors of an adapter have paths of their own."""
    return {path_name(path): spec for path, spec in jax.tree.leaves_with_path(specs)}


def select(patterns: Iterable[str], specs: Any, field: str) -> dict[str, np.ndarray]:
    """Which parameters at least one of the patterns matches, by path: booleans of shape (), or of shape (layers,).

    Raises UserError, which names `field`, for a pattern that matches no parameter.
    """
    chosen = {path: np.zeros(_shape(spec), bool) for path, spec in specs_by_path(specs).items()}
    for pattern in patterns:
        found = {path: _matched(pattern, path, spec) for path, spec in specs_by_path(specs).items()}
        if not any(mask.any() for mask in found.values()):
            layers = max((spec.shape[0] for spec in specs_by_path(specs).values() if spec.stacked), default=0)
            known = "With [lora], only adapters are trained:" if _has_adapters(specs) else "The model has"
            plain = re.fullmatch(r"[\w.*-]*", pattern)
            kind = "" if plain else " Patterns are no regular expressions: docs/training.md describes them."
            raise UserError(
                f"{field}: {pattern!r} matches no parameter",
                f"{known} {', '.join(found)}; its layers are layers.0 to layers.{layers - 1}.{kind}",
            )
        chosen = {path: mask | found[path] for path, mask in chosen.items()}
    return chosen


def _has_adapters(specs: Any) -> bool:
    return any(isinstance(leaf, Adapted) for leaf in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, Adapted)))


def per_layer(values: np.ndarray, array: Any) -> np.ndarray:
    """`values`, of shape () or (layers,), in a shape that broadcasts to `array`, whose first axis is the layers."""
    return values.reshape(*values.shape, *[1] * (array.ndim - values.ndim))


def _shape(spec: Spec) -> tuple[int, ...]:
    return spec.shape[: len(spec.stacked)]


def _matched(pattern: str, path: str, spec: Spec) -> np.ndarray:
    if not spec.stacked or matches_name(pattern, path):
        return np.full(_shape(spec), matches_name(pattern, path))
    first, rest = path.split(".", 1)
    return np.array([matches_name(pattern, f"{first}.{number}.{rest}") for number in range(spec.shape[0])])


def matches_name(pattern: str, name: str) -> bool:
    """Whether a pattern matches a part of a name between dots."""
    words, parts = pattern.split("."), name.split(".")
    windows = (parts[start : start + len(words)] for start in range(len(parts) - len(words) + 1))
    return any(all(map(_word_matches, words, window)) for window in windows)


def _word_matches(word: str, part: str) -> bool:
    if numbers := re.fullmatch(r"(\d+)-(\d+)", word):
        return part.isdigit() and int(numbers[1]) <= int(part) <= int(numbers[2])
    return fnmatchcase(part, word)
