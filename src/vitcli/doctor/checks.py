"""What one look found: a status, a sentence, what to do about it, and its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vitcli.errors import CheckpointError, ConfigError, DataError, RunExistsError, UserError

__all__ = [
    "GIB",
    "Check",
    "Issue",
    "Status",
    "first_line",
    "gather",
    "in_bytes",
    "in_words",
    "left_open",
    "problem_of",
    "worst",
]

Status = Literal["ok", "skipped", "warning", "problem"]  # a problem would end the run; skipped: another one is in the way
ORDER: tuple[Status, ...] = ("ok", "skipped", "warning", "problem")
GIB = 2**30


@dataclass(frozen=True)
class Issue:
    """Something that is not as it should be, and what to do about it."""

    status: Status
    text: str
    advice: str


@dataclass(frozen=True)
class Check:
    """One line of the examination."""

    name: str
    status: Status
    text: str
    advice: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)  # JSON values

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        said = {"name": self.name, "status": self.status, "text": self.text}
        return {**said, "advice": list(self.advice), "numbers": dict(self.numbers)}


def worst(statuses: Sequence[Status]) -> Status:
    """Return the gravest of some statuses; ok where there are none."""
    return max(statuses, key=ORDER.index, default="ok")


def gather(name: str, text: str, issues: Sequence[Issue] = (), **numbers: Any) -> Check:
    """Make one check of a sentence and of whatever is wrong: its status is that of the gravest."""
    status = worst([issue.status for issue in issues])
    parts = [part for part in (text, *(issue.text for issue in issues)) if part]
    advice = dict.fromkeys(issue.advice for issue in issues if issue.advice)  # each once, in order
    return Check(name, status, "; ".join(parts), tuple(advice), numbers)


def left_open(name: str, reason: str) -> Check:
    """Make the check of something that could not be looked at."""
    return Check(name, "skipped", f"not looked at: {reason}")


def problem_of(error: UserError) -> Check:
    """Make the check of an error that the run would end with; its message says what to do."""
    name = "run"
    for kind, of_kind in ((ConfigError, "config"), (DataError, "data"), (CheckpointError, "weights"), (RunExistsError, "run")):
        if isinstance(error, kind):
            name = of_kind
    return Check(name, "problem", str(error))


# ---------------------------------------------------------------- numbers for a person


def in_bytes(size: float) -> str:
    """Write a number of bytes, with two digits that mean something."""
    amount, unit = (size / GIB, "GiB") if size >= GIB else (size / 2**20, "MiB")
    return f"{amount:,.1f} {unit}" if amount < 10 else f"{amount:,.0f} {unit}"


def in_words(seconds: float) -> str:
    """Write a time roughly, in the unit that a person would take."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.0f} days"


def first_line(error: BaseException) -> str:
    """Return what a library's error says at its beginning."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
