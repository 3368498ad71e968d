"""The pictures of a run: `vit data check`'s own look at as many as a few seconds allow, and what the classes are like."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitcli.config import Config, DataConfig
from vitcli.data.check import UNUSABLE, CheckedSet, Report, check
from vitcli.data.examine import Finding, IndexReader, Reader, Seen
from vitcli.data.folders import Split
from vitcli.data.protocol import Source
from vitcli.data.sources import open_source
from vitcli.data_commands import as_files, open_readers, some
from vitcli.doctor.checks import Check, Issue, gather, left_open
from vitcli.own_data import class_sizes, short_side
from vitcli.recipes import FEW, UNEQUAL, inequality

__all__ = ["check_classes", "check_images"]

LOOK_SECONDS = 4.0  # at each split
COMPUTED = ("shapes", "mosaic", "digits")  # made by formulas, or part of a library
NEAR_BITS = 6  # as `vit data check`
STILL_READ = "ends without"  # how `examine` calls a file that lacks its end and is decoded all the same
FEW_EVALUATED = 1000  # evaluation images; with fewer an accuracy is good to a few points


@dataclass(frozen=True)
class Part:
    """Some pieces of a set, spread evenly over it."""

    reader: Reader
    tasks: Sequence[int]

    @property
    def classes(self) -> list[str] | None:
        """Return the whole set's class names."""
        return self.reader.classes

    @property
    def findings(self) -> list[Finding]:
        """Return what is wrong with the whole set before any image is read."""
        return self.reader.findings

    @property
    def total(self) -> int | None:
        """Return None: how many images the pieces hold is not asked for."""
        return None

    def __call__(self, task: int) -> Seen:
        """Look at a piece."""
        return self.reader(task)


def check_images(config: Config) -> Check:
    """Decode a part of the images of both splits as `vit data check` does, and say what is wrong with them.

    Raises:
        DataError: the data cannot be opened at all.
    """
    data = config.data
    if data.source in COMPUTED and data.val_source is None:
        return gather("images", "computed, not read: nothing can be wrong with them")
    labels = config.objective.needs_labels
    readers = readers_of(data, labels=labels)
    if not readers:
        return left_open("images", "they are remote, and would be fetched for it; `vit data check` does")
    parts, whole = [], True
    for split, reader in readers.items():
        tasks = affordable(reader)
        whole &= len(tasks) == len(reader.tasks)
        parts.append((split, Part(reader, tasks)))
    # only a whole set tells which classes have no images
    sets = [CheckedSet(split, part, training=whole and split == "train") for split, part in parts]
    report = check(sets, near=NEAR_BITS, jobs=1)
    totals = [len(reader.source) if isinstance(reader, IndexReader) else reader.total for reader in readers.values()]
    of = None if None in totals else sum(total or 0 for total in totals)
    return judge(report, data, of=of, whole=whole, labels=labels)


def readers_of(data: DataConfig, *, labels: bool) -> dict[Split, Reader]:
    """Open the splits that a run reads, with all their faults; a remote one is left out.

    Folders are listed as they are; other sets go by their index, because a whole shard takes too long.

    Args:
        labels: whether the run needs them.
    """
    files = as_files(data)
    found: dict[Split, Reader] = {}
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        spec = data.source if split == "train" else data.val_source or data.source
        if spec.startswith("folder:"):
            opened = open_readers(spec, [split], files, labels=labels)
            found |= {each: reader for each, reader in opened.items() if each == split}
        elif spec not in COMPUTED:
            source = open_source(spec, split=split, data=files, labels=labels)
            if not source.remote:
                found[split] = IndexReader(source)
    return found


