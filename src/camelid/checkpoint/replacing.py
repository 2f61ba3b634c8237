"""Replaces the files of a checkpoint by those of another, and leaves all other files in its folder alone.

    .NAME.incomplete/             the new files, completely written
    NAME/.camelid_replacing.json  the replacement: which files are removed, and which new ones are then moved in

While the second file exists, the folder holds neither checkpoint, and config.json is not in it. If the process is
killed at that point, the next process that opens the folder or writes to it completes the replacement.

A folder may come from an untrusted origin, and such a file in it could name any path. So a replacement is performed
only if its file was created in this folder, which its inode number shows (a copy, a download or an extracted archive
has another one), and only if every file that it names is inside the folder.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from camelid.checkpoint.tensors import summarize
from camelid.disk.atomic import sync
from camelid.disk.hashes import hash_file
from camelid.disk.json_files import read_json_or_empty, write_hf_json
from camelid.disk.locks import LOCK, unfinished
from camelid.errors import UserError
from camelid.inputs import expand_home

MANIFEST = "camelid_manifest.json"
OTHERS = "others"
"""the key in the manifest for the SHA-256 of files without tensors"""
REPLACEMENT_FILE = ".camelid_replacing.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Replacement:
    """The contents of REPLACEMENT_FILE: names of files."""

    add: list[str]
    """files that are moved in"""
    remove: list[str]
    """files that are removed before"""


# The names that camelid writes, for folders of other systems, and of versions whose manifest did not list all files.
# Each line is one checkpoint; of several in one folder, Hugging Face's libraries read the first.
WEIGHTS = [
    line.split()
    for line in """
    model.safetensors
    model.safetensors.index.json model-*-of-*.safetensors
    pytorch_model.bin
    pytorch_model.bin.index.json pytorch_model-*-of-*.bin
    consolidated.*.pth params.json
    streaming_params
    flax_params
    streaming_train_state
    model.ckpt
    rank_*/model.ckpt rank_*/model.safetensors strategy/ckpt_strategy_rank_*.ckpt
    latest_checkpointed_iteration.txt iter_*/mp_rank_*/model_optim_rng.pt
    model.pickle
    model.bin
    model.gguf
    delta.json delta.safetensors
    adapter_config.json adapter_model.safetensors
    """.strip().splitlines()
]
COMPANION_FILES = """
    config.json generation_config.json preprocessor_config.json tokenizer.json tokenizer.model tokenizer_config.json
    special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.jinja chat_template.json
