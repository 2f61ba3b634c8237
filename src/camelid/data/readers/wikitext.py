"""Reverses the tokenization of WikiText.

The original text cannot be recovered with certainty. These rules are applied to each line, in this order:

    0 @-@ 7 , 1 @,@ 000 , 2 @.@ 5      0-7, 1,000, 2.5
    men 's , did n't , I 'll           men's, didn't, I'll
    " word " , ' word '                "word", 'word' (quotes in pairs); players ' union   players' union
    ( 24 in ) , [ 1 ]                  (24 in), [1]
    $ 5 , £ 5 , 50 % , 45 ° F          $5, £5, 50%, 45 °F; 45 ° north   45° north
    5 – 6 , 12 : 30 , km / h           5–6, 12:30, km/h
    word , . ; : ! ?                   no space before the mark
    = = Heading = =                    == Heading ==

Spaces at both ends of a line and blank lines at both ends of a document are removed; <unk> is kept. A .txt file with
split = "file" is split into its articles, before each level-1 heading (` = Title = `).
"""

import re

RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<= )= (?==)|(?<==) =(?= |$)|^= (?==)", "="),
        (r" @([-,.])@ ", r"\1"),
        (r" (n't|'(?:s|t|re|ve|ll|d|m|S))(?![^\W_])", r"\1"),
        (r'(?<!\S)" ([^"]*?) ?"(?!\S)', r'"\1"'),
        (r"(?<!\S)' ([^']*?) '(?!\S)", r"'\1'"),
        (r"(?<=s) '(?= )", "'"),
        (r"([(\[{]) ", r"\1"),
        (r" ([)\]}])", r"\1"),
        (r"([$£€]) (?=\d)", r"\1"),
        (r"(?<=\d) %", "%"),
        (r" ° (?=[CFK](?!\w))", " °"),
        (r"(?<=\d) °(?![CFK](?!\w))", "°"),
        (r"(?<=\d) ([–:]) (?=\d)", r"\1"),
        (r"(?<=\w) / (?=\w)", "/"),
        (r" ([,.;:!?])(?=\s|$|[\"')\]}])", r"\1"),
    )
]


def clean(text: str) -> str:
    """Returns the text of one document with its tokenization reversed."""
    return "\n".join(map(_clean_line, text.split("\n"))).strip("\n")


def _clean_line(line: str) -> str:
    line = line.strip()
    for pattern, replacement in RULES:
        line = pattern.sub(replacement, line)
    return line
