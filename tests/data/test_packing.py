import itertools
import pickle
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from camelid.data.rows.batch import Batch
from camelid.data.rows.packing import Method, Packing
from data.stores import write_store

FIELDS = ("tokens", "targets", "weights", "positions", "segments")
Cell = tuple[int, int, float, int, int]


@pytest.fixture
def pack(tmp_path: Path):
    count = 0

    def make(documents: list[list[int]], size: int, method: Method = "stream", weights: Any = None, **how) -> Packing:
        nonlocal count
        count += 1
        return Packing(write_store(tmp_path / str(count), documents, weights), size, method, **how)

    return make


def cells(batch: Batch) -> list[list[Cell]]:
    columns = [getattr(batch, field).tolist() for field in FIELDS]
    return [list(zip(*row, strict=True)) for row in zip(*columns, strict=True)]


def made_up(chance: random.Random, lengths: list[int]) -> tuple[list[list[int]], list[list[float]] | None]:
    documents = [
        [chance.randrange(1, 1000) for _ in range(chance.choice(lengths))] for _ in range(chance.randint(1, 12))
    ]
    levels = chance.choice([None, [], [0.0, 1.0], [0.0, 0.5, 1.0]])
    if levels is None:
        return documents, None
    if not levels:
        return documents, [[0.5] + [1.0] * (len(document) - 1) for document in documents]
    return documents, [[chance.choice(levels) for _ in document] for document in documents]


def filled_up(row: list[Cell], size: int) -> list[Cell]:
    return row + [(0, 0, 0.0, 0, 0)] * (size - len(row))


def obvious_stream(documents: list[list[int]], weights: Any, size: int, cross: bool) -> list[list[Cell]]:
    """One token after another."""
    weights = weights or [[0.0] + [1.0] * (len(document) - 1) for document in documents]
    flat = [
        (number, token, weight)
        for number, (document, weighed) in enumerate(zip(documents, weights, strict=True))
        for token, weight in zip(document, weighed, strict=True)
    ]
    rows = []
    for first in range(0, len(flat) - 1, size):
        row, segment, position, before = [], 0, 0, None
        for place in range(first, min(first + size, len(flat))):
            number, token, _ = flat[place]
            following = flat[place + 1] if place + 1 < len(flat) else (None, 0, 0.0)
            target, weight = following[1:] if cross or following[0] == number else (0, 0.0)
            segment, position = (segment, position + 1) if number == before else (segment + 1, 0)
            row.append((token, target, weight, place - first if cross else position, 1 if cross else segment))
            before = number
        rows.append(filled_up(row, size))
    return rows


# --- stream


@pytest.mark.parametrize("cross", [False, True])
def test_a_stream_equals_an_obvious_one(pack, cross: bool):
    chance = random.Random(0)
    for _ in range(150):
        documents, weights = made_up(chance, [1, 2, 3, 9, 30])
        size = chance.randint(1, 13)
        packing = pack(documents, size, weights=weights, cross_documents=cross)
        expected = obvious_stream(documents, weights, size, cross)
        assert packing.num_rows == len(expected)
        assert packing.num_places == sum(cell[4] > 0 for row in expected for cell in row)
        assert cells(packing.rows(np.arange(len(expected)))) == expected
        some = np.array([chance.randrange(len(expected) + 2) for _ in range(4)]) if expected else np.array([0])
        padding = filled_up([], size)
        assert cells(packing.rows(some)) == [[*expected, padding, padding][row] for row in some]


