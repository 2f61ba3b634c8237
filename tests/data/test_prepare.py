import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest

import camelid
from camelid.data.config import Source
from camelid.data.preparation import concatenation, partial_stores
from camelid.data.preparation import prepare as preparing
from camelid.data.preparation.prepare import prepare
from camelid.data.preparation.store import MANIFEST, VALIDATION, VERSION, Store
from camelid.data.readers import lines
from camelid.data.readers.records import Record
from camelid.disk.locks import locked
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer, load_tokenizer
from data.stores import documents_of, write_store
from runs import TIMEOUT_S
from text.tiny import BOS, EOS, save_byte_tokenizer

SOURCE_ROOT = str(Path(camelid.__file__).parents[1])


def write_documents(name: str, count: int, length: int = 20) -> list[str]:
    texts = ["".join(random.Random(f"{name} {n}").choices(ascii_lowercase, k=length + n % 7)) for n in range(count)]
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def ids(texts: list[str]) -> list[list[int]]:
    return [[BOS, *text.encode(), EOS] for text in texts]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK", 1000)


@pytest.fixture
def sources() -> tuple[Source, ...]:
    write_documents("a.jsonl", 200)
    write_documents("b.jsonl", 100)
    Path("c.txt").write_text("one document\nof two lines")
    return Source(files=("a.jsonl", "c.txt")), Source(files=("b.jsonl",), add_bos=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_holds_the_documents_in_their_order(tokenizer: Tokenizer, sources):
    store = prepare(sources, tokenizer, Path("store"))
    expected = ids([*write_documents("a.jsonl", 200), "one document\nof two lines"])
    expected += [document[1:] for document in ids(write_documents("b.jsonl", 100))]
    assert documents_of(store) == expected
    assert store.manifest["tokenizer"] == tokenizer.fingerprint
    assert store.manifest["counts"] == {"rows": 301, "unreadable": 0, "empty": 0, "problems": []}
    store.verify()
    assert sorted(path.name for path in Path().iterdir()) == ["a.jsonl", "b.jsonl", "c.txt", "store"]


def test_any_number_of_workers_makes_the_same_store(tokenizer: Tokenizer, sources):
    for workers in (0, 1, 3):
        prepare(sources, tokenizer, Path(f"store{workers}"), workers=workers, validation_fraction=0.1, seed=3)
    assert contents(Path("store0")) == contents(Path("store1")) == contents(Path("store3"))


def test_chats_and_fields_keep_their_weights(tokenizer: Tokenizer):
    Path("a.jsonl").write_text('{"q": "ab", "a": "cd"}\n{"q": "e", "a": "f"}\n')
    store = prepare([Source(files=("a.jsonl",), kind="fields", fields="[q],a")], tokenizer, Path("store"))
    assert documents_of(store) == [[BOS, *b"abcd", EOS], [BOS, *b"ef", EOS]]
    assert store.weights(0, store.num_tokens).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]


def test_a_store_that_is_there_is_opened(tokenizer: Tokenizer, sources, monkeypatch: pytest.MonkeyPatch):
    prepare(sources, tokenizer, Path("store"))
    before = contents(Path("store"))
    monkeypatch.setattr(preparing, "make_partial_stores", None)
    assert prepare(sources, tokenizer, Path("store")).num_documents == 301
    os.utime("a.jsonl")  # the same text, written again
    assert prepare(sources, tokenizer, Path("store")).num_documents == 301
    assert contents(Path("store")) == before


