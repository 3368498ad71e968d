"""How often do a study's intervals hold the truth? Planted studies, whose true gaps are known: the table in docs/study.md.

python scripts/study_coverage.py                 # some minutes on one core
python scripts/study_coverage.py --studies 40    # a quick look
"""

import argparse

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from vitcli.study.stats import Scores, gaps

Floats = NDArray[np.float64]

ACCURACIES = np.array([[0.30, 0.55, 0.80, 0.95], [0.40, 0.58, 0.78, 0.92]])  # of two families at four sizes
SHARED, OWN = 0.5, 0.2  # of what makes an image hard: shared by both families, and by the seeds of one; the rest is each seed's
SEED_SD = {
    "0.3 points": np.full((2, 4), 0.003),
    "1 point": np.full((2, 4), 0.01),
    "0.3 to 1 point, by size and family": np.array([[1.0, 0.7, 0.5, 0.3], [0.5, 1.0, 0.3, 0.3]]) / 100,
}


def planted(generator: np.random.Generator, *, seeds: int, images: int, seed_sd: Floats) -> list[list[Scores]]:
    """Draw the answers of two families at every size; over seeds and images they are right with `ACCURACIES`."""
    shared = generator.standard_normal(images) * np.sqrt(SHARED)
    families = []
    for accuracies, deviations in zip(ACCURACIES, seed_sd, strict=True):
        own = generator.standard_normal(images) * np.sqrt(OWN)
        row = []
        for size, (accuracy, deviation) in enumerate(zip(accuracies, deviations, strict=True)):
            level = norm.ppf(accuracy)
            spread = deviation / norm.pdf(level)
            skill = level * np.sqrt(1 + spread**2) + spread * generator.standard_normal((seeds, 1))
            rest = np.sqrt(1 - SHARED - OWN) * generator.standard_normal((seeds, images))
            row.append(Scores.from_answers(1000 * 4**size, skill + shared + own + rest > 0))
        families.append(row)
    return families


def coverage(*, studies: int, seeds: int, images: int, seed_sd: Floats) -> tuple[float, float]:
    """Return how often the 95 % interval of a gap holds it, and its width over that of somebody who knows how gaps scatter."""
    generator = np.random.default_rng(0)
    truth = ACCURACIES[0] - ACCURACIES[1]
    hits, widths, values = [], [], []
    for number in range(studies):
        a, b = planted(generator, seeds=seeds, images=images, seed_sd=seed_sd)
        curve = gaps(a, b, resamples=1000, seed=number)
        low, high = (np.array([getattr(each, end) for each in curve.estimates]) for end in ("low", "high"))
        hits.append((low <= truth) & (truth <= high))
        widths.append((high - low) / 2)
        values.append(curve.values)
    ideal = norm.ppf(0.975) * np.std(values, axis=0)
    return float(np.mean(hits)), float(np.mean(np.mean(widths, axis=0) / ideal))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=300, help="planted for each number (default %(default)s)")
    studies = parser.parse_args().studies
    counts = (1, 2, 3, 5)
    print("| evaluation images | sd of a seed |", " | ".join(f"{n} seed{'s' if n > 1 else ''}" for n in counts), "|")
    print("|---:|---|" + "---|" * len(counts))
    for images in (2_000, 10_000):
        for name, seed_sd in SEED_SD.items():
            cells = []
            for seeds in counts:
                held, width = coverage(studies=studies, seeds=seeds, images=images, seed_sd=seed_sd)
                cells.append(f"{100 * held:.0f} % ({width:.1f})")
            print(f"| {images:,} | {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
