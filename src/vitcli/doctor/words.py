"""An examination as one screen of plain words."""

import shlex
import textwrap

from vitcli.doctor.checks import Check
from vitcli.doctor.examination import Examination

__all__ = ["lines_of"]

WIDTH = 80  # columns
MARKS = {"ok": "ok", "skipped": "-", "warning": "warning", "problem": "PROBLEM"}
FIRST = f"{'':<8} {'':<9} "


def lines_of(examination: Examination) -> list[str]:
    """Return the screen: a line or two for each check, what to do below what needs it, and the verdict."""
    lines = [line for check in examination.checks for line in lines_of_check(check)]
    return [*lines, "", *verdict(examination)]


def lines_of_check(check: Check) -> list[str]:
    """Return a check with its advice."""

    def wrapped(text: str, first: str, rest: str) -> list[str]:
        return textwrap.wrap(
            text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        )

    lines = wrapped(check.text, f"{MARKS[check.status]:<8} {check.name:<9} ", FIRST)
    for advice in check.advice:
        lines += wrapped(advice, f"{FIRST}-> ", f"{FIRST}   ")
    return lines


def verdict(examination: Examination) -> list[str]:
    """Say in a sentence what all of it comes to; the command to go on with stands alone, to be copied."""
    counts = {status: sum(check.status == status for check in examination.checks) for status in ("problem", "warning")}
    look = f"{counts['warning']} thing{'s' if counts['warning'] > 1 else ''} to look at"
    if counts["problem"]:
        many = "a problem" if counts["problem"] == 1 else f"{counts['problem']} problems"
        what = "This installation has" if examination.wish is None else "The run would end with"
        return [f"{what} {many}: mend what is marked PROBLEM, then look again."]
    if examination.wish is None:
        works = f"This installation works; {look}." if counts["warning"] else "This installation works."
        return [f"{works} To examine a run and its data:", "  vit doctor --config FILE"]
    fine = f"{look}, nothing that would end the run:" if counts["warning"] else "Ready:"
    return [fine, f"  {shlex.join(examination.wish.words())}"]
