import json
import multiprocessing
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camelid.data.preparation.store import MANIFEST, OFFSETS, TOKENS, WEIGHTS, Store, is_store
from camelid.data.rows.packing import Packing
from camelid.disk.locks import locked
from camelid.errors import UserError
from data.stores import documents_of, write_store


def test_documents_and_weights_come_back(tmp_path: Path):
    chance = random.Random(0)
    documents = [[chance.randrange(70_000) for _ in range(chance.randint(1, 9))] for _ in range(50)]
    weights = [[chance.choice([0.0, 1.0, 0.5, 2.25]) for _ in document] for document in documents]
    store = write_store(tmp_path / "s", documents, weights)
    assert documents_of(store) == documents
    assert (store.num_documents, store.num_tokens) == (50, sum(map(len, documents)))
    flat = [weight for part in weights for weight in part]
    assert store.weights(0, store.num_tokens).tolist() == flat
    assert store.weights(7, 31).tolist() == flat[7:31]


@pytest.mark.parametrize("first", [0.0, 1.0, 0.5])
def test_weights_that_are_alike_take_no_file(tmp_path: Path, first: float):
    documents = [[1, 2, 3], [4], [5, 6]]
    weights = [[first, 1.0, 1.0], [first], [first, 1.0]]
    store = write_store(tmp_path / "s", documents, weights)
    assert not (tmp_path / "s" / WEIGHTS).exists()
    assert store.weights(0, 6).tolist() == [first, 1, 1, first, first, 1]
    assert store.weights(1, 4).tolist() == [1, 1, first]


@pytest.mark.parametrize("weights", [[[0, 1, 0], [0, 1]], [[1, 1, 1], [0, 1]], [[0, 0.5, 0.5], [0, 0.5]]])
def test_weights_that_differ_take_one(tmp_path: Path, weights: list[list[float]]):
    store = write_store(tmp_path / "s", [[1, 2, 3], [4, 5]], weights)
    assert (tmp_path / "s" / WEIGHTS).stat().st_size == 5
    assert store.weights(0, 5).tolist() == [*weights[0], *weights[1]]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_the_smallest_type_of_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: type):
    store = write_store(tmp_path / "s", [[0, vocab_size - 1]], vocab_size=vocab_size)
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [0, vocab_size - 1]


def test_a_store_without_documents_opens(tmp_path: Path):
    store = write_store(tmp_path / "s", [])
    assert (store.num_documents, store.num_tokens) == (0, 0)
    assert Packing(store, 8).num_rows == 0


@pytest.mark.parametrize(("tokens", "message"), [([3, 100], "token id 100 is outside"), ([-1, 3], "token id -1")])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, tokens: list[int], message: str):
    with pytest.raises(UserError, match=message):
        write_store(tmp_path / "s", [tokens], vocab_size=100)


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_weights_that_mean_nothing_are_refused(tmp_path: Path, weight: float):
    with pytest.raises(UserError, match="a token has the loss weight"):
        write_store(tmp_path / "s", [[1, 2]], [[0, weight]])


def test_more_weights_than_codes_are_refused(tmp_path: Path):
    kept = np.arange(256, dtype=np.float32) / 7
    store = write_store(tmp_path / "s", [[1] * 256], [kept.tolist()])
    np.testing.assert_array_equal(store.weights(0, 256), kept)
    with pytest.raises(UserError, match="more than 256 different loss weights"):
        write_store(tmp_path / "t", [[1] * 257], [[n / 7 + 0.01 for n in range(257)]])


@pytest.mark.parametrize("name", [TOKENS, OFFSETS, WEIGHTS])
def test_a_damaged_store_is_named(tmp_path: Path, name: str):
    store = write_store(tmp_path / "s", [[1, 2, 3], [4, 5]], [[0, 0, 1], [0, 1]])
    store.verify()
    path = tmp_path / "s" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name} has {len(content) - 1} bytes, but the manifest lists {len(content)}"):
        Store.open(tmp_path / "s")
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError, match=f"{name} does not have the checksum in the manifest"):
        Store.open(tmp_path / "s").verify()
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Store.open(tmp_path / "s")


def test_a_folder_of_something_else_is_no_store(tmp_path: Path):
    assert not is_store(tmp_path / "nothing")
    for content in ("{", "[]", '{"format": "other"}'):
        (tmp_path / MANIFEST).write_text(content)
        assert not is_store(tmp_path)
        with pytest.raises(UserError, match="is not a prepared store"):
            Store.open(tmp_path)


def change_manifest(store: Store, change: Callable[[dict[str, Any]], Any]) -> None:
    change(store.manifest)
    (store.folder / MANIFEST).write_text(json.dumps(store.manifest))


