"""The command for the folder in which recipes' sources are kept as prepared stores."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from camelid.cli.shared import print_json
from camelid.errors import UserError

if TYPE_CHECKING:
    from camelid.data.preparation.cached import Cached

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
DAY_S = 86400


def cache(
    prune: Annotated[str | None, arg(metavar="all|DAYSd|SIZE")] = None,
    folder: Annotated[Path | None, arg(metavar="DIR")] = None,
    json: bool = False,
) -> None:
    """List the stores that recipes' sources were prepared to, or remove those that are not needed any more.

    camelid data cache
    camelid data cache --prune 30d
    camelid data cache --prune 100GB

    A store that a process has open is never removed, nor is one that you may not remove: they are listed as kept. What
    is removed is prepared again where a recipe needs it.

    Args:
        prune: all, what was not used for so many days (30d), or the least recently used until so much is left (100GB)
        folder: the data.cache of a recipe; left out, $CAMELID_CACHE/data or the user's cache folder
        json: print one JSON object
    """
    from camelid.data.preparation import cached
    from camelid.data.rows.loader import default_cache

    root = default_cache() if folder is None else folder
    entries = cached.list_cached(root)
    whole = {"folder": str(root), "bytes": sum(entry.bytes for entry in entries)}
    if prune is None:
        whole["entries"] = [_describe(entry) | {"in_use": cached.in_use(entry)} for entry in entries]
    else:
        kept: list[Cached] = []
        whole["removed"] = [_describe(entry) for entry in cached.prune(_chosen(prune, entries), kept.append)]
        whole["kept"] = [_describe(entry) for entry in kept]
    return print_json(whole) if json else _show(whole)


def _chosen(prune: str, entries: "list[Cached]") -> "list[Cached]":
    from camelid.data.preparation.cached import beyond, unused_since

    if prune == "all":
        return entries
    if match := re.fullmatch(r"(\d+)d", prune):
        return unused_since(entries, time.time() - int(match[1]) * DAY_S)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|TB)", prune):
        return beyond(entries, round(float(match[1]) * UNITS[match[2]]))
    raise UserError(f"--prune {prune}", "Choose all, an age in days (30d), or the size that may stay (100GB).")


def _describe(entry: "Cached") -> dict:
    return {
        "name": entry.folder.name,
        "kind": entry.kind,
        "bytes": entry.bytes,
        "used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.used)),
        "sources": list(entry.sources),
    }


def _show(whole: dict) -> None:
    from camelid.cli.data_view import show_cache

    show_cache(whole)
