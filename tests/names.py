"""Names of files and folders that file systems allow and that libraries may read as patterns, options or URLs."""

import random

KINDS = (
    "lr=[1e-4]",
    "[a-z]",
    "v*",
    "**",
    "back\\slash",
    "what?",
    "50% #3 a:b",
    "gs:",
    " blank and\ttab ",
    "two\nlines",
    "Küche 東京 🦙",
    "-rf",
    "{a,b}",
    "'quoted' \"twice\"",
    "$HOME `ls`",
    "x.__lock",
)
CHARACTERS = "".join(map(chr, range(32, 127))).replace("/", "") + "\n\tüß東🦙\u0301\u200b"


def random_names(count: int) -> list[str]:
    """So many different legal names, the same in every run, many of them with a leading dash, dot or blank."""
    draw = random.Random(0)
    names = dict.fromkeys(KINDS)
    while len(names) < count:
        start = draw.choice(["", "", "", "-", ".", " ", "~", "--"])
        name = start + "".join(draw.choices(CHARACTERS, k=draw.randint(1, 24)))
        if name not in (".", ".."):
            names[name] = None
    return list(names)[:count]
