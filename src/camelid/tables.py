"""Tables in a terminal."""

import os
import sys

from rich.console import Console
from rich.table import Table

WIDTH = 120
"""Columns of a line if standard output is not a terminal."""


def console() -> Console:
    """A console on standard output that prints text as it is."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, markup=False, width=None if has_width else WIDTH)


def grid(*columns: str) -> Table:
    """A table without lines; columns whose title begins with ">" are right-aligned."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table
