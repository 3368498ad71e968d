"""What follows from a study's measurements: means with intervals, gaps, power laws, crossovers, as values to print and draw.

Accuracies are shares of 1, intervals are those of 95 %, and `examples` are different images pretrained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Change", "Crossing", "Gap", "Law", "Mean", "Summary", "metric_words"]


@dataclass(frozen=True)
class Mean:
    """One family after one amount of data: the mean over its seeds."""

    variant: str
    family: str
    metric: str
    examples: int
    flops: float  # of training, mean of the seeds
    values: tuple[float, ...]  # one for each seed, by seed
    mean: float
    low: float | None  # of the interval over seeds; None with one seed
    high: float | None
    count: int  # evaluation images behind each value; 0 if not on record


@dataclass(frozen=True)
class Gap:
    """What the first of two compared families is ahead of the second."""

    variant: str
    metric: str
    examples: int
    value: float  # in [-1, 1]
    low: float | None  # None where there is no interval
    high: float | None
    method: str  # how the interval was made


@dataclass(frozen=True)
class Change:
    """What a variant of the settings changes in a family's accuracy, as against `plain`."""

    variant: str
    family: str
    metric: str
    examples: int
    value: float
    low: float | None
    high: float | None
    method: str


@dataclass(frozen=True)
class Law:
    """A family's error as a power of the data: scale * examples ** -exponent + floor."""

    variant: str
    family: str
    metric: str
    scale: float
    exponent: float
    floor: float
    exponent_low: float | None
    exponent_high: float | None

    def error(self, examples: float) -> float:
        """Return the error it says, in [0, 1] where it fits."""
        return self.scale * examples**-self.exponent + self.floor


@dataclass(frozen=True)
class Crossing:
    """Where the gap changes its sign, and how that is known."""

    variant: str
    metric: str
    kind: str  # measured, extrapolated, or none
    examples: float | None
    low: float | None
    high: float | None  # inf where the data set no end
    words: str  # what was found, at what sizes, how sure


@dataclass(frozen=True)
class Summary:
    """All of it, in the order in which families, variants and sizes are stated."""

    title: str
    families: tuple[str, ...]
    compare: tuple[str, str] | None  # None with one family
    variants: tuple[str, ...]
    metrics: tuple[str, ...]
    means: Sequence[Mean]
    gaps: Sequence[Gap]
    changes: Sequence[Change]
    laws: Sequence[Law]
    crossings: Sequence[Crossing]

    def curve(self, metric: str, family: str, variant: str) -> list[Mean]:
        """Return a family's means by size, ascending."""
        found = [m for m in self.means if (m.metric, m.family, m.variant) == (metric, family, variant)]
        return sorted(found, key=lambda mean: mean.examples)

    def gap_curve(self, metric: str, variant: str) -> list[Gap]:
        """Return the gaps by size, ascending."""
        return sorted((g for g in self.gaps if (g.metric, g.variant) == (metric, variant)), key=lambda gap: gap.examples)


def metric_words(metric: str) -> str:
    """Return a metric's name as a person says it."""
    kind, _, rest = metric.partition(":")
    if kind == "upstream":
        return "upstream top-1"
    if kind == "fewshot":
        dataset, _, shots = rest.rpartition(":")
        return f"{dataset}, {shots}-shot top-1"
    if kind == "finetune":
        return f"{rest}, fine-tuned top-1"
    if kind == "translate":
        return f"upstream top-1, images moved by {rest} px"
    return f"answers unchanged when images move by {rest} px" if kind == "unchanged" else metric
