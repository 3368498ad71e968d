"""Shards: what patterns and splits mean, reading at random, the index and its life, remote copies, and each bad input."""

import functools
import http.server
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from vitcli.config import DataConfig
from vitcli.data import remote, shard_build, shards
from vitcli.data.images import to_rgb
from vitcli.data.parallel import in_processes
from vitcli.data.shard_scan import scan_shard
from vitcli.data.shard_sets import choose_shards
from vitcli.data.shards import ShardSource, build_index, expand_shards, iter_members, open_shards
from vitcli.errors import DataError

Members = list[tuple[str, bytes]]


def image(seed: int, *, form: str = "PNG", size: tuple[int, int] = (5, 4)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, form)
    return target.getvalue()


def tar_bytes(members: Members, *, form: int = tarfile.GNU_FORMAT) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return target.getvalue()


def write_tar(path: Path, members: Members, *, form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, form=form))
    return path


def examples(labels: list[Any], *, first: int = 0) -> Members:
    members: Members = []
    for number, label in enumerate(labels, first):
        members += [(f"{number:04d}.png", image(number)), (f"{number:04d}.cls", str(label).encode())]
    return members


def write_set(folder: Path, labels: list[list[Any]], *, prefix: str = "part") -> list[Path]:
    """Write one shard for each list of labels."""
    starts = np.cumsum([0, *map(len, labels)]).tolist()
    return [
        write_tar(folder / f"{prefix}-{shard:04d}.tar", examples(some, first=starts[shard]))
        for shard, some in enumerate(labels)
    ]


def section(**settings: object) -> DataConfig:
    return DataConfig.model_validate({"source": "shards:x", "image_size": 8, **settings})


def opened(pattern: object, cache: Path, *, split: str = "train", **settings: object) -> ShardSource:
    settings.setdefault("val_fraction", 1e-9)  # one image of each class that has two
    return open_shards(str(pattern), split=split, data=section(**settings), cache_dir=cache)


def index_of(*paths: Path | str, cache: Path, **settings: Any) -> shards.ShardIndex:
    return build_index([str(path) for path in paths], cache_dir=cache, **settings)


def whole(pattern: object, cache: Path) -> ShardSource:
    """Open all images of shards, held-out ones too."""
    index = build_index(expand_shards(str(pattern)), cache_dir=cache)
    copies = remote.RemoteCopies(cache / "remote", limit_bytes=2**30)
    return ShardSource(index, name=f"shards:{pattern}", classes=index.classes, copies=copies)


def message(error: pytest.ExceptionInfo[DataError]) -> str:
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text
    return text


# Reading


def test_images_are_what_pillow_reads(tmp_path: Path) -> None:
    members: Members = []
    for number, (suffix, form) in enumerate(
        [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("JPG", "JPEG")]
    ):
        key = f"sub.folder/{number}"
        members += [
            (f"{key}.txt", b"a caption"),
            (f"{key}.{suffix}", image(number, form=form)),
            (f"{key}.cls", b" %d\n" % number),
        ]
    members += [("__index__.json", b"{}"), ("._0.jpg", b"what some systems leave"), ("sub.folder/0.mask.png", image(9))]
    shard = write_tar(tmp_path / "a.tar", members)
    source = whole(shard, tmp_path / "cache")
    assert len(source) == 5
    assert source.classes == ["0", "1", "2", "3", "4"]
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    with tarfile.open(shard) as tar:
        images = [name for name, _ in members if name.startswith("sub.folder") and name.lower().endswith(("g", "webp"))][:5]
        for number, name in enumerate(images):
            stored = tar.extractfile(name)
            assert stored is not None
            content = stored.read()
            assert source.read(number) == content
            pixels, label = source[number]
            with Image.open(io.BytesIO(content)) as reference:
                assert (pixels == to_rgb(reference)).all()
            assert label == number
            assert source.where(number) == f"{shard}:{name}"
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            source.read(outside)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_every_format(tmp_path: Path, form: int) -> None:
    names = ["short.png", "f" * 60 + "/" + "g" * 70 + ".png", "last.png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["h" * 300 + ".png", "größe/日本.png"]
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form, pax_headers={"comment": "global"}) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "short.png"
        tar.addfile(link)
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = number * 300  # one is empty, one ends at a block
            entry.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1  # type: ignore[assignment]  # makes pax records
            tar.addfile(entry, io.BytesIO(bytes([65 + number]) * entry.size))
    path = tmp_path / "a.tar"
    path.write_bytes(target.getvalue())
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    found = list(iter_members(path))
    assert [member[:3] for member in found] == expected
    assert [member.name for member in found] == names
    with open(path, "rb") as file:
        assert list(iter_members(file)) == found
    for member in found:  # names are read again from where the headers begin
        assert next(iter_members(path, start=member.head)) == member


def test_long_names_in_messages(tmp_path: Path) -> None:
    name = "d" * 120 + "/" + "e" * 80
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        shard = write_tar(tmp_path / f"{form}.tar", [(f"{name}.png", image(0)), (f"{name}.cls", b"0")], form=form)
        assert whole(shard, tmp_path / "cache").where(0) == f"{shard}:{name}.png"


def test_sizes_beyond_octal() -> None:
    from vitcli.data.tar import number

    assert number(b"00000000144\0") == 100
    assert number(b" 144 \0junk  ") == 100
    assert number(b"\x80" + (1 << 40).to_bytes(11, "big")) == 1 << 40


