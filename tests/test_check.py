"""Every kind of damage planted, all of it found, and nothing else; duplicates compared with the slow way of finding them."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from scipy.fft import dct

from vitcli.config import DataConfig
from vitcli.data.check import CheckedSet, Report, check
from vitcli.data.duplicates import correlate, linked_groups, perceptual_hash, similar_pairs, thumbnails
from vitcli.data.examine import IndexReader
from vitcli.data.examine_folders import read_folder
from vitcli.data.examine_shards import read_shards
from vitcli.data.sources import open_source
from vitcli.errors import DataError

Files = dict[str, bytes]


def picture(seed: int, *, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Draw a picture with large and small features, unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.integers(-20, 21, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + grain, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return out.getvalue()


def jpeg(seed: int, **options: Any) -> bytes:
    return encoded(picture(seed), "JPEG", **{"quality": 92, **options})


def png(seed: int) -> bytes:
    return encoded(picture(seed), "PNG")


def bomb() -> bytes:
    """Return a small PNG whose header claims 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def broken_png(seed: int) -> bytes:
    data = bytearray(png(seed))
    at = data.index(b"IDAT") + 40
    data[at : at + 60] = bytes(60)
    return bytes(data)


def write(root: Path, files: Files) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def healthy() -> Files:
    """Return a folder with nothing wrong: three classes, several formats, an evaluation split."""
    files = {}
    for label, name in enumerate(["ant", "bee", "cow"]):
        for i in range(6):
            files[f"train/{name}/{i}.{'png' if i % 2 else 'jpg'}"] = (png if i % 2 else jpeg)(100 * label + i)
        for i in range(2):
            files[f"val/{name}/{i}.webp"] = encoded(picture(100 * label + 50 + i), "WEBP", lossless=True)
    return files


def check_folder(root: Path, *, near: int = 6, jobs: int = 1, others: tuple[Path, ...] = ()) -> Report:
    readers = read_folder(root, val_fraction=0.2)
    sets = [CheckedSet(split, reader, training=split == "train") for split, reader in readers.items()]
    for other in others:
        sets += [CheckedSet(f"{other.name} {s}", r, own=False) for s, r in read_folder(other, val_fraction=0.2).items()]
    return check(sets, near=near, jobs=jobs)


def found(report: Report, root: Path) -> set[tuple[str, str]]:
    return {(finding.kind, finding.place.replace(f"{root}/", "")) for _, finding in report.findings}


def groups(report: Report, root: Path) -> list[tuple[str, bool, set[str]]]:
    return [(g.kind, g.labels_differ, {copy.place.replace(f"{root}/", "") for copy in g.copies}) for g in report.groups]


# A folder


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_healthy_folder_is_clean(tmp_path: Path, jobs: int) -> None:
    report = check_folder(write(tmp_path, healthy()), jobs=jobs)
    assert (report.findings, report.groups, report.leave_out) == ([], [], [])
    assert report.clean
    train, val = report.sets
    assert (train.images, train.classes, train.grey) == (18, {"ant": 6, "bee": 6, "cow": 6}, 0)
    assert train.sizes == [{"height": 40, "width": 48, "images": 18}]
    assert val.images == 6 and val.short_side == {"32 to 63": 6}