def test_a_changed_source_is_noticed(tokenizer: Tokenizer, sources):
    prepare(sources, tokenizer, Path("store"))
    text = Path("b.jsonl").read_text()
    Path("b.jsonl").write_text(text.replace("a", "b", 1))
    with pytest.raises(UserError, match=r"store was prepared before, and .*b\.jsonl has changed\nUse --overwrite"):
        prepare(sources, tokenizer, Path("store"))
    Path("store/diary.txt").write_text("dear")
    with pytest.raises(UserError, match=r"store holds diary\.txt in addition to its store"):
        prepare(sources, tokenizer, Path("store"), overwrite=True)
    Path("store/diary.txt").unlink()
    store = prepare(sources, tokenizer, Path("store"), overwrite=True)
    assert documents_of(store)[201:] == [
        [*json.loads(line)["text"].encode(), EOS] for line in Path("b.jsonl").read_text().splitlines()
    ]


def test_other_options_and_files_are_named(tokenizer: Tokenizer, sources):
    store = Path("store")
    prepare(sources, tokenizer, store)
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"sources": sources[:1]}, "sources was"),
        ({"sources": (sources[0], dataclasses.replace(sources[1], add_bos=True))}, "add_bos was False and is now True"),
        ({"tokenizer": load_tokenizer(save_byte_tokenizer(Path("other"), adds_bos=False))}, "tokenizer was"),
        ({"validation_fraction": 0.5}, r"validation_fraction was 0\.0 and is now 0\.5"),
    )
    for change, message in changes:
        with pytest.raises(UserError, match=f"prepared before, and {message}"):
            prepare(**{"sources": sources, "tokenizer": tokenizer, "folder": store} | change)
    globbed = [Source(files=("*.jsonl",))]
    prepare(globbed, tokenizer, Path("globbed"))
    write_documents("d.jsonl", 1)
    with pytest.raises(UserError, match=r"d\.jsonl was added to its sources"):
        prepare(globbed, tokenizer, Path("globbed"))
    Path("d.jsonl").unlink()
    Path("b.jsonl").unlink()
    with pytest.raises(UserError, match=r"b\.jsonl was removed from its sources"):
        prepare(globbed, tokenizer, Path("globbed"))


def test_weights_of_a_mixture_do_not_change_a_store(tokenizer: Tokenizer):
    write_documents("a.jsonl", 3)
    prepare([Source(files=("a.jsonl",), weight=1.0)], tokenizer, Path("store"))
    prepare([Source(files=("a.jsonl",), weight=3.0)], tokenizer, Path("store"))


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("tokens.bin", lambda path: path.unlink(), "is missing"),
        (MANIFEST, lambda path: path.write_text('{"format": "camelid store"}'), "store of version None"),
        (
            MANIFEST,
            lambda path: path.write_text(path.read_text().replace('"path"', '"t"')),
            "its manifest does not describe the sources",
        ),
    ],
)
def test_a_damaged_store_is_named_and_replaced(
    tokenizer: Tokenizer, sources, name: str, change: Callable[[Path], Any], problem: str
):
    prepare(sources, tokenizer, Path("store"))
    whole = contents(Path("store"))
    change(Path("store") / name)
    with pytest.raises(UserError, match=problem):
        prepare(sources, tokenizer, Path("store"))
    prepare(sources, tokenizer, Path("store"), overwrite=True)
    assert contents(Path("store")) == whole


