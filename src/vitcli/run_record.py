"""What a run directory says of itself, read for a person: finished or not, and whatever of it is there.

Nothing is written, so a run may be read while it trains.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcli.checkpoint import checkpoints_in, step_of
from vitcli.config import Config
from vitcli.config_file import stored_config
from vitcli.errors import UserError
from vitcli.recovery import STORE, Rollback, read_rollbacks
from vitcli.rundir import read_json
from vitcli.train import CONFIG, MANIFEST, SPLIT, SUMMARY, WEIGHTS

__all__ = ["RunRecord", "read_rows", "read_run"]


@dataclass(frozen=True)
class RunRecord:
    """A run directory as it is now."""

    path: Path
    config: Config  # resolved
    manifest: Mapping[str, Any]  # command, versions, hardware, data; empty where the file is missing
    summary: Mapping[str, Any] | None  # the last numbers; None until the run is finished
    rows: list[dict[str, Any]]  # of metrics.jsonl
    weights: Mapping[str, Any] | None  # what became of the tensors it started from
    split: Mapping[str, Any] | None  # which files of a folder are held out, where the run made the split
    rollbacks: list[Rollback]
    nonfinite: list[str]  # stored batches of steps that were not applied
    checkpoints: list[Path]  # newest first

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """The last step that is known of."""
        done = [row["step"] for row in self.rows] + [step_of(path) for path in self.checkpoints]
        return max([int((self.summary or {}).get("step", 0)), *done])

    def curve(self, kind: str, key: str) -> list[tuple[float, float]]:
        """Return (step, value) of the rows of a kind that have a number under `key`."""
        return [
            (float(row["step"]), float(row[key]))
            for row in self.rows
            if row["kind"] == kind and isinstance(row.get(key), int | float) and not isinstance(row.get(key), bool)
        ]

    def last_eval(self) -> dict[str, Any] | None:
        """Return the row of the last evaluation."""
        return next((row for row in reversed(self.rows) if row["kind"] == "eval"), None)

    def train_seconds(self) -> float:
        """Return the time spent training, without evaluations and saving."""
        known = (self.summary or {}).get("train_seconds")
        return float(known) if known is not None else sum(seconds for _, seconds in self.curve("train", "seconds"))


def read_run(path: Path) -> RunRecord:
    """Read a run directory, finished or not.

    Raises:
        UserError: it is none, or its config cannot be read.
    """
    if not (path / CONFIG).is_file():
        if path.parent.name == "checkpoints" and (path.parents[1] / CONFIG).is_file():
            raise UserError(f"{path}: a checkpoint; expected its run directory, {path.parents[1]}")
        what = "holds no config.yaml" if path.is_dir() else "there is no such directory"
        raise UserError(f"{path}: {what}; expected the run directory of vit pretrain or vit finetune")
    stored = path / STORE
    return RunRecord(
        path=path,
        config=stored_config(path / CONFIG),
        manifest=read_json(path / MANIFEST) or {},
        summary=read_json(path / SUMMARY),
        rows=read_rows(path / "metrics.jsonl"),
        weights=read_json(path / WEIGHTS),
        split=read_json(path / SPLIT),
        rollbacks=read_rollbacks(path),
        nonfinite=sorted(entry.name for entry in stored.glob("step_*")) if stored.is_dir() else [],
        checkpoints=checkpoints_in(path / "checkpoints"),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the whole rows of metrics.jsonl, without the line that is being written; none where there is no file."""
    rows = []
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    whole = line.endswith(b"\n") and isinstance(row["step"], int) and isinstance(row["kind"], str)
                except (ValueError, KeyError, TypeError, RecursionError):
                    break
                if not whole:
                    break
                rows.append(row)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return rows