def test_every_planted_damage_is_found_and_nothing_else(tmp_path: Path) -> None:
    files = healthy()
    damage: dict[tuple[str, str], bytes] = {
        ("empty", "train/ant/zero.jpg"): b"",
        ("truncated", "train/ant/cut.jpg"): jpeg(900)[:-300],
        ("truncated", "train/ant/no-end-mark.jpg"): jpeg(901)[:-2],
        ("truncated", "train/bee/cut.png"): png(902)[:-400],
        ("corrupt", "train/bee/broken.png"): broken_png(903),
        ("truncated", "train/bee/header-only.jpg"): jpeg(904)[:30],
        ("not-an-image", "train/cow/page.jpg"): b"<html>404 not found</html>",
        ("not-an-image", "train/cow/notes.txt"): b"remember the milk",
        ("too-large", "train/cow/bomb.png"): bomb(),
        ("misnamed", "train/ant/really-png.jpg"): png(905),
        ("misnamed", "val/ant/really-jpeg.webp"): jpeg(906),
        ("misnamed", "train/cow/photo.dat"): jpeg(907),
        ("outside-classes", "train/lost.jpg"): jpeg(908),
        ("outside-classes", "stray.png"): png(909),
    }  # fmt: skip
    files |= {place: data for (_, place), data in damage.items()}
    files |= {
        "val/dodo/1.jpg": jpeg(910),
        "README.md": b"about this set",
        "train/.hidden.jpg": b"",
        "train/ant/.DS_Store": b"x",
    }
    root = write(tmp_path, files)
    (root / "train" / "elk").mkdir()
    (root / "train" / "bee" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    report = check_folder(root)
    expected = set(damage) | {
        ("class-mismatch", "val/dodo"),
        ("class-mismatch", "train/elk"),
        ("empty-class", "train/elk"),
        ("unreadable", "train/bee/gone.jpg"),
    }
    assert found(report, root) == expected
    assert len(report.findings) == len(expected)
    assert report.groups == []
    unusable = {"empty", "truncated", "corrupt", "not-an-image", "too-large", "unreadable"}
    assert {f.place.replace(f"{root}/", "") for f in report.leave_out} == {
        place for kind, place in expected if kind in unusable
    }
    assert all(finding.reason and "\n" not in finding.reason for _, finding in report.findings)


def test_damage_in_a_folder_without_evaluation_split(tmp_path: Path) -> None:
    files = {f"{name}/{i}.jpg": jpeg(10 * label + i) for label, name in enumerate(["ant", "bee"]) for i in range(6)}
    root = write(tmp_path, files | {"ant/zero.jpg": b"", "bee/copy.jpg": files["ant/2.jpg"]})
    report = check_folder(root)
    assert found(report, root) == {("empty", "ant/zero.jpg")}
    assert groups(report, root) == [("duplicate", True, {"ant/2.jpg", "bee/copy.jpg"})]
    counts = {summary.name: summary.images for summary in report.sets}
    assert sum(counts.values()) == 13 and counts["val"] == 2


def test_no_folder_and_no_classes_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        read_folder(tmp_path / "nowhere", val_fraction=0.1)
    with pytest.raises(DataError, match="no class folders"):
        read_folder(write(tmp_path, {"a.jpg": b""}), val_fraction=0.1)


# Copies


def test_copies_within_and_between_splits(tmp_path: Path) -> None:
    files = healthy()
    files |= {
        "train/ant/again.jpg": files["train/ant/0.jpg"],  # the same file
        "train/ant/other-format.png": encoded(Image.open(io.BytesIO(files["train/ant/2.jpg"])), "PNG"),  # the same pixels
        "train/bee/leak.webp": files["val/bee/1.webp"],  # in both splits
        "train/cow/mislabelled.png": files["train/bee/1.png"],  # two labels
        "train/bee/recompressed.jpg": jpeg(103, quality=60),  # nearly the same as bee/3.png
        "train/cow/scaled.png": encoded(picture(203).resize((96, 80), Image.Resampling.BICUBIC), "PNG"),
    }
    root = write(tmp_path, files)
    report = check_folder(root)
    assert report.findings == []
    assert sorted(groups(report, root), key=lambda group: sorted(group[2])) == [
        ("duplicate", False, {"train/ant/0.jpg", "train/ant/again.jpg"}),
        ("duplicate", False, {"train/ant/2.jpg", "train/ant/other-format.png"}),
        ("duplicate", True, {"train/bee/1.png", "train/cow/mislabelled.png"}),
        ("near-duplicate", False, {"train/bee/3.png", "train/bee/recompressed.jpg"}),
        ("duplicate", False, {"train/bee/leak.webp", "val/bee/1.webp"}),
        ("near-duplicate", False, {"train/cow/3.png", "train/cow/scaled.png"}),
    ]
    assert report.counts() == {"duplicate": 4, "near-duplicate": 2, "same-picture-other-label": 1}
    assert {finding.place.replace(f"{root}/", "") for finding in report.leave_out} == {
        "train/ant/again.jpg",
        "train/ant/other-format.png",
        "train/bee/leak.webp",
        "train/bee/1.png",
        "train/cow/mislabelled.png",
        "train/bee/recompressed.jpg",
        "train/cow/scaled.png",
    }
    exact = check_folder(root, near=-1)
    assert {kind for kind, _, _ in groups(exact, root)} == {"duplicate"}


def test_copies_in_other_sets(tmp_path: Path) -> None:
    root, other = tmp_path / "mine", tmp_path / "theirs"
    files = healthy()
    write(root, files)
    theirs = {f"{name}/{i}.jpg": jpeg(5000 + 10 * label + i) for label, name in enumerate(["x", "y"]) for i in range(4)}
    theirs |= {"x/from-training.jpg": files["train/bee/0.jpg"], "x/again.jpg": theirs["x/1.jpg"], "y/bad.jpg": b""}
    write(other, theirs)
    report = check_folder(root, others=(other,))
    assert groups(report, tmp_path) == [("duplicate", False, {"mine/train/bee/0.jpg", "theirs/x/from-training.jpg"})]
    assert found(report, other) == {("empty", "y/bad.jpg")}
    assert [finding.place for finding in report.leave_out] == [str(root / "train/bee/0.jpg")]
    assert "from-training.jpg" in report.leave_out[0].reason


def test_flat_pictures_are_not_near_duplicates(tmp_path: Path) -> None:
    flat = {
        f"{name}/{i}.png": encoded(Image.new("RGB", (20, 20), (40 * i + k, 90, 7)), "PNG")
        for k, name in enumerate("ab")
        for i in range(4)
    }
    report = check_folder(write(tmp_path, flat))
    assert report.clean, report.groups


# Shards


def member(tar: tarfile.TarFile, name: str, data: bytes, **what: Any) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for key, value in what.items():
        setattr(entry, key, value)
    tar.addfile(entry, io.BytesIO(data))


def write_shard(path: Path, first: int, extra: Callable[[tarfile.TarFile], None] | None = None, *, count: int = 4) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            member(tar, f"{i:04d}.jpg", jpeg(i))
            member(tar, f"{i:04d}.cls", str(i % 3).encode())
        if extra:
            extra(tar)


def check_shards(folder: Path, *, files: str = "", jobs: int = 1) -> Report:
    readers = read_shards(
        f"{folder}/{files}", splits=["train", "val"], label_key="label", cache_dir=folder / "cache", remote_cache_gib=1.0
    )
    return check([CheckedSet(s, r, training=s == "train") for s, r in readers.items()], near=6, jobs=jobs)


@pytest.mark.parametrize("jobs", [1, 2])
def test_healthy_shards_are_clean(tmp_path: Path, jobs: int) -> None:
    write_shard(tmp_path / "train-0.tar", 0)
    write_shard(tmp_path / "train-1.tar", 10)
    write_shard(tmp_path / "val-0.tar", 20)
    report = check_shards(tmp_path, jobs=jobs)
    assert report.clean, (report.findings, report.groups)
    assert [(summary.name, summary.images, summary.classes) for summary in report.sets] == [
        ("train", 8, {"0": 3, "1": 3, "2": 2}),
        ("val", 4, {"0": 1, "1": 1, "2": 2}),
    ]


def test_every_planted_damage_in_shards_is_found_and_nothing_else(tmp_path: Path) -> None:
    def damage(tar: tarfile.TarFile) -> None:
        member(tar, "empty.jpg", b"")
        member(tar, "empty.cls", b"0")
        member(tar, "cut.jpg", jpeg(700)[:-300])
        member(tar, "cut.cls", b"1")
        member(tar, "page.jpg", b"<html></html>")
        member(tar, "page.cls", b"1")
        member(tar, "bomb.png", bomb())
        member(tar, "bomb.cls", b"1")
        member(tar, "really-png.jpg", png(701))
        member(tar, "really-png.cls", b"2")
        member(tar, "unlabelled.jpg", jpeg(702))
        member(tar, "beyond.jpg", jpeg(703))
        member(tar, "beyond.cls", b"3")
        member(tar, "negative.jpg", jpeg(704))
        member(tar, "negative.cls", b"-1")
        member(tar, "odd.jpg", jpeg(705))
        member(tar, "odd.json", b"{not json")
        member(tar, "lonely.cls", b"1")
        member(tar, "twice.jpg", jpeg(706))
        member(tar, "twice.cls", b"1")
        member(tar, "twice.png", png(707))
        member(tar, "../../outside.jpg", jpeg(708))
        member(tar, "../../outside.cls", b"1")
        member(tar, "/etc/absolute.jpg", jpeg(709))
        member(tar, "/etc/absolute.cls", b"1")
        member(tar, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        member(tar, "device.jpg", b"", type=tarfile.CHRTYPE)
        member(tar, "copy.jpg", jpeg(1))
        member(tar, "copy.cls", b"2")
        member(tar, "caption.txt", b"other members are nobody's business")

    write_shard(tmp_path / "train-0.tar", 0, damage)
    write_shard(tmp_path / "train-1.tar", 10)
    write_shard(tmp_path / "train-2.tar", 30)
    write_shard(tmp_path / "train-4.tar", 60)
    write_shard(tmp_path / "val-0.tar", 80)
    cut = (tmp_path / "train-2.tar").read_bytes()
    (tmp_path / "train-2.tar").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "train-3.tar").write_bytes(b"")
    (tmp_path / "train-5.tar").write_bytes(b"no tar file" * 100)
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncow\ndodo\n".replace("dodo\n", ""))
    names = [f"train-{n}.tar" for n in range(7)]
    info = {"train": {"name": "train", "filenames": names, "shard_lengths": [99, 4, 4, 4, 4, 4, 4]}}
    info["val"] = {"name": "val", "filenames": ["val-0.tar"], "shard_lengths": [4]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
    report = check_shards(tmp_path, files="train-*.tar")
    expected = {
        ("empty", "train-0.tar:empty.jpg"),
        ("truncated", "train-0.tar:cut.jpg"),
        ("not-an-image", "train-0.tar:page.jpg"),
        ("too-large", "train-0.tar:bomb.png"),
        ("misnamed", "train-0.tar:really-png.jpg"),
        ("missing-label", "train-0.tar:unlabelled.jpg"),
        ("label-out-of-range", "train-0.tar:beyond.cls"),
        ("label-out-of-range", "train-0.tar:negative.cls"),
        ("bad-label", "train-0.tar:odd.json"),
        ("label-without-image", "train-0.tar:lonely.cls"),
        ("name-twice", "train-0.tar:twice.png"),
        ("unsafe-member", "train-0.tar:../../outside.jpg"),
        ("unsafe-member", "train-0.tar:../../outside.cls"),
        ("unsafe-member", "train-0.tar:/etc/absolute.jpg"),
        ("unsafe-member", "train-0.tar:/etc/absolute.cls"),
        ("unsafe-member", "train-0.tar:link.jpg"),
        ("unsafe-member", "train-0.tar:device.jpg"),
        ("count-mismatch", "train-0.tar"),
        ("empty", "train-3.tar"),
        ("corrupt", "train-5.tar"),
        ("unreadable", "train-6.tar"),
    }
    seen = found(report, tmp_path)
    in_cut = {(kind, place) for kind, place in seen if place.startswith("train-2.tar")}
    assert len(in_cut) == 1 and {kind for kind, _ in in_cut} == {"truncated"}
    assert seen - in_cut == expected
    assert len(report.findings) == len(expected) + 1
    assert groups(report, tmp_path) == [("duplicate", True, {"train-0.tar:0001.jpg", "train-0.tar:copy.jpg"})]
    assert not list(tmp_path.parent.glob("outside*"))


def test_an_empty_class_and_class_names_as_labels(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("val", 50)):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for i in range(6):
                member(tar, f"{i}.jpg", jpeg(first + i))
                member(tar, f"{i}.json", json.dumps({"label": "bee" if i % 2 else "ant"}).encode())
    assert check_shards(tmp_path).clean
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncow\n")
    assert found(check_shards(tmp_path), tmp_path) == {("empty-class", "class cow")}


def test_a_class_that_only_the_evaluation_shards_have(tmp_path: Path) -> None:
    def seventh(tar: tarfile.TarFile) -> None:
        member(tar, "x.jpg", jpeg(99))
        member(tar, "x.cls", b"7")

    write_shard(tmp_path / "train-0.tar", 0)
    write_shard(tmp_path / "val-0.tar", 50, seventh)
    assert found(check_shards(tmp_path), tmp_path) == {("class-mismatch", "class 7")}


def test_remote_shards(tmp_path: Path) -> None:
    def damage(tar: tarfile.TarFile) -> None:
        member(tar, "bad.jpg", b"")
        member(tar, "bad.cls", b"0")

    for number in range(2):
        write_shard(tmp_path / f"train-{number}.tar", 10 * number, damage)
    store = fsspec.filesystem("memory")
    store.pipe({f"/checked/train-{n}.tar": (tmp_path / f"train-{n}.tar").read_bytes() for n in range(2)})
    readers = read_shards(
        "memory://checked/train-*.tar", splits=["train"], label_key="label", cache_dir=tmp_path / "cache", remote_cache_gib=1.0
    )
    report = check([CheckedSet("train", readers["train"], training=True)], near=6, jobs=1)
    assert report.sets[0].images == 8
    places = {(finding.kind, finding.place) for _, finding in report.findings}
    assert places == {("empty", f"memory://checked/train-{number}.tar:bad.jpg") for number in range(2)}


# Any other source


def test_a_source_by_index(tmp_path: Path) -> None:
    data = DataConfig.model_validate({"source": "digits", "image_size": 8, "memory_cache_gib": 0})
    digits = open_source("digits", split="val", data=data)
    report = check([CheckedSet("val", IndexReader(digits))], near=-1, jobs=1)
    assert (report.sets[0].images, report.sets[0].grey) == (359, 359)
    assert report.findings == []
    folder = write(tmp_path / "photos", healthy() | {"train/ant/zero.jpg": b"", "train/bee/cut.png": png(5)[:-300]})
    files = open_source(f"folder:{folder}", split="train", data=data)
    report = check([CheckedSet("train", IndexReader(files), training=True)], near=6, jobs=2)
    assert found(report, folder) == {("empty", "train/ant/zero.jpg"), ("truncated", "train/bee/cut.png")}
    os.unlink(folder / "train/ant/1.png")
    report = check([CheckedSet("train", IndexReader(files), training=True)], near=6, jobs=1)
    assert ("unreadable", "train/ant/1.png") in found(report, folder)


# The parts


def hamming(a: int, b: int) -> int:
    return (a ^ b).bit_count()


@pytest.mark.parametrize("distance", [0, 1, 3, 6, 9])
def test_similar_pairs_are_those_of_comparing_all(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 1 << 63, 150, dtype=np.uint64) * 2
    close = [int(value) ^ sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 12), replace=False)) for value in hashes]
    values = np.concatenate([hashes, np.array(close, np.uint64), hashes[:20], hashes[:3]])
    values = values[rng.permutation(len(values))]
    expected = {(i, j) for i, j in combinations(range(len(values)), 2) if hamming(int(values[i]), int(values[j])) <= distance}
    assert set(map(tuple, similar_pairs(values, distance=distance).tolist())) == expected


