"""Linear centred kernel alignment (CKA) of layers, of one model or of two (1905.00414), over mini-batches (2010.15327).

How alike two layers see n images: 1 where their representations are the same but for a rotation and a scale. HSIC is the
unbiased estimate (Song et al., 2012), so its mean over batches does not depend on their size; each has n >= 4 images.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LEAST", "Alignment", "as_vectors", "gram"]

LEAST = 4  # images of a batch
MOST_PLACES = 256  # of a layer; beyond them neighbours are averaged, so that a batch stays small at any resolution


def as_vectors(before: Tensor, places: Tensor) -> Tensor:
    """Return a layer's output as a vector for each image, (B, everything), from `split_tokens`."""
    if places.shape[-2] * places.shape[-1] > MOST_PLACES:
        height, width = places.shape[-2:]
        shrink = math.sqrt(MOST_PLACES / (height * width))
        places = F.adaptive_avg_pool2d(places, (max(1, round(height * shrink)), max(1, round(width * shrink))))
    return torch.cat([before.flatten(1), places.flatten(1)], dim=1).float()


def gram(vectors: Tensor) -> NDArray[np.float64]:
    """Return the inner products of vectors (n, D), (n, n), after their mean is taken away, which is most of some layers'."""
    vectors = vectors.double()
    vectors = vectors - vectors.mean(0)
    return (vectors @ vectors.T).cpu().numpy()


def unbiased_hsic(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return HSIC of each Gram matrix of (I, n, n) with each of (J, n, n), (I, J); n at least 4."""
    n = a.shape[-1]
    off = 1.0 - np.eye(n)
    a, b = a * off, b * off
    products = a.reshape(len(a), -1) @ b.reshape(len(b), -1).T  # traces of the products, as they are symmetric
    rows_a, rows_b = a.sum(2), b.sum(2)  # (I, n), (J, n)
    sums = np.outer(rows_a.sum(1), rows_b.sum(1)) / ((n - 1) * (n - 2))
    return (products + sums - 2.0 / (n - 2) * rows_a @ rows_b.T) / (n * (n - 3))


class Alignment:
    """CKA of I layers with J others, gathered batch by batch."""

    def __init__(self, rows: int, columns: int) -> None:
        self.cross = np.zeros((rows, columns))
        self.own = np.zeros(rows), np.zeros(columns)

    def add(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        """Take in a batch's Gram matrices, (I, n, n) and (J, n, n), of the same images."""
        self.cross += unbiased_hsic(a, b)
        for own, grams in zip(self.own, (a, b), strict=True):
            own += np.array([unbiased_hsic(each[None], each[None])[0, 0] for each in grams])

    def result(self) -> NDArray[np.float64]:
        """Return CKA, (I, J), at most about 1; nan where a layer says the same of all images."""
        scale = np.sqrt(np.maximum(np.outer(*self.own), 0.0))
        return np.divide(self.cross, scale, out=np.full_like(self.cross, np.nan), where=scale > 0)
