"""Prepared stores are found by what their sources hold, and those that nobody needs can be removed."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import camelid
from camelid.data.config import DataConfig, Source
from camelid.data.preparation import prepare
from camelid.data.preparation.cached import Cached, beyond, in_use, list_cached, prune, unused_since
from camelid.data.preparation.store import Store
from camelid.data.rows import stores
from camelid.data.rows.stores import data_cache, open_stores
from camelid.disk import hashes
from camelid.disk.hashes import content_hash, hash_file
from camelid.disk.locks import locked
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer
from data.stores import documents_of
from runs import TIMEOUT_S, called

ROOT = Path("cache/data")
FROZEN = {"inode": 1, "bytes": 1, "mtime_ns": 2**62, "ctime_ns": 2**62}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMELID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config() -> DataConfig:
    Path("a.jsonl").write_text('{"text": "one two three"}\n{"text": "four"}\n')
    Path("b.txt").write_text("five six seven")
    return DataConfig(train=(Source(files=("a.jsonl", "b.txt")),), sequence_length=8, batch_size=2)


def names() -> set[str]:
    return {entry.folder.name for entry in list_cached(ROOT)}


def with_files(config: DataConfig, *files: str) -> DataConfig:
    return replace(config, train=(Source(files=files),))


# Found by content -----------------------------------------------------------------------


def _touch() -> None:
    os.utime("a.jsonl", (1, 1))


def _copy_back() -> None:
    shutil.copy("a.jsonl", "c.jsonl")
    os.replace("c.jsonl", "a.jsonl")


def _write_again() -> None:
    Path("b.txt").write_text(Path("b.txt").read_text())


@pytest.mark.parametrize("change", [_touch, _copy_back, _write_again])
def test_a_file_that_holds_the_same_is_not_prepared_anew(
    change: Callable[[], None], config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    (before,) = open_stores(config, tokenizer)
    change()
    monkeypatch.setattr(prepare, "make_partial_stores", None)
    (after,) = open_stores(config, tokenizer)
    assert after.folder == before.folder


def test_copies_of_other_names_are_the_same_store_and_are_named(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    (before,) = open_stores(config, tokenizer)
    Path("elsewhere [2]").mkdir()
    for old, new in (("a.jsonl", "elsewhere [2]/x.y.jsonl"), ("b.txt", "elsewhere [2]/z.TXT")):
        Path(old).rename(new)
    monkeypatch.setattr(prepare, "make_partial_stores", None)
    (after,) = open_stores(with_files(config, "elsewhere [2]/x.y.jsonl", "elsewhere [2]/*.TXT"), tokenizer)
    assert after.folder == before.folder
    assert [Path(path).name for path in after.sources] == ["x.y.jsonl", "z.TXT"]
    assert list(after.sources.values()) == list(before.sources.values())
    assert names() == {before.folder.name}


@pytest.mark.parametrize(
    "files",
    [("b.txt", "a.jsonl"), ("a.jsonl",), ("a.jsonl", "b.jsonl"), ("a.txt", "b.txt")],
    ids=["another order", "fewer", "another ending", "another ending of the first"],
)
def test_what_is_read_otherwise_is_another_store(files: tuple[str, ...], config: DataConfig, tokenizer: Tokenizer):
    Path("b.txt").write_text('{"text": "x"}')
    (before,) = open_stores(config, tokenizer)
    for name in files:
        if not Path(name).exists():
            shutil.copy(f"{Path(name).stem}.{'txt' if name.endswith('jsonl') else 'jsonl'}", name)
    (after,) = open_stores(with_files(config, *files), tokenizer)
    assert after.folder != before.folder
    assert documents_of(after) != documents_of(before)


@pytest.mark.parametrize("settled", [False, True])
def test_an_edit_of_the_same_size_is_noticed(
    settled: bool, config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """Even with the old time of modification, and within one step of the file system's clock."""
    if settled:
        monkeypatch.setattr(hashes, "SETTLED_S", -1e9)
    else:  # all within one step: no time tells the edit
        monkeypatch.setattr(hashes, "_stamp", lambda path: FROZEN)
    (before,) = open_stores(config, tokenizer)
    stat = Path("b.txt").stat()
    Path("b.txt").write_text("FIVE six seven")
    os.utime("b.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (after,) = open_stores(config, tokenizer)
    assert after.folder != before.folder
    assert documents_of(after)[-1][1:5] == list(b"FIVE")


def test_a_named_store_notices_an_edit_that_keeps_size_and_time(config: DataConfig, tokenizer: Tokenizer):
    prepare.prepare(config.train, tokenizer, Path("store"))
    stat = Path("b.txt").stat()
    Path("b.txt").write_text("FIVE six seven")
    os.utime("b.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=r"b\.txt has changed"):
        prepare.prepare(config.train, tokenizer, Path("store"))


def test_a_settled_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashes, "SETTLED_S", -1e9)
    read: list[Path] = []
    monkeypatch.setattr(hashes, "hash_file", lambda path, *how: read.append(path) or hash_file(path))
    file = tmp_path / "a [1]\n*.txt"
    file.write_text("x")
    assert content_hash(file) == content_hash(file) == hash_file(file)
    assert len(read) == 1
    file.write_text("y")
    assert content_hash(file) == hash_file(file)
    assert len(read) == 2
    content_hash(file, lambda: True)
    assert len(read) == 2
    for known in (tmp_path / "cache" / "hashes").iterdir():
        known.write_text("{damaged")
    assert content_hash(file) == hash_file(file)


def test_reading_is_heard_of_and_text_that_was_read_before_is_not_read_again(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """As in the processes that wait for the first one, which share its cache."""
    monkeypatch.setattr(hashes, "SETTLED_S", -1e9)
    config = replace(config, train=(Source(files=("a.jsonl", *(f"{n}.txt" for n in range(40)))),))
    for n in range(40):
        Path(f"{n}.txt").write_text(f"text {n}" * 1000)
    size = sum(os.stat(name).st_size for name in config.train[0].files)
    for read_again in (True, False):
        heard: list[tuple[Any, ...]] = []
        (store,) = open_stores(config, tokenizer, progress=lambda *now, heard=heard: heard.append(now))
        reading = [now for now in heard if now[2:] == ("reading",)]
        assert [done for done, _, _ in reading] == sorted(done for done, _, _ in reading)
        assert reading[-1] == (size, size, "reading")
        assert reading == heard[: len(reading)], "tokenizing comes after it"
        assert (len(heard) > len(reading)) == read_again
        assert list(store.sources.values()) == [hash_file(Path(name)) for name in config.train[0].files]
        monkeypatch.setattr(hashes, "hash_file", None)


def test_a_file_that_cannot_be_read_ends_the_reading_of_the_others(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    def slow(path: Path, stopped: Callable[[], bool], read: Callable[[int], None]) -> str:
        if path.name == "b.txt":
            raise OSError("broken")
        deadline = time.monotonic() + TIMEOUT_S
        while not stopped():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return ""

    monkeypatch.setattr(hashes, "hash_file", slow)
    with pytest.raises(UserError, match=r"b\.txt cannot be read: broken"):
        open_stores(config, tokenizer)


def test_a_file_that_changed_just_now_is_read_again(tmp_path: Path):
    (tmp_path / "a").write_text("x")
    content_hash(tmp_path / "a")
    assert not (tmp_path / "cache" / "hashes").exists()


def test_what_was_not_read_to_its_end_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashes, "SETTLED_S", -1e9)
    (tmp_path / "a").write_text("x")
    content_hash(tmp_path / "a", lambda: True)
    assert content_hash(tmp_path / "a") == hash_file(tmp_path / "a")


# Where nothing can be written -----------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_named_with_both_ways_out(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    advice = r"\nSet the environment variable CAMELID_CACHE, or data\.cache in the recipe, to a folder"
    for place in (tmp_path / "file" / "c", Path("/proc/nohome"), tmp_path / "file"):
        monkeypatch.setenv("CAMELID_CACHE", str(place))
        with pytest.raises(UserError, match=f"the cache {place}/data cannot be written: .*{advice}"):
            open_stores(config, tokenizer)
        with pytest.raises(UserError, match=f"the cache {place} cannot be written: .*{advice}"):
            open_stores(replace(config, cache=str(place)), tokenizer)
    (found,) = open_stores(replace(config, cache=str(tmp_path / "mine")), tokenizer)
    assert found.folder.parent == tmp_path / "mine"


def test_a_store_of_a_cache_that_cannot_be_written_is_read(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    (before,) = open_stores(config, tokenizer)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(stores, "prepare", lambda *given, **options: Store.open(before.folder))
    (after,) = open_stores(config, tokenizer)
    assert after.folder == before.folder


# What is in the cache, and what may go --------------------------------------------------


def test_the_cache_lists_its_stores(config: DataConfig, tokenizer: Tokenizer):
    (first,) = open_stores(config, tokenizer)
    (second,) = open_stores(with_files(config, "b.txt"), tokenizer)
    (ROOT / "mine").mkdir()
    (ROOT / "mine" / "notes.txt").write_text("")
    os.utime(first.folder, (100, 100))
    entries = list_cached(ROOT)
    assert [entry.folder.name for entry in entries] == [second.folder.name, first.folder.name]
    assert [Path(path).name for path in entries[1].sources] == ["a.jsonl", "b.txt"]
    assert entries[1].used == 100
    assert entries[1].bytes == sum(file.stat().st_size for file in first.folder.rglob("*"))
    open_stores(config, tokenizer)
    assert list_cached(ROOT)[0].folder.name == first.folder.name, "it was used last"
    assert list_cached(Path("nowhere")) == []


def test_a_store_in_use_is_never_removed(config: DataConfig, tokenizer: Tokenizer):
    config = replace(config, validation_fraction=0.4)
    (held,) = open_stores(config, tokenizer, "validation")  # the held-out part alone
    (free,) = open_stores(with_files(config, "a.jsonl"), tokenizer)
    free_name = free.folder.name
    del free
    assert {entry.folder.name: in_use(entry) for entry in list_cached(ROOT)} == {
        held.folder.parent.name: True,
        free_name: False,
    }
    assert [entry.folder.name for entry in prune(list_cached(ROOT))] == [free_name]
    assert names() == {held.folder.parent.name}
    del held
    assert len(list(prune(list_cached(ROOT)))) == 1
    assert names() == set()


def test_a_store_that_another_process_reads_is_in_use(config: DataConfig, tokenizer: Tokenizer):
    (store,) = open_stores(config, tokenizer)
    folder = store.folder
    del store
    code = (
        "import sys; from camelid.data.preparation.store import Store; "
        "s = Store.open(sys.argv[1]); print('x', flush=True); input()"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(camelid.__file__).parents[1])},
    )
    with reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"x\n"
        assert list(prune(list_cached(ROOT))) == []
        reader.stdin.write(b"\n")
    assert [entry.folder for entry in prune(list_cached(ROOT))] == [folder.relative_to(Path.cwd())]


def _refusing(monkeypatch: pytest.MonkeyPatch, *modes: str) -> None:
    """Permissions do not stop root: opening an array in one of the modes fails as for a colleague's file."""
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *how: Any, **options: Any) -> Any:
        if path.suffix == ".bin" and mode in modes:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, mode, *how, **options)

    monkeypatch.setattr(Path, "open", refuse)


