"""What made a run's numbers, and what a reader should know before trusting them."""

import shlex
from pathlib import Path
from typing import Any

from vitcli.config import Config
from vitcli.config_file import flatten
from vitcli.figures import shorten
from vitcli.report.answers import Answers
from vitcli.report.words import in_json, percent
from vitcli.run_record import RunRecord
from vitcli.rundir import differing_keys

__all__ = ["environment", "megabytes", "notes_of", "settings", "weights"]


def notes_of(record: RunRecord) -> list[str]:
    """Return what a reader should know before trusting the numbers."""
    notes = []
    total = record.config.train.steps or 0
    if record.summary is None:
        notes.append(
            f"The run is not finished: it is at step {record.step:,} of {total:,}."
            if record.step
            else f"The run has not done a step that was logged, of {total:,}."
        )
    for rollback in record.rollbacks:
        notes.append(f"Loss or gradient was not finite time and again: the run went back to step {rollback.step:,}.")
    if record.nonfinite:
        stored = ", ".join(record.nonfinite[:3]) + (", ..." if len(record.nonfinite) > 3 else "")
        notes.append(
            f"Steps were not applied because loss or gradient was not finite; their batches are in nonfinite/: {stored}."
        )
    best = max(record.curve("eval", "top1"), key=lambda point: point[1], default=None)
    last = record.summary or record.last_eval()  # early stopping ends with the best weights, not the last
    if best is not None and last is not None and best[1] - last.get("top1", best[1]) > 0.01:
        notes.append(
            f"An earlier evaluation was better: top-1 {percent(best[1])} at step {int(best[0]):,}, "
            f"{percent(last['top1'])} at step {last['step']:,} (log.keep_best keeps the weights of the best)."
        )
    if str(record.manifest.get("git_revision") or "").endswith("-dirty"):
        notes.append("The code had local changes when the run began; its git revision does not say which.")
    return notes


def settings(record: RunRecord) -> list[dict[str, Any]]:
    """Return the settings that differ from their defaults, and whether the run chose them itself."""
    data = record.config.data
    default = Config.model_validate({"data": {"source": data.source, "image_size": data.image_size}}).model_dump(mode="json")
    here = record.config.model_dump(mode="json")
    requested = flatten(record.manifest.get("requested") or {})
    flat, flat_default = flatten(here), flatten(default)
    rows = []
    for key in ["data.source", "data.image_size", *differing_keys(here, default)]:
        if key not in ("out", "ckpt") and key in flat:
            needed = key in ("data.source", "data.image_size")
            rows.append(
                {
                    "key": key,
                    "value": in_json(flat[key]),
                    "default": "" if needed else in_json(flat_default.get(key)),
                    "chosen": key in requested and requested[key] in (None, "auto") and flat[key] != requested[key],
                }
            )
    return rows


def weights(record: RunRecord) -> dict[str, Any] | None:
    """Return what became of the tensors that the run started from."""
    found = record.weights
    if found is None:
        return None
    fates = [
        (fate, [shorten(str(name), 200) for name in found.get(fate) or ()]) for fate in ("taken", "resized", "new", "dropped")
    ]
    return {
        "source": shorten(str(found.get("source", "")), 300),
        "summary": shorten(str(found.get("summary", "")), 600),
        "fates": [(fate, names) for fate, names in fates if names],
    }


def environment(record: RunRecord, answers: Answers | None) -> list[tuple[str, str]]:
    """Return what the run was made with: what, and what it was."""
    manifest = record.manifest
    rows: list[tuple[str, Any]] = [
        ("run directory", record.path.resolve()),
        ("command", shlex.join(map(str, manifest.get("command") or ()))),
        ("started", manifest.get("started")),
        ("git revision", manifest.get("git_revision")),
    ]
    rows += list((manifest.get("versions") or {}).items())
    rows += [(key.replace("_", " "), value) for key, value in (manifest.get("hardware") or {}).items()]
    rows += [(f"data, {key}", value) for key, value in (manifest.get("data") or {}).items()]
    if record.split is not None:
        split = record.split
        rows.append(("held out", f"{split.get('held_out_images')} images: {split.get('rule')}"))
        rows.append(("held out, SHA-256 of their names", split.get("held_out_sha256")))
    if answers is not None:
        rows.append(("checkpoint evaluated", answers.about["checkpoint"]))
    return [(key, shorten(value if isinstance(value, str) else in_json(value), 2000)) for key, value in rows if value]


def megabytes(checkpoint: Path) -> str:
    """Return how large a checkpoint's files are together."""
    try:
        size = sum(file.stat().st_size for file in checkpoint.iterdir() if file.is_file())
    except OSError:  # deleted just now, by the run itself
        return "-"
    return f"{size / 1e6:,.1f} MB"
