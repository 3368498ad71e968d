"""What follows from a study's measurements: means with intervals, gaps, power laws, crossovers and words for them.

`stats` and `crossover` do the statistics on arrays; here measurements become their arrays and keep their names.
What was worked out once is kept in the process, so that a study in progress costs only what a new cell changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitcli.study.cells import PLAIN, UPSTREAM, Measurement
from vitcli.study.crossover import Crossover, crossover, verdict
from vitcli.study.laws import PowerLaw, power_laws
from vitcli.study.results import Answers, read_answers
from vitcli.study.stats import Estimate, Scores, accuracies, contrast, gaps

__all__ = ["Curve", "Gap", "Mean", "Summary", "metric_words", "short_set", "summarise"]

UNKNOWN = 1000  # evaluation images, where their number is not on record: few, so that intervals are not too narrow
Series = tuple[Measurement, ...]  # one family's measurements of one metric under one variant


class Curve(NamedTuple):
    """Which numbers belong on one line: a metric of a family under a variant."""

    metric: str
    variant: str
    family: str


@dataclass(frozen=True)
class Mean:
    """A family after one amount of data."""

    estimate: Estimate  # of the mean over its seeds
    values: tuple[float, ...]  # one for each seed, by seed
    flops: float  # of training, mean of the seeds

    @property
    def examples(self) -> int:
        """Return the different images pretrained on."""
        return self.estimate.examples


@dataclass(frozen=True)
class Gap:
    """The first of two compared families less the second, over the sizes, and where they cross."""

    estimates: tuple[Estimate, ...]  # by size, ascending
    crossover: Crossover
    words: str  # what was found, at what sizes, how sure


@dataclass(frozen=True)
class Summary:
    """All of it; families, variants and metrics in the order in which they are stated."""

    title: str
    families: tuple[str, ...]
    compare: tuple[str, str] | None  # None with one family, or with one size unless it was asked for
    variants: tuple[str, ...]  # plain first
    metrics: tuple[str, ...]  # those that were measured
    curves: Mapping[Curve, tuple[Mean, ...]]  # by size, ascending
    laws: Mapping[Curve, PowerLaw]
    changes: Mapping[Curve, tuple[Estimate, ...]]  # what a variant adds to a family's accuracy under the plain settings
    gaps: Mapping[tuple[str, str], Gap]  # by metric and variant
    gap_changes: Mapping[tuple[str, str], tuple[Estimate, ...]]  # what a variant adds to the gap under the plain settings
    first_arm: str | None = None  # of a study of one size: the family that each other one is compared with
    leads: Mapping[Curve, Estimate] = field(default_factory=dict)  # what a family is ahead of it, under the same variant

    def curve(self, metric: str, family: str, variant: str = PLAIN) -> tuple[Mean, ...]:
        """Return a family's means by size, ascending; () where there are none."""
        return self.curves.get(Curve(metric, variant, family), ())

    @property
    def headline(self) -> tuple[str, ...]:
        """Return the metrics that the study is about: not what was measured of moved images."""
        return tuple(metric for metric in self.metrics if is_headline(metric))


def summarise(
    measurements: Sequence[Measurement],
    *,
    title: str,
    families: Sequence[str],
    compare: tuple[str, str] | None,
    variants: Sequence[str],
    metrics: Sequence[str],
    one_pass: bool,
    first_arm: str | None = None,
) -> Summary:
    """Work out everything that measurements say.

    Args:
        metrics: the order to report them in; others come behind.
        one_pass: sizes are readings of the same runs.
        first_arm: of a study of one size, the family to compare each other one with.
    """
    series = in_series(measurements)
    order = [*dict.fromkeys([*metrics, *(key.metric for key in series)])]
    curves: dict[Curve, tuple[Mean, ...]] = {}
    laws: dict[Curve, PowerLaw] = {}
    changes: dict[Curve, tuple[Estimate, ...]] = {}
    gaps_found: dict[tuple[str, str], Gap] = {}
    gap_changes: dict[tuple[str, str], tuple[Estimate, ...]] = {}
    for key, own in series.items():
        followed = key.variant == PLAIN and is_headline(key.metric)  # laws take a while
        estimates, law = family_numbers(own, one_pass, with_law=followed)
        curves[key] = tuple(mean_at(own, estimate) for estimate in estimates)
        if law is not None:
            laws[key] = law
        plain = series.get(key._replace(variant=PLAIN))
        if key.variant != PLAIN and plain is not None:
            changes[key] = difference((own, plain), (1.0, -1.0), one_pass)
    for metric, variant in {(key.metric, key.variant): None for key in series}:
        pair = pair_of(series, metric, variant, compare)
        if pair is None or compare is None or not is_headline(metric):
            continue
        gaps_found[metric, variant] = gap_numbers(*pair, compare, metric_words(metric), one_pass)
        plain_pair = pair_of(series, metric, PLAIN, compare)
        if variant != PLAIN and plain_pair is not None:
            gap_changes[metric, variant] = difference((*pair, *plain_pair), (1.0, -1.0, -1.0, 1.0), one_pass)
    return Summary(
        title=title,
        families=tuple(families),
        compare=compare,
        variants=tuple(variants),
        metrics=tuple(metric for metric in order if any(key.metric == metric for key in series)),
        curves=curves,
        laws=laws,
        changes=changes,
        gaps={key: gap for key, gap in gaps_found.items() if gap.estimates},
        gap_changes={key: found for key, found in gap_changes.items() if found},
        first_arm=first_arm,
        leads={} if first_arm is None else leads_of(series, first_arm, one_pass),
    )


