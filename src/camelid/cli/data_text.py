"""Shows rows and documents as text, with the tokens that have a loss marked."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

LOSS, SPECIAL, RULE = "bold green", "cyan", "dim"
MARKS = "⟦⟧⟨⟩"
"""Marks of tokens with a loss and of special tokens if there is no color; in the text itself they are escaped."""


def print_row(console: Console, row: Mapping[str, Any], source: str | None) -> None:
    """Prints a row of training of the source with this label, or with None a document of a store."""
    if source is not None:
        padding = f", {row['padding']:,} of padding" if row["padding"] else ""
        console.rule(f"row {row['row']:,} of source {source}{padding}", style=RULE, characters="─")
    else:
        console.rule(f"document {row['document']:,}, {row['tokens']:,} tokens", style=RULE, characters="─")
    for number, runs in enumerate(row["documents"]):
        if number:
            console.print("┄" * 40, style=RULE)
        console.print(_text(runs, _has_color(console)), soft_wrap=True)
    if row.get("left_out"):
        console.print(f"... {row['left_out']:,} more tokens", style=RULE)


def _text(runs: Sequence[Mapping[str, Any]], color: bool) -> Text:
    """Runs that have a loss, and special tokens, in color or in marks; weights other than 0 and 1 in marks."""
    text = Text()
    for weight, group in itertools.groupby(runs, key=lambda run: run["weight"]):
        style = LOSS if weight and color else ""
        marked = weight not in (0, 1) or (weight and not color)
        text.append("" if not marked else MARKS[0] if weight == 1 else f"{MARKS[0]}{weight:g}: ", style)
        for run in group:
            shown, special = escaped(run["text"]), run["special"]
            if color:
                text.append(shown, f"{style} {SPECIAL if special else ''}".strip())
            else:
                text.append(f"{MARKS[2]}{shown}{MARKS[3]}" if special else shown)
        text.append(MARKS[1] if marked else "", style)
    return text


def print_legend(console: Console, sources: Sequence[Mapping[str, Any]]) -> None:
    """Prints how tokens with and without a loss, and special tokens, are shown."""
    words = [("loss", 1, False), ("special token", 1, True), ("special token", 0, True), ("no loss", 0, False)]
    other = sorted({weight for source in sources for weight in source["weights"]} - {0, 1})
    words += [("loss with this weight", weight, False) for weight in other[:1]]
    runs = [{"text": text, "weight": weight, "special": special} for text, weight, special in words]
    console.print(Text("  ").join(_text([run], _has_color(console)) for run in runs))


def escaped(text: str) -> str:
    """Returns a text with control and other invisible characters escaped; a line break is also shown as \\n."""
    return "".join(map(_escape, text))


def _escape(char: str) -> str:
    if char == "\n":
        return "\\n\n"
    if char == "\\" or char in MARKS or not char.isprintable():
        return char.encode("unicode_escape").decode("ascii")
    return char


def _has_color(console: Console) -> bool:
    return console.color_system is not None and not console.no_color