def test_a_link_stays_one_and_a_disk_is_refused(tokenizer: Tokenizer, sources, monkeypatch: pytest.MonkeyPatch):
    Path("large").mkdir()
    Path("store").symlink_to("large")
    prepare(sources, tokenizer, Path("store"))
    assert Path("store").is_symlink()
    assert Store.open("large").num_documents == 301
    Path("disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(UserError, match=r"disk is a mount point.*\nChoose .*disk/store"):
        prepare(sources, tokenizer, Path("disk"))


def test_a_folder_of_something_else_is_left_alone(tokenizer: Tokenizer, sources):
    Path("mine").mkdir()
    Path("mine/diary.txt").write_text("dear")
    for folder in ("mine", "c.txt"):
        with pytest.raises(UserError, match="holds something other than a store"):
            prepare(sources, tokenizer, Path(folder), overwrite=True)
    assert Path("mine/diary.txt").read_text() == "dear"
    Path("empty").mkdir()
    assert prepare(sources, tokenizer, Path("empty")).num_documents == 301


def test_a_file_that_is_written_meanwhile_is_refused(tokenizer: Tokenizer, sources):
    def write(done: int, total: int) -> None:
        if done == total:
            with Path("a.jsonl").open("a") as file:
                file.write('{"text": "more"}\n')

    with pytest.raises(UserError, match=r"while the sources were read, .*a\.jsonl has changed"):
        prepare(sources, tokenizer, Path("store"), progress=write)
    assert not Path("store").exists()


def test_an_error_does_not_wait_for_the_hashes_of_all_files(
    tokenizer: Tokenizer, sources, monkeypatch: pytest.MonkeyPatch
):
    ends: list[bool] = []

    def hash_slowly(path: Path, stopped: Callable[[], bool]) -> str:
        deadline = time.monotonic() + TIMEOUT_S
        while not stopped() and time.monotonic() < deadline:
            time.sleep(0.01)
        ends.append(stopped())
        return ""

    monkeypatch.setattr(preparing, "content_hash", hash_slowly)
    Path("a.jsonl").write_text("broken")
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: not JSON"):
        prepare(sources, tokenizer, Path("store"))
    assert ends == [True] * 3
    assert not Path(".store.incomplete").exists(), "there was nothing to go on from"


def test_a_tokenizer_that_changed_after_it_was_loaded_is_named(sources):
    folder = save_byte_tokenizer(Path("own"))
    tokenizer = load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"tokenizer\.json has changed since it was loaded"):
            prepare(sources, tokenizer, Path("store"), workers=workers)


def test_a_process_keeps_few_files_open(tokenizer: Tokenizer):
    write_documents("a.jsonl", 2000)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    try:
        store = prepare([Source(files=("a.jsonl",))], tokenizer, Path("store"), validation_fraction=0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert store.num_documents == 1800


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_disk_does_not_take_is_an_error_and_the_next_run_goes_on(tokenizer: Tokenizer, workers: int):
    write_documents("a.jsonl", 200)
    Path("b.txt").write_text("x" * 50_000)
    source = [Source(files=("a.jsonl", "b.txt"))]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"store.* cannot be written: .*File too large"):
            prepare(source, tokenizer, Path("store"), workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    begun = Path().glob(".store.incomplete/parts-*/.0*")
    seen: list[tuple[int, int]] = []
    store = prepare(
        source, tokenizer, Path("store"), progress=lambda done, total: seen.append((done, len(list(begun))))
    )
    assert seen[0] == (Path("a.jsonl").stat().st_size, 0), "parts are kept, and what was begun of one takes no room"
    assert store.num_documents == 201


def test_who_waited_for_another_store_leaves_nothing(tokenizer: Tokenizer, sources, monkeypatch: pytest.MonkeyPatch):
    prepare(sources[:1], tokenizer, Path("other"))
    work = Path(".store.incomplete").absolute()
    asked = threading.Event()
    existing = preparing.existing_store

    def ask(*arguments: Any) -> Store | None:
        found = existing(*arguments)
        asked.set()
        return found

    monkeypatch.setattr(preparing, "existing_store", ask)
    with ThreadPoolExecutor(1) as pool:
        with locked(work):
            waiting = pool.submit(prepare, sources, tokenizer, Path("store"))
            assert asked.wait(TIMEOUT_S)
            Path("other").rename("store")
        with pytest.raises(UserError, match="store was prepared before, and sources was"):
            waiting.result()
    assert not work.exists()


def test_progress_counts_the_bytes_of_the_sources(tokenizer: Tokenizer, sources):
    seen: list[tuple[int, int]] = []
    prepare(sources, tokenizer, Path("store"), workers=2, progress=lambda *now: seen.append(now))
    assert seen == sorted(seen)
    assert seen[0][0] == 0
    assert {total for _, total in seen} == {sum(Path(name).stat().st_size for name in ("a.jsonl", "b.jsonl", "c.txt"))}
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) > 5