def test_labels_from_json(tmp_path: Path) -> None:
    members = [
        ("a.png", image(0)), ("a.json", b'{"label": 1, "fine": "cat"}'), ("a.cls", b"0"),
        ("b.json", b'{"label": "1", "fine": "dog"}'), ("b.png", image(1)),
    ]  # fmt: skip
    shard = write_tar(tmp_path / "a.tar", members)
    index = index_of(shard, cache=tmp_path / "cache")
    assert index.labels.tolist() == [0, 1]  # cls is asked first, unless a key was named
    index = index_of(shard, cache=tmp_path / "cache", label_key="fine")
    assert (index.classes, index.labels.tolist()) == (["cat", "dog"], [0, 1])


def test_members_in_any_order(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("b.cls", b"1"), ("a.png", image(0)), ("b.png", image(1)), ("a.cls", b"0")])
    index = index_of(shard, cache=tmp_path / "cache")
    assert index.labels.tolist() == [0, 1]
    assert (np.diff(index.offsets) > 0).all()


def test_label_without_image_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write_tar(tmp_path / "a.tar", [*examples([0, 1]), ("lost.cls", b"1")])
    with caplog.at_level(logging.WARNING):
        assert len(index_of(shard, cache=tmp_path / "cache")) == 2
    assert "lost has a label but no image" in caplog.text


def test_members_are_never_extracted(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "c"
    members = [
        (f"{name}.{kind}", image(0) if kind == "jpg" else b"0")
        for name in ("../../evil", str(tmp_path / "abs"))
        for kind in ("jpg", "cls")
    ]
    shard = write_tar(place / "x.tar", members)
    source = whole(shard, tmp_path / "cache")
    assert [source[i][0].shape for i in range(2)] == [(5, 4, 3)] * 2
    assert source.where(0) == f"{shard}:../../evil.jpg"
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".jpg", ".cls")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "cache"]


def test_descriptors_are_few_and_shared_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    write_set(tmp_path, [[0, 1]] * 12)
    source = whole(tmp_path / "*.tar", tmp_path / "cache")
    expected = [source.read(i) for i in range(24)]
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(0, 24, 2000).tolist()
        assert list(pool.map(source.read, order)) == [expected[i] for i in order]
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    del source
    assert len(os.listdir("/proc/self/fd")) <= before - 1


def test_processes_map_the_index_again(tmp_path: Path) -> None:
    write_set(tmp_path, [[0, 1] * 30, [1, 0] * 30])
    for split in ("train", "val"):
        source = opened(tmp_path / "*.tar", tmp_path / "cache", split=split, val_fraction=0.5)
        packed = pickle.dumps(source)
        again = pickle.loads(packed)
        assert len(packed) < 4000  # and no arrays
        for one in (source, again):
            assert all(backed_by_file(array) for array in (one.labels, one.index.offsets, one.index.sizes, one.keep))
        expected = [source.read(i) for i in range(len(source))]
        assert [again.read(i) for i in range(len(source))] == expected
        assert list(in_processes(source.read, range(len(source)), jobs=2)) == expected


def backed_by_file(array: Any) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


# Patterns


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a-0.tar", "a-1.tar", "a-2.tar", "a-10.tar", "b-0.tar", "other.txt"):
        Path(name).touch()
    Path("c-0.tar").mkdir()
    assert expand_shards("a-{2..0}.tar") == ["a-2.tar", "a-1.tar", "a-0.tar"]
    assert expand_shards("{b,a}-0.tar") == ["b-0.tar", "a-0.tar"]
    assert expand_shards("x-{0098..0101}.tar") == ["x-0098.tar", "x-0099.tar", "x-0100.tar", "x-0101.tar"]
    assert expand_shards("a-*.tar") == ["a-0.tar", "a-1.tar", "a-10.tar", "a-2.tar"]
    assert expand_shards("{b,a}-?.tar") == ["b-0.tar", "a-0.tar", "a-1.tar", "a-2.tar"]
    assert expand_shards(f"{{{tmp_path}/b-0.tar,a-1.tar}}") == [f"{tmp_path}/b-0.tar", "a-1.tar"]
    assert expand_shards("b-0.tar::a-{0..1}.tar") == ["b-0.tar", "a-0.tar", "a-1.tar"]
    assert expand_shards("*-0.tar") == ["a-0.tar", "b-0.tar"]  # c-0.tar is a folder
    assert expand_shards(f"file://{tmp_path}/a-1.tar") == [f"{tmp_path}/a-1.tar"]
    assert expand_shards("s3://bucket/x-{0..1}.tar") == ["s3://bucket/x-0.tar", "s3://bucket/x-1.tar"]
    assert expand_shards("https://host/x-{0..1}.tar?sig=a") == ["https://host/x-0.tar?sig=a", "https://host/x-1.tar?sig=a"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_shards("~/a-1.tar") == [f"{tmp_path}/a-1.tar"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train-*.tar", "train-*.tar: nothing matches this pattern; . has 2 tar files, such as part-0000.tar"),
        ("nowhere/*.tar", "nowhere/*.tar: there is no folder nowhere"),
        ("empty/*.tar", "nothing matches this pattern; empty has no tar files"),
        ("empty", "empty: no tar files here"),
        ("part-{0000..0001.tar", "a brace is not closed"),
        ("{part,part}-0000.tar", "names part-0000.tar more than once"),
        ("part-{0000..0002}.tar", "part-0002.tar: there is no such shard"),
        ("nothing.tar", "nothing.tar: there is no such shard"),
        ("zero.tar", "zero.tar: this shard is empty (0 bytes)"),
        ("note.txt", "note.txt: this is not a tar file"),
        ("packed.tar.gz", "packed.tar.gz: this is not a tar file: it is compressed (gzip)"),
        ("hollow.tar", "hollow.tar: no images in this shard"),
        ("captions.tar", "captions.tar: no images in this shard"),
        ("{part-0000.tar,folder.tar}", "folder.tar: this is a folder"),
        ("nosuch://host/x.tar", ": cannot open this place: Protocol not known: nosuch"),
    ],
)
def test_bad_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(Path(), [[0, 1], [1, 0]])
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add("part-0000.tar")
    if not pattern.startswith(("train", "part", "empty")):
        Path("zero.tar").touch()
        Path("hollow.tar").write_bytes(tar_bytes([]))
        Path("captions.tar").write_bytes(tar_bytes([("a.txt", b"x"), ("a.cls", b"0")]))
        Path("folder.tar").mkdir()
    Path("empty").mkdir()
    Path("note.txt").write_text("no tar " * 200)
    Path("packed.tar.gz").write_bytes(packed.getvalue())
    with pytest.raises(DataError) as error:
        opened(pattern, tmp_path / "cache")
    assert expected in message(error)


