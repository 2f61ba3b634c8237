"""Shows the statistics of data/report.py in a terminal."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from camelid import tables
from camelid.cli.data_text import escaped, print_legend, print_row
from camelid.disk.space import format_bytes

BAR = 50  # characters of the longest bar
LABEL = 20  # characters of the name of a source in tables
FILES = 5  # files of a source that are named
NAME, SOURCES = 16, 60  # characters of the name and of the files of a store in the cache


def show_prepared(summary: Mapping[str, Any]) -> None:
    """Prints the result of `data prepare`."""
    console = tables.console()
    console.print(_counts(summary))
    if (speed := summary["tokens_per_second"]) is None:
        console.print("\nThe store exists already, with the same sources and options.")
    else:
        console.print(f"\n{summary['seconds']:.1f} s, {speed:,.0f} tokens/s")
    if (counted := summary["mindformers"]) is not None:
        message = f"\nMindFormers' masking excludes {counted['lost']:,} of {counted['conversations']:,} conversations"
        refused = f"; it cannot read {counted['refused']:,} more" if counted["refused"] else ""
        console.print(f"{message} at {counted['sequence_length']:,} tokens{refused}")


def show(summary: Mapping[str, Any]) -> None:
    """Prints the result of `data inspect`."""
    console = tables.console()
    if "rows" in summary:
        for line in (
            *_names(summary),
            "",
            _sources(summary),
            "",
            _packing(summary),
            *_lost(summary),
            *_silent(summary),
            "",
        ):
            console.print(line, soft_wrap=isinstance(line, str))
        for stage in _stages(summary):
            console.print(stage)
            console.print()
    else:
        console.print(_counts(summary["sources"][0]))
        console.print()
    console.print(_lengths(summary))
    for row in summary["shown"]:
        console.print()
        source = source_label(row["source"] + 1, summary["sources"][row["source"]]) if "row" in row else None
        print_row(console, row, source)
    if summary["shown"]:
        console.print()
        print_legend(console, summary["sources"])


def show_cache(summary: Mapping[str, Any]) -> None:
    """Prints the result of `data cache`."""
    console, removed = tables.console(), "removed" in summary
    entries = summary["removed" if removed else "entries"]
    size = sum(entry["bytes"] for entry in entries)
    console.print(
        f"{summary['folder']}: {'removed ' if removed else ''}{len(entries):,}, {format_bytes(size)}", soft_wrap=True
    )
    if entries:
        grid = tables.grid("name", ">size", "last used", "sources")
        for entry in entries:
            state = ", in use" if entry.get("in_use") else ""
            about = _shortened(", ".join(map(escaped, entry["sources"])), SOURCES) or entry["kind"]
            grid.add_row(escaped(entry["name"][:NAME]), format_bytes(entry["bytes"]), entry["used"][:10] + state, about)
        console.print(grid)
    if summary.get("kept"):
        names = ", ".join(escaped(entry["name"][:NAME]) for entry in summary["kept"])
        console.print(f"kept, because in use or not permitted to be removed: {names}", soft_wrap=True)


# Tables ---------------------------------------------------------------------------------


def _counts(source: Mapping[str, Any]) -> Table:
    """The counts of one store."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row("store", f"{source['store']}  ({format_bytes(source['bytes'])})")
    if source["files"]:
        grid.add_row("from", _shortened(", ".join(source["files"]), 100))
    grid.add_row("documents", _documents(source))
    grid.add_row("tokens", f"{source['tokens']:,}; {source['with_loss']:,} with loss ({_share_of_loss(source)})")
    if any(weight not in (0, 1) for weight in source["weights"]):
        grid.add_row("weights", " ".join(f"{weight:g}" for weight in source["weights"]))
    if (silent := source["documents_without_loss"])["count"]:
        grid.add_row("without loss", f"{_count(silent['count'], 'document')}: {_first(silent)}")
    if (held_out := source["held_out"]) is not None:
        grid.add_row("held out", f"{_count(held_out['documents'], 'document')}, {_count(held_out['tokens'], 'token')}")
    if source["unreadable"]:
        grid.add_row("unreadable", f"{source['unreadable']:,} of {source['rows_read']:,} records")
        for problem in source["problems"]:
            grid.add_row("", escaped(problem))
    return grid


def _documents(source: Mapping[str, Any]) -> str:
    lengths = source["lengths"]
    text = f"{lengths['shortest']:,} to {lengths['longest']:,} tokens, median {lengths['median']:,}"
    if lengths["shortest"] == lengths["longest"]:
        text = _count(lengths["longest"], "token")
    empty = f"; {_count(source['empty'], 'record')} without text" if source["empty"] else ""
    if source["documents"] == 1:
        return f"1 document, {text}{empty}"
    return f"{source['documents']:,} of {text}{empty}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _share_of_loss(source: Mapping[str, Any]) -> str:
    return f"{source['with_loss'] / source['tokens']:.1%}"


def _first(found: Mapping[str, Any]) -> str:
    more = ", ..." if found["count"] > len(found["first"]) else ""
    return ", ".join(f"{number:,}" for number in found["first"]) + more