def test_a_row_as_drawn_in_batch(pack):
    batch = pack([[7, 1, 2, 8], [7, 3, 4]], 8).rows(np.array([0]))
    assert batch.tokens.tolist() == [[7, 1, 2, 8, 7, 3, 4, 0]]
    assert batch.targets.tolist() == [[1, 2, 8, 0, 3, 4, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]


def test_a_document_goes_on_in_the_next_row(pack):
    batch = pack([[1, 2, 3, 4, 5], [6, 7, 8]], 3).rows(np.array([0, 1]))
    assert batch.targets.tolist() == [[2, 3, 4], [5, 0, 7]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.segments.tolist() == [[1, 1, 1], [1, 1, 2]]


@pytest.mark.parametrize("size", [1, 3, 4, 7, 30])
@pytest.mark.parametrize("weights", [None, "first", "all"])
def test_a_looped_stream_goes_on_at_its_beginning(pack, size: int, weights: Any):
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    given = {
        None: None,
        "first": [[0.5] + [1.0] * (len(document) - 1) for document in documents],
        "all": [[float(token % 3) for token in document] for document in documents],
    }[weights]
    packing = pack(documents, size, weights=given, cross_documents=True, looped=True)
    stream = list(itertools.chain(*documents))
    counts = list(itertools.chain(*(given or [[0.0] + [1.0] * (len(document) - 1) for document in documents])))
    assert packing.num_rows * size % len(stream) == 0
    assert packing.rows_per_epoch == len(stream) / size
    rows = packing.num_rows + 3  # which are the first three again
    batch = packing.rows(np.arange(rows) % packing.num_rows)
    endless = np.resize(stream, rows * size + 1)
    assert batch.tokens.reshape(-1).tolist() == endless[:-1].tolist()
    assert batch.targets.reshape(-1).tolist() == endless[1:].tolist()
    assert batch.weights.reshape(-1).tolist() == np.resize(counts, rows * size + 1)[1:].tolist()
    assert (batch.positions == np.arange(size)).all()
    assert (batch.segments == 1).all()
    assert {x.dtype for x in (batch.tokens, batch.targets, batch.positions, batch.segments)} == {np.dtype(np.int32)}
    assert batch.weights.dtype == np.float32


def test_rows_across_documents_count_what_follows_an_end_as_the_next_documents_first_token_does(pack):
    documents, weights = [[7, 1, 8], [7, 2, 8]], [[0.25, 1, 1], [0.5, 1, 1]]
    batch = pack(documents, 6, weights=weights, cross_documents=True).rows(np.array([0]))
    assert batch.targets.tolist() == [[1, 8, 7, 2, 8, 0]]
    assert batch.weights.tolist() == [[1, 1, 0.5, 1, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert batch.segments.tolist() == [[1] * 6]


@pytest.mark.parametrize("vocab_size", [300, 70_000])
@pytest.mark.parametrize("method", ["stream", "best_fit"])
def test_the_types_are_those_of_the_device(tmp_path: Path, vocab_size: int, method: Literal["stream", "best_fit"]):
    store = write_store(tmp_path / "s", [[1, 2, 3], [4, 5]], vocab_size=vocab_size)
    for cross in (False, True):
        batch = Packing(store, 2, method, cross_documents=cross).rows(np.array([0, 1, 2]))
        assert [getattr(batch, field).dtype for field in FIELDS] == [np.int32, np.int32, np.float32, np.int32, np.int32]


# --- best_fit and none


def examples_of(rows: list[list[Cell]]) -> list[tuple[list[int], list[float]]]:
    """The documents' parts in rows: their tokens with the last target, and the weights of all but the first."""
    found = []
    for row in rows:
        for segment in range(1, 1 + max(cell[4] for cell in row)):
            part = [cell for cell in row if cell[4] == segment]
            assert [cell[3] for cell in part] == list(range(len(part)))
            assert all(cell[1] == after[0] for cell, after in itertools.pairwise(part))
            found.append(([cell[0] for cell in part] + [part[-1][1]], [cell[2] for cell in part]))
        # Padding is at the end, and nothing counts there.
        end = sum(cell[4] > 0 for cell in row)
        assert row[end:] == [(0, 0, 0.0, 0, 0)] * (len(row) - end)
    return found


def cut(documents: list[list[int]], weights: Any, size: int, overlong: str) -> list[tuple[list[int], list[float]]]:
    weights = weights or [[0.0] + [1.0] * (len(document) - 1) for document in documents]
    found = []
    for document, weighed in zip(documents, weights, strict=True):
        if overlong == "drop" and len(document) > size + 1:
            continue
        ends = 1 if overlong == "truncate" else max(1, len(document) - 1)
        for first in range(0, min(ends, len(document) - 1), size):
            part = slice(first, first + size + 1)
            found.append((document[part], weighed[part][1:]))
    return found


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
@pytest.mark.parametrize("method", ["best_fit", "none"])
def test_every_document_stands_whole_in_a_row_or_as_asked(pack, method: Any, overlong: Any):
    chance = random.Random(1)
    for _ in range(60):
        documents, weights = made_up(chance, [1, 2, 3, 5, 9, 30])
        size = chance.randint(1, 13)
        packing = pack(documents, size, method, weights, overlong=overlong)
        expected = cut(documents, weights, size, overlong)
        rows = cells(packing.rows(np.arange(packing.num_rows + 1)))
        assert rows.pop() == filled_up([], size)
        found = examples_of(rows)
        if method == "none":
            assert found == expected
        assert sorted(found) == sorted(expected)
        plan = packing.plan
        assert plan is not None
        assert len(plan.starts) == len(expected)
        assert packing.num_rows == len(rows)
        assert packing.num_places == sum(len(weights) for _, weights in expected)
        over = sum(len(document) > size + 1 for document in documents)
        expected_counts = {"split": 0, "truncated": 0, "dropped": 0}
        expected_counts[{"split": "split", "truncate": "truncated", "drop": "dropped"}[overlong]] = over
        assert {name: getattr(plan, name) for name in expected_counts} == expected_counts
        assert plan.lost == sum(len(document) - 1 for document in documents) - packing.num_places


def test_best_fit_across_documents_is_one_segment(pack):
    batch = pack([[1, 2, 3], [4, 5], [6, 7]], 4, "best_fit", cross_documents=True).rows(np.array([0]))
    assert batch.tokens.tolist() == [[1, 2, 4, 6]]
    assert batch.targets.tolist() == [[2, 3, 5, 7]]
    assert batch.weights.tolist() == [[1, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3]]
    assert batch.segments.tolist() == [[1, 1, 1, 1]]


def test_a_copy_of_a_packing_has_the_same_plan_and_is_small(pack):
    packing = pack([[1, 2, 3], [4, 5]] * 5000, 8, "best_fit")
    packing.rows(np.array([0]))
    content = pickle.dumps(packing)
    assert len(content) < 2000
    assert cells(pickle.loads(content).rows(np.arange(9))) == cells(packing.rows(np.arange(9)))


def test_documents_of_one_token_make_no_row(pack):
    assert pack([[1], [2], [3]], 4, "best_fit").num_rows == 0
    assert pack([[1], [2], [3]], 4, "none").num_rows == 0
