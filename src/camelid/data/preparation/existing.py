"""Compares a store that exists already with what is to be prepared."""

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from camelid.data.preparation.store import MANIFEST, OFFSETS, TOKENS, VALIDATION, WEIGHTS, Store, is_store
from camelid.data.preparation.task import content_hashes
from camelid.errors import UserError

ARRAYS = f"({MANIFEST}|{TOKENS}|{OFFSETS}|{WEIGHTS})"
PLANS = (
    r"plans/\.?[^/]+/((plan|manifest)\.json|(rows|starts|lengths|places)\.bin|\.lock)"  # which earlier releases wrote
)
CONTENTS = re.compile(rf"({VALIDATION}/)?({ARRAYS}|{PLANS})")
"""The files that are removed when a store is replaced."""


def existing_store(folder: Path, described: dict[str, Any], overwrite: bool) -> Store | None:
    """Returns the store in a folder if it is the one that Task.describe describes; None if it is to be prepared.

    Raises UserError if it is another one, and `overwrite` is not set, or if the folder holds other files.
    """
    if not folder.exists():
        return None
    if not is_store(folder):
        if not folder.is_dir() or any(folder.iterdir()):
            raise UserError(f"{folder} holds something other than a store", "Choose another folder.")
        if os.path.ismount(folder):
            raise UserError(f"{folder} is a mount point, which a store cannot replace", f"Choose {folder / 'store'}.")
        return None
    try:
        store = Store.open(folder)
        if (changes := difference(store.manifest.get("prepared"), described)) is None:
            return _renamed(store, described)
        raise UserError(
            f"{folder} was prepared before, and {changes}",
            "Use --overwrite to replace it, or choose another folder.",
        )
    except UserError:
        if not overwrite:
            raise
    inside = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    if foreign := sorted(name for name in inside if not CONTENTS.fullmatch(name)):
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"{folder} holds {foreign[0]}{others} in addition to its store", "Move it away, or choose another folder."
        )
    return None


def _renamed(store: Store, described: dict[str, Any]) -> Store:
    """The store with the present names of its sources, which may differ from those that it was prepared from."""
    hashes = iter([file["sha256"] for file in itertools.chain.from_iterable(store.manifest["prepared"]["files"])])
    files = [[file | {"sha256": next(hashes)} for file in files] for files in described["files"]]
    return replace(store, manifest=store.manifest | {"prepared": described | {"files": files}})


def difference(prepared: Any, described: dict[str, Any]) -> str | None:
    """Returns what has changed since a store was prepared; None if neither options nor contents of files have."""
    try:
        before = [[(file["path"], file["sha256"]) for file in files] for files in prepared["files"]]
        if (changed := _changed_option(prepared["options"], described["options"])) is not None:
            return changed
    except (KeyError, TypeError, AttributeError):
        return "its manifest does not describe the sources"
    hashes = content_hashes(file["path"] for files in described["files"] for file in files)
    now = [[(file["path"], hashes[file["path"]]) for file in files] for files in described["files"]]
    if [[sha256 for _, sha256 in files] for files in before] == [[sha256 for _, sha256 in files] for files in now]:
        return None
    old, new = (dict(itertools.chain.from_iterable(groups)) for groups in (before, now))
    for path in sorted(old.keys() ^ new.keys()):
        return f"{path} was {'removed from' if path in old else 'added to'} its sources"
    changed = (f"{path} has changed" for path, sha256 in new.items() if old[path] != sha256)
    return next(changed, "the order of its files has changed")


def _changed_option(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    for name, value in now.items():
        was: Any = before.get(name)
        if name == "files":
            continue  # their names do not matter
        if name == "sources" and len(was) == len(value):
            # Only the option that differs is worth showing.
            if (found := next(filter(None, map(_changed_option, was, value)), None)) is not None:
                return found
        elif was != value:
            return f"{name} was {was!r} and is now {value!r}"
    return None