def test_another_version_is_refused(tmp_path: Path):
    for version in (99, None):
        store = write_store(tmp_path / f"{version}", [[1, 2]])
        change_manifest(store, lambda manifest, version=version: manifest.update(version=version))
        with pytest.raises(UserError, match=f"store of version {version}"):
            Store.open(store.folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.pop("num_tokens"), "KeyError('num_tokens')"),
        (lambda m: m.pop("weights"), "KeyError('weights')"),
        (lambda m: m.update(weights={}), "KeyError('first')"),
        (lambda m: m.update(weights={"levels": ["much"]}), "could not convert string"),
        (lambda m: m.update(files=[]), "AttributeError"),
        (lambda m: m["files"].pop(OFFSETS), "'tokens.bin': 12} bytes"),
        (lambda m: m["files"].update({"other.bin": {"bytes": 1}}), "'other.bin': 1} bytes"),
        (lambda m: m.update(num_tokens=4), "not {'tokens.bin': 16"),
        (lambda m: m.update(num_tokens="3"), "documents of 3 tokens"),
        (lambda m: m.update(num_documents=-1), "-1 documents"),
        (lambda m: m.update(vocab_size=100), "not {'tokens.bin': 6"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], problem: str):
    store = write_store(tmp_path / "s", [[1, 2], [3]])
    change_manifest(store, change)
    with pytest.raises(UserError, match=r"manifest\.json is inconsistent") as caught:
        Store.open(store.folder)
    assert problem in caught.value.problem


def test_offsets_end_where_the_tokens_do(tmp_path: Path):
    store = write_store(tmp_path / "s", [[1, 2], [3]])
    for offsets in ([0, 2, 4], [1, 2, 3]):
        np.array(offsets, "<i8").tofile(store.folder / OFFSETS)
        with pytest.raises(UserError, match=rf"offsets\.bin goes from {offsets[0]} to {offsets[-1]}, not 0 to 3"):
            Store.open(store.folder)


def test_another_tokenizer_is_refused(tmp_path: Path):
    store = write_store(tmp_path / "s", [[1, 2]], tokenizer="one")
    store.check_tokenizer("one", "tokenizer.json")
    with pytest.raises(UserError, match=r"prepared with another tokenizer than tokenizer\.json"):
        store.check_tokenizer("two", "tokenizer.json")


def test_a_copy_in_another_process_is_the_same_files(tmp_path: Path):
    store = write_store(tmp_path / "s", [[1, 2, 3]] * 10_000)
    content = pickle.dumps(store)
    assert len(content) < 1000
    assert documents_of(pickle.loads(content)) == documents_of(store)


def test_the_fingerprint_is_of_what_it_holds(tmp_path: Path):
    one = write_store(tmp_path / "1", [[1, 2], [3]])
    assert one.fingerprint == write_store(tmp_path / "2", [[1, 2], [3]]).fingerprint
    assert one.fingerprint != write_store(tmp_path / "3", [[1], [2, 3]]).fingerprint
    assert one.fingerprint != write_store(tmp_path / "4", [[1, 2], [3]], [[1, 1], [1]]).fingerprint


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell anonymous memory")


def test_a_huge_store_read_at_random_takes_no_memory_of_its_own(tmp_path: Path):
    size = 10 * 2**30 // 2
    document = 5000
    folder = tmp_path / "s"
    offsets = np.append(np.arange(0, size, document, dtype="<i8"), size)
    folder.mkdir()
    with (folder / TOKENS).open("wb") as file:
        file.truncate(2 * size)  # zeros that take no disk
    offsets.tofile(folder / OFFSETS)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": ""} for name in (TOKENS, OFFSETS)}
    about = {"format": "camelid store", "version": 1, "vocab_size": 1000, "num_documents": len(offsets) - 1}
    about |= {"num_tokens": size, "weights": {"first": 0.0}, "files": files, "tokenizer": "none"}
    (folder / MANIFEST).write_text(json.dumps(about))
    del offsets
    chance = np.random.default_rng(0)
    for method in ("stream", "best_fit"):
        packing = Packing(Store.open(folder), 2048, method)
        packing.rows(np.arange(8))
        before = anonymous_bytes()
        for _ in range(300):
            packing.rows(chance.integers(0, packing.num_rows, 8))
        assert anonymous_bytes() - before < 8 * 2**20, method


def _hold(folder: Path, taken, release) -> None:
    with locked(folder):
        taken.set()
        release.wait(600)
        time.sleep(0.5)  # while another process comes to the lock
        (folder / "made").touch()


def test_a_folder_is_held_by_one_process_until_it_lets_go_or_dies(tmp_path: Path):
    spawn = multiprocessing.get_context("spawn")
    folder = tmp_path / "held"
    for dies in (False, True):
        taken, release = spawn.Event(), spawn.Event()
        other = spawn.Process(target=_hold, args=(folder, taken, release))
        other.start()
        assert taken.wait(600)
        if dies:
            os.kill(other.pid or 0, 9)
        else:
            release.set()
        with locked(folder):
            assert (folder / "made").exists() is not dies
            (folder / "made").unlink(missing_ok=True)
        other.join()


def test_a_folder_that_its_holder_removed_is_made_again(tmp_path: Path):
    folder = tmp_path / "held"
    with locked(folder):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    with locked(folder):
        assert folder.is_dir()
