"""How data looks in a terminal, and as a picture; what is told comes from data/report.py.

Beside the command and not beside the facts: data/ is numpy alone, and describe.py needs the checkpoints' code.
"""

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from camelid.checkpoint.folder import in_units
from camelid.disk.atomic import write_atomically
from camelid.tables import console as _console
from camelid.tables import grid as _grid

BAR = 50  # characters of the longest bar
COLOURS = 10  # that matplotlib has
LABEL = 20  # characters of a source's name in tables
FILES = 5  # of a source, that are named
NAME, SOURCES = 16, 60  # characters of the name and of the files of a store in the cache

LEARNT, SPECIAL, RULE = "bold green", "cyan", "dim"
MARKS = "⟦⟧⟨⟩"
"""around what is learnt, and around specials, where there is no colour; in the text itself they are escaped"""


def show_prepared(whole: Mapping[str, Any]) -> None:
    """What `data prepare` has made."""
    console = _console()
    console.print(_counts(whole))
    if (speed := whole["tokens_per_second"]) is None:
        console.print("\nIt was there already, of these sources and options.")
    else:
        console.print(f"\n{whole['seconds']:.1f} s, {speed:,.0f} tokens a second")
    if (counted := whole["mindformers"]) is not None:
        told = f"\nMindFormers' masking gives up {counted['lost']:,} of {counted['conversations']:,} conversations"
        refused = f"; {counted['refused']:,} more it cannot read" if counted["refused"] else ""
        console.print(f"{told} at {counted['sequence_length']:,} tokens{refused}")


def show(whole: Mapping[str, Any]) -> None:
    """What `data inspect` has found."""
    console = _console()
    if "rows" in whole:
        for line in (*_names(whole), "", _sources(whole), "", _packing(whole), *_lost(whole), *_silent(whole), ""):
            console.print(line, soft_wrap=isinstance(line, str))
        for stage in _stages(whole):
            console.print(stage)
            console.print()
    else:
        console.print(_counts(whole["sources"][0]))
        console.print()
    console.print(_lengths(whole))
    for row in whole["shown"]:
        console.print()
        _show_row(console, row, whole)
    if whole["shown"]:
        console.print()
        console.print(_legend(_has_colour(console), whole["sources"]))


def show_cache(whole: Mapping[str, Any]) -> None:
    """What `data cache` has found, or removed."""
    console, removed = _console(), "removed" in whole
    entries = whole["removed" if removed else "entries"]
    size = sum(entry["bytes"] for entry in entries)
    console.print(
        f"{whole['folder']}: {'removed ' if removed else ''}{len(entries):,}, {in_units(size)}", soft_wrap=True
    )
    if entries:
        grid = _grid("name", ">size", "last used", "sources")
        for entry in entries:
            state = ", in use" if entry.get("in_use") else ""
            about = _shortened(", ".join(map(_escaped, entry["sources"])), SOURCES) or entry["kind"]
            grid.add_row(_escaped(entry["name"][:NAME]), in_units(entry["bytes"]), entry["used"][:10] + state, about)
        console.print(grid)
    if whole.get("kept"):
        names = ", ".join(_escaped(entry["name"][:NAME]) for entry in whole["kept"])
        console.print(f"kept, in use or not yours to remove: {names}", soft_wrap=True)


def draw_lengths(whole: Mapping[str, Any], path: Path) -> None:
    """The histogram as a PNG, sources stacked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    edges, below = whole["histogram"]["edges"], [0] * (len(whole["histogram"]["edges"]) - 1)
    # The last bar may be open, and is drawn as wide as the others.
    width = edges[1] - edges[0]
    names = [_label(n, source) for n, source in enumerate(whole["sources"], start=1)]
    parts = whole["histogram"]["documents"]
    if len(parts) > COLOURS:
        names, parts = [f"{len(parts)} sources"], [[sum(counts) for counts in zip(*parts, strict=True)]]
    for name, counts in zip(names, parts, strict=True):
        plain = name.replace("$", r"\$")  # which would begin a formula
        axes.bar(edges[:-1], counts, width, bottom=below, align="edge", label=plain)
        below = [low + count for low, count in zip(below, counts, strict=True)]
    labels = _labels(edges)
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


# Parts ----------------------------------------------------------------------------------


def _has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _counts(source: Mapping[str, Any]) -> Table:
    """A store by itself."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row("store", f"{source['store']}  ({source['bytes']:,} bytes)")
    if source["files"]:
        grid.add_row("from", _shortened(", ".join(source["files"]), 100))
    grid.add_row("documents", _documents(source))
    grid.add_row("tokens", f"{source['tokens']:,}; {source['with_loss']:,} with loss ({_share_of_loss(source)})")
    if any(weight not in (0, 1) for weight in source["weights"]):
        grid.add_row("weights", " ".join(f"{weight:g}" for weight in source["weights"]))
    if (silent := source["documents_without_loss"])["count"]:
        grid.add_row("without loss", f"{silent['count']:,} documents: {_first(silent)}")
    if (held_out := source["held_out"]) is not None:
        grid.add_row("held out", f"{held_out['documents']:,} documents, {held_out['tokens']:,} tokens")
    if source["unreadable"]:
        grid.add_row("unreadable", f"{source['unreadable']:,} of {source['rows_read']:,} rows")
        for problem in source["problems"]:
            grid.add_row("", _escaped(problem))
    return grid


