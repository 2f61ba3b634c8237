"""A fault that somebody could write, and the test that must notice it: the tests of the tests (CONTRIBUTING.md)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    """below src/camelid"""
    text: str
    """stands there exactly once"""
    instead: str
    test: str
    """below tests; it passes without the fault and fails with it"""