def test_missing_protocol_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"s3://bucket/\S+: Install s3fs to access S3; pip install 'fsspec\[s3\]'"):
        opened("s3://bucket/a.tar", tmp_path)


# Splits


def write_info(folder: Path, **splits: list[str]) -> None:
    content = {"splits": {name: {"name": name, "filenames": files} for name, files in splits.items()}}
    (folder / "_info.json").write_text(json.dumps(content))


def names(urls: list[str] | None) -> list[str] | None:
    return None if urls is None else [Path(url).name for url in urls]


def test_splits_of_info(tmp_path: Path) -> None:
    for name in ("train-0.tar", "train-1.tar", "validation-0.tar", "more.tar"):
        (tmp_path / name).touch()
    write_info(tmp_path, train=["train-0.tar", "train-1.tar"], test=["more.tar"], validation=["validation-0.tar"])
    for pattern, train in [
        ("", ["train-0.tar", "train-1.tar"]),
        ("train-*.tar", ["train-0.tar", "train-1.tar"]),
        ("train-1.tar", ["train-1.tar"]),
    ]:
        choice = choose_shards(str(tmp_path / pattern), "train")
        assert (names(choice.urls), choice.hold_out) == (train, False)
        choice = choose_shards(str(tmp_path / pattern), "val")
        assert (names(choice.urls), choice.hold_out, names(choice.train)) == (["validation-0.tar"], False, train)
    choice = choose_shards(str(tmp_path / "validation-*.tar"), "val")
    assert (names(choice.urls), names(choice.train)) == (["validation-0.tar"], ["train-0.tar", "train-1.tar"])
    assert names(choose_shards(str(tmp_path / "more.tar"), "val").urls) == ["more.tar"]
    assert names(choose_shards(str(tmp_path / "validation-*.tar"), "train").urls) == ["train-0.tar", "train-1.tar"]
    assert choose_shards(str(tmp_path / "*.tar"), "val").hold_out  # of no single split
    write_info(tmp_path, train=["train-0.tar", "train-1.tar"])
    for pattern in ("", "train-*.tar"):
        choice = choose_shards(str(tmp_path / pattern), "val")
        assert (names(choice.urls), choice.hold_out) == (["train-0.tar", "train-1.tar"], True)