""".split()


# What may be replaced --------------------------------------------------------------------


def refuse_foreign(folder: Path, new: Mapping[str, Path | None]) -> None:
    """Raises UserError if the `new` files cannot replace a checkpoint in a folder without harm to other files.

    `new` maps the name of each file to a file with its contents, or to None if that does not exist yet. A file that
    camelid did not write conflicts if it has the same name and other contents, or if it holds weights: of two
    checkpoints in one folder, different readers would choose different ones.
    """
    own = owned_files(folder)
    if own is None:
        raise UserError(
            f"{folder} is not a checkpoint that can be replaced; it holds {summarize(sorted(os.listdir(folder)))}",
            "Choose another destination, or move these files away.",
        )
    foreign = [name for name, content in new.items() if name not in own and _in_the_way(folder / name, content)]
    foreign += [name for patterns in WEIGHTS for name in _named(folder, patterns) if name not in {*own, *new}]
    if foreign:
        raise UserError(
            f"{folder} holds files that camelid did not write, or that were changed since: "
            + summarize(sorted(foreign)),
            "Move them away, or choose another destination.",
        )


def refuse_sources(destination: str | Path, sources: Iterable[Path]) -> None:
    """Raises UserError if a destination is one of the files and folders that are read, or if it would replace one.

    The result may be rounded or incomplete, and the source would be lost. Sources in a folder of their own below the
    destination, such as `original/`, are left alone.
    """
    place = Path(os.path.realpath(expand_home(destination)))
    own = (owned_files(place) or set()) if place.is_dir() else set()
    for source in sources:
        for path in (Path(os.path.realpath(source)), Path(os.path.realpath(source.parent), source.name)):
            if place == path or (place in path.parents and str(path.relative_to(place)) in own):
                raise UserError(
                    f"{destination} cannot be replaced, because {source} is read to create it",
                    "Choose another destination.",
                )


def owned_files(folder: Path) -> set[str] | None:
    """The names of the files that belong to the checkpoint in a folder; None if the folder holds something else.

    The manifest lists them; files without tensors that were changed since are left out. Without a manifest, a folder
    is a checkpoint if it has weights and a config.json that describes a model. Of several checkpoints in one folder,
    only the first in the order of WEIGHTS may be replaced.
    """
    if (folder / REPLACEMENT_FILE).is_file():  # a replacement that could not be completed
        record = read_replacement(folder)
        return {*record.remove, *record.add, REPLACEMENT_FILE}
    manifest = read_json_or_empty(folder / MANIFEST)
    found = [names for patterns in WEIGHTS if (names := _named(folder, patterns))]
    if not isinstance(tensors := manifest.get("files"), dict):
        if "model_type" not in read_json_or_empty(folder / CONFIG) or not found:
            return None if any(name != LOCK for name in os.listdir(folder)) else set()
        return {*found[0], *_named(folder, COMPANION_FILES)}
    if not isinstance(others := manifest.get(OTHERS), dict):
        weights = {name for names in found if not tensors.keys().isdisjoint(names) for name in names}
        return {*tensors, *weights, *_named(folder, COMPANION_FILES), MANIFEST}
    unchanged = {name for name, sha256 in others.items() if _hash(folder / name) == sha256}
    return {*tensors, *unchanged, MANIFEST}


def _in_the_way(path: Path, content: Path | None) -> bool:
    if not os.path.lexists(path):
        return any(os.path.lexists(above) and not above.is_dir() for above in path.parents)
    return content is None or _hash(content) != _hash(path)


def _hash(path: Path) -> str | None:
    """SHA-256 of a file; None if it is not a file."""
    return hash_file(path) if path.is_file() else None


def _named(folder: Path, patterns: Iterable[str]) -> list[str]:
    """The files of a folder whose names match one of the patterns."""
    return [str(file.relative_to(folder)) for pattern in patterns for file in folder.glob(pattern) if not file.is_dir()]


# Replacing them --------------------------------------------------------------------------


def add_to_manifest(folder: Path, names: Iterable[str]) -> None:
    """Adds files to the manifest of a folder; those with tensors are in it already."""
    manifest = read_json_or_empty(folder / MANIFEST)
    tensors = manifest.setdefault("files", {})
    others = {name: _hash(folder / name) for name in sorted(names) if name not in tensors and name != MANIFEST}
    write_hf_json(folder / MANIFEST, {"version": 1} | manifest | {OTHERS: others})


def files_in(folder: Path) -> list[str]:
    """The names of all files in and below a folder, except for its lock."""
    names = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_symlink() or not file.is_dir())
    return sorted(name for name in names if name != LOCK)


def replace_files(new: Path, folder: Path) -> None:
    """Replaces the checkpoint in a folder by the files in the folder `new`, which are moved.

    The caller holds the lock. Raises UserError, with nothing changed, if files that camelid did not write conflict.
    """
    names = files_in(new)
    refuse_foreign(folder, {name: new / name for name in names})
    own = owned_files(folder) or set()
    # The remaining files have the same contents as the user's, which are kept.
    add = [name for name in names if name in own or not os.path.lexists(folder / name)]
    add_to_manifest(new, add)
    add = sorted({*add, MANIFEST})
    for name in add:
        sync(new / name)
    inside = (name for name in own if name != REPLACEMENT_FILE and _is_inside(folder, name))
    record = Replacement(add, sorted(name for name in inside if os.path.lexists(folder / name)))
    _write_record(new / REPLACEMENT_FILE, record)
    (new / REPLACEMENT_FILE).rename(folder / REPLACEMENT_FILE)
    sync(folder)
    _follow(record, new, folder)


def complete(new: Path, folder: Path) -> None:
    """Completes the replacement that a killed process started in a folder, from any point.

    Raises UserError if the new files are gone, and, with nothing changed, if the replacement cannot be trusted.
    """
    record = read_replacement(folder)
    for name in record.add:
        if not _is_inside(new, name):
            raise _untrusted(folder, f"names {name!r}, which is not in {new}")
    _follow(record, new, folder)


def _follow(record: Replacement, new: Path, folder: Path) -> None:
    add = sorted(record.add, key=lambda name: (name == CONFIG, name))
    waiting = [name for name in add if os.path.lexists(new / name)]
    if not add or any(name not in waiting and not os.path.lexists(folder / name) for name in add):
        raise UserError(
            f"a checkpoint in {folder} was being replaced when the process was killed, and the new files, which were "
            f"in {new}, are gone",
            "Write it again with the option to overwrite.",
        )
    if len(waiting) == len(add):  # otherwise all old files were removed before
        for name in sorted(record.remove, key=lambda name: (name != CONFIG, name)):
            (folder / name).unlink(missing_ok=True)
            _remove_empty((folder / name).parent, folder)
    for name in waiting:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).rename(folder / name)
    sync(folder)
    (folder / REPLACEMENT_FILE).unlink()


def _remove_empty(below: Path, folder: Path) -> None:
    """Removes a folder that has become empty, and those above it, up to `folder`."""
    while folder in below.parents and below.is_dir() and not any(below.iterdir()):
        below.rmdir()
        below = below.parent


def _is_inside(folder: Path, name: str) -> bool:
    """Whether an untrusted name is that of a file below a folder, with symbolic links resolved."""
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        return False
    try:
        return Path(os.path.realpath((folder / name).parent)).is_relative_to(os.path.realpath(folder))
    except UnicodeEncodeError:  # JSON can hold characters that no file name has
        return False


# The replacement --------------------------------------------------------------------------


def _write_record(path: Path, record: Replacement) -> None:
    with path.open("w", encoding="utf-8") as file:
        about = {"inode": os.fstat(file.fileno()).st_ino, "add": record.add, "remove": record.remove}
        json.dump(about, file)
    sync(path)


def read_replacement(folder: Path) -> Replacement:
    """The replacement that was started in a folder; raises UserError if it cannot be trusted."""
    path = folder / REPLACEMENT_FILE
    about = read_json_or_empty(path)
    if path.is_symlink() or about.get("inode") != path.stat().st_ino:
        raise _untrusted(folder, "was not created in this folder: it was copied, or came with a download")
    record = Replacement(list(_strings(about.get("add"))), list(_strings(about.get("remove"))))
    for name in (*record.add, *record.remove):
        if not _is_inside(folder, name):
            raise _untrusted(folder, f"names {name!r}, which is not in the folder")
    return record


def _untrusted(folder: Path, why: str) -> UserError:
    return UserError(
        f"{folder / REPLACEMENT_FILE}, which lists the files of a checkpoint that are replaced, {why}",
        "Nothing was changed. Copy or download the checkpoint again; or move the new files, which are in "
        f"{unfinished(folder)}, to their places yourself, and remove {REPLACEMENT_FILE}.",
    )


def _strings(value: Any) -> Iterator[str]:
    return (each for each in value if isinstance(each, str)) if isinstance(value, list) else iter(())
