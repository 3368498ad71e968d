"""Packing: the same pictures and labels come out, the same bytes every time, and nothing half is ever taken for a shard."""

import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitcli.config import DataConfig
from vitcli.data.pack import PackSettings, pack, pack_order, read_back
from vitcli.data.protocol import Source, SourceDefaults
from vitcli.data.sources import open_source
from vitcli.errors import DataError

PLAIN = PackSettings(shard_bytes=1 << 30, examples_per_shard=7)


def section(**settings: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "digits", "image_size": 8, "memory_cache_gib": 0, **settings})


def make_folder(root: Path, *, side: int = 24) -> Path:
    """Write two classes of images in several formats, with an evaluation split."""
    rng = np.random.default_rng(0)
    formats = ["jpg", "png", "webp", "jpg", "bmp"]
    for split, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(["bird", "cat"]):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (side + 4 * label, side + i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02d}.{formats[i % 5]}")
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos")


def open_folder_source(photos: Path, split: str = "train") -> Source:
    return open_source(f"folder:{photos}", split=split, data=section())


def packed(source: Source, folder: Path, settings: PackSettings = PLAIN, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return pack(source, folder, split=options.pop("split", "train"), settings=settings, **{"jobs": 1, **options})


def members(folder: Path, pattern: str = "train-*.tar") -> list[tuple[str, bytes]]:
    found = []
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            for entry in tar:
                assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.mode) == (0, 0, 0, "", "", 0o644)
                file = tar.extractfile(entry)
                assert file is not None
                found.append((entry.name, file.read()))
    return found


def contents(source: Source) -> Counter[tuple[bytes, int]]:
    examples = (source[index] for index in range(len(source)))
    return Counter((hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest(), label) for image, label in examples)


def test_files_are_stored_as_they_are(photos: Path, tmp_path: Path) -> None:
    result = packed(open_folder_source(photos), tmp_path / "out")
    assert [shard.examples for shard in result.shards] == [7, 7, 6]
    found = members(tmp_path / "out")
    assert [name.partition(".")[0] for name, _ in found[::2]] == [f"{n:09d}" for n in range(20)]
    assert all(
        image.partition(".")[0] == label.partition(".")[0] and label.endswith(".cls")
        for (image, _), (label, _) in zip(found[::2], found[1::2])
    )
    expected: Counter[tuple[str, bytes, int]] = Counter()
    for path in (photos / "train").rglob("*.*"):
        if path.suffix != ".bmp":
            expected[(path.suffix[1:], path.read_bytes(), b"01"[["bird", "cat"].index(path.parent.name)])] += 1
    stored = Counter((name.rpartition(".")[2], data, label[0]) for (name, data), (_, label) in zip(found[::2], found[1::2]))
    assert expected <= stored
    rest = stored - expected
    assert sum(rest.values()) == 4 and {kind for kind, _, _ in rest} == {"png"}, "BMP files become PNG"


def test_the_bytes_are_those_of_the_standard_library(photos: Path, tmp_path: Path) -> None:
    packed(open_folder_source(photos), tmp_path / "out")
    for path in sorted((tmp_path / "out").glob("train-*.tar")):
        again = io.BytesIO()
        with tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in members(tmp_path / "out", path.name):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        assert path.read_bytes() == again.getvalue()