def affordable(reader: Reader) -> list[int]:
    """Return as many pieces as the time allows, spread over all of them; one of them is timed."""
    tasks = reader.tasks
    if not len(tasks):
        return []
    started = time.perf_counter()
    reader(tasks[len(tasks) // 2])
    count = max(1, int(LOOK_SECONDS / (time.perf_counter() - started + 1e-9)))
    return [tasks[i] for i in np.unique(np.linspace(0, len(tasks) - 1, min(count, len(tasks))).astype(int))]


def judge(report: Report, data: DataConfig, *, of: int | None, whole: bool, labels: bool) -> Check:
    """Put a report of the data check into one line."""
    broken = [found for _, found in report.findings if found.kind in UNUSABLE and not found.reason.startswith(STILL_READ)]
    others = [found for _, found in report.findings if found not in broken]
    readable = sum(summary.images for summary in report.sets)
    looked = readable + len(broken)
    share = f"{looked:,} looked at" if whole or of is None else f"{looked:,} of {of:,} looked at"
    words = f"vit data check {data.source}" if labels else f"vit data check {data.source} --unlabelled"
    more = "" if whole else f"{words} looks at all of them"
    list_them = f"{words} --write-list bad.tsv lists all"
    issues = []
    if broken:
        expected = len(broken) if whole or not looked or of is None else len(broken) * of / looked
        skipping = data.on_error == "skip"
        ends = not skipping or expected > data.skip_limit
        if skipping:
            end, advice = f", about {expected:,.0f} in all; data.skip_limit is {data.skip_limit:,}", "raise data.skip_limit"
        else:
            end, advice = ", and the first of them ends the run", "take them out, or set data.on_error=skip"
        text = f"{some(len(broken), 'file')} cannot be read ({broken[0].place}: {broken[0].reason}){end}"
        issues.append(Issue("problem" if ends else "warning", text, f"{list_them}; {advice}" if ends else list_them))
    if others:
        kinds = ", ".join(f"{sum(each.kind == kind for each in others):,} {kind}" for kind in sorted({o.kind for o in others}))
        issues.append(Issue("warning", f"{kinds} (such as {others[0].place}: {others[0].reason})", list_them))
    issues += copies(report, list_them, labels=labels)
    said = [] if issues or whole else [more]
    text = share if issues else f"{share}, nothing wrong"
    made = gather("images", text, issues, looked_at=looked, of=of, counts=report.counts())
    return Check(made.name, made.status, made.text, (*made.advice, *said), made.numbers)


def copies(report: Report, list_them: str, *, labels: bool) -> list[Issue]:
    """Say which pictures are there twice where that does harm: to an accuracy, or where there are no labels to a loss."""
    across = [group for group in report.groups if len(group.sets) > 1]
    differing = [group for group in report.groups if group.labels_differ]
    inside = len(report.groups) - len(across)
    issues = []
    if across:
        places = " = ".join(next(copy.place for copy in across[0].copies if copy.set == name) for name in across[0].sets[:2])
        measure = "accuracy" if labels else "loss"
        text = f"{some(len(across), 'picture')} both to train and to evaluate on ({places}): the {measure} will flatter"
        issues.append(Issue("warning", text, list_them))
    if differing and labels:
        places = " = ".join(copy.place for copy in differing[0].copies[:2])
        issues.append(Issue("warning", f"{some(len(differing), 'picture')} with two labels ({places})", list_them))
    if inside:
        issues.append(Issue("warning", f"{some(inside, 'picture')} there twice in one split", list_them))
    return issues


def check_classes(config: Config, train: Source, val: Source) -> Check:
    """Say how many images there are, and where classes or pictures do not suit the settings."""
    labels = config.objective.needs_labels
    issues, sizes = [], class_sizes(train) if labels else None
    numbers: dict[str, Any] = {"train_examples": len(train), "val_examples": len(val)}
    if labels:
        numbers["classes"] = len(train.classes)
    if sizes is not None:
        few = [name for name, count in sizes.items() if count < FEW]
        if few:
            text = f"{some(len(few), 'class')} with fewer than {FEW} training images ({few[0]})"
            issues.append(Issue("warning", text, "add images of them, or take them out"))
        ratio = inequality(sizes)
        numbers["largest_over_smallest"] = round(ratio, 2)
        if ratio >= UNEQUAL and config.train.class_weights == "none" and config.data.sampling == "natural":
            text = f"the largest class is {ratio:.0f} times the smallest, and all images count alike"
            issues.append(Issue("warning", text, "train.class_weights=sqrt or data.sampling=sqrt, if small classes matter"))
    side = None if config.data.source in COMPUTED else short_side(train)
    if side is not None:
        numbers["short_side_px"] = side
        if side < 0.75 * min(config.data.image_size):
            text = f"pictures of {side} px are enlarged to {' x '.join(map(str, config.data.image_size))}"
            issues.append(Issue("warning", text, f"data.image_size={side} costs less and shows as much"))
    counts = f"{len(train):,} images to train on, {len(val):,} to evaluate on"
    if labels:
        counts = f"{len(train.classes):,} classes, {counts}"
        if len(val) < FEW_EVALUATED:
            points = 100 * 1.96 * 0.5 / len(val) ** 0.5  # half of a binomial's 95 % interval, where it is widest
            numbers["accuracy_within_points"] = round(points, 1)
            counts += f" (an accuracy is good to {points:.0f} points)"
    return gather("data", f"{config.data.source}: {counts}", issues, **numbers)
