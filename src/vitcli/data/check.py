"""What is wrong with a set: damaged and misplaced files, empty classes, pictures that are there twice or labelled twice.

Every image is decoded. Exact duplicates have equal pixels (SHA-256 of the decoded image); near ones a similar perceptual hash
and similar thumbnails. Both are looked for within and between all sets that are given, such as training and evaluation.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vitcli.data.duplicates import THUMBNAIL_SIDE, correlate, linked_groups, similar_pairs
from vitcli.data.examine import Finding, Reader, Seen
from vitcli.data.parallel import in_processes

__all__ = ["CheckedSet", "Group", "Report", "check"]

ALIKE = 0.95  # correlation of thumbnails of near duplicates; JPEG copies and scaled ones have more
SIDES = (32, 64, 128, 256, 512, 1024)  # px, of the histogram of short sides
MOST_SIZES = 10  # listed
UNUSABLE = frozenset(
    {
        "empty",
        "truncated",
        "corrupt",
        "not-an-image",
        "too-large",
        "unreadable",
        "missing-label",
        "bad-label",
        "label-out-of-range",
    }
)


@dataclass(frozen=True)
class CheckedSet:
    """A set, or one split of it, to go through."""

    name: str
    reader: Reader
    own: bool = True  # one of the set that is checked, not only compared with
    training: bool = False


@dataclass(frozen=True)
class Copy:
    """One of several copies of a picture."""

    set: str
    place: str
    label: str | None  # the class's name


@dataclass(frozen=True)
class Group:
    """Pictures that are the same, or nearly the same."""

    kind: str  # duplicate or near-duplicate
    copies: list[Copy]
    labels_differ: bool

    @property
    def sets(self) -> list[str]:
        """Return the names of the sets that the copies are in."""
        return list(dict.fromkeys(copy.set for copy in self.copies))


@dataclass(frozen=True)
class Summary:
    """What one set is like, as plain numbers."""

    name: str
    images: int  # readable ones
    classes: dict[str, int]
    grey: int
    sizes: list[dict[str, int]]  # the most common ones
    short_side: dict[str, int]  # images by length of the short side, px


@dataclass(frozen=True)
class Report:
    """All that was found."""

    sets: list[Summary]
    findings: list[tuple[str, Finding]]  # with the set's name
    groups: list[Group]
    leave_out: list[Finding]  # images of the checked set that training had better not see

    @property
    def clean(self) -> bool:
        """Tell whether nothing was found."""
        return not self.findings and not self.groups

    def counts(self) -> dict[str, int]:
        """Return how often each kind of thing was found."""
        kinds = Counter(finding.kind for _, finding in self.findings)
        kinds.update(group.kind for group in self.groups)
        differing = sum(group.labels_differ for group in self.groups)
        return dict(sorted(kinds.items())) | ({"same-picture-other-label": differing} if differing else {})

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "clean": self.clean,
            "counts": self.counts(),
            "sets": [asdict(summary) for summary in self.sets],
            "findings": [{"set": name, **asdict(finding)} for name, finding in self.findings],
            "duplicates": [{**asdict(group), "sets": group.sets} for group in self.groups],
        }


def check(sets: Sequence[CheckedSet], *, near: int, jobs: int | None = None) -> Report:
    """Go through sets and compare their images.

    Args:
        near: bits out of 64 in which the hashes of near duplicates may differ; -1 looks for exact ones only.
        jobs: processes; None takes one for each core.
    """
    with tempfile.TemporaryFile() as thumbnail_file:
        survey = Survey(sets, thumbnail_file)
        findings: list[tuple[str, Finding]] = []
        for number, each in enumerate(sets):
            findings += [(each.name, finding) for finding in each.reader.findings]
            bar = tqdm(total=each.reader.total, desc=f"checking {each.name}", unit="img", leave=False, delay=1.0, disable=None)
            with bar:
                for seen in in_processes(each.reader, each.reader.tasks, jobs=jobs):
                    findings += [(each.name, finding) for finding in seen.findings]
                    survey.add(seen, number)
                    bar.update(len(seen.labels))
            if each.training:
                findings += [(each.name, finding) for finding in survey.empty_classes(number, findings)]
            elif each.own:
                findings += [(each.name, finding) for finding in survey.untrained_classes(number, findings)]
        survey.finish()
        rows = find_duplicates(survey, near=near)
        groups = [survey.group(kind, members) for kind, members in rows]
        summaries = [survey.summary(number) for number in range(len(sets))]
        own = {each.name for each in sets if each.own}
        leave_out = [finding for name, finding in findings if name in own and finding.kind in UNUSABLE]
        leave_out += spare_copies(sets, groups)
    return Report(summaries, findings, groups, leave_out)


class Survey:
    """What was seen of all sets; thumbnails lie in a file, because they would fill the memory."""

    def __init__(self, sets: Sequence[CheckedSet], thumbnail_file: Any) -> None:
        self.sets = sets
        self.file = thumbnail_file
        self.pieces: list[Seen] = []
        self.piece_set: list[int] = []
        self.classes = [list(each.reader.classes or ()) for each in sets]
        self.tallies: list[Counter[int]] = [Counter() for _ in sets]

    def add(self, seen: Seen, number: int) -> None:
        """Take in a piece of set `number`."""
        labels, tally = seen.labels, seen.tally
        if seen.names is not None:  # labels of this piece alone: number the set's classes as they come
            known = {name: label for label, name in enumerate(self.classes[number])}
            table = [known.setdefault(name, len(known)) for name in seen.names]
            self.classes[number] = list(known)
            labels = np.array([*table, -1], np.int32)[labels]
            tally = {table[label] if label >= 0 else -1: count for label, count in tally.items()}
        self.tallies[number].update(tally)
        self.file.write(seen.thumbs.tobytes())
        self.pieces.append(replace(seen, labels=labels, thumbs=seen.thumbs[:0].copy(), findings=[]))
        self.piece_set.append(number)

    def empty_classes(self, number: int, findings: Sequence[tuple[str, Finding]]) -> list[Finding]:
        """Return the classes of a set that have no images, but those a reader has named already."""
        named = classes_named(findings)
        return [
            Finding("empty-class", f"class {name}", f"no images of it in {self.sets[number].name}")
            for label, name in enumerate(self.classes[number])
            if not self.tallies[number][label] and name not in named
        ]

    def untrained_classes(self, number: int, findings: Sequence[tuple[str, Finding]]) -> list[Finding]:
        """Return the classes with images in a set that no training set read before knows, but those named already."""
        training = [other for other, each in enumerate(self.sets[:number]) if each.own and each.training]
        known = classes_named(findings).union(*(self.classes[other] for other in training))
        return [
            Finding("class-mismatch", f"class {name}", f"in {self.sets[number].name}, but there are no training images of it")
            for label, name in enumerate(self.classes[number])
            if training and self.tallies[number][label] and name not in known
        ]

    def finish(self) -> None:
        """Put the pieces together; nothing can be added after this."""
        lengths = [len(piece.labels) for piece in self.pieces]
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)  # (pieces + 1,)
        self.set_of = np.repeat(np.array(self.piece_set, np.int32), lengths)
        self.labels = np.concatenate([np.zeros(0, np.int32), *(piece.labels for piece in self.pieces)])
        self.sizes = np.concatenate([np.zeros((0, 2), np.int32), *(piece.sizes for piece in self.pieces)])
        self.grey = np.concatenate([np.zeros(0, np.bool_), *(piece.grey for piece in self.pieces)])
        self.digests = np.concatenate([np.zeros((0, 2), np.uint64), *(piece.digests for piece in self.pieces)])
        self.hashes = np.concatenate([np.zeros(0, np.uint64), *(piece.hashes for piece in self.pieces)])
        self.contrast = np.concatenate([np.zeros(0, np.bool_), *(piece.contrast for piece in self.pieces)])
        self.file.flush()
        shape = (len(self.labels), THUMBNAIL_SIDE, THUMBNAIL_SIDE)
        mapped = len(self.labels) > 0  # nothing cannot be mapped
        self.thumbs: NDArray[np.uint8] = (
            np.memmap(self.file, np.uint8, "r", shape=shape) if mapped else np.zeros(shape, np.uint8)
        )

    def place(self, row: int) -> str:
        """Return where an image lies."""
        piece = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.pieces[piece].places.decode(errors="surrogateescape").split("\0")[row - int(self.starts[piece])]

    def copy(self, row: int) -> Copy:
        """Return an image as a member of a group."""
        number, label = int(self.set_of[row]), int(self.labels[row])
        listed = self.classes[number]
        return Copy(self.sets[number].name, self.place(row), listed[label] if 0 <= label < len(listed) else None)

    def group(self, kind: str, rows: NDArray[np.int64]) -> Group:
        """Return a group of images; other sets have other classes, so labels are compared within the checked one."""
        copies = [self.copy(row) for row in rows.tolist()]
        own = {each.name for each in self.sets if each.own}
        labels = {copy.label for copy in copies if copy.set in own and copy.label is not None}
        return Group(kind, copies, len(labels) > 1)

    def sort_key(self, number: int) -> Callable[[tuple[str, int]], tuple[int, str]]:
        """Return how a set's classes are sorted: those known beforehand as they are, others by number or name."""
        return lambda entry: (
            (0, "") if self.sets[number].reader.classes is not None else (len(entry[0]) * entry[0].isdigit(), entry[0])
        )

    def summary(self, number: int) -> Summary:
        """Describe a set."""
        mine = self.set_of == number
        labels, sizes = self.labels[mine], self.sizes[mine]
        classes = self.classes[number]
        counts = np.bincount(labels[(labels >= 0) & (labels < len(classes))], minlength=len(classes)).tolist()
        different, times = np.unique(sizes, axis=0, return_counts=True)
        common = np.argsort(-times, kind="stable")[:MOST_SIZES]
        bins = np.bincount(np.searchsorted(SIDES, sizes.min(axis=1, initial=1 << 30), side="right"), minlength=len(SIDES) + 1)
        names = [f"below {SIDES[0]}", *(f"{low} to {high - 1}" for low, high in pairwise(SIDES)), f"{SIDES[-1]} or more"]
        return Summary(
            name=self.sets[number].name,
            images=len(labels),
            classes=dict(sorted(zip(classes, counts, strict=True), key=self.sort_key(number))),
            grey=int(self.grey[mine].sum()),
            sizes=[
                {"height": int(different[i, 0]), "width": int(different[i, 1]), "images": int(times[i])}
                for i in common.tolist()
            ],
            short_side={name: count for name, count in zip(names, bins.tolist(), strict=True) if count},
        )