def test_a_store_that_may_only_be_read_is_in_use_where_it_is_open(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    (store,) = open_stores(config, tokenizer)
    _refusing(monkeypatch, "r+b")
    (entry,) = list_cached(ROOT)
    assert in_use(entry)
    del store
    assert not in_use(entry)


def test_a_store_that_may_not_be_opened_counts_as_in_use(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    open_stores(config, tokenizer)
    _refusing(monkeypatch, "r+b", "rb")
    (entry,) = list_cached(ROOT)
    kept: list[Cached] = []
    assert in_use(entry)
    assert list(prune([entry], kept.append)) == []
    assert kept == [entry]


@pytest.mark.parametrize("whose", ["the cache", "a folder in the store", "a sticky folder"])
def test_a_store_of_a_colleague_is_kept_whole_and_the_others_are_removed(
    whose: str, config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    other = open_stores(replace(config, validation_fraction=0.4), tokenizer)[0].folder.name
    mine = open_stores(config, tokenizer)[0].folder.name
    closed = {"the cache": "data", "a folder in the store": "validation"}.get(whose)
    access, rename = os.access, Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == other:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        return rename(path, target)

    if closed is None:
        monkeypatch.setattr(Path, "rename", refuse)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != closed and access(path, mode))
    before = {path: path.read_bytes() for path in (ROOT / other).rglob("*") if path.is_file()}
    kept: list[Cached] = []
    removed = [entry.folder.name for entry in prune(list_cached(ROOT), kept.append)]
    assert removed == ([] if whose == "the cache" else [mine])
    assert other in {entry.folder.name for entry in kept}
    assert {path: path.read_bytes() for path in (ROOT / other).rglob("*") if path.is_file()} == before


def test_files_that_vanish_while_the_cache_is_listed_are_not_counted(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    folder = open_stores(config, tokenizer)[0].folder
    expected = sum(file.stat().st_size for file in folder.iterdir() if file.name != "tokens.bin")
    (ROOT / ".gone.pruned").mkdir()
    walk = os.walk

    def as_others_remove(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for found in walk(root):
            if root.name == ".gone.pruned":
                root.rmdir()
            (folder / "tokens.bin").unlink(missing_ok=True)
            yield found

    monkeypatch.setattr(os, "walk", as_others_remove)
    assert [(entry.folder.name, entry.bytes) for entry in list_cached(ROOT)] == [(folder.name, expected)]


def test_what_a_killed_process_left_is_removed_and_what_another_makes_is_not(config: DataConfig, tokenizer: Tokenizer):
    for name in (".a.incomplete", ".b.incomplete", ".c.pruned"):
        (ROOT / name / "parts-1").mkdir(parents=True)
        (ROOT / name / "parts-1" / "tokens.bin").write_bytes(b"x")
    with locked(ROOT / ".a.incomplete"):
        assert {entry.kind for entry in list_cached(ROOT)} == {"unfinished"}
        assert {entry.folder.name for entry in prune(list_cached(ROOT))} == {".b.incomplete", ".c.pruned"}
    assert names() == {".a.incomplete"}


def test_what_goes_is_chosen_by_age_or_by_size():
    entries = [
        Cached(Path(str(n)), "store", size, (), used) for n, (size, used) in enumerate([(5, 30), (7, 10), (2, 20)])
    ]
    assert [entry.used for entry in unused_since(entries, 20)] == [10]
    assert [entry.used for entry in beyond(entries, 7)] == [10]
    assert [entry.used for entry in beyond(entries, 6)] == [20, 10]
    assert beyond(entries, 14) == []
    assert len(beyond(entries, 0)) == 3


def test_the_command_lists_and_prunes(config: DataConfig, tokenizer: Tokenizer):
    (store,) = open_stores(config, tokenizer)
    name = store.folder.name
    listed = called("data", "cache")
    assert name[:16] in listed.stdout
    assert "b.txt" in listed.stdout
    assert "in use" in listed.stdout
    lines = called("data", "cache", "--prune", "all").stdout.splitlines()
    assert lines[0].endswith("removed 0, 0 bytes")
    assert lines[1] == f"kept, because in use or not permitted to be removed: {name[:16]}"
    del store
    os.utime(ROOT / name, (time.time() - 5 * 86400,) * 2)
    assert json.loads(called("data", "cache", "--prune", "6d", "--json").stdout)["removed"] == []
    assert json.loads(called("data", "cache", "--prune", "1MB", "--json").stdout)["removed"] == []
    whole = json.loads(called("data", "cache", f"--folder={ROOT}", "--json").stdout)
    assert [(entry["name"], entry["kind"], entry["in_use"]) for entry in whole["entries"]] == [(name, "store", False)]
    (removed,) = json.loads(called("data", "cache", "--prune", "4d", "--json").stdout)["removed"]
    assert removed["name"] == name
    assert not (ROOT / name).exists()
    refused = called("data", "cache", "--prune", "old")
    assert refused.returncode == 2
    assert "--prune old\n         Choose all, an age in days (30d)" in refused.stderr


def test_the_default_folder_is_that_of_the_loader(config: DataConfig):
    assert json.loads(called("data", "cache", "--json").stdout)["folder"] == str(data_cache(config))
