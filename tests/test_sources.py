"""Sources: every image mode, every folder layout, torchvision's real file formats, the decoded cache, and each bad input."""

import gzip
import hashlib
import http.server
import logging
import os
import pickle
import re
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision
from numpy.typing import NDArray
from PIL import Image

from vitcli.config import AugmentConfig, DataConfig
from vitcli.data.cache import decode_once
from vitcli.data.folders import open_folder
from vitcli.data.images import decode as decode_image
from vitcli.data.images import to_rgb
from vitcli.data.preview import pick, preview
from vitcli.data.protocol import Source
from vitcli.data.sources import ArraySource, DecodedSource, FileSource, open_source
from vitcli.data.transforms import TrainTransform
from vitcli.errors import DataError


def section(**settings: object) -> DataConfig:
    return DataConfig.model_validate({"source": "digits", "image_size": 8, **settings})


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (8, 8), seed: int = 0, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:04d}{suffix}")


def read_image(path: Path) -> NDArray[np.uint8]:
    return decode_image(path.read_bytes(), where=str(path))


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message
    return message


# Image modes


def gradient() -> NDArray[np.uint8]:
    return np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)


def test_to_rgb_reads_every_mode(tmp_path: Path) -> None:
    grey = gradient()
    rgb = np.stack([grey, 255 - grey, grey // 2], axis=2)
    assert (to_rgb(Image.fromarray(rgb)) == rgb).all()
    assert (to_rgb(Image.fromarray(grey)) == grey[:, :, None]).all()
    bits = Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)
    assert set(np.unique(to_rgb(bits))) == {0, 255}
    palette = Image.fromarray(rgb).quantize(256)
    assert (to_rgb(palette) == np.asarray(palette.convert("RGB"))).all()
    cmyk = Image.fromarray(rgb).convert("CMYK")
    assert np.abs(to_rgb(cmyk).astype(int) - rgb).max() <= 1
    assert to_rgb(Image.fromarray(rgb).convert("YCbCr")).shape == (6, 8, 3)
    cmyk.save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - rgb).mean() < 8


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., :3] = 40
    rgba[0, :, 3] = (0, 255)
    rgba[1, :, 3] = 128
    expected = [[255, 40], [147, 147]]  # 40 * 128/255 + 255 * 127/255
    assert np.abs(to_rgb(Image.fromarray(rgba))[..., 0].astype(int) - expected).max() <= 1
    la = Image.fromarray(rgba).convert("LA")
    assert np.abs(to_rgb(la)[..., 1].astype(int) - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png").tolist() == [[[255, 255, 255], [200, 100, 50]]]
    palette.save(tmp_path / "p.gif", transparency=1)
    assert read_image(tmp_path / "p.gif").tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    wide = np.array([[0, 257, 128 * 257, 65535, 300, 40000]], np.uint16)
    Image.fromarray(wide).save(tmp_path / f"wide{suffix}")
    assert read_image(tmp_path / f"wide{suffix}")[0, :, 0].tolist() == [0, 1, 128, 255, 1, 156]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to show
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = read_image(tmp_path / "turned.jpg")
    assert upright.shape == (32, 16, 3) and upright[4].mean() > 250 and upright[28].mean() < 5


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="float.tif.*floating point"):
        read_image(tmp_path / "float.tif")


def test_damaged_files_are_named_with_the_reason(tmp_path: Path) -> None:
    write_images(tmp_path, 1, size=(64, 64), suffix=".jpg")
    whole = (tmp_path / "0000.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    for name, reason in (("cut", "truncated"), ("empty", "the file is empty"), ("text", "no image format")):
        with pytest.raises(DataError, match=f"{name}.jpg: cannot read this image: .*{reason}") as error:
            read_image(tmp_path / f"{name}.jpg")
        one_line(error)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    source = FileSource(open_folder(make_set(tmp_path), split="train", val_fraction=0.1), name="set")
    Path(source.where(2)).unlink()
    with pytest.raises(DataError, match=f"{re.escape(source.where(2))}: cannot read this image: No such file") as error:
        source[2]
    one_line(error)


# Folders


def test_train_and_val_folders(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for name in ("zebra", "ant"):
            write_images(tmp_path / split / name, count, seed=len(name) + count)
    (tmp_path / "train" / "ant" / ".hidden.png").write_text("x")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    write_images(tmp_path / "train" / "ant" / "deeper", 1)
    train = open_source(f"folder:{tmp_path}", split="train", data=section())
    val = open_source(f"folder:{tmp_path}", split="val", data=section())
    assert train.classes == val.classes == ["ant", "zebra"]
    assert (len(train), len(val)) == (9, 4)  # val/ is preferred to test/
    assert train.labels is not None and train.labels.tolist() == [0] * 5 + [1] * 4
    image, label = val[3]
    assert label == 1 and (image == read_image(tmp_path / "val" / "zebra" / "0001.png")).all()
    assert train.fingerprint != val.fingerprint


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_other_names_for_the_held_out_split(tmp_path: Path, held_out: str) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "train" / name, 2)
        write_images(tmp_path / held_out / name, 3)
    assert len(open_folder(tmp_path, split="val", val_fraction=0.1).relative) == 6


def test_a_folder_one_level_too_high_is_refused_with_the_right_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "dataset" / name, 2)
    with pytest.raises(DataError, match=rf"only one class folder, dataset; .* did you mean folder:{tmp_path}/dataset"):
        open_source(f"folder:{tmp_path}", split="train", data=section())


