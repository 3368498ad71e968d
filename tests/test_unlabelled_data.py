"""`vit data` and `vit doctor` on pictures that are in no classes: a heap of files, shards without labels."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.harness import vit
from vitcli.config import DataConfig
from vitcli.data.folders import open_unlabelled
from vitcli.data.shards import iter_members
from vitcli.data.sources import open_source
from vitcli.doctor import look, trial
from vitcli.errors import DataError

CONFIG = """
model: {patch_size: 4, width: 32, depth: 1, num_heads: 2}
data: {source: "folder:heap", image_size: 16, val_fraction: 0.25}
augment: {crop: pad, flip: false}
objective: {name: masked_patch}
train: {steps: 2, batch_size: 4, tune: false}
log: {sample_images: 0}
"""
PICTURES = 24


def picture(number: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((20, 20), Image.Resampling.BICUBIC).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Write pictures into a folder, some directly and some deeper, and a config that learns from them; return their parent."""
    for number in range(PICTURES):
        path = tmp_path / "heap" / ("2024/may" if number % 2 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    (tmp_path / "a.yaml").write_text(CONFIG)
    return tmp_path


def write_shard(path: Path, beside: Callable[[int], bytes] | None = None) -> None:
    """Write a shard of pictures, each with a cls or json member where there is one beside it."""
    with tarfile.open(path, "w") as shard:
        for number in range(PICTURES):
            for kind, content in {"png": picture(number), "json": beside(number) if beside else b""}.items():
                info = tarfile.TarInfo(f"{number:04d}.{kind}")
                info.size = len(content)
                if content:
                    shard.addfile(info, io.BytesIO(content))


def test_check_finds_what_is_wrong_in_a_heap_and_nothing_else(place: Path) -> None:
    words = ("data", "check", "folder:heap", "--json", "data.val_fraction=0.25")
    assert vit(*words, cwd=place).returncode == 2  # where classes are expected
    clean = vit(*words, "--unlabelled", cwd=place)
    assert clean.returncode == 0, clean.stdout + clean.stderr
    sets = {each["name"]: each for each in json.loads(clean.stdout)["sets"]}
    split = {name: open_unlabelled(place / "heap", split=name, val_fraction=0.25) for name in ("train", "val")}
    assert {name: each["images"] for name, each in sets.items()} == {name: len(files.labels) for name, files in split.items()}
    in_words = vit("data", "check", "folder:heap", "--config", "a.yaml", cwd=place).stdout  # which learns without labels
    assert "train: 18 readable images without classes\n" in in_words and "classes:" not in in_words

    held_out, trained, damaged = split["val"].relative[0], *split["train"].relative[:2]
    (place / "heap" / damaged).write_bytes((place / "heap" / damaged).read_bytes()[:200])
    (place / "heap" / "notes.txt").write_text("no picture")
    (place / "heap" / trained).write_bytes((place / "heap" / held_out).read_bytes())
    found = json.loads(vit(*words, "--unlabelled", cwd=place).stdout)
    assert found["counts"] == {"duplicate": 1, "not-an-image": 1, "truncated": 1}
    assert sorted(found["duplicates"][0]["sets"]) == ["train", "val"]
    against = json.loads(
        vit("data", "check", "digits", "--split", "val", "--against", "folder:heap", "--json", cwd=place).stdout
    )
    assert [each["name"] for each in against["sets"]] == ["val", "folder:heap (train)", "folder:heap (val)"]


def test_check_of_shards_without_labels(place: Path) -> None:
    for name, beside in (("none.tar", None), ("other.tar", lambda number: b'{"caption": "a thing"}')):
        write_shard(place / name, beside)
        words = ("data", "check", f"shards:{name}", "--json", "--near", "-1")
        assert json.loads(vit(*words, cwd=place).stdout)["counts"] == {"missing-label": PICTURES}
        assert vit(*words, "--unlabelled", cwd=place).returncode == 0
    write_shard(place / "wrong.tar", lambda number: b'{"label": -1}')
    counts = json.loads(vit("data", "check", "shards:wrong.tar", "--unlabelled", "--json", cwd=place).stdout)["counts"]
    assert counts == {"label-out-of-range": PICTURES}, "a label that is there must be one"


def test_pack_writes_no_labels_and_what_it_writes_is_read_back(place: Path) -> None:
    words = ("data", "pack", "folder:heap", "packed", "--unlabelled", "--examples-per-shard", "7", "data.val_fraction=0.25")
    result = vit(*words, "--jobs", "1", cwd=place)
    assert result.returncode == 0 and "objective.name=mae" in result.stdout, result.stdout + result.stderr
    shards = sorted((place / "packed").glob("*.tar"))
    suffixes = {member.name.rpartition(".")[2] for shard in shards for member in iter_members(str(shard), where="")}
    assert suffixes == {"png"} and not (place / "packed" / "classnames.txt").exists()
    data = DataConfig(source="shapes", image_size=16, val_fraction=0.25)
    for split in ("train", "val"):
        before, after = (
            open_source(spec, split=split, data=data, labels=False)
            for spec in (f"folder:{place / 'heap'}", f"shards:{place / 'packed'}")
        )
        pixels = [sorted(source[index][0].tobytes() for index in range(len(source))) for source in (before, after)]
        assert pixels[0] == pixels[1] and after.classes == ["unlabelled"]
    with pytest.raises(DataError, match="no label"):
        open_source(f"shards:{place / 'packed'}", split="train", data=data)
    again = vit(*words, "--jobs", "1", cwd=place)
    assert again.returncode == 0 and "there already" in again.stdout
    indexed = vit("data", "index", "packed/train-*.tar", "--unlabelled", cwd=place).stdout
    assert "18 images in 3 shards, without labels" in indexed
    assert vit("data", "index", "packed/train-*.tar", cwd=place).returncode == 2


def test_classes_and_no_classes_do_not_mix_in_a_folder(place: Path) -> None:
    assert vit("data", "pack", "digits", "packed", "--split", "val", "--jobs", "1", cwd=place).returncode == 0
    mixed = vit("data", "pack", "folder:heap", "packed", "--unlabelled", "--split", "train", cwd=place)
    assert mixed.returncode == 2 and "are in none; choose another folder" in mixed.stderr
    # a set that has classes keeps them
    kept = vit("data", "pack", "digits", "packed", "--split", "val", "--unlabelled", "--jobs", "1", cwd=place)
    assert kept.returncode == 0 and "there already" in kept.stdout


def test_preview_stats_and_bench(place: Path) -> None:
    sheet = vit("data", "preview", "folder:heap", "--unlabelled", "--rows", "3", "--out", "a.png", cwd=place)
    assert "22 training images without classes" in sheet.stdout, sheet.stderr
    with Image.open(place / "a.png") as image:
        rows = np.asarray(image)[100:].shape[0] // 100
    assert rows == 1, "of 22 images there are two rows of 8 without repeating one"
    stats = vit("data", "stats", "folder:heap", "--json", cwd=place)
    assert json.loads(stats.stdout)["examples"] == 22
    bench = vit("data", "bench", "folder:heap", "data.image_size=16", "--batch-size", "4", "--seconds", "0.05", cwd=place)
    assert bench.returncode == 0 and "bottleneck: " in bench.stdout, bench.stderr


def test_doctor_looks_at_pictures_without_classes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MEASURE_SECONDS", 0.02)
    monkeypatch.setattr(trial, "STAGE_SECONDS", 0.005)
    (place / "heap" / "0.png").write_bytes(b"")
    words = ("doctor", "--config", "a.yaml", "data.memory_cache_gib=0", "data.workers=0", "--json")
    found = {check["name"]: check for check in json.loads(vit(*words, "data.on_error=skip", cwd=place).stdout)["checks"]}
    assert found["images"]["status"] == "warning" and found["images"]["numbers"]["counts"] == {"empty": 1}
    assert "vit data check folder:heap --unlabelled" in found["images"]["advice"][0]
    assert found["data"]["text"] == "folder:heap: 18 images to train on, 6 to evaluate on"
    assert found["speed"]["numbers"]["images_per_second"] > 0
    write_shard(place / "a.tar")
    (place / "heap" / "0.png").write_bytes(picture(0))
    sharded = vit(*words, "data.source=shards:a.tar", cwd=place)
    assert {check["status"] for check in json.loads(sharded.stdout)["checks"]} <= {"ok", "warning"}, sharded.stdout
    # the same pictures, where labels are needed
    refused = vit(*words, "objective.name=classification", cwd=place)
    assert refused.returncode == 1 and "class folder" in refused.stdout


def test_a_check_by_index_counts_as_doctor_says(place: Path) -> None:
    config = DataConfig(source=f"folder:{place / 'heap'}", image_size=16, val_fraction=0.25)
    readers = look.readers_of(config, labels=False)
    assert {split: reader.total for split, reader in readers.items()} == {"train": 18, "val": 6}
