"""Links from a page to files outside docs/ work in the repository; the site replaces them by the file's name.

The repository's README is the exception: on the site, its place is the first page.
"""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?!\.)([^)]*)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The Markdown of a page with links that lead to pages of the site, or to nothing."""
    depth = page.file.src_uri.count("/")

    def replaced(link: re.Match) -> str:
        text, target = link[1], link[2]
        ups = link[0].count("../")
        if ups <= depth:
            return link[0]  # another page of the site
        if target.startswith("README.md"):
            return f"[{text}]({'../' * depth}index.md)"
        return text if text.startswith("`") else f"{text} (`{target}`)"

    return OUTSIDE.sub(replaced, markdown)
