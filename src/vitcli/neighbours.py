"""k nearest neighbours by cosine similarity: what frozen features know without any training.

The weighted vote is that of Wu et al. (1805.01978) and DINO (2104.14294): exp(similarity / 0.07) for a neighbour's class.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

__all__ = ["KNN_TEMPERATURE", "nearest_classes"]

KNN_TEMPERATURE = 0.07
CHUNK = 1 << 26  # similarities or votes at a time: 256 MiB of float32, 512 of float64


def nearest_classes(
    train_features: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test_features: NDArray[np.float32],
    *,
    num_classes: int,
    neighbours: Sequence[int],
    device: torch.device,
) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return for each number of neighbours the classes of test features (M, D) by weighted and by plain vote, (M,) each.

    Of classes with equal votes it is the one with the lowest number.

    Args:
        train_features: (N, D); length does not matter, only direction.
        neighbours: numbers from 1 to N.
    """
    most = max(neighbours)
    if most > len(train_features) or min(neighbours) < 1:
        raise ValueError(f"neighbours must be 1 to {len(train_features)}, got {list(neighbours)}")
    known = F.normalize(torch.from_numpy(train_features).to(device), dim=1)  # (N, D)
    labels = torch.from_numpy(train_labels).to(device)
    rows = max(1, CHUNK // max(len(known), num_classes))
    found: dict[int, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = {k: [] for k in neighbours}
    for start in range(0, len(test_features), rows):
        asked = F.normalize(torch.from_numpy(test_features[start : start + rows]).to(device), dim=1)  # (m, D)
        similarity, nearest = (asked @ known.T).topk(most, dim=1)  # (m, most) each, nearest first
        similarity, classes = similarity.double(), labels[nearest]
        for k in neighbours:
            votes = []
            for weights in (((similarity[:, :k] - 1.0) / KNN_TEMPERATURE).exp(), torch.ones_like(similarity[:, :k])):
                counted = weights.new_zeros(len(asked), num_classes).scatter_add_(1, classes[:, :k], weights)
                votes.append(counted.argmax(1).cpu().numpy())
            found[k].append((votes[0], votes[1]))
    return {k: (np.concatenate([w for w, _ in parts]), np.concatenate([p for _, p in parts])) for k, parts in found.items()}