def test_a_named_set_may_lie_as_plain_class_folders(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / "pets" / name, 5)
    opened = [open_source("pets", split=split, data=section(root=tmp_path, val_fraction=0.2)) for split in ("train", "val")]
    assert [len(source) for source in opened] == [8, 2]
    assert opened[0].classes == ["cat", "dog"]


def test_deterministic_split(tmp_path: Path) -> None:
    for name, count in (("many", 50), ("few", 2), ("one", 1)):
        write_images(tmp_path / name, count)
    train = open_folder(tmp_path, split="train", val_fraction=0.2)
    val = open_folder(tmp_path, split="val", val_fraction=0.2)
    assert not set(train.relative) & set(val.relative) and len(train.relative) + len(val.relative) == 53
    assert np.bincount(val.labels, minlength=3).tolist() == [1, 10, 0]  # few, many, one
    assert np.bincount(train.labels, minlength=3).tolist() == [1, 40, 1]
    most = open_folder(tmp_path, split="train", val_fraction=0.99)
    assert np.bincount(most.labels).tolist() == [1, 1, 1]
    only_train = tmp_path / "elsewhere"
    (only_train / "train").mkdir(parents=True)
    for name in ("many", "few", "one"):
        (tmp_path / name).rename(only_train / "train" / name)
    moved = open_folder(only_train, split="val", val_fraction=0.2)
    assert moved.relative == val.relative  # by relative path, wherever it lies


def test_folder_mistakes(tmp_path: Path) -> None:
    def refuse(path: Path, match: str, split: str = "train") -> None:
        with pytest.raises(DataError, match=match) as error:
            open_source(f"folder:{path}", split=split, data=section())  # type: ignore[arg-type]
        one_line(error)

    refuse(tmp_path / "nowhere", "nowhere: there is no such folder")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file", "this is a file")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "no class folders")
    write_images(tmp_path / "flat", 3)
    refuse(tmp_path / "flat", "flat: no class folders here; .*jpg; pictures in no classes are for objective.name=mae")
    write_images(tmp_path / "holes" / "full", 3)
    (tmp_path / "holes" / "void").mkdir()
    (tmp_path / "holes" / "void" / "notes.txt").write_text("x")
    refuse(tmp_path / "holes", r"holes/void: no images in this class folder \(1 files of other types\)")
    for split, names in (("train", ("a", "b")), ("val", ("b", "c"))):
        for name in names:
            write_images(tmp_path / "mismatch" / split / name, 1)
    refuse(tmp_path / "mismatch", "only in train/: a; only in val/: c", split="val")
    for name in ("a", "b"):
        write_images(tmp_path / "eval_only" / "test" / name, 1)
        write_images(tmp_path / "single" / name, 1)
    refuse(tmp_path / "eval_only", "has test/ but no train/")
    assert len(open_source(f"folder:{tmp_path / 'eval_only'}", split="val", data=section())) == 2
    refuse(tmp_path / "single", "single image", split="val")
    for name in ("a", "b"):
        write_images(tmp_path / "bad" / name, 3)
    for path in (tmp_path / "bad" / "a").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    refuse(tmp_path / "bad", "000..png: cannot read this image")
    assert not list((tmp_path / "vit-cache" / "decoded").glob(".tmp-*"))


def test_unknown_names() -> None:
    with pytest.raises(DataError, match="cifar-10: no such data set.*did you mean cifar10"):
        open_source("cifar-10", split="train", data=section())
    with pytest.raises(DataError, match="did you mean folder:/"):
        open_source("/", split="train", data=section())
    with pytest.raises(DataError, match="no such data set"):
        open_source("folder:", split="train", data=section())