def test_splits_by_name(tmp_path: Path) -> None:
    for name in ("in-train-0.tar", "in-val-0.tar", "only/val/0.tar", "plain/0.tar", "plain/1.tar", "both/train/0.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert names(choose_shards(str(tmp_path), "train").urls) == ["in-train-0.tar"]
    choice = choose_shards(str(tmp_path), "val")
    assert (names(choice.urls), choice.hold_out, names(choice.train)) == (["in-val-0.tar"], False, ["in-train-0.tar"])
    assert choose_shards(str(tmp_path / "in-train-*.tar"), "val").hold_out
    for pattern in ("in-val-*.tar", "only/val/*.tar", "only/val"):
        choice = choose_shards(str(tmp_path / pattern), "val")
        assert (choice.hold_out, choice.train) == (False, None)
        with pytest.raises(DataError, match="these are shards to evaluate on"):
            choose_shards(str(tmp_path / pattern), "train")
    for pattern in ("plain", "plain/*.tar", "both/train/*.tar"):
        assert choose_shards(str(tmp_path / pattern), "val").hold_out
        assert choose_shards(str(tmp_path / pattern), "train").hold_out


def test_hold_out(tmp_path: Path) -> None:
    labels = [[0] * 40 + [1] * 10, [2] * 2 + [3], [1] * 10 + [0] * 40]
    write_set(tmp_path, labels)
    train, val = (opened(tmp_path, tmp_path / "cache", split=split, val_fraction=0.1) for split in ("train", "val"))
    everything = whole(tmp_path, tmp_path / "cache")
    assert train.keep is not None and val.keep is not None
    assert sorted([*train.keep.tolist(), *val.keep.tolist()]) == list(range(103))
    assert np.bincount(val.labels).tolist() == [8, 2, 1]
    assert np.bincount(train.labels).tolist() == [72, 18, 1, 1]  # never a class's last image
    for source in (train, val):
        assert source.keep is not None
        for i, position in enumerate(source.keep.tolist()):
            assert source.read(i) == everything.read(position)
            assert source.where(i) == everything.where(position)
            assert source.labels[i] == everything.labels[position]
    assert train.block_starts is not None
    assert train.block_starts.tolist() == [0, *np.searchsorted(train.keep, [50, 53, 103]).tolist()]
    assert train.fingerprint != val.fingerprint != everything.fingerprint
    elsewhere = tmp_path / "elsewhere"
    write_set(elsewhere, labels)
    again = opened(elsewhere, tmp_path / "other-cache", split="val", val_fraction=0.1)
    assert again.keep is not None and again.keep.tolist() == val.keep.tolist()
    assert again.fingerprint == val.fingerprint
    assert opened(tmp_path, tmp_path / "cache", split="val", val_fraction=0.5).fingerprint != val.fingerprint


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    write_set(tmp_path, [[0, 1]])
    with pytest.raises(DataError, match="every class has a single image"):
        opened(tmp_path, tmp_path / "cache", split="val")


# Classes


def split_set(folder: Path, train: list[Any], val: list[Any]) -> None:
    write_set(folder, [train], prefix="train")
    write_set(folder, [val], prefix="val")


def test_class_lists(tmp_path: Path) -> None:
    split_set(tmp_path, [1, 0, 2], [0, 1])
    assert opened(tmp_path, tmp_path / "cache").classes == ["0", "1", "2"]
    assert opened(tmp_path, tmp_path / "cache", split="val").classes == ["0", "1", "2"]  # as in training
    (tmp_path / "classnames.txt").write_text("n01\ta cat, a pet\nn02\ta dog\nn03\ta bird\n")
    assert opened(tmp_path, tmp_path / "cache").classes == ["n01", "n02", "n03"]
    (tmp_path / "classnames.txt").unlink()
    (tmp_path / "classes.txt").write_text("crane\nowl\ncrane")
    assert opened(tmp_path, tmp_path / "cache", split="val").classes == ["crane (0)", "owl", "crane (2)"]
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "_info.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    assert opened(tmp_path, tmp_path / "cache").classes == ["a", "b", "c"]


def test_class_names_as_labels(tmp_path: Path) -> None:
    split_set(tmp_path, ["cat", "ape", "dog"], ["dog", "cat"])
    train, val = (opened(tmp_path, tmp_path / "cache", split=split) for split in ("train", "val"))
    assert train.classes == val.classes == ["ape", "cat", "dog"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([1, 0, 2], [2, 1])
    (tmp_path / "classnames.txt").write_text("dog\ncat\nape\n")
    train, val = (opened(tmp_path, tmp_path / "cache", split=split) for split in ("train", "val"))
    assert train.classes == val.classes == ["dog", "cat", "ape"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([1, 2, 0], [0, 1])


def test_classes_of_evaluation_shards(tmp_path: Path) -> None:
    split_set(tmp_path, [0, 1, 2], [0, 3])
    with pytest.raises(DataError) as error:
        opened(tmp_path, tmp_path / "cache", split="val")
    assert "val-0000.tar:0001.png: label 3 is out of range" in message(error)
    (tmp_path / "train-0000.tar").write_bytes(b"cut")  # to evaluate, training shards need not be whole
    assert opened(tmp_path / "val-0000.tar", tmp_path / "cache", split="val").labels.tolist() == [0, 3]
    split_set(tmp_path, ["a", "b"], ["a", "c"])
    with pytest.raises(DataError, match=re.escape("val-0000.tar:0001.png: label 'c' is none of the 2 classes")):
        opened(tmp_path, tmp_path / "cache", split="val")


def test_class_without_images(tmp_path: Path) -> None:
    split_set(tmp_path, [0, 0, 2, 2, 4, 4], [0])
    with pytest.raises(DataError) as error:
        opened(tmp_path, tmp_path / "cache")
    assert "2 of 5 classes have no images in 1 shards: 1, 3; " in message(error)
    (tmp_path / "classnames.txt").write_text("\n".join("abcdefghijkl"))
    with pytest.raises(DataError) as error:
        opened(tmp_path, tmp_path / "cache")
    assert "9 of 12 classes have no images in 1 shards: b, d, f, g, h, ...; " in message(error)
    assert len(opened(tmp_path, tmp_path / "cache", split="val").classes) == 12  # which matters in training only


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([*examples([0]), ("x.png", b"")], "a.tar:x.png: no label; expected x.cls or x.json beside it"),
        ([*examples([0]), ("x.png", b""), ("x.cls", b"")], "a.tar:x.cls: this label is empty"),
        ([*examples([0]), ("x.png", b""), ("x.cls", b"\xff\xfe")], "a.tar:x.cls: 'utf-8' codec can't decode"),
        ([*examples([0]), ("x.png", b""), ("x.cls", b"a\0b")], "a.tar:x.cls: label a\\x00b is not text"),
        ([*examples([0]), ("x.png", b""), ("x.cls", b"-1")], "a.tar:x.cls: label -1 is out of range"),
        ([*examples([0]), ("x.png", b""), ("x.cls", b"9" * 30)], f"a.tar:x.cls: label {'9' * 30} is out of range"),
        ([*examples([0]), ("x.png", b""), ("x.cls", b"cat")], "a.tar:x.png: label 'cat' is not a number, as other labels are"),
        (
            [*examples([0]), ("x.png", b""), ("x.cls", b"1000000")],
            f"a.tar:x.cls: label {10**6} is out of range; expected a class as a number from 0 to 999,999, or its name",
        ),
        ([*examples([0]), ("x.png", b""), ("x.json", b"{")], "a.tar:x.json: Expecting property name"),
        ([*examples([0]), ("x.png", b""), ("x.json", b"[" * 200_000)], "a.tar:x.json: maximum recursion depth exceeded"),
        (
            [*examples([0]), ("x.png", b""), ("x.json", b"[1]")],
            "a.tar:x.json: no label: no key 'label' (set data.label_key), but none",
        ),
        (
            [*examples([0]), ("x.png", b""), ("x.json", b'{"y": 1, "z": 2}')],
            "no key 'label' (set data.label_key), but y, z; expected a class",
        ),
        ([*examples([0]), ("x.png", b""), ("x.json", b'{"label": true}')], "label True is neither a number nor text"),
        ([*examples([0]), ("x.png", b""), ("x.json", b'{"label": 1.5}')], "label 1.5 is neither a number nor text"),
        ([*examples([0]), ("0000.jpg", b"")], "a.tar:0000.jpg: a second image of this name, after 0000.png"),
        ([*examples([0]), *examples([0])], "a.tar:0000.png: a second image of this name, after 0000.png"),
        ([*examples([0]), ("0000.cls", b"")], "a.tar:0000.cls: a second cls member of this name"),
        ([*examples([0]), ("two\nlines.png", b"")], "a.tar:two\\nlines.png: no label"),
    ],
)
def test_bad_members(tmp_path: Path, members: Members, expected: str) -> None:
    shard = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError) as error:
        index_of(shard, cache=tmp_path / "cache")
    assert expected in message(error)