def _numbered(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The sources of training and validation, with their labels."""
    train = [(source_label(n, source), source) for n, source in enumerate(summary["sources"], start=1)]
    stores = [source["store"] for source in summary["sources"]]
    validation = []
    for n, source in enumerate(summary.get("validation", ()), start=1):
        of = str(Path(source["store"]).parent)
        validation.append(
            (f"{stores.index(of) + 1} held out" if of in stores else source_label(f"v{n}", source), source)
        )
    return [*train, *validation]


def source_label(number: int | str, source: Mapping[str, Any]) -> str:
    """The number of a source, and its name, shortened to fit in tables; _names shows it in full."""
    first, *others = _full_names(source)
    name, more = Path(first).name, f" and {len(others):,} more" if others else ""
    room = LABEL - len(more)
    return f"{number} {name if len(name) <= room else f'{name[: room - 3]}...'}{more}"


def _full_names(source: Mapping[str, Any]) -> Sequence[str]:
    """The files of a source, or its store."""
    return source["files"] if source["name"] == ", ".join(source["files"]) else [source["name"]]


def _names(summary: Mapping[str, Any]) -> Iterator[str]:
    """The files of each source, and the store that it was prepared into."""
    stores = {source["store"] for source in summary["sources"]}
    for label, source in _numbered(summary):
        if str(Path(source["store"]).parent) in stores:
            continue  # held out from a source that is listed
        number, files = label.split()[0], _full_names(source)
        more = f" and {len(files) - FILES:,} more" if len(files) > FILES else ""
        what = "source" if number.isdigit() else "validation"
        yield f"{what} {number}: {', '.join(map(escaped, files[:FILES]))}{more}"
        for part in source["made_of"] if len(source["made_of"]) > 1 else ():
            template = f", template {escaped(part['template'])}" if part["template"] else ""
            yield f"  {', '.join(map(escaped, part['files']))}: {part['kind']}{template}"
        if source["store"] != source["name"]:
            yield f"  prepared in {escaped(source['store'])}"


def _sources(summary: Mapping[str, Any]) -> Table:
    named = _numbered(summary)
    unreadable = [">unreadable"] if any(source["unreadable"] for _, source in named) else []
    grid = tables.grid("source", ">documents", ">tokens", ">with loss", ">median", ">longest", *unreadable)
    for label, source in named:
        grid.add_row(
            label,
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            _share_of_loss(source),
            f"{source['lengths']['median']:,}",
            f"{source['lengths']['longest']:,}",
            *(f"{source['unreadable']:,}" for _ in unreadable),
        )
    return grid


def _packing(summary: Mapping[str, Any]) -> Table:
    method = summary["sources"][0]["packing"]
    title = f"{method['method']}, rows of {method['sequence_length']:,}"
    grid = tables.grid(title, ">rows", ">filled", ">split", ">truncated", ">dropped", ">no loss")
    for label, source in _numbered(summary):
        packing = source["packing"]
        grid.add_row(
            label,
            f"{packing['rows']:,}",
            f"{packing['filled']:.1%}",
            *(f"{packing[name]:,}" for name in ("split", "truncated", "dropped")),
            f"{packing['rows_without_loss']['count']:,}",
        )
    return grid


def _lost(summary: Mapping[str, Any]) -> Iterator[str]:
    for label, source in _numbered(summary):
        if lost := source["packing"]["lost"]:
            share = lost / source["tokens"]
            yield f"tokens truncated or dropped of source {label}: {lost:,} of {source['tokens']:,} ({share:.1%})"


def _silent(summary: Mapping[str, Any]) -> Iterator[str]:
    for label, source in _numbered(summary):
        if (silent := source["packing"]["rows_without_loss"])["count"]:
            yield f"rows without loss of source {label}: {_first(silent)}"


def _stages(summary: Mapping[str, Any]) -> list[Table]:
    """The shares of the tokens in each stage, and how often sources are read."""
    shown = []
    for stage in summary["stages"]:
        last = stage["first_step"] + stage["steps"]
        title = (
            f"steps {stage['first_step']:,} to {last:,}"
            if stage["steps"]
            else f"from step {stage['first_step']:,}: not reached"
        )
        grid = tables.grid(title, ">requested", ">actual", ">rows", ">repeats")
        for n, source in enumerate(summary["sources"]):
            grid.add_row(
                source_label(n + 1, source),
                f"{stage['asked'][n]:.2%}",
                f"{stage['given'][n]:.2%}",
                f"{stage['rows'][n]:,}",
                f"{stage['repeats'][n]:.2f}",
            )
        shown.append(grid)
    if len(shown) > 1:
        grid = tables.grid(f"all {summary['steps']:,} steps", ">repeats")
        for n, repeats in enumerate(summary["repeats"]):
            grid.add_row(source_label(n + 1, summary["sources"][n]), f"{repeats:.2f}")
        shown.append(grid)
    return shown


def _lengths(summary: Mapping[str, Any]) -> Table:
    """A histogram of the lengths of documents, over all sources."""
    counts = [sum(each) for each in zip(*summary["histogram"]["documents"], strict=True)]
    grid = tables.grid(">tokens", ">documents", "")
    for label, count in zip(bar_labels(summary["histogram"]["edges"]), counts, strict=True):
        # A bar that is not empty is visible.
        bar = max(round(BAR * count / max(counts)), 1 if count else 0)
        grid.add_row(label, f"{count:,}", Text("█" * bar, "green"))
    return grid


def bar_labels(edges: Sequence[int]) -> list[str]:
    """Returns the range of lengths of each bar of a histogram."""
    width = edges[1] - edges[0]

    def of_bar(first: int, after: int) -> str:
        if after - first > width:
            return f"from {first:,}"
        return f"{first:,}" if after - first == 1 else f"{first:,} to {after - 1:,}"

    return [of_bar(first, after) for first, after in itertools.pairwise(edges)]


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
