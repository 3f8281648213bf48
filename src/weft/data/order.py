"""Orders that never change: functions of a key alone, not of a library's random stream.

`shuffle` makes a whole order at once. `Permutation` computes any entry of one, and needs no memory: a Feistel network
over the bits of i, keyed, is a bijection of 0 … 2^b-1; results ≥ n are sent through again until they fall inside (cycle
walking; Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), which makes it a bijection of 0 … n-1.
"""

import hashlib

import numpy as np

ROUNDS = 8


def key(*parts: object) -> int:
    """A 64-bit key out of names and numbers."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "little")


def shuffle(n: int, key: int) -> np.ndarray:
    """[n] int64: 0 … n-1 in an order that the key decides."""
    # splitmix64 of a counter never gives a number twice, so there are no ties and any sort gives the same order
    step = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(_mix(step + np.uint64(key)))


class Permutation:
    """A fixed, pseudo-random order of 0 … n-1.

    Args:
        n: how many things, 1 or more.
        key: which order; see `key`.
    """

    def __init__(self, n: int, key: int) -> None:
        assert n >= 1
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._right_bits = np.uint64(bits // 2)
        self._right = np.uint64((1 << bits // 2) - 1)
        self._left = np.uint64((1 << bits - bits // 2) - 1)
        self._keys = [_mix(np.array([(key + k * 0x9E3779B97F4A7C15) % (1 << 64)], np.uint64)) for k in range(ROUNDS)]

    def __call__(self, i: np.ndarray) -> np.ndarray:
        """[…] int64 places → [...] int64 things."""
        out = self._once(i.astype(np.uint64))
        while (outside := out >= self.n).any():
            out[outside] = self._once(out[outside])
        return out.astype(np.int64)

    def _once(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._right_bits, x & self._right
        for k in range(0, ROUNDS, 2):
            left = left ^ (_mix(right ^ self._keys[k]) & self._left)
            right = right ^ (_mix(left ^ self._keys[k + 1]) & self._right)
        return np.asarray((left << self._right_bits) | right)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood, 2014): every bit in reaches every bit out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