def test_labels_outside_the_class_list(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    shard = write_tar(tmp_path / "a.tar", examples([0, 1, 2]))
    with pytest.raises(DataError) as error:
        index_of(shard, cache=tmp_path / "cache")
    assert message(error) == (
        f"{shard}:0002.png: label 2 is out of range: {tmp_path}/classnames.txt has 2 classes, numbered from 0"
    )
    shard = write_tar(tmp_path / "a.tar", examples([0, "cat", "cow"]))
    with pytest.raises(DataError, match=re.escape(f"{shard}:0002.png: label 'cow' is none of the 2 classes in")):
        index_of(shard, cache=tmp_path / "cache")
    shard = write_tar(tmp_path / "a.tar", examples([0, "cat", "dog"]))
    assert index_of(shard, cache=tmp_path / "cache").labels.tolist() == [0, 0, 1]


def test_numbers_here_and_names_there(tmp_path: Path) -> None:
    write_set(tmp_path, [[0, 1], ["cat"]])
    with pytest.raises(DataError, match="part-0000.tar:0000.png: label 0 is a number, but other shards name their classes"):
        opened(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("classnames.txt", b"a\n\nb\n", "classnames.txt: line 2 is empty; expected the name of class 1"),
        ("classes.txt", b"", "classes.txt: line 1 is empty"),
        ("classes.txt", b"\xff\xff", "classes.txt: this is not text in UTF-8"),
        ("_info.json", b"{", "_info.json: this is not JSON"),
        ("_info.json", b'{"splits": {"train": 1}}', "_info.json: split train is not a table with `filenames`"),
        ("_info.json", b'{"splits": {"train": {"filenames": []}}}', "_info.json: split train has no list of `filenames`"),
        (
            "_info.json",
            b'{"splits": {"train": {"filenames": ["part-0000.tar"], "shard_lengths": [1, 2]}}}',
            "_info.json: split train needs one number of `shard_lengths` for each of its 1 files",
        ),
        (
            "_info.json",
            b'{"splits": {"train": {"filenames": "part-{0000..0001}.tar", "shard_lengths": [2, 3]}}}',
            "part-0001.tar: this shard holds 2 images, but",
        ),
        (
            "_info.json",
            b'{"splits": {"train": {"filenames": ["part-0000.tar", "part-0001.tar"], "num_samples": 5}}}',
            "_info.json: says that split train has 5 examples, but its shards hold 4",
        ),
        (
            "_info.json",
            b'{"splits": {"train": {"filenames": ["part-0000.tar", "part-0009.tar"]}}}',
            "part-0009.tar: there is no such shard",
        ),
    ],
)
def test_bad_files_beside(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    write_set(tmp_path, [[0, 1], [1, 0]])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        opened(tmp_path, tmp_path / "cache")
    assert expected in message(error)


# Damage


def test_a_tar_cut_anywhere_is_told(tmp_path: Path) -> None:
    members = [("a" * 120 + ".png", image(0)), ("a" * 120 + ".cls", b"0"), ("b.png", image(1)), ("b.cls", b"1")]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        content = tar_bytes(members, form=form)
        path = tmp_path / "a.tar"
        path.write_bytes(content)
        end = list(iter_members(path))[-1].offset + 512
        for length in [*range(0, end, 128), 1, end - 1, end, end + 511]:
            path.write_bytes(content[:length])
            with pytest.raises(DataError) as error:
                list(iter_members(path))
            assert message(error).startswith(str(path))
            if length >= 512:
                assert "truncated: " in message(error)
        path.write_bytes(content[: end + 512])  # one block of the end mark will do
        assert len(list(iter_members(path))) == 4


def test_truncation_names_the_member(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", examples([0, 1]))
    member = list(iter_members(path))[2]
    path.write_bytes(path.read_bytes()[: member.offset + 10])
    with pytest.raises(DataError) as error:
        index_of(path, cache=tmp_path / "cache")
    end, cut = member.offset + member.size, member.offset + 10
    expected = (
        f"{path}:0001.png: truncated: the member ends at byte {end:,}, the file at {cut:,}; copy or write the shard again"
    )
    assert message(error) == expected
    path.write_bytes(path.read_bytes()[: member.head])
    with pytest.raises(DataError, match=f"the file ends at byte {member.head:,}, after 0000.cls, without tar's end mark"):
        index_of(path, cache=tmp_path / "cache")


def test_damage_inside_a_tar(tmp_path: Path) -> None:
    content = bytearray(tar_bytes(examples([0, 1])))
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    head = list(iter_members(path))[1].head
    content[head + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"a.tar: damaged at byte {head:,}, after 0000.png: no header here"):
        list(iter_members(path))
    with pytest.raises(DataError, match="nowhere.tar: cannot open this shard: No such file"):
        list(iter_members(tmp_path / "nowhere.tar"))


def test_broken_image_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("a.png", image(0)[:40]), ("a.cls", b"0"), ("b.jpg", b""), ("b.cls", b"1")])
    source = whole(shard, tmp_path / "cache")
    for i, name in enumerate(["a.png", "b.jpg"]):
        with pytest.raises(DataError, match=re.escape(f"{shard}:{name}: cannot read this image")):
            source[i]