# Named sets


def test_digits() -> None:
    train, val = (open_source("digits", split=split, data=section()) for split in ("train", "val"))
    assert isinstance(train, ArraySource) and train.uniform
    assert (len(train), len(val)) == (1438, 359) and train.classes == [str(i) for i in range(10)]
    images, labels = train.batch(np.arange(len(train)))
    assert images.shape == (1438, 8, 8, 3) and images.dtype == np.uint8 and images.max() == 255 and images.min() == 0
    assert (images[..., 0] == images[..., 2]).all()
    assert val.labels is not None and np.bincount(val.labels).min() >= 35
    image, label = train[5]
    assert (image == images[5]).all() and label == labels[5]
    seen = {image.tobytes() for image in images}
    held_out = [val[i][0].tobytes() in seen for i in range(len(val))]
    assert sum(held_out) == 0
    assert open_source("digits", split="train", data=section()).fingerprint == train.fingerprint != val.fingerprint


def cifar_files(folder: Path, *, per_batch: int = 4) -> dict[str, str]:
    """Write CIFAR-10's python format, a few images long; return the md5 of each file."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        entry = {
            "data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
            "labels": rng.integers(0, 10, per_batch).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(entry))
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for path in folder.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    return sums


def expect_small_cifar(monkeypatch: pytest.MonkeyPatch, sums: dict[str, str]) -> None:
    """Make torchvision's integrity check expect our small files."""
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve a folder over HTTP on this machine."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(served))  # type: ignore[arg-type]

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_address[1]}", served
    listening.shutdown()
    listening.server_close()
    thread.join()


@pytest.mark.parametrize("nested", [True, False])
def test_cifar10_as_torchvision_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    root = tmp_path / "root"
    sums = cifar_files((root / "cifar10" if nested else root) / "cifar-10-batches-py")
    expect_small_cifar(monkeypatch, sums)
    train = open_source("cifar10", split="train", data=section(root=root))
    val = open_source("cifar10", split="val", data=section(root=root))
    assert (len(train), len(val), train.uniform) == (20, 4, True) and train.classes[3] == "class 3"
    place = (root / "cifar10" if nested else root) / "cifar-10-batches-py" / "test_batch"
    stored = pickle.loads(place.read_bytes())
    image, label = val[2]
    assert (image == stored["data"][2].reshape(3, 32, 32).transpose(1, 2, 0)).all() and label == stored["labels"][2]


