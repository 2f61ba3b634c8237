import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from camelid.data.rows import mixture
from camelid.data.rows.mixture import Mixture, RowShares, row_shares

SHARES = (RowShares(0, (1.0, 3.0, 1.0)),)


def mixed(num_rows=(10, 30, 7), shares=SHARES, shuffle=True, seed=0) -> Mixture:
    return Mixture(tuple(num_rows), tuple(shares), shuffle, seed)


def found(mix: Mixture, first: int, stop: int) -> list[tuple[int, int]]:
    return list(zip(*(x.tolist() for x in mix.find(np.arange(first, stop))), strict=True))


def test_one_source_is_read_row_after_row():
    assert found(mixed([5], [RowShares(0, (2.0,))], shuffle=False), 0, 12) == [(0, n % 5) for n in range(12)]


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    rows = [row for _, row in found(mixed([50], [RowShares(0, (1.0,))]), 0, 150)]
    epochs = [rows[first : first + 50] for first in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(range(50)) not in epochs


def test_a_source_of_a_mixture_is_read_epoch_after_epoch():
    places = found(mixed(), 0, 500)
    for source, size in enumerate((10, 30, 7)):
        rows = [row for which, row in places if which == source]
        for first in range(0, len(rows) - size, size):
            assert sorted(rows[first : first + size]) == list(range(size))


def test_sources_of_one_size_are_read_in_orders_of_their_own():
    rows = [
        [row for which, row in found(mixed([40, 40], [RowShares(0, (1.0, 1.0))]), 0, 400) if which == n] for n in (0, 1)
    ]
    assert rows[0][:40] != rows[1][:40]
    # Seeds one apart would give the second source the first one's next epoch.
    assert rows[0][40:80] != rows[1][:40]


@pytest.mark.parametrize("size", [2, mixture.DRAWN_AT_ONCE, mixture.DRAWN_AT_ONCE + 1])
def test_few_rows_and_many_are_read_once_an_epoch(size: int):
    mix = mixed([size], [RowShares(0, (1.0,))])
    rows = mix.find(np.arange(size, 4 * size if size > 2 else 2000))[1].reshape(-1, size)
    assert (np.sort(rows) == np.arange(size)).all()
    assert len({row.tobytes() for row in rows}) == (2 if size == 2 else 3), "each epoch has an order of its own"
    assert mix.find(np.arange(5 * size + 1, 5 * size + 2))[1] == mix.find(np.arange(5 * size, 6 * size))[1][1]


@pytest.mark.parametrize("weights", [(1.0, 3.0, 1.0), (0.7, 0.2999, 0.0001), (0.0, 1.0, 1e-9), (1 / 3, 1 / 3, 1 / 3)])
def test_shares_are_exact_however_long_it_runs(weights: tuple[float, ...]):
    mix = mixed(shares=[RowShares(0, weights)])
    for blocks in (1, 10, 1000, 10**9):
        rows = blocks * mixture.BLOCK
        for taken, weight in zip(mix.taken(rows), weights, strict=True):
            assert abs(taken - rows * weight / sum(weights)) <= len(weights) / 2
    assert (sum(mix.taken(12345)), mix.taken(12345)[0] == 0) == (12345, weights[0] == 0)


def test_a_source_without_weight_is_never_read():
    assert {source for source, _ in found(mixed(shares=[RowShares(0, (1.0, 0.0, 1.0))]), 0, 1500)} == {0, 2}


def test_hundreds_of_sources_add_up():
    weights = tuple(float(np.exp(-n / 20)) for n in range(200))
    mix = mixed([3] * 200, [RowShares(0, weights)])
    taken = mix.taken(40_000 * 5)
    assert sum(taken) == 200_000
    for count, weight in zip(taken, weights, strict=True):
        assert abs(count - 200_000 * weight / sum(weights)) < 101
    assert Counter(source for source, _ in found(mix, 0, 1000)).total() == 1000


def test_the_order_within_a_block_is_mixed():
    sources = [source for source, _ in found(mixed(shares=[RowShares(0, (1.0, 1.0, 0.0))]), 0, 1024)]
    changes = sum(a != b for a, b in itertools.pairwise(sources))
    assert 400 < changes < 620


def test_a_place_is_the_same_in_any_order():
    mix = mixed(
        shares=[RowShares(0, (1.0, 3.0, 1.0)), RowShares(1500, (3.0, 1.0, 1.0)), RowShares(1501, (0.0, 0.0, 1.0))]
    )
    in_order = found(mix, 0, 2100)
    other = pickle.loads(pickle.dumps(mix))
    for place in (2099, 0, 1500, 2048, 1023, 1499, 1501, 77):
        assert found(other, place, place + 1) == [in_order[place]]
    taken = [Counter(source for source, _ in in_order[:place]) for place in (1, 1500, 1501, 2090)]
    assert [tuple(count[n] for n in range(3)) for count in taken] == [mix.taken(p) for p in (1, 1500, 1501, 2090)]


def test_where_shares_change_sources_go_on_where_they_were():
    mix = mixed(shares=[RowShares(0, (1.0, 1.0, 0.0)), RowShares(777, (0.0, 1.0, 5.0))], shuffle=False)
    places = found(mix, 0, 1800)
    assert places[:777] == found(mixed(shares=[RowShares(0, (1.0, 1.0, 0.0))], shuffle=False), 0, 777)
    for source, size in enumerate((10, 30, 7)):
        rows = [row for which, row in places if which == source]
        assert rows == [n % size for n in range(len(rows))]
    later = Counter(source for source, _ in places[777:])
    assert later[0] == 0
    assert abs(later[2] - 5 * later[1]) < 100


def test_another_seed_is_another_order():
    assert found(mixed(seed=0), 0, 100) != found(mixed(seed=1), 0, 100)


def test_far_places_are_found():
    assert len(found(mixed((10, 5000, 7)), 10**12, 10**12 + 100)) == 100


def test_only_the_order_of_many_shuffled_rows_has_a_name():
    sizes = (10, mixture.DRAWN_AT_ONCE, mixture.DRAWN_AT_ONCE + 1)
    assert mixed(sizes).row_orders == (None, None, "feistel")
    assert mixed(sizes, shuffle=False).row_orders == (None, None, None)


def test_the_order_stays_what_it_was():
    """A run that is resumed with a newer camelid or numpy must see the same rows."""
    expected = [(1, 4804), (0, 5), (1, 1850), (2, 1), (2, 5), (0, 1), (1, 3011), (2, 0)]
    assert found(mixed((10, 5000, 7)), 10**6, 10**6 + 8) == expected


def test_shares_of_tokens_become_shares_of_rows():
    weights = row_shares((1.0, 1.0), (500.0, 1000.0))
    assert weights[0] == 2 * weights[1]