def test_shard_that_changes_during_a_run(tmp_path: Path) -> None:
    first, second = write_set(tmp_path, [[0, 1], [1, 0]])
    source = whole(tmp_path, tmp_path / "cache")
    content = source.read(0)
    whole_file = first.read_bytes()
    os.truncate(first, 600)
    with pytest.raises(DataError, match=re.escape(f"{first}:byte 2,048: the shard ends inside this image")):
        source.read(1)
    assert source.read(2)
    again = pickle.loads(pickle.dumps(source))
    with pytest.raises(DataError, match=re.escape(f"{first}: this shard had 10,240 bytes when it was indexed and has 600 now")):
        again.read(0)
    second.unlink()
    with pytest.raises(DataError, match=re.escape(f"{second}: cannot open this shard: No such file")):
        again.read(2)
    assert again.where(2).startswith(f"{second}:byte ")
    first.write_bytes(whole_file)
    assert again.read(0) == content


# The life of an index


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the names of shards as they are scanned."""
    seen: list[str] = []
    scan = scan_shard

    def watch(shard: Any, **settings: Any) -> Any:
        seen.append(Path(settings["where"]).name)
        return scan(shard, **settings)

    monkeypatch.setattr(shard_build, "scan_shard", watch)
    return seen


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".tmp-") or path.name.endswith((".parts", ".part"))]


def test_index_is_made_once(tmp_path: Path, scanned: list[str]) -> None:
    paths = write_set(tmp_path, [[0, 1], [1], [1, 0]])
    index = index_of(*paths, cache=tmp_path / "cache")
    assert scanned == ["part-0000.tar", "part-0001.tar", "part-0002.tar"]
    assert index.starts.tolist() == [0, 2, 3, 5]
    assert [index.shard_of(i) for i in range(5)] == [0, 0, 1, 2, 2]
    assert index.counts.tolist() == [2, 3]
    again = index_of(*paths, cache=tmp_path / "cache")
    assert len(scanned) == 3
    assert again.offsets.tolist() == index.offsets.tolist() and again.fingerprint == index.fingerprint
    assert not leftovers(tmp_path)


def test_only_changed_and_new_shards_are_scanned_again(tmp_path: Path, scanned: list[str]) -> None:
    paths = write_set(tmp_path, [["a", "b"], ["b", "c"], ["c", "a"]])
    before = index_of(*paths[:2], cache=tmp_path / "cache")
    del scanned[:]
    index = index_of(*paths, cache=tmp_path / "cache")
    assert scanned == ["part-0002.tar"]
    assert index.labels.tolist() == [0, 1, 1, 2, 2, 0]
    del scanned[:]
    write_tar(paths[1], examples(["b", "d", "d"], first=2))
    changed = index_of(*paths, cache=tmp_path / "cache")
    assert scanned == ["part-0001.tar"]
    assert (changed.classes, changed.labels.tolist()) == (["a", "b", "c", "d"], [0, 1, 1, 3, 3, 2, 0])
    assert len({before.fingerprint, index.fingerprint, changed.fingerprint}) == 3
    del scanned[:]
    os.utime(paths[0], ns=(1, 1))  # same size, another time: it may be another shard
    touched = index_of(*paths, cache=tmp_path / "cache")
    assert scanned == ["part-0000.tar"]
    assert touched.fingerprint == changed.fingerprint  # it is not
    fresh = index_of(*paths, cache=tmp_path / "fresh")
    for column in ("offsets", "sizes", "gaps", "labels", "starts", "counts"):
        assert (getattr(fresh, column) == getattr(touched, column)).all()


def test_another_class_list_is_looked_up_anew(tmp_path: Path, scanned: list[str]) -> None:
    paths = write_set(tmp_path, [["a", "b"], ["b", "a"]])
    index_of(*paths, cache=tmp_path / "cache")
    for lines, labels in [("b\na", [1, 0, 0, 1]), ("x\na\nb", [1, 2, 2, 1])]:
        (tmp_path / "classes.txt").write_text(lines)
        assert index_of(*paths, cache=tmp_path / "cache").labels.tolist() == labels
    assert len(scanned) == 2  # the one made without a list has the names


def test_a_scan_goes_on_after_an_error(tmp_path: Path, scanned: list[str]) -> None:
    paths = write_set(tmp_path, [[0], [1], [2], [3]])
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[:1000])
    with pytest.raises(DataError, match=r"part-0002\.tar"):
        index_of(*paths, cache=tmp_path / "cache")
    paths[2].write_bytes(content)
    del scanned[:]
    assert index_of(*paths, cache=tmp_path / "cache").labels.tolist() == [0, 1, 2, 3]
    assert scanned == ["part-0002.tar", "part-0003.tar"]
    assert not leftovers(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from vitcli.data import shard_build
scan, left = shard_build.scan_shard, [int(sys.argv[1])]
def scan_some(*values, **settings):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return scan(*values, **settings)
shard_build.scan_shard = scan_some
index = shard_build.build_index(sys.argv[3:], cache_dir=Path(sys.argv[2]))
print(index.labels.tolist(), index.fingerprint)
"""