# --- killed and begun again


COMMAND = """
import signal, sys, threading, time
from multiprocessing import resource_tracker
from pathlib import Path
from camelid.data.preparation import partial_stores
from camelid.data.readers import lines
from camelid.data.config import Source
from camelid.data.preparation.prepare import prepare
from camelid.text.tokenizer import load_tokenizer

if "stuck" in sys.argv:
    partial_stores._batches = lambda records: time.sleep(600)
if "missed" in sys.argv:
    # The kernel gives the signal to the other thread: it does not interrupt what the main one waits in.
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    resource_tracker.ensure_running()  # its start would unblock the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
if __name__ == "__main__":
    lines.BLOCK = 1000
    def progress(done, total):
        print(done, total, flush=True)
        if done > total // 3 and "slow" in sys.argv:
            time.sleep(600)
    prepare([Source(files=("a.jsonl",))], load_tokenizer(sys.argv[1]), Path("store"), workers=int(sys.argv[2]),
            progress=progress, validation_fraction=0.2)
"""


def start(tokenizer: Tokenizer, workers: int, *words: str, guarded: bool = True) -> subprocess.Popen:
    Path("command.py").write_text(COMMAND if guarded else COMMAND.replace('__name__ == "__main__"', "True"))
    command = [sys.executable, "command.py", str(tokenizer.files[0].parent), str(workers), *words]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": SOURCE_ROOT}, stdout=-1, stderr=-1, text=True)