def leads_of(series: Mapping[Curve, Series], first_arm: str, one_pass: bool) -> dict[Curve, Estimate]:
    """Return what each family of a study of one size is ahead of the first, on the same images."""
    found: dict[Curve, Estimate] = {}
    for key, own in series.items():
        first = series.get(key._replace(family=first_arm))
        if key.family != first_arm and first is not None and is_headline(key.metric):
            for estimate in difference((own, first), (1.0, -1.0), one_pass):
                found[key] = estimate
    return found


def is_headline(metric: str) -> bool:
    """Tell whether a study is about a metric: not if it was measured of moved images."""
    return metric.partition(":")[0] not in ("translate", "unchanged")


def in_series(measurements: Sequence[Measurement]) -> dict[Curve, Series]:
    """Return measurements by what they belong to, by size and seed."""
    found: dict[Curve, list[Measurement]] = {}
    for one in sorted(measurements, key=lambda one: (one.examples, one.seed)):
        found.setdefault(Curve(one.metric, one.variant, one.family), []).append(one)
    return {key: tuple(members) for key, members in found.items()}


def pair_of(
    series: Mapping[Curve, Series], metric: str, variant: str, compare: tuple[str, str] | None
) -> tuple[Series, Series] | None:
    """Return the two compared families' measurements, or None where one has none."""
    found = [series.get(Curve(metric, variant, family)) for family in compare or ()]
    return (found[0], found[1]) if len(found) == 2 and found[0] and found[1] else None


def mean_at(own: Series, estimate: Estimate) -> Mean:
    here = [one for one in own if one.examples == estimate.examples]
    return Mean(estimate, tuple(one.value for one in here), float(np.mean([one.flops for one in here])))


# ---------------------------------------------------------------- numbers


@lru_cache(maxsize=2048)
def family_numbers(own: Series, one_pass: bool, *, with_law: bool) -> tuple[tuple[Estimate, ...], PowerLaw | None]:
    """Return a family's accuracy at every size, and its power law where one is asked for and there are sizes enough for it."""
    (scores,) = scores_of([own])
    curve = accuracies(scores, readings=one_pass)
    laws = power_laws(curve) if with_law else None
    return curve.estimates, None if laws is None else laws[0]


@lru_cache(maxsize=2048)
def gap_numbers(a: Series, b: Series, names: tuple[str, str], metric: str, one_pass: bool) -> Gap:
    """Return a minus b at every size that both have, where they cross, and words for it."""
    curve = gaps(*scores_of([a, b]), readings=one_pass)
    laws = power_laws(curve)
    crossing = crossover(curve, laws)
    return Gap(curve.estimates, crossing, verdict(curve, crossing, a=names[0], b=names[1], metric=metric, laws=laws))


@lru_cache(maxsize=2048)
def difference(all_of_them: tuple[Series, ...], weights: tuple[float, ...], one_pass: bool) -> tuple[Estimate, ...]:
    """Return the weighted sum of accuracies at every size that all have."""
    return contrast(scores_of(all_of_them), weights, readings=one_pass).estimates


def scores_of(all_of_them: Sequence[Series]) -> list[list[Scores]]:
    """Return measurements as arrays: the answers, if all are about the same images, else the accuracies alone."""
    kept = [answers_of(one) for own in all_of_them for one in own]
    known = [answers for answers in kept if answers is not None]
    paired = len(known) == len(kept) and len({answers.images for answers in known}) == 1
    return [scores_of_family(own, paired=paired) for own in all_of_them]


def scores_of_family(own: Series, *, paired: bool) -> list[Scores]:
    found = []
    for examples in dict.fromkeys(one.examples for one in own):
        here = [one for one in own if one.examples == examples]
        answered = [answers.correct for one in here if paired and (answers := answers_of(one)) is not None]
        if paired:
            found.append(Scores.from_answers(examples, np.stack(answered)))
        else:
            count = min(one.count or UNKNOWN for one in here)
            found.append(Scores(examples, np.array([one.value for one in here]), count))
    return found


def answers_of(one: Measurement) -> Answers | None:
    """Return the answers behind a measurement, where they are kept and give that number."""
    if one.predictions is None:
        return None
    answers = read_answers(one.predictions)
    return answers if abs(float(answers.correct.mean()) - one.value) < 1e-6 else None


# ---------------------------------------------------------------- words


def metric_words(metric: str) -> str:
    """Return a metric's name as a person says it."""
    kind, _, rest = metric.partition(":")
    if metric == UPSTREAM:
        return "upstream top-1"
    if kind == "fewshot":
        dataset, _, shots = rest.rpartition(":")
        return f"{short_set(dataset)} {shots}-shot top-1"
    if kind == "finetune":
        return f"{short_set(rest)} fine-tuned top-1"
    if kind == "translate":
        return f"upstream top-1, images moved by {rest} px"
    return f"answers unchanged, images moved by {rest} px" if kind == "unchanged" else metric


def short_set(dataset: str) -> str:
    """Return a data set's name without the path that leads to it."""
    kind, _, place = dataset.partition(":")
    return Path(place).name or dataset if kind in ("folder", "shards", "hf") and place else dataset
