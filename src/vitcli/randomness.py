"""Random numbers that are derived, not drawn: pure functions of a seed and a counter.

Order is f(seed, epoch), augmentation f(seed, epoch, index), dropout f(seed, step, rank). Nothing has to be stored to resume,
and no worker count, batch size or rank count can change a number. The mixing function is SplitMix64's finaliser
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["derive_seed", "mix", "normal", "permute", "permute_each", "uniform", "words"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: SplitMix64's increment
FEISTEL_ROUNDS = 6  # 4 already make a pseudo-random permutation (Luby and Rackoff, 1988); 2 more for small domains


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and their order; the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words, (..., ) to (..., ), one to one."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def words(seed: int, counters: ArrayLike, draws: int) -> NDArray[np.uint64]:
    """Return (B, draws) 64-bit words; row b depends on (seed, counters[b]) alone."""
    keys = mix(np.asarray(counters, dtype=np.int64).astype(np.uint64) ^ mix(np.array([seed], dtype=np.uint64)))  # (B,)
    return mix(keys[:, None] + GOLDEN * np.arange(1, draws + 1, dtype=np.uint64))


def uniform(seed: int, counters: ArrayLike, draws: int) -> NDArray[np.float64]:
    """Return (B, draws) numbers in [0, 1); row b is a function of (seed, counters[b]) alone.

    Args:
        seed: non-negative, below 2^63 (see `derive_seed`).
        counters: (B,) integers, say the examples' indices.
        draws: numbers per counter.
    """
    return (words(seed, counters, draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed: int, counters: ArrayLike, draws: int) -> NDArray[np.float64]:
    """Return (B, draws) standard normal numbers by the Box-Muller transform; arguments as for `uniform`."""
    u = uniform(seed, counters, 2 * draws)
    return np.sqrt(-2.0 * np.log1p(-u[:, :draws])) * np.cos(2.0 * np.pi * u[:, draws:])


def permute(positions: ArrayLike, size: int, seed: int) -> NDArray[np.int64]:
    """Map positions (B,) in [0, size) to where a shuffle of `size` items puts them, in O(B) time and memory.

    A Feistel network on the next even power of two, walked until it lands inside [0, size): a bijection for every size and
    seed, so an epoch of any length needs no stored order and any position is reached without the ones before it.
    """
    half_bits = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    x = np.array(positions, dtype=np.int64).astype(np.uint64)
    if x.size and int(x.max()) >= size:
        raise ValueError(f"positions must be below {size}, got {int(x.max())}")
    keys = words(seed, [0], FEISTEL_ROUNDS)[0]
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():  # the domain is less than 4 times `size`, so a handful of rounds
        left, right = x[outside] >> half_bits, x[outside] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        x[outside] = (left << half_bits) | right
        outside = x >= np.uint64(size)
    return x.astype(np.int64)


def permute_each(positions: NDArray[np.int64], sizes: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Map each position (B,) to where a shuffle of sizes[b] items, drawn by keys[b], puts it: `permute` for many sizes.

    Args:
        sizes: (B,) each above its position.
        keys: (B,) scrambled words; equal size and key is the same shuffle.
    """
    half_bits = np.maximum(1, (np.frexp((sizes - 1).astype(np.float64))[1] + 1) // 2).astype(np.uint64)
    masks = (np.uint64(1) << half_bits) - np.uint64(1)
    rounds = mix(keys[:, None] + GOLDEN * np.arange(1, FEISTEL_ROUNDS + 1, dtype=np.uint64))  # (B, rounds)
    x, limits = positions.astype(np.uint64), sizes.astype(np.uint64)
    outside = np.arange(len(x))
    while len(outside):
        bits, mask, round_keys = half_bits[outside], masks[outside], rounds[outside]
        left, right = x[outside] >> bits, x[outside] & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(right ^ round_keys[:, number]) & mask)
        x[outside] = (left << bits) | right
        outside = outside[x[outside] >= limits[outside]]
    return x.astype(np.int64)