def _documents(source: Mapping[str, Any]) -> str:
    lengths = source["lengths"]
    told = f"{lengths['shortest']:,} to {lengths['longest']:,} tokens, median {lengths['median']:,}"
    if lengths["shortest"] == lengths["longest"]:
        told = f"{lengths['longest']:,} tokens"
    empty = f"; {source['empty']:,} rows without text" if source["empty"] else ""
    return f"{source['documents']:,} of {told}{empty}"


def _share_of_loss(source: Mapping[str, Any]) -> str:
    return f"{source['with_loss'] / source['tokens']:.1%}"


def _first(found: Mapping[str, Any]) -> str:
    more = ", ..." if found["count"] > len(found["first"]) else ""
    return ", ".join(f"{number:,}" for number in found["first"]) + more


def _numbered(whole: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Training's sources by their labels, then validation's."""
    train = [(_label(n, source), source) for n, source in enumerate(whole["sources"], start=1)]
    stores = [source["store"] for source in whole["sources"]]
    validation = []
    for n, source in enumerate(whole.get("validation", ()), start=1):
        of = str(Path(source["store"]).parent)
        validation.append((f"{stores.index(of) + 1} held out" if of in stores else _label(f"v{n}", source), source))
    return [*train, *validation]


def _label(number: int | str, source: Mapping[str, Any]) -> str:
    """A number, and as much of the name as tables have room for; _names tells the rest."""
    first, *others = _whole_names(source)
    name, more = Path(first).name, f" and {len(others):,} more" if others else ""
    room = LABEL - len(more)
    return f"{number} {name if len(name) <= room else f'{name[: room - 3]}...'}{more}"


def _whole_names(source: Mapping[str, Any]) -> Sequence[str]:
    """The files of a source, or the store that it is."""
    return source["files"] if source["name"] == ", ".join(source["files"]) else [source["name"]]


def _names(whole: Mapping[str, Any]) -> Iterator[str]:
    """Where each source comes from, and where it was prepared to."""
    stores = {source["store"] for source in whole["sources"]}
    for label, source in _numbered(whole):
        if str(Path(source["store"]).parent) in stores:
            continue  # held out of a source that is named
        number, files = label.split()[0], _whole_names(source)
        more = f" and {len(files) - FILES:,} more" if len(files) > FILES else ""
        what = "source" if number.isdigit() else "validation"
        yield f"{what} {number}: {', '.join(map(_escaped, files[:FILES]))}{more}"
        for part in source["made_of"] if len(source["made_of"]) > 1 else ():
            template = f", template {_escaped(part['template'])}" if part["template"] else ""
            yield f"  {', '.join(map(_escaped, part['files']))}: {part['kind']}{template}"
        if source["store"] != source["name"]:
            yield f"  prepared in {_escaped(source['store'])}"


def _sources(whole: Mapping[str, Any]) -> Table:
    named = _numbered(whole)
    unreadable = [">unreadable"] if any(source["unreadable"] for _, source in named) else []
    grid = _grid("source", ">documents", ">tokens", ">with loss", ">median", ">longest", *unreadable)
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


def _packing(whole: Mapping[str, Any]) -> Table:
    method = whole["sources"][0]["packing"]
    title = f"{method['method']}, rows of {method['sequence_length']:,}"
    grid = _grid(title, ">rows", ">filled", ">split", ">truncated", ">dropped", ">no loss")
    for label, source in _numbered(whole):
        packing = source["packing"]
        grid.add_row(
            label,
            f"{packing['rows']:,}",
            f"{packing['filled']:.1%}",
            *(f"{packing[name]:,}" for name in ("split", "truncated", "dropped")),
            f"{packing['rows_without_loss']['count']:,}",
        )
    return grid


def _lost(whole: Mapping[str, Any]) -> Iterator[str]:
    for label, source in _numbered(whole):
        if lost := source["packing"]["lost"]:
            share = lost / source["tokens"]
            yield f"tokens truncated or dropped of source {label}: {lost:,} of {source['tokens']:,} ({share:.1%})"


def _silent(whole: Mapping[str, Any]) -> Iterator[str]:
    for label, source in _numbered(whole):
        if (silent := source["packing"]["rows_without_loss"])["count"]:
            yield f"rows without loss of source {label}: {_first(silent)}"


def _stages(whole: Mapping[str, Any]) -> list[Table]:
    """Shares of the tokens by stage, and how often sources are read."""
    tables = []
    for stage in whole["stages"]:
        last = stage["first_step"] + stage["steps"]
        title = (
            f"steps {stage['first_step']:,} to {last:,}"
            if stage["steps"]
            else f"from step {stage['first_step']:,}: never"
        )
        grid = _grid(title, ">asked", ">given", ">rows", ">repeats")
        for n, source in enumerate(whole["sources"]):
            grid.add_row(
                _label(n + 1, source),
                f"{stage['asked'][n]:.2%}",
                f"{stage['given'][n]:.2%}",
                f"{stage['rows'][n]:,}",
                f"{stage['repeats'][n]:.2f}",
            )
        tables.append(grid)
    if len(tables) > 1:
        grid = _grid(f"all {whole['steps']:,} steps", ">repeats")
        for n, repeats in enumerate(whole["repeats"]):
            grid.add_row(_label(n + 1, whole["sources"][n]), f"{repeats:.2f}")
        tables.append(grid)
    return tables


def _lengths(whole: Mapping[str, Any]) -> Table:
    """Bars of the documents' lengths, all sources together."""
    counts = [sum(each) for each in zip(*whole["histogram"]["documents"], strict=True)]
    grid = _grid(">tokens", ">documents", "")
    for label, count in zip(_labels(whole["histogram"]["edges"]), counts, strict=True):
        # Something is seen of whatever is there.
        bar = max(round(BAR * count / max(counts)), 1 if count else 0)
        grid.add_row(label, f"{count:,}", Text("█" * bar, "green"))
    return grid


def _labels(edges: Sequence[int]) -> list[str]:
    width = edges[1] - edges[0]

    def label(first: int, after: int) -> str:
        if after - first > width:
            return f"from {first:,}"
        return f"{first:,}" if after - first == 1 else f"{first:,} to {after - 1:,}"

    return [label(first, after) for first, after in itertools.pairwise(edges)]


# Rows as text ---------------------------------------------------------------------------


def _show_row(console: Console, row: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    if "row" in row:
        label = _label(row["source"] + 1, whole["sources"][row["source"]])
        padding = f", {row['padding']:,} of padding" if row["padding"] else ""
        console.rule(f"row {row['row']:,} of source {label}{padding}", style=RULE, characters="─")
    else:
        console.rule(f"document {row['document']:,}, {row['tokens']:,} tokens", style=RULE, characters="─")
    for number, pieces in enumerate(row["documents"]):
        if number:
            console.print("┄" * 40, style=RULE)
        console.print(_text(pieces, _has_colour(console)), soft_wrap=True)
    if row.get("left_out"):
        console.print(f"... {row['left_out']:,} tokens more", style=RULE)


def _text(pieces: Sequence[Mapping[str, Any]], colour: bool) -> Text:
    """Learnt and read, specials and text, told apart by colour, or else by marks; what counts otherwise, by marks."""
    text = Text()
    for weight, run in itertools.groupby(pieces, key=lambda piece: piece["weight"]):
        style = LEARNT if weight and colour else ""
        marked = weight not in (0, 1) or (weight and not colour)
        text.append("" if not marked else MARKS[0] if weight == 1 else f"{MARKS[0]}{weight:g}: ", style)
        for piece in run:
            shown, special = _escaped(piece["text"]), piece["special"]
            if colour:
                text.append(shown, f"{style} {SPECIAL if special else ''}".strip())
            else:
                text.append(f"{MARKS[2]}{shown}{MARKS[3]}" if special else shown)
        text.append(MARKS[1] if marked else "", style)
    return text


def _legend(colour: bool, sources: Sequence[Mapping[str, Any]]) -> Text:
    words = [("what is learnt", 1, False), ("special", 1, True), ("special", 0, True), ("what is read", 0, False)]
    other = sorted({weight for source in sources for weight in source["weights"]} - {0, 1})
    words += [("what counts so much", weight, False) for weight in other[:1]]
    pieces = [{"text": text, "weight": weight, "special": special} for text, weight, special in words]
    return Text("  ").join(_text([piece], colour) for piece in pieces)


def _escaped(text: str) -> str:
    """Text without control characters and other unseen ones; a line break is shown, and breaks the line."""
    return "".join(map(_escape, text))


def _escape(char: str) -> str:
    if char == "\n":
        return "\\n\n"
    if char == "\\" or char in MARKS or not char.isprintable():
        return char.encode("unicode_escape").decode("ascii")
    return char


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
