"""Where a run's numbers go: the console, TensorBoard and metrics.jsonl, the same ones in all three.

A row's step is the number of updates done. A resumed run cuts metrics.jsonl back to its starting step and tells TensorBoard to
forget what came after it, so that neither holds a step twice.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from vitcli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard.writer import SummaryWriter

__all__ = ["RunLog", "duration"]

SPEED_MEMORY = 0.7  # share of the old estimate in the smoothed seconds per step behind ETA


class RunLog:
    """The log of one run, from `start_step` to `total_steps`.

    Args:
        run_dir: gets metrics.jsonl and tensorboard/; made if missing.
        batch_size: images per step, for img/s.
        quiet: nothing on the console.
        writes: whether this process writes files and speaks; of several that train together one does.
        stream: the console; standard error by default, so that standard output holds results only.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        start_step: int,
        total_steps: int,
        batch_size: int,
        quiet: bool = False,
        writes: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.quiet = quiet or not writes
        self.writes = writes
        self.stream = sys.stderr if stream is None else stream
        self.metrics_path = run_dir / "metrics.jsonl"
        self.tensorboard_dir = run_dir / "tensorboard"
        self.purge_step = start_step + 1 if self.tensorboard_dir.exists() else None
        self.lazy_writer: SummaryWriter | None = None
        self.metrics_file: TextIO | None = None
        rows: list[dict[str, Any]] = []
        try:
            if writes:
                run_dir.mkdir(parents=True, exist_ok=True)
                rows = cut_back(self.metrics_path, start_step)
                self.metrics_file = open(self.metrics_path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise UserError(
                f"{self.metrics_path}: cannot be written ({error.strerror}); choose another run directory"
            ) from error
        self.evals = {row["step"]: row for row in rows if row["kind"] == "eval"}
        self.probed = {row["step"] for row in rows if row["kind"] == "fewshot"}
        self.inspected = {row["step"] for row in rows if row["kind"] == "inspect"}
        self.train_seconds = sum(row.get("seconds", 0.0) for row in rows if row["kind"] == "train")  # of the whole run
        self.row_step = start_step  # the last row's
        self.window_start = time.monotonic()
        self.paused_seconds = 0.0  # since the last row
        self.is_paused = False
        self.step_seconds: float | None = None  # smoothed
        self.bar: tqdm[Any] | None = None
        if self.stream.isatty() and not self.quiet:
            self.bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self.stream,
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} {percentage:3.0f} %|{bar}| {elapsed}{postfix}",
            )

    # ------------------------------------------------------------ numbers

    def tick(self, step: int) -> None:
        """Move the progress bar to `step` updates done; costs next to nothing, and nothing without a terminal."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def train_row(self, step: int, values: Mapping[str, Any]) -> float:
        """Log training numbers after `step` updates, with the speed since the row before; return it, images/s.

        The console shows `loss` and `accuracy` (in [0, 1]) where given and not None. Time inside `paused()` is left out.
        """
        seconds = max(time.monotonic() - self.window_start - self.paused_seconds, 1e-9)
        steps = step - self.row_step
        if steps < 1:
            raise ValueError(f"training rows must go forward: {step} after {self.row_step}")
        speed = steps * self.batch_size / seconds
        latest = seconds / steps
        before = latest if self.step_seconds is None else self.step_seconds
        self.step_seconds = SPEED_MEMORY * before + (1 - SPEED_MEMORY) * latest
        self.write_row("train", step, {**values, "images_per_second": speed, "seconds": seconds})
        self.train_seconds += seconds
        self.row_step, self.window_start, self.paused_seconds = step, time.monotonic(), 0.0

        shown = []
        if isinstance(values.get("loss"), int | float):
            shown.append(f"loss {values['loss']:.4g}")
        if isinstance(values.get("accuracy"), int | float):
            shown.append(f"acc {100 * values['accuracy']:.1f} %")
        shown += [f"{speed:.0f} img/s", f"ETA {duration(self.step_seconds * (self.total_steps - step))}"]
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(shown), refresh=False)
            self.bar.update(step - self.bar.n)
            self.bar.refresh()
        else:
            self.message(f"step {step}/{self.total_steps} ({100 * step // self.total_steps} %) {' '.join(shown)}")
        return speed

    def eval_row(self, step: int, values: Mapping[str, Any]) -> None:
        """Log an evaluation after `step` updates; the console shows `top1`, `top5`, `accuracy` and `loss` where given.

        A run killed between its last evaluation and its summary evaluates that step again; the files keep the first row.
        """
        if not self.has_eval(step):
            with self.paused():
                self.write_row("eval", step, values)
            self.evals[step] = dict(values)
        names = (("top1", "top-1"), ("top5", "top-5"), ("accuracy", "accuracy"))
        shown = [f"{name} {100 * values[key]:.2f} %" for key, name in names if key in values]
        if isinstance(values.get("loss"), int | float):
            shown.append(f"loss {values['loss']:.4g}")
        self.message(f"eval step {step}/{self.total_steps}: {', '.join(shown)}")

    def has_eval(self, step: int) -> bool:
        """Tell whether an evaluation after `step` updates is in the log, from before a resume or from now."""
        return step in self.evals

    def fewshot_row(self, step: int, accuracies: Mapping[str, float]) -> None:
        """Log few-shot probes after `step` updates: accuracies in [0, 1] by "<data set>/<shots>shot"."""
        with self.paused():
            self.write_row("fewshot", step, accuracies)
        self.probed.add(step)
        shown = [f"{name.replace('/', ' ')} {100 * accuracy:.2f} %" for name, accuracy in accuracies.items()]
        self.message(f"few-shot step {step}/{self.total_steps}: {', '.join(shown)}")

    def inspect_row(self, step: int, pictures: Mapping[str, "Tensor"], *, seconds: float) -> None:
        """Put uint8 pictures (1, 3, H, W) of the model after `step` updates into TensorBoard, and log what they took."""
        for name, picture in pictures.items():
            self.images(step, f"inspect/{name}", picture)
        self.write_row("inspect", step, {"figures": len(pictures), "seconds": seconds})
        self.inspected.add(step)
        self.message(f"inspect step {step}/{self.total_steps}: {len(pictures)} figures in {seconds:.1f} s, in TensorBoard")

    def images(self, step: int, tag: str, images: "Tensor") -> None:
        """Put uint8 images (n, 3, H, W) into TensorBoard as one grid."""
        if not self.writes:
            return
        with self.paused():
            self.writer().add_images(tag, images.cpu(), global_step=step)

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Put flat settings, and the numbers to compare runs by (say `eval/top1`), into TensorBoard's HPARAMS page."""
        if not self.writes:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()}
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        file_writer: Any = self.writer().file_writer
        for summary in hparams(plain, finite):  # not add_hparams(), which would make a second run in a sub-directory
            file_writer.add_summary(summary)

    # ------------------------------------------------------------ words and time

    def message(self, text: str) -> None:
        """Say one line on the console, above the bar if there is one."""
        if self.quiet:
            return
        try:
            if self.bar is not None:
                self.bar.write(text, file=self.stream)
            else:
                self.stream.write(text + "\n")
            self.stream.flush()
        except BrokenPipeError:  # `vit pretrain ... 2>&1 | head`: who stops reading does not stop the training
            self.quiet = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside (evaluation, saving) out of img/s and ETA; may be nested."""
        if self.is_paused:
            yield
            return
        self.is_paused, start = True, time.monotonic()
        try:
            yield
        finally:
            self.is_paused = False
            self.paused_seconds += time.monotonic() - start

    def close(self) -> None:
        """Write out everything and close; a second call does nothing."""
        if self.bar is not None:
            self.bar.close()
        if self.lazy_writer is not None:
            self.lazy_writer.close()
            self.lazy_writer = None
        if self.metrics_file is not None:
            self.metrics_file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------ files

    def writer(self) -> "SummaryWriter":
        """Return TensorBoard's writer, opened at the first need: importing it takes seconds."""
        if self.lazy_writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.lazy_writer = SummaryWriter(str(self.tensorboard_dir), purge_step=self.purge_step)
        return self.lazy_writer

    def write_row(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and its plain numbers to TensorBoard, under `kind`/key."""
        if self.metrics_file is None:
            return
        try:
            self.metrics_file.write(json.dumps({"kind": kind, "step": step, **finite(dict(values))}, allow_nan=False) + "\n")
            self.metrics_file.flush()
        except OSError as error:
            raise UserError(
                f"{self.metrics_path}: cannot be written ({error.strerror}); free some space and run again"
            ) from error
        writer = self.writer()
        for key, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                writer.add_scalar(f"{kind}/{key}", value, global_step=step)
        if kind == "eval":
            writer.flush()


def cut_back(path: Path, start_step: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl back to its whole rows up to `start_step`, atomically, and return them.

    A line that a kill left half written is dropped; so is everything after it, had there been anything.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    rows, kept = [], []
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
            whole = line.endswith(b"\n") and isinstance(row["step"], int) and isinstance(row["kind"], str)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            break
        if row["step"] <= start_step:
            rows.append(row)
            kept.append(line)
    if b"".join(kept) != content:
        temporary = path.with_name(f".tmp-{path.name}")
        with open(temporary, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return rows


def finite(value: Any) -> Any:
    """Replace floats that JSON cannot write by None, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def duration(seconds: float) -> str:
    """Write seconds as mm:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
