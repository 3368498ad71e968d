"""`vit predict`: whose names, in which order, and what happens to files that are none."""

import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.harness import Result, vit
from vitcli.data.transforms import EvalTransform, normalise
from vitcli.errors import UserError
from vitcli.opened import OpenedModel, open_model
from vitcli.predict import Found, find_images, in_order, likeliest, new_file, predict_images

TINY = """
model: {patch_size: 8, width: 32, depth: 1, num_heads: 2}
data: {source: shapes, image_size: 16, shapes: {classes: 7, train_examples: 60, val_examples: 30}}
train: {steps: 3, batch_size: 8, precision: float32}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    (folder / "tiny.yaml").write_text(TINY)
    assert vit("pretrain", "--config", "tiny.yaml", cwd=folder).returncode == 0
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def opened(run: Path) -> OpenedModel:
    return open_model(run, dataset="images", say=str)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of ten pictures, two of them damaged, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "b" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b/c.jpg", "b/deep/d.jpeg", "b/e.webp", "f.PNG", "g.bmp", "h.gif", "z.jpg")):
        size = (20 + number, 30)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "z.jpg").read_bytes()[:-200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


ORDER = ["a.png", "broken.jpg", "empty.png", "f.PNG", "g.bmp", "h.gif", "z.jpg", "b/c.jpg", "b/e.webp", "b/deep/d.jpeg"]


def ask(run: Path, *words: str, **how: Any) -> Result:
    return vit("predict", "--ckpt", str(run), *words, **how)


def rows_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


# ---------------------------------------------------------------- answers


def test_a_folder_in_order_with_what_cannot_be_read(run: Path, photos: Path) -> None:
    result = ask(run, str(photos), "--json", "--batch-size", "3", "--top", "2")
    assert result.returncode == 1
    rows = rows_of(result)
    assert [os.path.relpath(row["path"], photos) for row in rows] == ORDER
    bad = [row for row in rows if "error" in row]
    assert [Path(row["path"]).name for row in bad] == ["broken.jpg", "empty.png"]
    assert "cannot read this image" in bad[0]["error"]
    assert "the file is empty" in bad[1]["error"]
    for row in rows:
        if row not in bad:
            assert [set(one) for one in row["top"]] == [{"class", "probability"}] * 2
            assert 1 >= row["top"][0]["probability"] >= row["top"][1]["probability"] > 0
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"vit: {photos}/broken.jpg: cannot read this image")
    assert lines[-1] == "vit: no prediction for 2 of 10 images"


def test_the_answers_are_the_models(opened: OpenedModel, photos: Path) -> None:
    names = [photos / name for name in ORDER if name not in ("broken.jpg", "empty.png")]
    with closing(predict_images(opened, [Found(str(name)) for name in names], top=99, batch_size=3)) as found:
        predictions = list(found)
    data = opened.config.data
    for name, prediction in zip(names, predictions, strict=True):
        with Image.open(name) as picture:
            pixels = EvalTransform(image_size=data.image_size)([np.array(picture.convert("RGB"))])
        with torch.no_grad():
            expected = opened.model(normalise(pixels, mean=data.mean, std=data.std))[0].softmax(0)
        assert prediction.path == str(name)
        assert [number for number, _ in prediction.top] == expected.argsort(descending=True).tolist()
        assert [share for _, share in prediction.top] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_changes_nothing(run: Path, photos: Path, batch_size: int) -> None:
    rows, others = (rows_of(ask(run, str(photos), "--json", "--batch-size", size)) for size in (str(batch_size), "7"))
    assert [row["path"] for row in rows] == [row["path"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert [one["class"] for one in row.get("top", [])] == [one["class"] for one in other.get("top", [])]
        shares = [[one["probability"] for one in each.get("top", [])] for each in (row, other)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-6)


def test_a_sigmoid_head_gives_each_class_its_own_probability() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0], [1.0, torch.nan, 0.0], [3.0, 3.0, -9.0]])
    found = likeliest(logits, top=2, loss="sigmoid")
    assert [number for number, _ in found[0]] == [1, 0]
    assert [share for _, share in found[0]] == pytest.approx([1 / (1 + np.exp(-2)), 0.5])
    assert found[1] == []
    assert [number for number, _ in found[2]] == [0, 1]
    assert sum(share for _, share in likeliest(logits[:1], top=3, loss="softmax")[0]) == pytest.approx(1)


def test_views_are_averaged(run: Path, photos: Path) -> None:
    plain, flipped = (rows_of(ask(run, str(photos / "a.png"), "--json", *words)) for words in ((), ("--tta", "flip")))
    assert plain[0]["top"] != flipped[0]["top"]
    with Image.open(photos / "a.png") as picture:
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "mirrored.png")
    mirrored = rows_of(ask(run, str(photos / "mirrored.png"), "--json", "--tta", "flip"))
    assert [one["class"] for one in mirrored[0]["top"]] == [one["class"] for one in flipped[0]["top"]]


def test_another_image_size(run: Path, photos: Path) -> None:
    assert ask(run, str(photos / "a.png"), "--image-size", "24x32").returncode == 0
    refused = ask(run, str(photos / "a.png"), "--image-size", "big")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "expected a number of pixels" in refused.stderr


# ---------------------------------------------------------------- forms


def test_tables(run: Path, photos: Path) -> None:
    whole = ask(run, str(photos / "a.png"), str(photos / "empty.png"), "--top", "3")
    lines = whole.stdout.splitlines()
    assert lines[0] == str(photos / "a.png")
    assert all(line.startswith("  ") and "%" in line for line in lines[1:4])
    assert lines[4] == str(photos / "empty.png")
    assert "the file is empty" in lines[5]
    short = ask(run, str(photos / "a.png"), str(photos / "empty.png"), "--top", "1").stdout.splitlines()
    assert len(short) == 2
    assert "%" in short[0]
    assert str(photos / "a.png") in short[0]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt"])
def test_a_file_is_there_when_it_is_whole(run: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"found.{suffix}"
    result = ask(run, str(photos), "--out", str(out), "--top", "2")
    assert (result.returncode, result.stdout) == (1, "")
    text = out.read_text()
    if suffix == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert list(rows[0]) == ["path", "class_1", "probability_1", "class_2", "probability_2", "error"]
        assert [os.path.relpath(row["path"], photos) for row in rows] == ORDER
        assert float(rows[0]["probability_1"]) > 0
        assert rows[1]["class_1"] == ""
        assert rows[1]["error"]
    elif suffix == "jsonl":
        assert [os.path.relpath(json.loads(line)["path"], photos) for line in text.splitlines()] == ORDER
    else:
        assert text.startswith(str(photos / "a.png"))
    again = ask(run, str(photos), "--out", str(out))
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert out.read_text() == text
    assert not list(tmp_path.glob("*.part"))


def test_an_interrupted_file_has_another_name(tmp_path: Path) -> None:
    def fill(path: Path, text: str) -> None:
        with new_file(path) as file:
            file.write(text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "found.csv", "half")
    assert [path.name for path in tmp_path.iterdir()] == ["found.csv.part"]
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "other.csv", "")
    assert [path.name for path in tmp_path.iterdir()] == ["found.csv.part"]
    with pytest.raises(UserError, match="No such file"), new_file(tmp_path / "gone" / "found.csv"):
        pass


# ---------------------------------------------------------------- names


def found(*words: str, stdin: bytes = b"", separator: bytes = b"\n") -> list[Found]:
    return list(find_images(words, stdin=io.BytesIO(stdin), separator=separator))


def test_files_folders_globs_and_names_on_stdin(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    assert [one.path for one in found(".")] == [f"./{name}" for name in ORDER]
    assert [one.path for one in found("z.jpg", "notes.txt", "gone.png")] == ["z.jpg", "notes.txt", "gone.png"]
    assert [one.path for one in found("*.jpg", "b/*")] == ["broken.jpg", "z.jpg", "b/c.jpg", "b/deep/d.jpeg", "b/e.webp"]
    assert [one.path for one in found("**/*.jp*g")] == ["b/c.jpg", "b/deep/d.jpeg", "broken.jpg", "z.jpg"]
    assert [one.path for one in found("-", stdin=b"z.jpg\n\nb/deep\ngone\n")] == ["z.jpg", "b/deep/d.jpeg", "gone"]
    assert [one.path for one in found("-", "a.png", stdin=b"x\ny\0z", separator=b"\0")] == ["x\ny", "z", "a.png"]
    assert [one.problem for one in found("*.tif")] == ["no file fits this pattern"]
    (photos / "none").mkdir()
    assert [one.problem for one in found("none")] == ["no images in this folder or below it"]
    Path("[x].png").write_bytes(b"")
    assert found("[x].png") == [Found("[x].png")]
    os.symlink(photos, photos / "b" / "circle")
    assert len(found(".")) == len(ORDER) + 1


def test_names_come_whole_however_they_arrive() -> None:
    names = [f"{number}" * 20_000 for number in range(9)] + ["\udcff.png", "last"]
    stream = os.fsencode("\n".join(names))
    assert [one.path for one in found("-", stdin=stream)] == names


def test_names_that_are_no_files_are_reported(run: Path, photos: Path) -> None:
    os.mkfifo(photos / "pipe.png")
    words = [str(photos / name) for name in ("gone.png", "pipe.png", "notes.txt", "x?.png")]
    result = ask(run, *words, "--json")
    assert result.returncode == 1
    problems = [row["error"] for row in rows_of(result)]
    expected = ["No such file", "this is not a file", "no image format recognises it", "no file fits this pattern"]
    assert all(part in problem for part, problem in zip(expected, problems, strict=True))
    odd = photos / "new\nline \x1b[31m\udcff.png"
    os.rename(photos / "a.png", odd)
    shown = ask(run, str(odd), "--top", "1")
    assert shown.returncode == 0
    assert "new\\nline \\x1b[31m\\udcff.png" in shown.stdout
    assert rows_of(ask(run, str(odd), "--json"))[0]["path"] == str(odd)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--null"], "expected - among the images"),
        (["--top", "0"], "--top"),
        (["--tta", "zoom"], "--tta"),
        (["--ckpt", "gone"], "gone"),
    ],
)
def test_what_cannot_be_is_one_line(run: Path, photos: Path, words: list[str], said: str) -> None:
    result = ask(run, str(photos), *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr


@pytest.mark.slow
def test_names_through_a_pipe_are_answered_while_it_is_open(run: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "vitcli", "predict", "--ckpt", str(run), "-", "--null", "--json", "--batch-size", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for name in ("a.png", "empty.png", "z.jpg"):
            process.stdin.write(os.fsencode(photos / name) + b"\0")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["path"] == str(photos / name)
        process.send_signal(2)  # while it waits for a name
        process.stdout.close()
        assert process.wait(60) == 130


# ---------------------------------------------------------------- in order, ahead, bounded


def test_results_come_in_order_and_little_is_made_ahead() -> None:
    drawn = 0

    def numbers() -> Iterator[int]:
        nonlocal drawn
        while True:
            drawn += 1
            yield drawn

    def work(number: int) -> int:
        time.sleep(0.002 if number % 3 == 0 else 0)
        return number

    with closing(in_order(work, numbers(), threads=3, ahead=10)) as made:
        assert [next(made) for _ in range(50)] == list(range(1, 51))
        time.sleep(0.1)
        assert drawn <= 50 + 10 + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vit-decode")]


def test_what_goes_wrong_ahead_is_raised() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the list broke")

    with closing(in_order(lambda number: number, broken(), threads=1, ahead=4)) as made:
        assert next(made) == 1
        with pytest.raises(OSError, match="the list broke"):
            next(made)
    with closing(in_order(lambda number: 1 // number, iter([1, 0]), threads=1, ahead=4)) as made:
        assert next(made) == 1
        with pytest.raises(ZeroDivisionError):
            next(made)