def start_build(scans: int, cache: Path, paths: list[Path]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(scans), str(cache), *map(str, paths)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_scan_goes_on(tmp_path: Path, scanned: list[str]) -> None:
    paths = write_set(tmp_path, [[0], [1], [2], [3]])
    process = start_build(3, tmp_path / "cache", paths)
    assert process.communicate()[0] == ""
    assert process.returncode == -9
    kept = next((tmp_path / "cache" / "shards").glob("*.parts"))
    assert len(list(kept.iterdir())) == 3
    (kept / ".tmp-half").write_bytes(b"half")
    sorted(kept.iterdir())[1].write_bytes(b"damaged")
    assert index_of(*paths, cache=tmp_path / "cache").labels.tolist() == [0, 1, 2, 3]
    assert len(scanned) == 2
    assert not leftovers(tmp_path)


def test_processes_race(tmp_path: Path) -> None:
    paths = write_set(tmp_path, [[label % 3] * 5 for label in range(30)])
    processes = [start_build(10**6, tmp_path / "cache", paths) for _ in range(3)]
    answers = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(answers) == 1
    assert len(list((tmp_path / "cache" / "shards").glob("*-*"))) == 1
    assert not leftovers(tmp_path)


def test_many_shards_are_scanned_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_set(tmp_path, [[shard % 2, 1] for shard in range(12)])
    expected = index_of(*paths, cache=tmp_path / "one", workers=1)
    monkeypatch.setattr(shard_build, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(shard_build, "MANY", 1)
    found = index_of(*paths, cache=tmp_path / "two", workers=2)
    assert found.fingerprint == expected.fingerprint
    os.truncate(paths[7], 700)
    with pytest.raises(DataError, match=r"part-0007\.tar.* truncated"):
        index_of(*paths, cache=tmp_path / "two", workers=2)


def test_damaged_index_is_made_again(tmp_path: Path, scanned: list[str], caplog: pytest.LogCaptureFixture) -> None:
    paths = write_set(tmp_path, [[0, 1], [1, 0]])
    folder = index_of(*paths, cache=tmp_path / "cache").folder
    damages = [("labels.npy", b"x"), ("offsets.npy", b""), ("index.json", b"{"), ("index.json", b"[]"), ("starts.npy", None)]
    for name, content in damages:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert index_of(*paths, cache=tmp_path / "cache").labels.tolist() == [0, 1, 1, 0]
        assert "damaged index" in caplog.text
    assert len(scanned) == 2 + 2 * len(damages)
    halved = (folder / "labels.npy").read_bytes()[:-4]
    (folder / "labels.npy").write_bytes(halved)
    assert index_of(*paths, cache=tmp_path / "cache").labels.tolist() == [0, 1, 1, 0]


def test_index_beside_the_shards(tmp_path: Path, scanned: list[str]) -> None:
    paths = write_set(tmp_path / "here", [[0, 1], [1, 0]])
    index = index_of(*paths, cache=tmp_path / "cache", beside=True)
    assert index.folder.parent == tmp_path / "here" / ".vit-index"
    assert not (tmp_path / "cache").exists()
    moved = (tmp_path / "here").rename(tmp_path / "there")
    source = whole(moved, tmp_path / "cache")
    assert source.where(3) == f"{moved}/part-0001.tar:0003.png"
    assert len(scanned) == 2  # it has moved with the shards
    opened(moved, tmp_path / "cache", split="val")
    assert not (tmp_path / "cache").exists()
    assert len(whole(moved / "part-0001.tar", tmp_path / "cache")) == 2
    assert len(scanned) == 2  # of that shard, too, all is known
    other = write_tar(tmp_path / "other.tar", examples([0]))
    with pytest.raises(DataError, match="only if they are in one folder on this machine"):
        index_of(other, moved / "part-0000.tar", cache=tmp_path / "cache", beside=True)


def test_index_moves_from_the_cache_to_the_shards(tmp_path: Path, scanned: list[str]) -> None:
    paths = write_set(tmp_path / "set", [[0, 1], [1, 0]])
    before = index_of(*paths, cache=tmp_path / "cache")
    after = index_of(*paths, cache=tmp_path / "cache", beside=True)
    assert len(scanned) == 2
    assert before.folder != after.folder
    assert (before.fingerprint, before.offsets.tolist()) == (after.fingerprint, after.offsets.tolist())


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    paths = write_set(tmp_path, [[0, 1]])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write the index of the shards here: .*; set VIT_CACHE to a folder with room"):
        index_of(*paths, cache=tmp_path / "file")


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(place: str, labels: list[list[Any]], **settings: Any) -> str:
        write_set(tmp_path / place, labels, **settings)
        return whole(tmp_path / place, tmp_path / "cache").fingerprint

    first = fingerprint("a", [[0, 1], [1, 0]])
    time.sleep(0.01)
    assert fingerprint("b", [[0, 1], [1, 0]]) == first
    assert fingerprint("c", [[0, 1], [1, 1]]) != first
    assert fingerprint("d", [[0, 1], [1, 0]], prefix="x") != first
    (tmp_path / "b" / "classes.txt").write_text("cat\ndog")
    assert whole(tmp_path / "b", tmp_path / "cache").fingerprint != first


# Remote shards


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def upload(filesystem: Any, labels: list[list[Any]], *, prefix: str = "part") -> None:
    for shard, some in enumerate(labels):
        filesystem.pipe_file(f"/set/{prefix}-{shard:04d}.tar", tar_bytes(examples(some, first=100 * shard)))


SHARD_BYTES = 10240  # of these small shards: tarfile rounds up


def copies_of(cache: Path) -> list[Path]:
    return sorted((cache / "remote").glob("*.tar"))


def test_remote_shards(tmp_path: Path, memory: Any) -> None:
    upload(memory, [[0, 1], [1, 0], [0, 1]], prefix="train")
    upload(memory, [[1, 0]], prefix="validation")
    write_set(tmp_path, [[0, 1], [1, 0]])
    listed = {"train": [f"train-{shard:04d}.tar" for shard in range(3)], "validation": ["validation-0000.tar"]}
    memory.pipe_file("/set/_info.json", json.dumps({"splits": {name: {"filenames": f} for name, f in listed.items()}}).encode())
    memory.pipe_file("/set/classnames.txt", b"cat\ndog\n")
    for pattern in ("memory://set/train-{0000..0002}.tar", "memory://set/train-*.tar", "memory://set", "memory://set/"):
        source = opened(pattern, tmp_path / "cache")
        assert source.remote and source.classes == ["cat", "dog"]
        assert [label for _, label in (source[i] for i in range(6))] == [0, 1, 1, 0, 0, 1]
        assert source.where(2).endswith("set/train-0001.tar:0100.png")
        assert source.read(2) == image(100)
        assert pickle.loads(pickle.dumps(source)).read(3) == image(101)
        val = opened(pattern, tmp_path / "cache", split="val")
        assert val.labels.tolist() == [1, 0]
    assert len(copies_of(tmp_path / "cache")) == 4
    with pytest.raises(DataError, match="memory://set/x-.*: nothing matches this pattern"):
        opened("memory://set/x-*.tar", tmp_path / "cache")
    with pytest.raises(DataError, match=r"memory://set/train-0003.tar: there is no such shard"):
        opened("memory://set/train-{0002..0003}.tar", tmp_path / "cache")


def test_remote_shard_that_changes_is_fetched_again(tmp_path: Path, memory: Any) -> None:
    upload(memory, [[0, 1]])
    pattern = "memory://set/part-0000.tar"
    assert whole(pattern, tmp_path / "cache").labels.tolist() == [0, 1]
    upload(memory, [[1, 0]])
    assert whole(pattern, tmp_path / "cache").labels.tolist() == [1, 0]


def test_remote_cache_limit(tmp_path: Path, memory: Any) -> None:
    upload(memory, [[0, 1]] * 6)
    limit = 3.5 * SHARD_BYTES / 2**30
    source = opened("memory://set/part-*.tar", tmp_path / "cache", remote_cache_gib=limit, split="train")
    assert len(copies_of(tmp_path / "cache")) == 3
    source.opened.cache_clear()
    everything = whole("memory://set/part-*.tar", tmp_path / "cache")
    copies = remote.RemoteCopies(tmp_path / "cache" / "remote", limit_bytes=int(limit * 2**30))
    paths = {}
    for shard in (0, 1, 2, 0, 3):  # 1 is the one used longest ago when 3 needs room
        url, (size, stamp) = everything.index.urls[shard], everything.index.stats[shard]
        os.close(copies.open(url, size=size, stamp=stamp))
        paths[shard] = copies.fetch(url, size=size, stamp=stamp)
        time.sleep(0.01)
        assert sum(path.stat().st_size for path in copies_of(tmp_path / "cache")) <= limit * 2**30
    assert copies_of(tmp_path / "cache") == sorted(paths[shard] for shard in (0, 2, 3))
    with pytest.raises(DataError, match="part-0000.tar: this shard has .* GiB, more than data.remote_cache_gib="):
        opened("memory://set/part-*.tar", tmp_path / "small", remote_cache_gib=1e-7)


def bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def test_remote_copies_under_way_count(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(memory, [[0, 1]] * 8)
    most: list[int] = []
    download = remote.download

    def slow(url: str, path: Path, *, size: int) -> None:
        download(url, path, size=size)
        time.sleep(0.01)
        most.append(sum(map(bytes_of, path.parent.glob("*.*"))))

    monkeypatch.setattr(remote, "download", slow)
    monkeypatch.setattr(shards, "OPEN_COPIES", 1)
    everything = whole("memory://set/part-*.tar", tmp_path / "index")
    copies = remote.RemoteCopies(tmp_path / "copies", limit_bytes=2 * SHARD_BYTES)
    source = ShardSource(everything.index, name="x", classes=["0", "1"], copies=copies)
    del most[:]
    order = np.random.default_rng(0).integers(0, 16, 60).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, order)) == [everything.read(i) for i in order]
    assert most and max(most) <= 2 * SHARD_BYTES
    assert not list((tmp_path / "copies").glob("*.part"))


def test_what_a_killed_process_was_fetching(tmp_path: Path, memory: Any) -> None:
    upload(memory, [[0, 1, 0, 1]])
    folder = tmp_path / "cache" / "remote"
    folder.mkdir(parents=True)
    (folder / f"{'0' * 32}.{2**40}.part").write_bytes(b"half")
    assert len(opened("memory://set/*.tar", tmp_path / "cache", split="train", remote_cache_gib=2e-5).read(0)) > 0
    assert not list(folder.glob("*.part"))


def test_fetching_is_tried_again(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(memory, [[0, 1]])
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    get_file, failures = type(memory).get_file, 2

    def flaky(self: Any, source: str, target: str, **settings: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            if failures:
                raise ConnectionError("reset by\npeer")
            Path(target).write_bytes(b"cut")
            return
        get_file(self, source, target, **settings)

    monkeypatch.setattr(type(memory), "get_file", flaky)
    assert len(whole("memory://set/*.tar", tmp_path / "cache")) == 2
    failures = 10**6
    with pytest.raises(DataError) as error:
        whole("memory://set/*.tar", tmp_path / "other")
    assert "cannot fetch this shard: reset by peer; tried 3 times" in message(error)
    assert not leftovers(tmp_path / "other" / "remote")


def test_shards_over_http(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    write_set(tmp_path / "served", [[0, 1], [1, 0]])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        root = f"http://127.0.0.1:{server.server_port}"
        for pattern in ("part-{0000..0001}.tar", "part-*.tar"):
            source = whole(f"{root}/{pattern}", tmp_path / "cache")
            assert source.remote and source.labels.tolist() == [0, 1, 1, 0]
            assert [source.read(i) for i in range(4)] == [image(i) for i in range(4)]
        with pytest.raises(DataError, match="part-0002.tar: there is no such shard"):
            whole(f"{root}/part-0002.tar", tmp_path / "cache")
        (tmp_path / "served" / "classnames.txt").write_text("cat\ndog\n")
        assert opened(f"{root}/part-{{0000..0001}}.tar", tmp_path / "cache").classes == ["cat", "dog"]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