def until_a_third(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        done, total = map(int, line.split())
        if done > total // 3:
            return
    raise AssertionError(process.stderr.read() if process.stderr else "")


def children(process: subprocess.Popen) -> list[int]:
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_begun_again_gives_the_same_store(tokenizer: Tokenizer, workers: int):
    write_documents("a.jsonl", 300)
    process = start(tokenizer, workers, "slow")
    until_a_third(process)
    process.kill()
    process.communicate()
    assert not Path("store").exists()
    left = {path.name for path in Path(".store.incomplete").glob("parts-*/[0-9]*")}
    assert left
    # One that was begun, and one that the machine did not keep.
    (made,) = Path(".store.incomplete").glob("parts-*")
    (made / ".000099.1").mkdir()
    damaged = made / min(left) / "tokens.bin"
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    process = start(tokenizer, workers)
    out, err = process.communicate()
    assert process.returncode == 0, err
    first = int(out.split()[0])
    assert first > 0 or len(left) == 1, "parts that were there are made again"
    prepare([Source(files=("a.jsonl",))], tokenizer, Path("whole"), validation_fraction=0.2)
    assert contents(Path("store")) == contents(Path("whole"))
    assert not Path(".store.incomplete").exists()


def test_parts_of_other_chunks_are_of_no_use(tokenizer: Tokenizer, sources, monkeypatch: pytest.MonkeyPatch):
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(sources, tokenizer, Path("store"), progress=interrupt)
    assert list(Path().glob(".store.incomplete/parts-*/0*"))
    monkeypatch.setattr(lines, "BLOCK", 1500)  # as another version of camelid may have it
    prepare(sources, tokenizer, Path("store"))
    prepare(sources, tokenizer, Path("whole"))
    assert contents(Path("store")) == contents(Path("whole"))


def test_what_was_left_of_other_files_is_of_no_use(tokenizer: Tokenizer):
    write_documents("a.jsonl", 300)
    process = start(tokenizer, 0, "slow")
    until_a_third(process)
    process.kill()
    process.communicate()
    write_documents("a.jsonl", 299)
    process = start(tokenizer, 0)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.split()[0] == "0"
    assert Store.open("store").num_documents + Store.open(Path("store") / VALIDATION).num_documents == 299


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_in_the_midst_of_a_part(tokenizer: Tokenizer, number: signal.Signals):
    write_documents("a.jsonl", 300)
    process = start(tokenizer, 2, "stuck")
    until(lambda: len(list(Path().glob(".store.incomplete/parts-*/.0*"))) == 2)
    workers = [pid for pid in children(process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    process.send_signal(number)
    process.wait(TIMEOUT_S)
    until(lambda: all(map(gone, workers)))
    process.communicate()
    assert not Path("store").exists()


def test_an_interrupt_that_does_not_wake_the_main_thread_ends_it_too(tokenizer: Tokenizer):
    write_documents("a.jsonl", 300)
    process = start(tokenizer, 2, "stuck", "missed")
    until(lambda: len(list(Path().glob(".store.incomplete/parts-*/.0*"))) == 2)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in err


def test_a_worker_that_was_killed_is_named(tokenizer: Tokenizer):
    write_documents("a.jsonl", 300)
    process = start(tokenizer, 2, "stuck")
    until(lambda: len(list(Path().glob(".store.incomplete/parts-*/.0*"))) == 2)
    worker = next(pid for pid in children(process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert "WorkerEnded: a process that prepares data ended unexpectedly (exit code -9)" in err
    assert process.returncode == 1


def test_what_is_left_by_a_process_that_was_killed_at_its_end_goes(
    tokenizer: Tokenizer, sources, monkeypatch: pytest.MonkeyPatch
):
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if path.name == ".store.incomplete":
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(sources, tokenizer, Path("store"))
    whole = contents(Path("store"))
    assert list(Path(".store.incomplete").glob("parts-*/0*"))
    prepare(sources, tokenizer, Path("store"))
    assert contents(Path("store")) == whole
    assert not Path(".store.incomplete").exists()


def test_a_script_without_a_guard_is_told_so(tokenizer: Tokenizer):
    write_documents("a.jsonl", 300)
    process = start(tokenizer, 2, guarded=False)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert "Put its code behind `if __name__ == '__main__':`" in err
    assert "a process that prepares data ended unexpectedly (exit code 1)" in err


def test_an_error_in_a_worker_is_the_users(tokenizer: Tokenizer):
    write_documents("a.jsonl", 100)
    with Path("a.jsonl").open("a") as file:
        file.write("{broken\n")
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"a\.jsonl, line 101: not JSON"):
            prepare([Source(files=("a.jsonl",))], tokenizer, Path("store"), workers=workers)


def test_few_tokens_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(partial_stores, "CHARACTERS_AT_ONCE", 10)
    ids = np.arange(5, dtype=np.int32)
    for value in ("x" * 5, ids, (ids, ids * 1.0), {"a": "xx", "b": ["xxx", 1]}):
        sizes = [len(batch) for batch in partial_stores._batches([Record(value, "")] * 6)]
        assert sizes == ([1] * 6 if isinstance(value, tuple) else [2, 2, 2])


# --- what is left out


def test_unreadable_rows_are_counted_over_all_chunks(tokenizer: Tokenizer):
    texts = write_documents("a.jsonl", 100)
    rows = Path("a.jsonl").read_text().splitlines()
    rows[3] = rows[50] = rows[97] = "{"
    Path("a.jsonl").write_text("\n".join(rows))
    source = Source(files=("a.jsonl",), max_unreadable=0.03)
    store = prepare([source], tokenizer, Path("store"), workers=2)
    counts = store.manifest["counts"]
    assert (counts["rows"], counts["unreadable"]) == (100, 3)
    assert [problem.split(":")[0] for problem in counts["problems"]] == [f"a.jsonl, line {n}" for n in (4, 51, 98)]
    assert documents_of(store) == ids([text for n, text in enumerate(texts) if n not in (3, 50, 97)])
    with pytest.raises(UserError, match=r"3 of 100 records are unreadable.*line 4.*line 51.*line 98"):
        prepare([Source(files=("a.jsonl",), max_unreadable=0.02)], tokenizer, Path("other"))


def test_documents_without_text_are_counted_and_left_out(tokenizer: Tokenizer):
    Path("a.jsonl").write_text('{"text": ""}\n{"text": "ab"}\n{"text": ""}\n')
    store = prepare([Source(files=("a.jsonl",))], tokenizer, Path("store"))
    assert documents_of(store) == ids(["ab"])
    assert store.manifest["counts"]["empty"] == 2


def test_sources_without_text_are_an_error(tokenizer: Tokenizer):
    Path("a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"there is no text in a\.jsonl"):
        prepare([Source(files=("a.jsonl",))], tokenizer, Path("store"))


def test_one_file_in_two_sources_is_refused_unless_something_else_is_made_of_it(tokenizer: Tokenizer):
    write_documents("a.jsonl", 3)
    with pytest.raises(UserError, match=r"a\.jsonl is named more than once"):
        prepare([Source(files=("a.jsonl",)), Source(files=("*.jsonl",))], tokenizer, Path("store"))
    sources = [Source(files=("a.jsonl",)), Source(files=("a.jsonl",), add_eos=False)]
    assert prepare(sources, tokenizer, Path("store")).num_documents == 6


# --- held out


def split(store: Store) -> tuple[list[list[int]], list[list[int]]]:
    return documents_of(store), documents_of(Store.open(store.folder / VALIDATION))


@pytest.mark.parametrize(("fraction", "held"), [(0.2, 40), (0.0001, 1), (0.9999, 199)])
def test_a_share_of_the_documents_is_held_out(tokenizer: Tokenizer, monkeypatch, fraction: float, held: int):
    texts = write_documents("a.jsonl", 200)
    monkeypatch.setattr(concatenation, "TOKENS_AT_ONCE", 100)
    kept, held_out = split(prepare([Source(files=("a.jsonl",))], tokenizer, Path("s"), validation_fraction=fraction))
    assert len(held_out) == held
    assert sorted(kept + held_out) == sorted(ids(texts))
    order = {tuple(document): n for n, document in enumerate(ids(texts))}
    for part in (kept, held_out):
        places = [order[tuple(document)] for document in part]
        assert places == sorted(places)
    if held == 40:
        places = [order[tuple(document)] for document in held_out]
        assert max(np.diff(places)) > 8, "they should be drawn, not counted off"


def test_a_pair_of_a_preference_is_held_out_together(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    rows = [{"prompt": f"ask {n:02}", "chosen": "yes", "rejected": "no"} for n in range(50)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(concatenation, "TOKENS_AT_ONCE", 100)
    source = Source(files=("a.jsonl",), kind="preference", template="vicuna_v1.1")
    kept, held_out = split(prepare([source], tokenizer, Path("s"), validation_fraction=0.2))
    assert (len(kept), len(held_out)) == (80, 20)
    for documents in (kept, held_out):
        asked = [bytes(token for token in document if token < 256).partition(b"ask ")[2][:2] for document in documents]
        assert asked[::2] == asked[1::2]


def test_another_seed_holds_out_others(tokenizer: Tokenizer):
    write_documents("a.jsonl", 100)
    source = [Source(files=("a.jsonl",))]
    made = [prepare(source, tokenizer, Path(f"{n}"), validation_fraction=0.1, seed=n) for n in range(2)]
    assert split(made[0])[1] != split(made[1])[1]


def test_of_a_single_document_the_end_is_held_out(tokenizer: Tokenizer):
    Path("a.txt").write_text("abcdefghijklmnopqr")
    kept, held_out = split(prepare([Source(files=("a.txt",))], tokenizer, Path("s"), validation_fraction=0.25))
    assert kept == [[BOS, *b"abcdefghijklmn"]]
    assert held_out == [[*b"opqr", EOS]]


def test_too_little_to_hold_out_is_an_error(tokenizer: Tokenizer):
    Path("a.txt").write_text("a")
    with pytest.raises(UserError, match="a single document of 3 tokens cannot be divided"):
        prepare([Source(files=("a.txt",))], tokenizer, Path("s"), validation_fraction=0.25)


def test_a_store_is_a_source(tokenizer: Tokenizer):
    write_store(Path("old"), [[1, 2, 3], [4, 5]], [[0, 0.5, 1], [0, 0]], tokenizer.vocab_size, tokenizer.fingerprint)
    store = prepare([Source(files=("old",), kind="tokens")], tokenizer, Path("new"))
    assert documents_of(store) == [[1, 2, 3], [4, 5]]
    assert store.weights(0, 5).tolist() == [0, 0.5, 1, 0, 0]


@pytest.mark.parametrize("files", [("other",), ("own", "other"), ("o*",)], ids=str)
def test_a_store_of_another_tokenizer_is_no_source(files: tuple[str, ...], tokenizer: Tokenizer):
    Path("a.txt").write_text("text")
    for name, adds_bos in (("own", True), ("other", False)):
        made_with = tokenizer if adds_bos else load_tokenizer(save_byte_tokenizer(Path("tokenizer"), adds_bos=False))
        prepare([Source(files=("a.txt",))], made_with, Path(name))
    with pytest.raises(UserError, match=r"^other was prepared with another tokenizer than"):
        prepare([Source(files=files, kind="tokens")], tokenizer, Path("new"))
    assert not Path("new").exists()
    assert prepare([Source(files=("own",), kind="tokens")], tokenizer, Path("new")).num_tokens == 6


CHATML = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "added_tokens_decoder": {
        "258": {"content": "<|im_start|>", "special": True},
        "259": {"content": "<|im_end|>", "special": True},
    },
}


def test_a_store_of_the_same_vocabulary_without_the_declared_tokens_is_refused():
    """As camelid made it when only tokenizer.json decided ids, and its fingerprint was the hash of that file."""
    Path("a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    chats = [Source(files=("a.jsonl",), kind="chat", template="chatml")]
    new = load_tokenizer(save_byte_tokenizer(Path("new"), config=CHATML))
    plain = load_tokenizer(save_byte_tokenizer(Path("plain")))
    assert plain.fingerprint == plain.vocabulary_hash == new.vocabulary_hash
    old = dataclasses.replace(new, backend=plain.backend, fingerprint=new.vocabulary_hash)
    letters = prepare(chats, old, Path("store"))
    with pytest.raises(UserError, match=r"store was prepared before, and tokenizer was '"):
        prepare(chats, new, Path("store"))
    with pytest.raises(UserError, match=r"^store was prepared with another tokenizer"):
        prepare([Source(files=("store",), kind="tokens")], new, Path("again"))
    assert prepare(chats, new, Path("fresh")).num_tokens < letters.num_tokens


def test_a_store_of_chats_whose_training_flags_were_ignored_is_refused(tokenizer: Tokenizer):
    rows = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    Path("a.jsonl").write_text(rows)
    chats = [Source(files=("a.jsonl",), kind="chat", template="vicuna_v1.1")]
    prepare(chats, tokenizer, Path("store"))
    manifest = json.loads(Path("store", MANIFEST).read_text())
    manifest["prepared"]["options"].pop("version_of_messages", None)
    Path("store", MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="version_of_messages was None and is now 2"):
        prepare(chats, tokenizer, Path("store"))


def test_the_manifest_says_where_everything_came_from(tokenizer: Tokenizer, sources):
    manifest = json.loads((prepare(sources, tokenizer, Path("store")).folder / MANIFEST).read_text())
    (first, _), (second,) = manifest["prepared"]["files"]
    assert first["path"] == str(Path("a.jsonl").resolve())
    assert second["bytes"] == Path("b.jsonl").stat().st_size
    assert len(second["sha256"]) == 64
    assert manifest["prepared"]["options"]["sources"][1]["add_bos"] is False
    assert manifest["version"] == VERSION
