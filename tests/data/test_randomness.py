import numpy as np
import pytest

from camelid.data.randomness import GOLDEN_RATIO, draw, permute, seed_of, splitmix64

SIZES = [*range(1, 70), 255, 256, 257, 4097, 16384, 16385, 65536, 65537, 100_000]


def obvious_permute(index: int, size: int, seed: int) -> int:
    """The permutation as its documentation defines it, with Python's integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    half = 1
    while 4**half < size:
        half += 1
    while True:
        left, right = divmod(index, 2**half)
        for number in range(1, 7):
            key = mix((seed + number * 0x9E3779B97F4A7C15) % 2**64)
            left, right = right, left ^ (mix((right + key) % 2**64) % 2**half)
        index = left * 2**half + right
        if index < size:
            return index


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
@pytest.mark.parametrize("size", SIZES)
def test_every_index_has_one_place(size: int, seed: int):
    np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, seed)), np.arange(size))


@pytest.mark.parametrize("size", [2, 5, 4097, 65537, 10**7, 2**31 + 1, 10**12, 2**62])
def test_the_permutation_is_the_one_that_is_documented(size: int):
    drawn = (draw(50, "indices") % np.uint64(size)).astype(np.int64)
    indices = np.unique(np.append(drawn, [0, size - 1]))
    for seed in (0, 7, 2**64 - 1):
        expected = [obvious_permute(index, size, seed) for index in indices.tolist()]
        assert permute(indices, size, seed).tolist() == expected


def test_nothing_changes_between_releases():
    """A run that is resumed with another release must read the same rows."""
    assert seed_of(0, "rows", 2, 7) == 16264692752356377770
    assert draw(2, 0, "rows", 1).tolist() == [3652285949612398880, 6213635819203292400]
    assert permute(np.arange(5), 4097, 0).tolist() == [2910, 3968, 1196, 1559, 4024]
    assert permute(np.arange(5), 10**7, 2**63 + 5).tolist() == [5021737, 8414925, 5728168, 6032559, 8403301]


def test_the_mixing_function_is_splitmix64():
    """The first outputs of the generator for the seed 1234567, which its reference implementation in C prints."""
    states = (1234567 + np.arange(1, 3).astype(np.uint64) * np.uint64(GOLDEN_RATIO)).astype(np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("size", [4097, 65_000, 65_537, 10**6, 10**7])
def test_the_order_looks_random(size: int):
    """Neighbors are independent, and each batch draws from all parts of the rows as evenly as chance does."""
    for seed in range(3):
        count = min(size, 10**6)
        rows = permute(np.arange(count), size, seed)
        for lag in (1, 2, 3, 4, 8, 256):
            assert abs(np.corrcoef(rows[lag:], rows[:-lag])[0, 1]) < 5 / count**0.5
        eighths = rows[: count // 64 * 64].reshape(-1, 64) * 8 // size
        counts = np.stack([(eighths == part).sum(axis=1) for part in range(8)], axis=1)
        chi_squared, degrees = ((counts - 8) ** 2 / 8).sum(), 7 * len(counts)
        assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5


def test_seeds_give_permutations_of_their_own():
    rows = [permute(np.arange(10_000), 10_000, seed) for seed in (0, 1, 2, 2**63)]
    for n, one in enumerate(rows):
        for other in rows[:n]:
            assert np.count_nonzero(one == other) < 10
