"""What a program would compute, read without running it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def largest_array(function: Callable, *args: Any) -> int:
    """How many elements the largest array has that a function computes, in loops and branches too."""
    return max(math.prod(shape) for shape in _shapes(jax.make_jaxpr(function)(*args).jaxpr))


def _shapes(jaxpr: core.Jaxpr) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars if hasattr(var.aval, "shape"))
        for inner in core.jaxprs_in_params(equation.params):
            yield from _shapes(inner)
