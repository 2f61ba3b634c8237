"""`camelid data cache`."""

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
    """List the stores that the sources of recipes were prepared into, or remove those that are not needed any more.

    camelid data cache
    camelid data cache --prune 30d
    camelid data cache --prune 100GB

    A store that a process has open is never removed, nor is one that you have no permission to remove: these are listed
    as kept. A store that was removed is prepared again when a recipe needs it.

    Args:
        prune: all, those not used for N days (30d), or the least recently used until a size remains (100GB)
        folder: the data.cache of a recipe; by default, $CAMELID_CACHE/data or the cache folder of the user
        json: print one JSON object
    """
    from camelid.data.preparation import cached
    from camelid.data.rows.stores import default_cache

    root = default_cache() if folder is None else folder
    entries = cached.list_cached(root)
    summary = {"folder": str(root), "bytes": sum(entry.bytes for entry in entries)}
    if prune is None:
        summary["entries"] = [_describe(entry) | {"in_use": cached.in_use(entry)} for entry in entries]
    else:
        kept: list[Cached] = []
        summary["removed"] = [_describe(entry) for entry in cached.prune(_chosen(prune, entries), kept.append)]
        summary["kept"] = [_describe(entry) for entry in kept]
    return print_json(summary) if json else _show(summary)


def _chosen(prune: str, entries: "list[Cached]") -> "list[Cached]":
    from camelid.data.preparation.cached import beyond, unused_since

    if prune == "all":
        return entries
    if match := re.fullmatch(r"(\d+)d", prune):
        return unused_since(entries, time.time() - int(match[1]) * DAY_S)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|TB)", prune):
        return beyond(entries, round(float(match[1]) * UNITS[match[2]]))
    raise UserError(f"--prune {prune}", "Choose all, an age in days (30d), or a size to keep (100GB).")


def _describe(entry: "Cached") -> dict:
    return {
        "name": entry.folder.name,
        "kind": entry.kind,
        "bytes": entry.bytes,
        "used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.used)),
        "sources": list(entry.sources),
    }


def _show(summary: dict) -> None:
    from camelid.cli.data_view import show_cache

    show_cache(summary)
