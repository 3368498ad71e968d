"""The report: one page with the run's own numbers, whole without a network, whatever state the run is in."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from tests.harness import vit
from tests.made_run import make_run
from vitcli.metrics import share_interval
from vitcli.predictions import VAL_PREDICTIONS, load_predictions

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = ["<script>alert(1)<", '"><img src=x onerror=alert(1)>', "{{ 7*7 }}", "$x$", "_a", "</title><b>"]


class Page(HTMLParser):
    """What stands in a page: its elements, links, ids and text; fails on a tag that is closed wrongly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.kinds: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def report(run: Path, *words: str) -> tuple[Page, str]:
    out = run.parent / f"{run.name}.html"
    result = vit("report", str(run), "--out", str(out), *words)
    assert result.returncode == 0, result.stderr
    raw = out.read_text(encoding="utf-8")
    page = Page(raw)
    assert not page.kinds & {"script", "iframe", "object", "embed", "link", "form"}
    assert not page.handlers
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", raw)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    return page, raw


def test_a_finished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    page, raw = report(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    summary = json.loads((run / "summary.json").read_text())
    assert f"{100 * summary['top1']:.2f}\xa0%" in page.text
    low, high = share_interval(summary["correct"], summary["examples"])
    assert f"{100 * low:.1f} – {100 * high:.1f}\xa0%" in page.text
    for words in ("Loss", "Accuracy", "Most confused", "Calibration", "expected calibration error", "finished: 100 steps"):
        assert words in page.text
    for words in ("optim.warmup_steps", "chosen", "a processor", "'a file.yaml'", "The code had local changes"):
        assert words in page.text
    found, _ = load_predictions(run / VAL_PREDICTIONS)
    assert raw.count('<li><img src="data:image/png') == min(24, int((~found.correct).sum()))
    assert raw.count("<svg") == 7  # five curves, confusion, calibration
    assert len(raw) < 600_000


def test_pictures_are_the_images_that_were_mistaken(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=False)
    _, raw = report(run, "--mistakes", "3")
    pictures = re.findall(r'<li><img src="data:image/png;base64,([^"]+)"', raw)
    assert len(pictures) == 3
    found, _ = load_predictions(run / VAL_PREDICTIONS)
    wrong = np.flatnonzero(~found.correct)
    worst = wrong[np.argmax(found.top_probabilities[wrong, 0])]
    from vitcli.config_file import stored_config
    from vitcli.data.sources import open_source

    data = stored_config(run / "config.yaml").data
    image, _ = open_source("shapes", split="val", data=data)[int(found.indices[worst])]
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), image)
    assert f"shapes[{found.indices[worst]}]" in raw


def test_an_unfinished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False, predictions=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 50, "lo')  # being written just now
    page, _ = report(run)
    assert "not finished: step 40 of 100" in page.text
    assert "there is no checkpoint to make them with" in page.text
    assert "top-1" in page.text  # of the last evaluation in the log
    for name in ("metrics.jsonl", "manifest.json"):
        (run / name).unlink()
    page, _ = report(run)
    assert "has not done a step" in page.text


def test_an_old_run_without_predictions_has_intervals_from_its_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", predictions=False, rows=False)
    page, raw = report(run, "--stored-only")
    summary = json.loads((run / "summary.json").read_text())
    low, high = share_interval(summary["correct"], summary["examples"])
    assert f"{100 * low:.1f} – {100 * high:.1f}\xa0%" in page.text
    assert 'class="track"' in raw
    assert "No predictions are stored" in page.text


def test_names_of_strangers_are_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b onclick=x>&run", classes=HOSTILE, rows=False)
    page, raw = report(run)
    for name in HOSTILE:
        assert name in page.text
    assert "<b onclick=x>&run" in page.text
    assert raw.count("<b ") == raw.count('<b style="left:')  # ours, in the table of classes


