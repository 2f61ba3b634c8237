"""That the faults can still be planted; `python tests/mutations/run.py` plants them all and runs their tests."""

import ast
from functools import cache
from pathlib import Path

import pytest

from mutations.fault import Fault
from mutations.run import FAULTS, notice, planted

TESTS = Path(__file__).parents[1]


def by_name(fault: Fault) -> str:
    return fault.name


@cache
def names_of_tests(file: str) -> set[str]:
    """The names of the tests in a file."""
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", FAULTS, ids=by_name)
def test_a_fault_finds_its_text_and_its_test(fault: Fault):
    ast.parse(planted(fault))
    file, name = fault.test.partition("[")[0].split("::")
    assert name in names_of_tests(file)


def test_a_planted_fault_is_noticed():
    """A cheap one; the whole list takes minutes."""
    (fault,) = (
        fault for fault in FAULTS if fault.name == "blockwise: the backward pass forgets that weights add up to 1"
    )
    assert notice(fault) is not None
