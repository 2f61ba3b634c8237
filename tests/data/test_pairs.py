"""Pairs of answers in rows: both in one row, next to each other, never split."""

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from camelid.data.config import DataConfig, Source
from camelid.data.rows.batch import PairBatch
from camelid.data.rows.best_fit import Overlong
from camelid.data.rows.loader import Loader
from camelid.data.rows.packing import Method, Packing
from camelid.data.rows.pairs import make_pair_plan
from camelid.data.rows.prefetch import prefetched
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer
from data.stores import documents_of, write_store

SOURCE = Source(files=("pairs.jsonl",), kind="preference", template="vicuna_v1.1")


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMELID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config() -> DataConfig:
    draw = random.Random(1)
    rows = [{"prompt": f"ask {n}", "chosen": "y" * draw.randint(1, 9), "rejected": f"no {n}"} for n in range(30)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train=(SOURCE,), sequence_length=600, batch_size=4)


@pytest.mark.parametrize("one_per_row", [False, True])
@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_a_plan_keeps_both_answers_of_every_pair_in_one_row(one_per_row: bool, overlong: Overlong):
    draw = np.random.default_rng(0)
    for size in (2, 9, 16):
        places = draw.integers(1, 12, (40, 2))
        offsets = np.append(0, np.cumsum(places.ravel() + 1))
        plan = make_pair_plan(offsets, size, one_per_row=one_per_row, overlong=overlong)
        assert (np.diff(plan.offsets) % 2 == 0).all()
        starts, lengths = plan.starts.reshape(-1, 2), plan.lengths.astype(int).reshape(-1, 2)
        numbers = np.searchsorted(offsets, starts)
        np.testing.assert_array_equal(offsets[numbers], starts)
        assert (numbers[:, 0] % 2 == 0).all()
        np.testing.assert_array_equal(numbers[:, 1], numbers[:, 0] + 1)
        fits = places.sum(1) <= size
        kept = sorted((numbers[:, 0] // 2).tolist())
        assert kept == [n for n in range(40) if fits[n] or overlong == "truncate"]
        for pair, (chosen, rejected) in zip((numbers[:, 0] // 2).tolist(), lengths.tolist(), strict=True):
            whole = places[pair].tolist()
            if fits[pair]:
                assert [chosen, rejected] == whole
            else:  # as much as fits, divided as evenly as their lengths allow
                assert chosen + rejected == size or min(whole) >= size // 2
                cut = [was for was, length in zip(whole, (chosen, rejected), strict=True) if length < was]
                assert max(cut) == max(whole)
                assert all(length >= min(size // 2, was) for was, length in zip(whole, (chosen, rejected), strict=True))
        in_rows = [lengths.ravel()[a:b] for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)]
        assert max(row.sum() for row in in_rows) <= size
        assert not one_per_row or {len(row) for row in in_rows} == {2}
        assert plan.split == 0
        assert plan.dropped == (2 * np.count_nonzero(~fits) if overlong == "drop" else 0)
        assert plan.truncated == np.count_nonzero(lengths < places[numbers[:, 0] // 2])
        assert plan.lost == places.sum() - lengths.sum()


def test_pairs_are_packed_as_well_as_documents_of_their_lengths():
    places = np.tile([[3, 5], [2, 6], [4, 4]], (5, 1))
    plan = make_pair_plan(np.append(0, np.cumsum(places.ravel() + 1)), 24, one_per_row=False, overlong="split")
    assert plan.num_rows == 5
    assert plan.num_places == 5 * 24


@pytest.mark.parametrize(("size", "overlong"), [(9, "split"), (1, "truncate"), (1, "drop")])
def test_a_pair_that_is_longer_than_a_row_is_never_split(size: int, overlong: Overlong):
    offsets = np.array([0, 3, 6, 12, 18])
    with pytest.raises(
        UserError, match=r"\d of 2 pairs are longer than a row of \d tokens.*the longest has 10\nIncrease"
    ):
        make_pair_plan(offsets, size, one_per_row=False, overlong=overlong)


@pytest.mark.parametrize("method", ["best_fit", "none"])
def test_a_row_holds_the_answers_in_order_with_the_values_of_the_reference(tmp_path: Path, method: Method):
    documents = [[10, 11, 12], [10, 11, 13, 14], [20, 21], [20, 22, 23], [30, 31, 32], [30, 33]]
    store = write_store(tmp_path / "store", documents)
    values = np.arange(6, dtype=np.float32) - 7
    packing = pickle.loads(pickle.dumps(Packing(store, 8, method, pairs=True, reference=values)))
    batch = packing.rows(np.arange(packing.num_rows + 1))
    assert isinstance(batch, PairBatch)
    seen = []
    for row in range(len(batch.tokens)):
        count = int(batch.segments[row].max())
        assert count % 2 == 0
        for segment in range(1, count + 1):
            here = batch.segments[row] == segment
            document = [*batch.tokens[row][here].tolist(), int(batch.targets[row][here][-1])]
            assert documents.index(document) % 2 == (segment + 1) % 2
            expected = [values[documents.index(document)]] + [0.0] * (int(here.sum()) - 1)
            assert batch.reference[row][here].tolist() == expected
            seen.append(document)
        assert not batch.reference[row][batch.segments[row] == 0].any()
    assert sorted(seen) == sorted(documents)
    assert packing.num_rows == (2 if method == "best_fit" else 3)


# Loaders ---------------------------------------------------------------------------------------------


def test_a_loader_of_preferences_packs_pairs_and_no_worker_changes_them(config: DataConfig, tokenizer: Tokenizer):
    loader = Loader(config, tokenizer)
    assert loader.pairs
    assert loader.notes == ()
    documents = documents_of(loader.stores[0])
    values = [np.arange(len(documents), dtype=np.float32) + 1]
    with_values = loader.with_reference(values)
    for step in range(3):
        plain, batch = loader.batch(step), with_values.batch(step)
        assert isinstance(batch, PairBatch)
        assert not hasattr(plain, "reference")
        for name, array in vars(plain).items():
            np.testing.assert_array_equal(array, getattr(batch, name))
        firsts = batch.reference[batch.positions == 0]
        for value, row, column in zip(firsts, *np.nonzero(batch.positions == 0), strict=True):
            if batch.segments[row, column]:
                document = documents[int(value) - 1]
                assert batch.tokens[row, column : column + len(document) - 1].tolist() == document[:-1]
    for other, step in zip(prefetched(with_values, 0, 3, workers=2), range(3), strict=True):
        for name, array in vars(with_values.batch(step)).items():
            np.testing.assert_array_equal(array, getattr(other, name))


def test_a_mixture_of_preferences_has_the_values_of_each_store(config: DataConfig, tokenizer: Tokenizer):
    Path("more.jsonl").write_text(json.dumps({"prompt": "b", "chosen": "c", "rejected": "~"}) + "\n")
    sources = replace(SOURCE, weight=1.0), replace(SOURCE, files=("more.jsonl",), weight=1.0)
    loader = Loader(replace(config, train=sources), tokenizer)
    values = [np.full(store.num_documents, -1.0 - n, np.float32) for n, store in enumerate(loader.stores)]
    batch = loader.with_reference(values).batch(0)
    assert isinstance(batch, PairBatch)
    of_more = np.any(batch.tokens == ord("~"), axis=1)
    assert 0 < np.count_nonzero(of_more) < len(of_more)
    for row, more in enumerate(of_more):
        found = set(batch.reference[row][batch.positions[row] == 0]) - {0.0}
        assert found == ({-2.0} if more else {-1.0})


def test_what_a_row_cannot_hold_is_told_or_refused(config: DataConfig, tokenizer: Tokenizer):
    longest = int((np.diff(Loader(config, tokenizer).stores[0].offsets) - 1).reshape(-1, 2).sum(1).max())
    Loader(replace(config, sequence_length=longest), tokenizer)
    short = replace(config, sequence_length=longest - 1)
    with pytest.raises(UserError, match=f"pairs are longer than a row of {longest - 1} tokens"):
        Loader(short, tokenizer)
    for overlong, what in (("truncate", "truncated"), ("drop", "dropped")):
        (note,) = Loader(replace(short, overlong=overlong), tokenizer).notes
        assert f"of 60 answers of the train data are {what}, because their pairs are longer than a row of" in note


def test_packing_that_separates_pairs_is_refused(config: DataConfig, tokenizer: Tokenizer):
    for stream in ({"packing": "stream"}, {"cross_documents": True}):
        with pytest.raises(
            UserError, match=r"'stream' would separate the two answers.*\nSet data\.packing = 'best_fit'"
        ):
            Loader(replace(config, **stream), tokenizer)
    ready = Source(files=(str(Loader(config, tokenizer).stores[0].folder),), kind="tokens")
    with pytest.raises(UserError, match="'stream' would separate"):  # the default of prepared stores
        Loader(replace(config, train=(ready,)), tokenizer)
    loader = Loader(replace(config, train=(ready,), packing="best_fit"), tokenizer)
    assert loader.pairs
    np.testing.assert_array_equal(loader.batch(0).tokens, Loader(config, tokenizer).batch(0).tokens)


@pytest.mark.parametrize("weight", [None, 1.0])
def test_pairs_and_other_documents_are_not_mixed(config: DataConfig, tokenizer: Tokenizer, weight: float | None):
    Path("text.jsonl").write_text('{"text": "a story"}\n')
    train = replace(SOURCE, weight=weight), Source(files=("text.jsonl",), weight=weight)
    with pytest.raises(UserError, match=r"holds pairs of answers .* also holds other documents\nTrain on sources"):
        Loader(replace(config, train=train), tokenizer)