def test_many_values_are_sorted_by_longer_keys() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, 40_000, dtype=np.uint64)
    planted = hashes[:200] ^ np.uint64(0b1011)
    pairs = similar_pairs(np.concatenate([hashes, planted]), distance=4)
    assert set(map(tuple, pairs.tolist())) >= {(i, 40_000 + i) for i in range(200)}
    assert len(pairs) < 210


def test_many_equal_hashes_are_linked_without_all_pairs() -> None:
    hashes = np.full(5000, 7, np.uint64)
    pairs = similar_pairs(hashes, distance=4)
    assert len(pairs) == 4999
    assert [len(group) for group in linked_groups(pairs, 5000)] == [5000]


def test_the_hash_is_the_cosine_transform_done_one_by_one() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    hashes, contrast = perceptual_hash(grey)
    assert contrast.all()
    for image, value in zip(grey, hashes.tolist()):
        low = dct(dct(image.astype(float), axis=0), axis=1)[:8, :8].ravel()
        expected = int("".join("1" if x > np.median(low) else "0" for x in low), 2)
        assert value == expected
    assert not perceptual_hash(np.full((1, 32, 32), 200, np.uint8))[1].any()


def test_thumbnails_correlate_as_numpy_says() -> None:
    thumbs = thumbnails(np.random.default_rng(0).integers(0, 256, (6, 32, 32), dtype=np.uint8))
    pairs = np.array([[0, 1], [2, 2], [3, 5]])
    expected = [np.corrcoef(thumbs[a].ravel(), thumbs[b].ravel())[0, 1] for a, b in pairs]
    assert correlate(thumbs, pairs) == pytest.approx(expected, abs=1e-9)


def test_linked_groups() -> None:
    pairs = np.array([[5, 9], [1, 2], [2, 7], [0, 9]])
    assert [group.tolist() for group in linked_groups(pairs, 12)] == [[0, 5, 9], [1, 2, 7]]
    assert linked_groups(np.empty((0, 2), np.int64), 12) == []


def test_shards_that_are_not_there_are_no_damaged_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of these 3 shards is there"):
        read_shards(f"{tmp_path}/a-{{0..2}}.tar", splits=["train"], label_key="label", cache_dir=tmp_path, remote_cache_gib=1.0)
