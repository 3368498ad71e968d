"""`vit report`: a run directory as one HTML page that opens anywhere: nothing is loaded from elsewhere and nothing runs.

The page shows what the run wrote and, where predictions are stored or can be made, what they say. Names of classes and files
are strangers' words: they are escaped, and the page's own policy forbids scripts.
"""

from collections.abc import Callable
from pathlib import Path

from vitcli.assess import predictions_of_run
from vitcli.errors import UserError
from vitcli.findings import findings
from vitcli.predictions import VAL_PREDICTIONS, load_predictions
from vitcli.report.answers import CONFUSED, Answers
from vitcli.report.facts import notes_of
from vitcli.report.page import GENERATOR, render
from vitcli.report.pictures import open_pictures
from vitcli.run_record import RunRecord, read_run
from vitcli.rundir import write_text

__all__ = ["write_report"]

Say = Callable[[str], None]


def write_report(
    run_dir: Path, *, out: Path | None, data_root: Path | None, mistakes: int, stored_only: bool, say: Say
) -> Path:
    """Write a run's report and return its path, by default report.html in the run directory.

    Args:
        data_root: where the evaluation images are looked for; default as the run had it.
        mistakes: how many are shown.
        stored_only: read no images and run no model, only what the run directory holds.

    Raises:
        UserError: it is no run directory, or `out` holds something that is no report.
    """
    record = read_run(run_dir)
    path = out or run_dir / "report.html"
    refuse_other_file(path)
    notes = notes_of(record)
    answers = find_answers(record, data_root=data_root, stored_only=stored_only, mistakes=mistakes, notes=notes, say=say)
    pictures = None
    if answers is not None and not stored_only:
        pictures = open_pictures(record.config, fingerprint=answers.about["fingerprint"], data_root=data_root, notes=notes)
    page = render(record, answers, pictures, notes)
    # a file's name may hold bytes that are no text
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def refuse_other_file(path: Path) -> None:
    """Raise UserError if a path holds something that `vit report` did not write, or cannot be written to."""
    if path.is_dir():
        raise UserError(f"{path}: this is a directory; expected a file such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}; make it, or choose another --out")
    if path.exists():
        with open(path, "rb") as file:
            if GENERATOR.encode() not in file.read(4096):
                raise UserError(f"{path}: holds something that is no report; choose another --out")


def find_answers(
    record: RunRecord, *, data_root: Path | None, stored_only: bool, mistakes: int, notes: list[str], say: Say
) -> Answers | None:
    """Load the run's predictions or make them; where neither works, say so in `notes`.

    A run without labels has no classifier to predict with, so nothing is missing.
    """
    if not record.config.objective.needs_labels:
        return None
    stored = record.path / VAL_PREDICTIONS
    if not stored.exists() and (stored_only or not record.checkpoints):
        if record.step:
            why = "they were not asked for" if record.checkpoints else "there is no checkpoint to make them with"
            notes.append(f"No predictions are stored, and {why}: no calibration, confusion or mistakes.")
        return None
    try:
        if stored_only:
            predictions, about = load_predictions(stored)
        else:
            if not stored.exists():
                say(f"{record.path}: no predictions are stored; evaluating its newest checkpoint")
            predictions, about = predictions_of_run(record.path, data_root=data_root, say=say)
    except UserError as error:
        notes.append(f"No predictions, so no calibration, confusion or mistakes: {error}")
        return None
    loss = record.config.train.loss
    found = findings(predictions, classes=about["classes"], loss=loss, mistakes=mistakes, confused=CONFUSED)
    return Answers(predictions, about, found)
