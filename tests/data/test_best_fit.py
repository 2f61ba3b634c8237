import hashlib
import itertools
import random
import tracemalloc

import numpy as np
import pytest

from camelid.data.rows import best_fit
from camelid.data.rows.best_fit import fill, make_plan


def obvious_rooms(lengths: list[int], size: int) -> list[int]:
    """What is left in each row, one piece after another, the longest first, each into the fullest row that has room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(size - length)
    return sorted(rooms)


def test_rows_are_as_full_as_one_piece_after_another_makes_them():
    chance = random.Random(0)
    for _ in range(300):
        size = chance.randint(1, 30)
        lengths = [chance.randint(1, size) for _ in range(chance.randint(0, 80))]
        patterns = fill(np.bincount(lengths, minlength=size + 1).astype(np.int64))
        rooms = [
            size - sum(length * n for length, n in pattern.items)
            for pattern in patterns
            for _ in range(pattern.num_rows)
        ]
        assert sorted(rooms) == obvious_rooms(lengths, size)


def obvious_plan(lengths: list[int], size: int, overlong: str) -> list[tuple[int, int]]:
    """The start and the length of every fragment, in the order of the documents."""
    fragments, start = [], 0
    for length in lengths:
        places = length - 1
        if overlong == "split":
            fragments += [(start + at, min(size, places - at)) for at in range(0, places, size)]
        elif places > 0 and (places <= size or overlong == "truncate"):
            fragments.append((start, min(places, size)))
        start += length
    return fragments


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_every_fragment_is_in_one_row(overlong: best_fit.Overlong):
    chance = random.Random(0)
    for _ in range(100):
        size = chance.choice([1, 7, 255, 256, 65535, 65536])
        lengths = [chance.randint(1, size * 5 // 2 + 2) for _ in range(chance.randint(0, 60))]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        plan = make_plan(offsets, size, one_per_row=False, overlong=overlong)
        expected = obvious_plan(lengths, size, overlong)
        found = list(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True))
        assert sorted(found) == sorted(expected)
        assert plan.num_places == sum(length for _, length in expected)
        rows = [found[begin:end] for begin, end in itertools.pairwise(plan.offsets.tolist())]
        assert all(0 < sum(length for _, length in row) <= size for row in rows)
        assert sorted(size - sum(length for _, length in row) for row in rows) == obvious_rooms(
            [length for _, length in expected], size
        )
        in_order = make_plan(offsets, size, one_per_row=True, overlong=overlong)
        assert list(zip(in_order.starts.tolist(), in_order.lengths.tolist(), strict=True)) == expected
        assert in_order.offsets.tolist() == list(range(len(expected) + 1))


def test_the_plan_is_the_same_in_every_release():
    """A run that is resumed must read the same rows."""
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    plan = make_plan(np.concatenate([[0], np.cumsum(lengths)]), 16, one_per_row=False, overlong="split")
    digest = hashlib.sha256()
    for array in (plan.offsets, plan.starts, plan.lengths):
        digest.update(array.astype("<i8").tobytes())
    assert digest.hexdigest() == "0bb933bdc97113102df06a0957f17b8f7a712ff9f7335fc4ab66578ab4bf1436"


def test_a_million_documents_take_memory_for_their_fragments_alone():
    lengths = np.exp(np.random.default_rng(0).normal(5, 1, 1_000_000)).astype(np.int64) + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    del lengths
    tracemalloc.start()
    plan = make_plan(offsets, 2048, one_per_row=False, overlong="split")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 12 * 2**20
    assert peak < 64 * 2**20
    assert plan.num_places / (plan.num_rows * 2048) > 0.99