def classes_named(findings: Sequence[tuple[str, Finding]]) -> set[str]:
    """Return the classes that findings are about, by the last part of their place."""
    kinds = ("empty-class", "class-mismatch")
    return {re.split(r"/|^class ", finding.place)[-1] for _, finding in findings if finding.kind in kinds}


def find_duplicates(survey: Survey, *, near: int) -> list[tuple[str, NDArray[np.int64]]]:
    """Return groups of rows with their kind; those that lie in sets to compare with alone are left out."""
    if not len(survey.labels):
        return []
    own = np.array([each.own for each in survey.sets])[survey.set_of]
    order = np.lexsort((survey.digests[:, 1], survey.digests[:, 0]))  # stable: equal ones stay in order
    new = np.concatenate([[True], (np.diff(survey.digests[order].astype(np.uint64), axis=0) != 0).any(axis=1)])
    edges = np.flatnonzero(new)
    lengths = np.diff(np.append(edges, len(order)))
    groups = [("duplicate", order[edge : edge + length]) for edge, length in zip(edges, lengths) if length > 1]
    if near >= 0:
        first = order[edges]  # one row of each different picture
        shown = np.flatnonzero(survey.contrast[first])
        pairs = similar_pairs(survey.hashes[first[shown]], distance=near)
        alike = correlate(survey.thumbs, first[shown][pairs]) >= ALIKE
        for linked in linked_groups(pairs[alike], len(shown)):
            rows = [order[edges[i] : edges[i] + lengths[i]] for i in shown[linked].tolist()]
            groups.append(("near-duplicate", np.sort(np.concatenate(rows))))
    groups = [(kind, rows) for kind, rows in groups if own[rows].any()]
    return sorted(groups, key=lambda group: (group[0], int(group[1][0])))


def spare_copies(sets: Sequence[CheckedSet], groups: Sequence[Group]) -> list[Finding]:
    """Return the copies to leave out: training images that another set has too; of others all but the first.

    Where labels differ within a set, nobody knows which is right, so all go.
    """
    own = {each.name: each for each in sets if each.own}
    found: dict[str, Finding] = {}
    for group in groups:
        for name, each in own.items():
            mine = [copy for copy in group.copies if copy.set == name]
            elsewhere = [copy for copy in group.copies if copy.set != name]
            if each.training and elsewhere:
                spare, why = mine, f"also {elsewhere[0].place} of {elsewhere[0].set}"
            elif len({copy.label for copy in mine}) > 1:
                spare, why = mine, "its copies have different labels"
            else:
                spare, why = mine[1:], f"also {mine[0].place}" if mine else ""
            for copy in spare:
                found.setdefault(copy.place, Finding(group.kind, copy.place, why))
    return list(found.values())
