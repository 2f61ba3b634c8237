"""Random numbers and permutations that are the same in every release of camelid, numpy and Python.

A run that is resumed must read the rows that it would have read without the interruption, so nothing here may change.
"""

import hashlib

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 6  # four suffice in theory (Luby and Rackoff); the others are for small domains
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # the odd integer nearest to 2^64 / phi


def seed_of(*purpose: object) -> int:
    """Returns an unsigned 64-bit seed for a purpose: the SHA-256 of its words, for example `seed_of(0, "rows", 2)`."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, purpose)).encode()).digest()[:8], "little")


def draw(count: int, *purpose: object) -> UInt64[np.ndarray, " n"]:
    """Returns `count` independent random 64-bit integers for a purpose."""
    # numpy guarantees the raw output of its bit generators across versions, but not the distributions drawn from it.
    return np.random.Philox(key=seed_of(*purpose)).random_raw(count)


def splitmix64(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Mixes the bits of each integer; a bijection (the output function of SplitMix64, Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(indices: Int64[np.ndarray, " n"], size: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Returns where a pseudorandom permutation of [0, size) maps each index; it needs no memory for the permutation.

    A Feistel network permutes [0, 4^k), the smallest such domain that holds `size` integers. Cycle walking restricts
    it to [0, size): results outside of it are encrypted again until they are inside (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", CT-RSA 2002). `seed` is an unsigned 64-bit integer that selects the permutation.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    keys = splitmix64(np.uint64(seed) + np.uint64(GOLDEN_RATIO) * np.arange(1, ROUNDS + 1, dtype=np.uint64))
    found = _encrypt(indices.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(found >= size)).size:
        found[outside] = _encrypt(found[outside], half, keys)
    return found.astype(np.int64)


def _encrypt(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """The Feistel network on integers of 2 * `half` bits, one round for each key."""
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (splitmix64(right + key) & mask)
    return (left << np.uint64(half)) | right
