"""Plots the lengths of documents."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camelid.cli.data_view import bar_labels, source_label
from camelid.disk.atomic import write_atomically

COLORS = 10  # of matplotlib's default cycle


def draw_lengths(summary: Mapping[str, Any], path: Path) -> None:
    """Writes the histogram as a PNG, with the sources stacked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    edges, below = summary["histogram"]["edges"], [0] * (len(summary["histogram"]["edges"]) - 1)
    # The last bar may be wider, but is drawn like the others.
    width = edges[1] - edges[0]
    names = [source_label(n, source) for n, source in enumerate(summary["sources"], start=1)]
    counts_by_source = summary["histogram"]["documents"]
    if len(counts_by_source) > COLORS:
        names, counts_by_source = (
            [f"{len(counts_by_source)} sources"],
            [[sum(counts) for counts in zip(*counts_by_source, strict=True)]],
        )
    for name, counts in zip(names, counts_by_source, strict=True):
        plain = name.replace("$", r"\$")  # a $ starts a formula
        axes.bar(edges[:-1], counts, width, bottom=below, align="edge", label=plain)
        below = [low + count for low, count in zip(below, counts, strict=True)]
    labels = bar_labels(edges)
    if labels[-1].startswith("from"):
        axes.set_xticks([*edges[:-4:4], edges[-2]], [*(f"{edge:,}" for edge in edges[:-4:4]), labels[-1]])
    axes.set(xlabel="tokens", ylabel="documents", title="Lengths of documents")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())