def test_cifar10_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    address, served = server
    expect_small_cifar(monkeypatch, cifar_files(tmp_path / "made" / "cifar-10-batches-py"))
    archive = served / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    root = tmp_path / "root"
    assert len(open_source("cifar10", split="train", data=section(root=root))) == 20
    assert [path.name for path in root.iterdir()] == ["cifar10"]  # nothing temporary is left
    archive.unlink()
    assert len(open_source("cifar10", split="val", data=section(root=root))) == 4  # from disk now
    (root / "cifar10" / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
    assert len(open_source("cifar10", split="val", data=section(root=root))) == 4  # unpacked again from the archive
    assert not re.search(r"%\||Downloading|Extracting|already", "".join(capfd.readouterr()))  # torchvision's own words


def test_missing_set_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for url in ("http://127.0.0.1:9/x.tar.gz", "http://no-such-host.invalid/x.tar.gz"):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        started = time.monotonic()
        with pytest.raises(DataError, match="cifar10: not found in .*download failed") as error:
            open_source("cifar10", split="train", data=section(root=tmp_path / "root"))
        assert time.monotonic() - started < 20
        message = one_line(error)
        for part in (tmp_path / "root" / "cifar10", tmp_path / "root", "train/<class>", "cifar-10-batches-py"):
            assert str(part) in message
    assert list((tmp_path / "root").iterdir()) == []
    assert not re.search(r"%\||Downloading|Extracting|already", "".join(capfd.readouterr()))  # torchvision's own words
    with pytest.raises(DataError, match="imagenet: not found .*ILSVRC2012_devkit_t12.tar.gz.*no automatic download") as error:
        open_source("imagenet", split="val", data=section(root=tmp_path / "root"))
    one_line(error)


def test_damaged_and_unrepairable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root" / "cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(DataError, match="incomplete or damaged") as error:
        open_source("cifar10", split="train", data=section(root=tmp_path / "root"))
    one_line(error)


def idx(values: NDArray[np.uint8]) -> bytes:
    """MNIST's format: two zero bytes, type 8 (uint8), rank, big-endian lengths, data."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_is_downloaded_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Path], name: str, folder: str
) -> None:
    address, served = server
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    resources = []
    for part, content in (
        ("train-images-idx3-ubyte.gz", idx(images)),
        ("train-labels-idx1-ubyte.gz", idx(labels)),
        ("t10k-images-idx3-ubyte.gz", idx(images[:3])),
        ("t10k-labels-idx1-ubyte.gz", idx(labels[:3])),
    ):
        (served / part).write_bytes(gzip.compress(content))
        resources.append((part, hashlib.md5((served / part).read_bytes()).hexdigest()))
    stored = getattr(torchvision.datasets, folder)
    monkeypatch.setattr(stored, "resources", resources)
    monkeypatch.setattr(stored, "mirrors", ["http://127.0.0.1:9/", f"{address}/"])
    train = open_source(name, split="train", data=section(root=tmp_path / "root"))
    assert len(train) == 7 and len(open_source(name, split="val", data=section(root=tmp_path / "root"))) == 3
    assert isinstance(train, ArraySource)
    got, got_labels = train.batch(np.array([4, 1]))
    assert got.shape == (2, 28, 28, 3) and (got[..., 1] == images[[4, 1]]).all() and got_labels.tolist() == [4, 1]


def test_flowers_train_on_train_and_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    base = tmp_path / "root" / "flowers102" / "flowers-102"
    write_images(base / "jpg", 6, suffix=".jpg")
    for i in range(6):
        (base / "jpg" / f"{i:04d}.jpg").rename(base / "jpg" / f"image_{i + 1:05d}.jpg")
    scipy_io.savemat(base / "imagelabels.mat", {"labels": np.array([1, 2, 3, 1, 2, 3])})
    scipy_io.savemat(base / "setid.mat", {"trnid": np.array([1, 2]), "valid": np.array([3, 4]), "tstid": np.array([5, 6])})
    files = {"image": ("102flowers.tgz", "")}
    for kind, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        files[kind] = (name, hashlib.md5((base / name).read_bytes()).hexdigest())
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", files)
    train = open_source("flowers102", split="train", data=section(root=tmp_path / "root"))
    val = open_source("flowers102", split="val", data=section(root=tmp_path / "root"))
    assert train.labels is not None and train.labels.tolist() == [0, 1, 2, 0] and len(train.classes) == 102
    assert val.labels is not None and val.labels.tolist() == [1, 2]
    assert (train[1][0] == read_image(base / "jpg" / "image_00002.jpg")).all()


def test_pets(tmp_path: Path) -> None:
    base = tmp_path / "root" / "oxford-iiit-pet"
    write_images(base / "images", 3, suffix=".jpg")
    (base / "annotations").mkdir()
    for i, name in enumerate(("Maine_Coon_1", "beagle_1", "beagle_2")):
        (base / "images" / f"{i:04d}.jpg").rename(base / "images" / f"{name}.jpg")
    (base / "annotations" / "trainval.txt").write_text("Maine_Coon_1 1 1 1\nbeagle_1 2 2 1\n")
    (base / "annotations" / "test.txt").write_text("beagle_2 2 2 1\n")
    train = open_source("pets", split="train", data=section(root=tmp_path / "root"))
    assert train.classes == ["Maine Coon", "Beagle"] and len(train) == 2


def test_named_set_as_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test", "val"):
        for name in ("cat", "dog"):
            write_images(tmp_path / "vit-data" / "cifar10" / split / name, 1 if split == "val" else 2)
    val = open_source("cifar10", split="val", data=section())  # the root comes from $VIT_DATA
    assert len(val) == 4 and val.classes == ["cat", "dog"]  # the published test set, not val
    for wnid in ("n01440764", "n01443537"):
        write_images(tmp_path / "vit-data" / "imagenet" / "val" / wnid, 1)
    assert len(open_source("imagenet", split="val", data=section())) == 2


# Decoded cache


def make_set(tmp_path: Path, *, mixed: bool = False) -> Path:
    for name in ("a", "b"):
        write_images(tmp_path / "set" / "train" / name, 5, seed=ord(name))
        write_images(tmp_path / "set" / "val" / name, 2, seed=ord(name) + 1)
    if mixed:
        write_images(tmp_path / "set" / "train" / "b", 2, size=(5, 9))
    return tmp_path / "set"


@pytest.mark.parametrize("mixed", [False, True])
def test_decoded_once_and_equal_to_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool) -> None:
    spec = f"folder:{make_set(tmp_path, mixed=mixed)}"
    decoded = open_source(spec, split="train", data=section())
    files = open_source(spec, split="train", data=section(memory_cache_gib=0))
    assert isinstance(decoded, DecodedSource) and isinstance(files, FileSource) and not files.uniform
    assert decoded.uniform is not mixed and decoded.fingerprint == files.fingerprint
    for i in range(len(files)):
        assert (decoded[i][0] == files[i][0]).all() and decoded[i][1] == files[i][1]
    if not mixed:
        images, labels = decoded.batch(np.array([7, 0, 7]))
        assert (images[0] == files[7][0]).all() and labels.tolist() == [1, 0, 1]
    monkeypatch.setattr("vitcli.data.cache.decode", lambda data, where: pytest.fail("decoded again"))
    again = open_source(spec, split="train", data=section())
    assert (again[6][0] == decoded[6][0]).all()
    copy: Source = pickle.loads(pickle.dumps(again))  # as a loader process gets it
    assert (copy[6][0] == decoded[6][0]).all() and len(pickle.dumps(again.pixels)) < 5000  # type: ignore[attr-defined]


def test_cache_follows_changes_of_the_files(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    open_source(f"folder:{folder}", split="train", data=section())
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(folder / "train" / "a" / "0000.png")
    assert (open_source(f"folder:{folder}", split="train", data=section())[0][0] == 9).all()


def test_damaged_cache_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = f"folder:{make_set(tmp_path)}"
    before = open_source(spec, split="train", data=section())[3][0].copy()
    stored = list((tmp_path / "vit-cache" / "decoded").glob("*/pixels.bin"))
    assert len(stored) == 1
    os.truncate(stored[0], 100)
    with caplog.at_level(logging.WARNING):
        after = open_source(spec, split="train", data=section())[3][0]
    assert (before == after).all() and "damaged cache" in caplog.text


def test_unwritable_cache_decodes_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = f"folder:{make_set(tmp_path)}"
    expected = open_source(spec, split="val", data=section())[1][0]
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("VIT_CACHE", str(tmp_path / "blocked"))
    source = open_source(spec, split="val", data=section())
    assert (source[1][0] == expected).all() and "for this run" in caplog.text
    copy: Source = pickle.loads(pickle.dumps(source))
    assert (copy[1][0] == expected).all()


def test_processes_decode_large_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_set(tmp_path, mixed=True)
    files = FileSource(open_folder(folder, split="train", val_fraction=0.1), name="set")
    expected = decode_once(files, key="a", cache_dir=tmp_path / "threads", name="set")
    monkeypatch.setattr("vitcli.data.cache.WORTH_PROCESSES", 0)
    got = decode_once(files, key="a", cache_dir=tmp_path / "processes", name="set")
    assert (got.flat == expected.flat).all() and (got.sizes == expected.sizes).all()
    (folder / "train" / "b" / "0003.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="0003.png: cannot read") as error:
        decode_once(files, key="b", cache_dir=tmp_path / "processes", name="set")
    one_line(error)


def test_two_processes_may_decode_at_once(tmp_path: Path) -> None:
    files = FileSource(open_folder(make_set(tmp_path), split="train", val_fraction=0.1), name="set")
    results: list[NDArray[np.uint8]] = []

    def decode() -> None:
        results.append(decode_once(files, key="a", cache_dir=tmp_path / "cache", name="set")[2])

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all((result == results[0]).all() for result in results)
    assert [path.name.startswith(".") for path in (tmp_path / "cache" / "decoded").iterdir()] == [False]


# Preview


def test_preview_of_any_source(tmp_path: Path) -> None:
    digits = open_source("digits", split="val", data=section())
    sheet = preview(digits, rows=10, columns=6)
    assert sheet.size == (6 * 100 + 4, 10 * 116 + 4)
    transform = TrainTransform(AugmentConfig(crop="inception"), image_size=(32, 16))
    mixed = open_source(f"folder:{make_set(tmp_path, mixed=True)}", split="train", data=section())
    augmented = preview(mixed, rows=2, columns=3, transform=transform)
    assert augmented.size == (3 * 100 + 4, 4 * 116 + 4)  # a row before and a row after for each class
    assert np.asarray(augmented).std() > 10, "an empty sheet"


def test_preview_of_the_corpus_has_a_row_for_each_class() -> None:
    corpus = open_source("shapes", split="train", data=section(image_size=32))
    labels = [corpus[index][1] for index in pick(corpus, rows=3, columns=4, seed=0).tolist()]
    assert labels == [0] * 4 + [49] * 4 + [99] * 4
