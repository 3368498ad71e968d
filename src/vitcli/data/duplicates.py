"""Pictures that are there twice: the same pixels, or nearly the same ones.

Near duplicates have a 64-bit perceptual hash (the signs of an image's low frequencies) that differs in few bits, and thumbnails
that correlate. All pairs within a Hamming distance are found without comparing all pairs.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

__all__ = ["HASH_SIDE", "correlate", "linked_groups", "perceptual_hash", "similar_pairs", "thumbnails"]

HASH_SIDE = 32  # px of the grey image that is hashed
FREQUENCIES = 8  # lowest ones kept in each direction: 64 bits
THUMBNAIL_SIDE = 16
SORTING = 2  # what sorting costs a value, in comparisons; measured
LONGEST_KEY = 6  # blocks
CROSS_LIMIT = 1000  # pairs made of two sets of equal hashes; beyond it only the first ones are compared


def perceptual_hash(grey: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return hashes (B,) of grey images (B, 32, 32), and (B,) whether each has enough contrast for its hash to mean anything.

    Bit (r, c) tells whether the cosine transform's frequency (r, c) is above the median of the 64 lowest; pHash (Zauner 2010).
    """
    spectrum = scipy.fft.dctn(grey.astype(np.float32), type=2, axes=(1, 2))[:, :FREQUENCIES, :FREQUENCIES]
    spectrum = spectrum.reshape(len(grey), FREQUENCIES * FREQUENCIES)
    bits = spectrum > np.median(spectrum, axis=1, keepdims=True)
    hashes = np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)
    return hashes, grey.std(axis=(1, 2)) >= 2.0  # of 255: below it, compression noise decides


def thumbnails(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Shrink grey images (B, 32, 32) to (B, 16, 16)."""
    step = HASH_SIDE // THUMBNAIL_SIDE
    return grey.reshape(-1, THUMBNAIL_SIDE, step, THUMBNAIL_SIDE, step).mean(axis=(2, 4)).round().astype(np.uint8)


def correlate(thumbs: NDArray[np.uint8], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return Pearson's correlation (P,) of the thumbnails (N, 16, 16) of each pair (P, 2)."""
    result = np.empty(len(pairs))
    for start in range(0, len(pairs), 4096):
        part = pairs[start : start + 4096]
        a, b = (thumbs[part[:, side]].reshape(len(part), -1).astype(np.float64) for side in (0, 1))
        a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
        norm = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
        result[start : start + 4096] = (a * b).sum(axis=1) / np.maximum(norm, 1e-9)
    return result


def similar_pairs(hashes: NDArray[np.uint64], *, distance: int) -> NDArray[np.int64]:
    """Return all pairs (P, 2), the lower index first, whose hashes (N,) differ in at most `distance` bits.

    Where more than 1,000 pairs come from the same two hashes, only the first of each is taken: chains still link them all.
    """
    values, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    by_value = np.argsort(inverse, kind="stable")
    starts = np.cumsum(counts) - counts
    between = close_values(values, distance=distance)
    alone = (counts[between] == 1).all(axis=1)
    found = [by_value[starts[between[alone]]]]
    for i, j in itertools.chain(between[~alone].tolist(), ((k, k) for k in np.flatnonzero(counts > 1).tolist())):
        first, second = by_value[starts[i] : starts[i] + counts[i]], by_value[starts[j] : starts[j] + counts[j]]
        found.append(cross(first, second, same=i == j))
    pairs = np.sort(np.concatenate(found), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def cross(first: NDArray[np.int64], second: NDArray[np.int64], *, same: bool) -> NDArray[np.int64]:
    """Pair the members of two sets, or of one with itself, all with all if that is not too many."""
    if len(first) * len(second) <= CROSS_LIMIT:
        a, b = (side.ravel() for side in np.meshgrid(first, second, indexing="ij"))
        keep = a < b if same else np.ones(len(a), np.bool_)
        return np.stack([a[keep], b[keep]], axis=1)
    if same:
        return np.stack([np.full(len(first) - 1, first[0]), first[1:]], axis=1)
    return np.array([[first[0], second[0]]])


def close_values(values: NDArray[np.uint64], *, distance: int) -> NDArray[np.int64]:
    """Return all pairs (P, 2) of different, ascending values (N,) that differ in at most `distance` bits.

    Cut 64 bits into distance + k blocks: whatever bits differ, k blocks are equal. So values are sorted by every choice of k
    blocks, and only those equal in them are compared. A larger k means more choices, but fewer values equal by chance.
    """
    count = len(values)

    def cost(kept: int) -> float:
        equal_by_chance = count / 2 ** (64 * kept // (distance + kept))
        return math.comb(distance + kept, kept) * (SORTING + equal_by_chance / 2)

    kept = min(range(1, LONGEST_KEY + 1), key=cost)
    found = [np.empty((0, 2), np.int64)]
    for mask in block_masks(distance + kept, kept) if distance else ():
        keys = values & mask
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        left, offset = np.arange(count), 1
        while len(left := left[left + offset < count]):
            left = left[keys[left] == keys[left + offset]]
            pairs = np.stack([order[left], order[left + offset]], axis=1)
            near = np.bitwise_count(values[pairs[:, 0]] ^ values[pairs[:, 1]]) <= distance
            found.append(np.sort(pairs[near], axis=1))
            offset += 1
    return np.unique(np.concatenate(found), axis=0)


def block_masks(blocks: int, kept: int) -> Iterator[np.uint64]:
    """Yield the masks of every choice of `kept` out of `blocks` stretches of 64 bits."""
    edges = np.linspace(0, 64, blocks + 1).astype(int).tolist()
    stretches = [(1 << stop) - (1 << start) for start, stop in itertools.pairwise(edges)]
    for chosen in itertools.combinations(stretches, kept):
        yield np.uint64(sum(chosen))


def linked_groups(pairs: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """Return the groups of 2 or more of `count` items that pairs (P, 2) link, directly or by others, each ascending."""
    if not len(pairs):
        return []
    links = coo_matrix((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, component = connected_components(links, directed=False)
    linked = np.unique(pairs)
    order = linked[np.argsort(component[linked], kind="stable")]
    edges = np.flatnonzero(np.diff(component[order])) + 1
    return sorted(np.split(order, edges), key=lambda group: int(group[0]))