def test_missing_or_changed_images_leave_a_note(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for label in ("one", "two"):
        (photos / label).mkdir(parents=True)
        for number in range(20):
            pixels = np.random.default_rng(number).integers(0, 255, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / label / f"{number}.png")
    run = make_run(tmp_path / "run", source=f"folder:{photos}", accuracy=0.0, rows=False)
    page, raw = report(run)
    assert 'src="data:image/jpeg' in raw
    assert f"Files are below {photos}\n" in page.text
    assert re.search(r"(one|two)/\d+\.png", page.text)
    assert "say little: one, two." in page.text
    for number in range(20):  # whichever of them are held out
        shutil.move(photos / "two" / f"{number}.png", photos / "two" / f"other-{number}.png")
    page, raw = report(run)
    assert "no longer those that were evaluated" in page.text
    assert "no picture" in page.text
    assert "<img" not in raw
    shutil.rmtree(photos)
    assert "No pictures: " in report(run)[0].text


def test_damaged_predictions_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=False)
    (run / VAL_PREDICTIONS).write_bytes(b"12345678 nonsense")
    page, _ = report(run, "--stored-only")
    assert "No predictions, so no calibration" in page.text
    assert "damaged" in page.text


def test_what_else_a_run_directory_may_hold(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=False)
    (run / "rollbacks.json").write_text('{"rollbacks": [{"step": 20, "skip": 5}]}')
    (run / "nonfinite" / "step_00000025").mkdir(parents=True)
    weights = {"source": "B_16.npz", "summary": "152 tensors: 149 taken, 2 new: head", "taken": ["a"], "new": ["head.weight"]}
    (run / "weights_report.json").write_text(json.dumps(weights))
    split = {"rule": "0.1 of every class", "held_out_images": 7, "held_out_sha256": "abc"}
    (run / "split.json").write_text(json.dumps(split))
    probes = [{"kind": "fewshot", "step": step, "digits/5shot": step / 200, "seconds": 1.0} for step in (50, 100)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probes))
    page, raw = report(run, "--stored-only")
    for words in ("went back to step 20", "step_00000025", "B_16.npz", "149 taken, 2 new", "1 new", "head.weight"):
        assert words in page.text
    assert "7 images: 0.1 of every class" in page.text
    assert "Few-shot accuracy" in page.text
    assert raw.count("<svg") == 3


def test_a_run_that_stopped_early(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=False)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "step": 60, "trained_steps": 80, "stopped_early": True}))
    text = report(run, "--stored-only")[0].text
    assert "stopped early after 80 of 100 steps, with the weights of step 60" in text


def test_where_it_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=False)
    assert vit("report", str(run), "--mistakes", "0").returncode == 0
    first = (run / "report.html").read_text()
    assert vit("report", str(run)).returncode == 0  # a report may be made anew
    assert (run / "report.html").read_text() != first
    (tmp_path / "thesis.html").write_text("precious")
    for words, said in (
        ([str(run), "--out", str(tmp_path / "thesis.html")], "holds something that is no report"),
        ([str(run), "--out", str(tmp_path)], "this is a directory"),
        ([str(run), "--out", str(tmp_path / "nowhere" / "x.html")], "there is no directory"),
        ([str(tmp_path / "nowhere")], "there is no such directory"),
        ([str(tmp_path)], "holds no config.yaml"),
    ):
        result = vit("report", *words)
        assert result.returncode == 2
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert (tmp_path / "thesis.html").read_text() == "precious"


def test_a_run_of_ours_from_training_to_report(tmp_path: Path) -> None:
    config = """
    model: {patch_size: 8, width: 32, depth: 1, num_heads: 2}
    data: {source: shapes, image_size: 16, shapes: {classes: 3, train_examples: 60, val_examples: 30}}
    train: {steps: 4, batch_size: 8}
    """
    (tmp_path / "tiny.yaml").write_text(config)
    assert vit("pretrain", "--config", "tiny.yaml", "--out", "run", cwd=tmp_path).returncode == 0
    run = tmp_path / "run"
    page, _ = report(run)
    assert "finished: 4 steps" in page.text
    assert "step_00000004" in page.text
    for name in ("summary.json", str(VAL_PREDICTIONS)):  # as of a run that was stopped
        (run / name).unlink()
    result = vit("report", str(run))
    assert result.returncode == 0
    assert "evaluating its newest checkpoint" in result.stderr
    text = Page((run / "report.html").read_text()).text
    assert "not finished: step 4 of 4" in text
    assert "Calibration" in text
    result = vit("report", str(run / "checkpoints" / "step_00000004"))
    assert (result.returncode, "expected its run directory" in result.stderr) == (2, True)