def test_the_folder_says_what_is_in_it(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        packed(open_folder_source(photos, split), tmp_path / "out", split=split)
    info = json.loads((tmp_path / "out" / "_info.json").read_text())
    assert info == {
        "splits": {
            "train": {
                "name": "train",
                "filenames": ["train-000000.tar", "train-000001.tar", "train-000002.tar"],
                "shard_lengths": [7, 7, 6],
                "num_samples": 20,
            },
            "validation": {
                "name": "validation",
                "filenames": ["validation-000000.tar"],
                "shard_lengths": [6],
                "num_samples": 6,
            },
        }
    }
    assert (tmp_path / "out" / "classnames.txt").read_text() == "bird\ncat\n"
    assert not list((tmp_path / "out").glob(".tmp*"))


def test_what_is_packed_reads_back_as_the_same_set(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        packed(open_folder_source(photos, split), tmp_path / "out", split=split, decode_all=True)
    for split in ("train", "val"):
        again = open_source(f"shards:{tmp_path}/out/train-*.tar", split=split, data=section())
        assert again.classes == ["bird", "cat"]
        assert contents(again) == contents(open_folder_source(photos, split))


@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves closing to the garbage collector
def test_webdataset_reads_it(photos: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    packed(open_folder_source(photos), tmp_path / "out")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("train-*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(found) == 20
    assert Counter(int(sample["cls"]) for sample in found) == {0: 10, 1: 10}
    assert all({"jpg", "png", "webp"} & sample.keys() for sample in found)


def test_pixels_become_png_without_loss(tmp_path: Path) -> None:
    digits = open_source("digits", split="val", data=section())
    packed(digits, tmp_path / "out", replace(PLAIN, examples_per_shard=200))
    found = members(tmp_path / "out")
    assert {name.rpartition(".")[2] for name, _ in found} == {"png", "cls"}
    with Image.open(io.BytesIO(found[0][1])) as picture:
        assert picture.mode == "L", "grey needs one channel"
    again = open_source(f"shards:{tmp_path}/out/train-*.tar", split="train", data=section(val_fraction=0.1))
    packed_again = open_source(f"shards:{tmp_path}/out/train-*.tar", split="val", data=section(val_fraction=0.1))
    assert contents(again) + contents(packed_again) == contents(digits)


def test_labels_that_are_computed(tmp_path: Path) -> None:
    shapes = open_source("shapes", split="val", data=section(image_size=16, shapes={"classes": 3, "val_examples": 9}))
    packed(shapes, tmp_path / "out", replace(PLAIN, examples_per_shard=100))
    assert Counter(int(data) for name, data in members(tmp_path / "out") if name.endswith(".cls")) == {0: 3, 1: 3, 2: 3}


def test_the_same_call_writes_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    source = open_folder_source(photos)
    for name, jobs in (("a", 1), ("b", 2)):
        packed(source, tmp_path / name, jobs=jobs)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert first == second
    packed(source, tmp_path / "c", replace(PLAIN, seed=1))
    assert (tmp_path / "c" / "train-000000.tar").read_bytes() != first["train-000000.tar"]


def test_the_order_is_shuffled_and_complete(photos: Path) -> None:
    source = open_folder_source(photos)
    order = pack_order(source, np.arange(20), seed=0)
    assert sorted(order.tolist()) == list(range(20))
    assert order.tolist() != list(range(20))
    assert (order == pack_order(source, np.arange(20), seed=0)).all()


def test_remote_blocks_are_read_one_after_the_other() -> None:
    class Remote(SourceDefaults):
        remote = True
        block_starts = np.array([0, 10, 25, 40])

        def __len__(self) -> int:
            return 40

    order = pack_order(Remote(), np.delete(np.arange(40), [3, 30]), seed=0)
    assert sorted(order.tolist()) == [i for i in range(40) if i not in (3, 30)]
    blocks = np.searchsorted([10, 25], order, side="right")
    assert np.count_nonzero(np.diff(blocks)) == 2
    assert (np.diff(order) < 0).sum() > 5, "shuffled within a block"


def test_resize_scales_down_only_what_is_larger(photos: Path, tmp_path: Path) -> None:
    packed(open_folder_source(photos), tmp_path / "out", replace(PLAIN, resize=26))
    stored = {path.read_bytes() for path in (photos / "train").rglob("*.*")}
    kept = resized = 0
    for name, data in members(tmp_path / "out"):
        if name.endswith(".cls"):
            continue
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.rpartition(".")[2]]
            kept += data in stored
            resized += min(picture.size) == 26 and data not in stored
            assert min(picture.size) <= 26
    small = 0
    for path in (photos / "train").rglob("*.*"):
        with Image.open(path) as picture:
            small += min(picture.size) <= 26 and path.suffix != ".bmp"
            large = min(picture.size) > 26
        resized -= large
    assert (kept, resized) == (small, 0)


def test_quality_makes_everything_jpeg(photos: Path, tmp_path: Path) -> None:
    sizes = {}
    for quality in (20, 90):
        result = packed(open_folder_source(photos), tmp_path / str(quality), replace(PLAIN, quality=quality))
        sizes[quality] = sum(shard.bytes for shard in result.shards)
        assert {name.rpartition(".")[2] for name, _ in members(tmp_path / str(quality))} == {"jpg", "cls"}
    assert sizes[20] < sizes[90]


def test_shards_have_about_the_size_asked_for(tmp_path: Path) -> None:
    shapes = open_source("shapes", split="train", data=section(image_size=32, shapes={"classes": 5, "train_examples": 300}))
    result = packed(shapes, tmp_path / "out", PackSettings(shard_bytes=256 * 1024))
    assert len(result.shards) > 2
    assert all(abs(shard.bytes / (256 * 1024) - 1) < 0.1 for shard in result.shards[:-1])


def test_a_list_is_left_out(photos: Path, tmp_path: Path) -> None:
    source = open_folder_source(photos)
    places = frozenset([source.where(3), source.where(17), "nowhere.jpg"])
    result = packed(source, tmp_path / "out", left_out=places)
    assert (result.left_out, result.examples) == (2, 18)
    found = {data for _, data in members(tmp_path / "out")}
    assert not {Path(place).read_bytes() for place in places - {"nowhere.jpg"}} & found
    with pytest.raises(DataError, match="left_out"):
        packed(source, tmp_path / "out")
    with pytest.raises(DataError, match="nothing to pack"):
        packed(source, tmp_path / "all", left_out=frozenset(source.where(i) for i in range(20)))


# Going on, and refusing


class FailsOnce(SourceDefaults):
    """A source with an example that cannot be read until it is mended."""

    encoded = True

    def __init__(self, source: Any, bad: int) -> None:
        self.source, self.bad = source, bad
        self.labels, self.classes, self.name, self.fingerprint = source.labels, source.classes, source.name, source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        raise AssertionError

    def where(self, index: int) -> str:
        return str(self.source.where(index))

    def read(self, index: int) -> bytes:
        if index == self.bad:
            raise DataError(f"{self.where(index)}: not now")
        return bytes(self.source.read(index))


def test_an_interrupted_pack_goes_on(photos: Path, tmp_path: Path) -> None:
    source = open_folder_source(photos)
    bad = int(pack_order(source, np.arange(20), seed=0)[10])  # in the second of three shards
    with pytest.raises(DataError, match="not now"):
        packed(FailsOnce(source, bad), tmp_path / "out")
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert set(there) == {"train-000000.tar"}
    assert not (tmp_path / "out" / "_info.json").exists(), "half a set does not look like a whole one"
    assert not list((tmp_path / "out").glob(".tmp*"))
    assert packed(source, tmp_path / "out").written == 2
    assert (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns == there["train-000000.tar"]
    assert packed(source, tmp_path / "out").written == 0
    packed(source, tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_shard_that_was_cut_is_written_again(photos: Path, tmp_path: Path) -> None:
    source = open_folder_source(photos)
    packed(source, tmp_path / "out")
    path = tmp_path / "out" / "train-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-700])
    assert packed(source, tmp_path / "out").written == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize("change", [{"seed": 3}, {"quality": 80}, {"resize": 20}, {"examples_per_shard": 9}])
def test_other_settings_are_refused(photos: Path, tmp_path: Path, change: dict[str, int]) -> None:
    source = open_folder_source(photos)
    packed(source, tmp_path / "out")
    with pytest.raises(DataError, match=rf"packed otherwise: {next(iter(change))} \(.* there, .* now\)") as error:
        packed(source, tmp_path / "out", replace(PLAIN, **change))
    assert "\n" not in str(error.value)


def test_another_source_is_refused(photos: Path, tmp_path: Path) -> None:
    packed(open_folder_source(photos), tmp_path / "out")
    (photos / "train" / "cat" / "new.png").write_bytes((photos / "train" / "cat" / "01.png").read_bytes())
    with pytest.raises(DataError, match="fingerprint"):
        packed(open_folder_source(photos), tmp_path / "out")
    with pytest.raises(DataError, match="lists other classes"):
        packed(open_source("digits", split="val", data=section()), tmp_path / "out", split="val")


def test_shards_of_others_are_not_touched(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-0000.tar").write_bytes(b"theirs")
    with pytest.raises(DataError, match="that this command has not written"):
        packed(open_folder_source(photos), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-0000.tar"]


def test_class_names_that_make_no_line_are_refused(photos: Path, tmp_path: Path) -> None:
    source = open_folder_source(photos)
    source.classes = ["bird", "c\nat"]
    with pytest.raises(DataError, match="one class name a line"):
        packed(source, tmp_path / "out")


# Verification


def test_damage_on_the_way_to_disk_is_noticed(photos: Path, tmp_path: Path) -> None:
    packed(open_folder_source(photos), tmp_path / "out")
    path = tmp_path / "out" / "train-000000.tar"
    with tarfile.open(path) as tar:
        written = []
        for entry in tar:
            file = tar.extractfile(entry)
            assert file is not None
            written.append((entry.name, entry.size, zlib.crc32(file.read())))
    read_back(path, written, ["somewhere"] * 7, step=1)
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # in the first image
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"read back, 000000000\.\w+ is not what was written|cannot read this image"):
        read_back(path, written, ["somewhere"] * 7, step=100)
    with pytest.raises(DataError, match="is not what was written"):
        read_back(path, written[:-2], ["somewhere"] * 6, step=100)


def test_a_damaged_image_is_found_with_verify(photos: Path, tmp_path: Path) -> None:
    good = photos / "train" / "cat" / "01.png"
    good.write_bytes(good.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cat/01\.png: cannot read this image"):
        packed(open_folder_source(photos), tmp_path / "out", decode_all=True)
