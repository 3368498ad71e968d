"""Hostile and damaged input gets an error: no execution, no escape, no endless loop, no exhausted memory.

Readers of configs, checkpoint manifests and weights, tar files, their indexes and lists, and images are given FEW made-up
inputs each by default and MANY in the slow suite. Each may read one or refuse it with its own error, in one printable line.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from braceexpand import braceexpand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.harness import vit
from vitcli import checkpoint
from vitcli.checkpoint import latest_checkpoint, load_checkpoint, load_weights_file, save_checkpoint, verify_checkpoint
from vitcli.config import Config
from vitcli.config_file import dump_config, read_config, setting_keys
from vitcli.data import images
from vitcli.data.images import EncodedImage, ImageError, decode, read_size, rgb_pixels
from vitcli.data.shard_build import build_index
from vitcli.data.shard_index import ShardIndex
from vitcli.data.shard_scan import scan_shard
from vitcli.data.shard_sets import MOST_SHARDS, count_braced, expand_braces, read_set_info
from vitcli.data.tar import BLOCK, iter_members
from vitcli.errors import CheckpointError, ConfigError, DataError, UserError

FEW, MANY = 30, 5_000  # inputs for each reader
Read = TypeVar("Read")

inputs = pytest.mark.parametrize("inputs", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def try_all(inputs: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Give made-up inputs to a check: the same ones for FEW, new ones each time for MANY."""

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=inputs == FEW,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(strategy)
    def run(made_up: Any) -> None:
        check(made_up)

    run()


def attempt(read: Callable[[], Read], error: type[UserError]) -> Read | None:
    """Return what was read, or None if it was refused as it should be."""
    try:
        return read()
    except error as refusal:
        message = str(refusal)
        assert message.isprintable() and len(message) < 10_000, message[:300]
    return None


# ---------------------------------------------------------------- what inputs are made of

ODD_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)
ODD_BYTES = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.builds(
        lambda number, size, order: (number % 256**size).to_bytes(size, order),
        st.sampled_from(ODD_NUMBERS),
        st.sampled_from((1, 2, 4, 8)),
        st.sampled_from(("little", "big")),
    ),
)
ODD_TEXT = st.sampled_from(
    [
        "",
        "\0",
        "\n",
        "\x1b[2J",
        "\ud800",
        "\udce9",
        "é",
        "x" * 300,
        "../../x",
        "/etc/passwd",
        "~",
        "1e3",
        "08",
        "-1",
        "9" * 5000,
    ]
)
JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 70),
        st.sampled_from([2**31, 2**63 - 1, 2**63, 10**30, -(10**30), 1e308, float("inf"), float("nan"), 0.5]),
        ODD_TEXT,
        st.text(max_size=5),
    ),
    lambda inside: st.one_of(st.lists(inside, max_size=3), st.dictionaries(ODD_TEXT | st.text(max_size=5), inside, max_size=3)),
    max_leaves=5,
)


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Draw a sound file with a few bytes changed, put in, taken out, repeated or cut off."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        # most headers are short, and most of what can go wrong is in them
        place = min(draw(st.integers(0, 700)) if draw(st.booleans()) else draw(st.integers(0, 1 << 20)), len(content))
        kind = draw(st.sampled_from(("set", "set", "set", "insert", "delete", "repeat", "cut", "splice")))
        if kind == "set":
            new = draw(ODD_BYTES)
            content[place : place + len(new)] = new
        elif kind == "insert":
            content[place:place] = draw(ODD_BYTES)
        elif kind == "delete":
            del content[place : place + draw(st.integers(1, 600))]
        elif kind == "repeat":
            content[place:place] = content[place : place + draw(st.integers(1, 600))]
        elif kind == "cut":
            del content[place:]
        else:
            content[place:] = draw(st.sampled_from(seeds))[place:]
    return bytes(content)


@st.composite
def altered(draw: st.DrawFn, tree: Any) -> Any:
    """Draw a JSON value with one or two places in it replaced by junk, taken out, or added to."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 2))):
        here = tree
        while isinstance(here, dict | list) and here:
            key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
            if not (isinstance(here[key], dict | list) and here[key]) or draw(st.integers(0, 3)) == 0:
                if draw(st.integers(0, 4)) == 0:
                    del here[key]
                else:
                    here[key] = draw(JUNK)
                break
            here = here[key]
        if isinstance(here, dict) and draw(st.integers(0, 4)) == 0:
            here[draw(ODD_TEXT)] = draw(JUNK)
    return tree


def text_of(value: Any) -> str:
    """Write JSON with what JSON allows and Python makes trouble of: NaN, lone surrogates."""
    return json.dumps(value)


# ---------------------------------------------------------------- configs

CONFIG = "data: {source: shapes, image_size: 32}\nmodel: {variant: Ti/4}\ntrain: {steps: 10}\n"
YAML_PIECES = st.sampled_from(
    [
        *(
            " ",
            "  ",
            "\n",
            "\n  ",
            "\n- ",
            "? ",
            ": ",
            ", ",
            "{",
            "}",
            "[",
            "]",
            "&a ",
            "*a",
            "<<: *a",
            "~",
            "#",
            "'",
            '"',
            "|",
            ">",
        ),
        *(
            "!!bool ",
            "!!int ",
            "!!float ",
            "!!timestamp ",
            "!!binary ",
            "!!set ",
            "!!omap ",
            "!!null ",
            "!!str ",
            "!x ",
            "!!map ",
        ),
        *(
            "!!python/object/apply:os.system ",
            "%YAML 3.0",
            "---",
            "...",
            "\0",
            "\ud800",
            "\x85",
            "\u2028",
            "\ufeff",
            "\t",
            "\x07",
        ),
        *(
            "9" * 4000,
            "9" * 5000,
            "0x10",
            "1e999",
            ".nan",
            "-.inf",
            "1_0",
            "010",
            "1:30",
            "yes",
            "2026-11-22",
            "\\",
            '"\\0"',
            '"\\ud800"',
        ),
        *(
            "data",
            "source",
            "train.steps",
            "seed: ",
            "optim:\n  lr: ",
            "model",
            "mix: [{source: shapes}]",
            "a.b",
            ".",
            "=",
            "<<",
        ),
    ]
)


def settings_tree() -> st.SearchStrategy[dict[str, Any]]:
    """Draw settings by dotted key, most of them known."""
    return st.dictionaries(
        st.sampled_from(setting_keys()) | ODD_TEXT, JUNK | st.sampled_from(["shapes", "B/16", 32, 8]), max_size=4
    )


@inputs
def test_configs(inputs: int, tmp_path: Path, root: Path) -> None:
    file, again = tmp_path / "x.yaml", tmp_path / "again.yaml"
    shipped = [CONFIG.encode(), *sorted((path.read_bytes() for path in (root / "configs").rglob("*.yaml")), key=len)[:2]]

    def encode(pieces: list[str]) -> bytes:
        return (CONFIG + "".join(pieces)).encode("utf-8", "surrogatepass")

    def as_lines(tree: dict[str, Any]) -> bytes:
        return (CONFIG + "".join(f"{json.dumps(key)}: {json.dumps(value)}\n" for key, value in tree.items())).encode()

    contents = st.one_of(damaged(shipped), st.lists(YAML_PIECES, max_size=12).map(encode), settings_tree().map(as_lines))

    def check(content: bytes) -> None:
        file.write_bytes(content)
        config = attempt(lambda: read_config(file)[0], ConfigError)
        if config is not None:  # what is taken is written to the run directory, and must come back
            again.write_text(dump_config(config), encoding="utf-8")
            assert read_config(again)[0] == config

    try_all(inputs, contents, check)


@inputs
def test_overrides(inputs: int, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(CONFIG)
    values = st.one_of(st.lists(YAML_PIECES, max_size=6).map("".join), JUNK.map(text_of))
    words = st.builds(lambda key, value: f"{key}={value}", st.sampled_from(setting_keys()) | ODD_TEXT, values) | ODD_TEXT
    try_all(
        inputs,
        st.lists(words, min_size=1, max_size=3),
        lambda some: attempt(lambda: read_config(file, some), ConfigError) and None,
    )


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint of a tiny model."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    size = {"image_size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop_fraction": None}
    return save_checkpoint(
        tmp_path_factory.mktemp("run") / "checkpoints",
        step=7,
        model_state=model.state_dict(),
        ema_state=None,
        optimizer_state=optimizer.state_dict(),
        manifest={
            "model": {"patch_size": 4, "width": 8, "depth": 1, "num_heads": 1},
            "classes": ["a", "b"],
            "preprocessing": size,
            "source": "digits",
            "data": {"source": "digits"},
            "train": {"loss": "softmax"},
            "seed": 0,
        },
    )


def sign(body: dict[str, Any]) -> str:
    """Write a manifest with the checksum that its reader expects: a hostile one has it right."""
    return json.dumps({**body, "sha256": checkpoint.sha256_of_json(body)})


def read_everything(folder: Path) -> None:
    """Read a checkpoint in every way there is, and use what its manifest says as `vit eval` does."""
    attempt(lambda: verify_checkpoint(folder), CheckpointError)
    attempt(lambda: load_checkpoint(folder), CheckpointError)
    attempt(lambda: latest_checkpoint(folder.parents[1]), CheckpointError)
    weights = attempt(lambda: load_weights_file(folder), CheckpointError)
    if weights is not None:
        data = {**weights.preprocessing, "source": str(weights.manifest["source"])}
        base = {"model": weights.model, "data": data, "train": {"steps": 1}}
        attempt(lambda: read_config(None, base=base, base_name="checkpoint"), ConfigError)


@inputs
def test_checkpoint_manifests(inputs: int, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["sha256"]
    contents = st.one_of(
        altered(manifest).map(lambda body: sign(body).encode() if isinstance(body, dict) else text_of(body).encode()),
        damaged([(saved / "manifest.json").read_bytes()]),
        JUNK.map(lambda value: text_of(value).encode()),
    )

    def check(content: bytes) -> None:
        (folder / "manifest.json").write_bytes(content)
        read_everything(folder)

    try_all(inputs, contents, check)


@inputs
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_checkpoint_files(inputs: int, name: str, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["sha256"]
    sound = (saved / name).read_bytes()
    contents = damaged([sound])
    if name == "model.safetensors":
        length = int.from_bytes(sound[:8], "little")
        header = json.loads(sound[8 : 8 + length])
        description = json.loads(header["__metadata__"]["vit"])
        del description["sha256"]

        def with_header(new: Any) -> bytes:
            text = text_of(new).encode()
            return len(text).to_bytes(8, "little") + text + sound[8 + length :]

        def with_description(new: Any) -> bytes:
            text = sign(new) if isinstance(new, dict) else text_of(new)
            return with_header({**header, "__metadata__": {**header["__metadata__"], "vit": text}})

        contents |= altered(header).map(with_header) | altered(description).map(with_description)

    def check(content: bytes) -> None:
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": checkpoint.sha256_of(folder / name)}
        (folder / "manifest.json").write_text(sign(manifest))
        read_everything(folder)

    try_all(inputs, contents, check)


# ---------------------------------------------------------------- tar files


def header(name: bytes, size: bytes, kind: bytes, *, sound: bool = True, magic: bytes = b"ustar\x0000") -> bytes:
    """Build a tar header of any content whose checksum is right."""
    block = bytearray(BLOCK)
    block[: min(len(name), 100)] = name[:100]
    block[124 : 124 + min(len(size), 12)] = size[:12]
    block[156:157] = kind
    block[257 : 257 + len(magic)] = magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) + (not sound))
    return bytes(block)


SIZES = st.one_of(
    st.integers(0, 1500).map(lambda size: b"%011o\0" % size),
    st.sampled_from(
        [
            b"-0000000100\0",
            b"+7",
            b"1_0",
            b"99999999999\0",
            b"\xff" * 12,
            b"\x80" + b"\xff" * 11,
            b"\x80" + bytes(11),
            b"",
            b"7" * 12,
        ]
    ),
    st.integers(0, 2**64).map(lambda size: b"\x80" + size.to_bytes(11, "big")),
)
PAX_VALUES = st.sampled_from(
    [b"0", b"5", b"-512", b"-1024", b"1_0", b" 7", b"9" * 30, b"9" * 5000, b"x", b"", b"../x.jpg", b"a.cls", b"\xff"]
)
PAX_KEYS = st.sampled_from(
    [b"path", b"size", b"GNU.sparse.major", b"GNU.sparse.realsize", b"hdrcharset", b"linkpath", b"\xff", b""]
)


def pax(records: list[tuple[bytes, bytes]], off: int) -> bytes:
    lines = b""
    for key, value in records:
        rest = b" %s=%s\n" % (key, value)
        length = len(rest) + len(str(len(rest) + 3))
        lines += b"%d" % (length + off) + rest
    return lines


@st.composite
def tar_files(draw: st.DrawFn) -> bytes:
    """Draw a tar file of headers whose checksums are right and whose fields may not be."""
    content = b""
    names = st.sampled_from(
        [b"a.jpg", b"a.cls", b"b.jpg", b"b.json", b"../c.png", b"/d.jpg", b"e/", b"\xff.jpg", b"\n.jpg", b"", b"x" * 100]
    )
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(
            st.sampled_from([b"0", b"0", b"0", b"\0", b"7", b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"X", b"S", b"D", b"?"])
        )
        body, size = draw(st.binary(max_size=40)), draw(SIZES)
        if kind in (b"x", b"g", b"X"):
            body = pax(draw(st.lists(st.tuples(PAX_KEYS, PAX_VALUES), max_size=3)), draw(st.sampled_from([0, 0, 0, 1, -1, -9])))
        if draw(st.integers(0, 3)):
            size = b"%011o\0" % len(body)
        magic = draw(st.sampled_from([b"ustar\x0000", b"ustar  \0", b""]))
        content += header(draw(names), size, kind, sound=draw(st.integers(0, 15)) > 0, magic=magic)
        content += body.ljust(-(-len(body) // BLOCK) * BLOCK, b"\0")
    return content + bytes(draw(st.sampled_from([1024, 1024, 512, 0, 100])))


def sound_tars() -> list[bytes]:
    """Write small shards in the formats there are."""
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for number, folder in enumerate(("", "f/" * 60)):
                for suffix, content in (("jpg", b"\xff\xd8" * 300), ("cls", b"3"), ("json", b'{"label": 3}')):
                    entry = tarfile.TarInfo(f"{folder}{number}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        made.append(buffer.getvalue())
    return made


@inputs
def test_tar_files(inputs: int) -> None:
    def check(content: bytes) -> None:
        members = attempt(lambda: list(islice(iter_members(io.BytesIO(content), where="x.tar"), 1000)), DataError)
        end = 0
        for member in members or ():
            assert member.head >= end and member.offset >= member.head + BLOCK and member.size >= 0
            end = member.offset + member.size
            assert end <= len(content)
        part = attempt(lambda: scan_shard(io.BytesIO(content), where="x.tar"), DataError)
        if part is not None:
            assert (part.offsets + part.sizes <= len(content)).all() and (part.labels < 1_000_000).all()

    for sound in sound_tars():
        assert len(scan_shard(io.BytesIO(sound), where="x.tar").labels) == 2
    try_all(inputs, tar_files() | damaged(sound_tars()), check)


@inputs
def test_indexes_of_shards(inputs: int, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, content in enumerate(sound_tars()[:2]):
        (shards / f"{number}.tar").write_bytes(content)
    urls = sorted(map(str, shards.iterdir()))
    sound = build_index(urls, cache_dir=tmp_path / "cache", workers=1)
    files = {path.name: path.read_bytes() for path in sorted(sound.folder.iterdir())}
    folder = Path(shutil.copytree(sound.folder, tmp_path / "index"))
    description = json.loads(files["index.json"])
    changes = st.one_of(
        st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), damaged([files[name]]))),
        st.tuples(st.just("index.json"), altered(description).map(lambda value: text_of(value).encode())),
    )

    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        (folder / name).write_bytes(content)
        with contextlib.suppress(OSError, ValueError, KeyError):
            index = ShardIndex(folder, urls)
            assert len(index.labels) == len(index) == int(index.counts.sum())
            assert all(0 <= label < len(index.classes) for label in index.labels.tolist())
            for shard in range(len(urls)):
                index.part(shard)
        (folder / name).write_bytes(files[name])

    assert len(ShardIndex(folder, urls)) == 4
    try_all(inputs, changes, check)


@inputs
def test_lists_beside_shards(inputs: int, tmp_path: Path) -> None:
    info = {
        "splits": {
            "train": {"filenames": "{0..1}.tar", "shard_lengths": [2, 2], "num_samples": 4},
            "val": {"filenames": ["v.tar"]},
        },
        "classes": ["cat", "dog"],
    }
    lists = st.one_of(
        st.tuples(st.just("_info.json"), altered(info).map(lambda value: text_of(value).encode())),
        st.tuples(st.just("_info.json"), damaged([json.dumps(info).encode()])),
        st.tuples(st.just("classes.txt"), st.text(max_size=20).map(str.encode) | damaged(["cat\ndög\t3\n".encode()])),
    )

    def check(change: tuple[str, bytes]) -> None:
        (tmp_path / change[0]).write_bytes(change[1])
        found = attempt(lambda: read_set_info(str(tmp_path)), DataError)
        for url in [url for urls in found.splits.values() for url in urls] if found else []:
            with contextlib.suppress(OSError):
                os.stat(url)
        (tmp_path / change[0]).unlink()

    try_all(inputs, lists, check)


@inputs
def test_braces(inputs: int) -> None:
    pieces = st.sampled_from(
        ["{", "}", ",", "a", "..", "0", "1", "03", "-2", "{0..3}", "{a..e}", "{b,c}", "{1..9..4}", "\\", ".tar", "{}", "{x}"]
    )

    def check(some: list[str]) -> None:
        pattern = "".join(some)
        names = attempt(lambda: expand_braces(pattern), DataError)
        if names is not None and "{a..e}" not in pattern:  # letters are counted as all there are
            assert len(names) == count_braced(pattern)

    try_all(inputs, st.lists(pieces, max_size=10), check)


# ---------------------------------------------------------------- images


def sound_images() -> list[bytes]:
    """Write a small picture in every format and mode that is read."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (21, 34, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    ways: list[tuple[str, str, dict[str, Any]]] = [
        *(("RGB", "JPEG", how) for how in ({}, {"progressive": True}, {"exif": exif}, {"subsampling": 2, "quality": 30})),
        *((mode, "JPEG", {}) for mode in ("L", "CMYK")),
        *((mode, "PNG", {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
        ("RGB", "PNG", {"exif": exif}),
        *((mode, "GIF", {}) for mode in ("P", "L")),
        *((mode, "BMP", {}) for mode in ("RGB", "P", "1")),
        ("RGB", "WEBP", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        *(("RGB", "TIFF", {"compression": how}) for how in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        *((mode, "TIFF", {}) for mode in ("CMYK", "1", "I;16", "RGBA")),
        *((mode, "PPM", {}) for mode in ("RGB", "L", "1")),
    ]
    made = []
    for mode, form, how in ways:
        buffer = io.BytesIO()
        as_mode = (
            Image.fromarray(rng.integers(0, 65536, (21, 34)).astype(np.uint16)) if mode == "I;16" else picture.convert(mode)
        )
        as_mode.save(buffer, form, **how)
        made.append(buffer.getvalue())
    return made


@inputs
def test_images(inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1 << 20)  # the limit is tested below; here it would cost time
    sound = sound_images()

    def check(content: bytes) -> None:
        size = attempt(lambda: read_size(content, where="x"), DataError)
        pixels = attempt(lambda: decode(content, where="x"), DataError)
        if pixels is not None:
            assert pixels.dtype == np.uint8 and pixels.shape == (*(size or ()), 3)
        with contextlib.suppress(ImageError):
            image = EncodedImage(content)
            box = (0.0, 0.0, float(image.height), float(image.width))
            part, (top, left, bottom, right) = image.part(box, size=(4, 4), clip=True)
            assert part.ndim == 3 and 0 <= top <= bottom <= part.shape[0] and 0 <= left <= right <= part.shape[1]

    for content in sound:
        assert decode(content, where="x").shape[2] == 3
    try_all(inputs, damaged(sound), check)


def test_large_images_are_converted_in_bands_to_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in sound_images():
        image = Image.open(io.BytesIO(content))
        for turn in (None, *images.UPRIGHT.values()):
            monkeypatch.setattr(images, "BAND_PIXELS", 1 << 20)
            whole = rgb_pixels(image, turn)
            for band in (1, 100, 333):
                monkeypatch.setattr(images, "BAND_PIXELS", band)
                assert np.array_equal(rgb_pixels(image, turn), whole)


# ---------------------------------------------------------------- bombs, each in a process with little memory to spare

SPARE = 1 << 30  # bytes

BOMB = """
import resource, sys
from pathlib import Path
import torch
from vitcli.checkpoint import load_checkpoint, load_weights_file
from vitcli.config_file import read_config
from vitcli.data.images import decode
from vitcli.data.shard_index import ShardIndex
from vitcli.data.shard_scan import scan_shard
from vitcli.data.shard_sets import expand_shards, read_set_info
from vitcli.errors import UserError
readers = {
    "config": lambda place: read_config(Path(place)),
    "override": lambda place: read_config(None, [Path(place).read_text()]),
    "checkpoint": lambda place: load_checkpoint(Path(place)),
    "weights": lambda place: load_weights_file(Path(place)),
    "shard": lambda place: scan_shard(place, where="x.tar"),
    "index": lambda place: ShardIndex(Path(place), ["x.tar"]),
    "info": read_set_info,
    "pattern": lambda place: expand_shards(Path(place).read_text()),
    "image": lambda place: decode(Path(place).read_bytes(), where="x"),
}
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + SPARE
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
for kind, place in (line.split(" ", 1) for line in sys.stdin.read().splitlines()):
    try:
        readers[kind](place)
        print(kind, place, "was read")
    except MemoryError:
        print(kind, place, "exhausted the memory")
    except (UserError, *((ValueError, KeyError) if kind == "index" else ())) as error:
        if len(str(error)) > 10_000:
            print(kind, place, "made a message without end")
    except BaseException as error:
        print(kind, place, "raised", repr(error)[:200])
print("done")
"""


class Payload:
    """What a pickle would do if anybody loaded it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def png(width: int, height: int) -> bytes:
    """Build a PNG whose header claims a size and whose pixels are missing."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def laughs(open_: str, close: str, key: str) -> str:
    """Write thirty lines of YAML that stand for 9^30 values."""
    lines = ["a0: &a0 {x: 1}"]
    for number in range(1, 30):
        inside = ", ".join(f"{key.format(place)}*a{number - 1} " for place in range(9))
        lines.append(f"a{number}: &a{number} {open_}{inside}{close}")
    return CONFIG + "\n".join(lines) + "\n"


@pytest.mark.slow
def test_bombs(tmp_path: Path, saved: Path) -> None:
    bombs: list[tuple[str, Path]] = []
    trap = tmp_path / "executed"

    def add(kind: str, content: bytes | str) -> Path:
        path = tmp_path / f"bomb-{len(bombs)}"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        bombs.append((kind, path))
        return path

    add("config", laughs("[", "]", ""))
    add("config", laughs("{", "}", "k{}: "))
    add("config", "a: &a " + "x" * 100_000 + "\nb: [" + ",".join(["*a"] * 3_000) + "]\n")
    add("config", CONFIG + "out: " + "[" * 100_000)
    add("config", "".join(f"k{number}: 1\n" for number in range(2_000)))
    add("config", f"a: !!python/object/apply:os.mkdir ['{trap}']\n")
    bombs.append(("config", Path("/dev/zero")))
    add("override", "out=" + "[" * 100_000)
    add("override", "out=" + "9" * 100_000)
    add("override", "mix=" + laughs("[", "]", "").replace("\n", ", ").join("{}"))

    add(
        "shard",
        b"".join(header(b"p", b"%011o\0" % 14, b"x") + b"14 size=-1024\n".ljust(512, b"\0") for _ in range(3))
        + header(b"a.jpg", b"0\0", b"0")
        + bytes(1024),
    )
    long = b"".join(header(b"l", b"%011o\0" % (1 << 20), b"L") + b"n" * (1 << 20) for _ in range(40))
    add("shard", long + header(b"a.jpg", b"%011o\0" % 0, b"0") + header(b"a.cls", b"%011o\0" % 0, b"0") + bytes(1024))
    add("shard", header(b"a.jpg", b"\x80" + b"\xff" * 11, b"0") + bytes(1024))
    label = b'{"label": ' + b"[" * 500_000 + b"}"
    body = label.ljust(-(-len(label) // BLOCK) * BLOCK, b"\0")
    add("shard", header(b"a.jpg", b"%011o\0" % 0, b"0") + header(b"a.json", b"%011o\0" % len(label), b"0") + body + bytes(1024))

    for pattern in (
        "{0..9999999999}.tar",
        "{0..9}" * 20,
        "{" + "{0..9}" * 20 + ",x}",
        "{" * 5000 + "a,b" + "}" * 5000,
        "{a..z}" * 10,
    ):
        add("pattern", pattern)
        folder = tmp_path / f"set-{len(bombs)}"
        folder.mkdir()
        (folder / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": pattern}}}))
        bombs.append(("info", folder))
    for name, content in (
        ("_info.json", "[" * 100_000),
        ("_info.json", '{"splits": {"a\\n": 3}}'),
        ("classes.txt", "a\x1b[2Jb\n"),
    ):
        folder = tmp_path / f"set-{len(bombs)}"
        folder.mkdir()
        (folder / name).write_text(content)
        bombs.append(("info", folder))
    folder = tmp_path / "set-pipe"
    folder.mkdir()
    os.mkfifo(folder / "_info.json")
    bombs.append(("info", folder))

    shard = tmp_path / "x.tar"
    shard.write_bytes(sound_tars()[0])
    index = build_index([str(shard)], cache_dir=tmp_path / "cache", workers=1).folder
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<i8", "fortran_order": False, "shape": (1 << 40,)})
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(trap)], object), allow_pickle=True)
    for name in ("starts.npy", "counts.npy", "labels.npy"):
        for stored in (array.getvalue(), objects.getvalue(), b"", pickle.dumps(Payload(trap))):
            folder = Path(shutil.copytree(index, tmp_path / f"index-{len(bombs)}"))
            (folder / name).write_bytes(stored)
            bombs.append(("index", folder))

    for size in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)):
        add("image", png(*size))
    add("image", b"P6 99999 99999 255 ")
    add(
        "image",
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
        + b"\x08\0;",
    )
    add("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")

    add("weights", (1 << 60).to_bytes(8, "little") + b"{")
    add("weights", (200_000).to_bytes(8, "little") + b"[" * 200_000)
    add("weights", pickle.dumps(Payload(trap)))
    for file, payload in (
        ("optimizer.pt", pickle.dumps(Payload(trap))),
        ("manifest.json", b"[" * 100_000),
        ("model.safetensors", (1 << 62).to_bytes(8, "little")),
    ):
        place = Path(shutil.copytree(saved, tmp_path / f"checkpoint-{len(bombs)}" / saved.name))
        (place / file).write_bytes(payload)
        if file != "manifest.json":
            manifest = json.loads((saved / "manifest.json").read_text())
            del manifest["sha256"]
            manifest["files"][file] = {"bytes": len(payload), "sha256": checkpoint.sha256_of(place / file)}
            (place / "manifest.json").write_text(sign(manifest))
        bombs.append(("checkpoint", place))

    lines = "\n".join(f"{kind} {place}" for kind, place in bombs)
    code = f"SPARE = {SPARE}\n{BOMB}"
    done = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr
    assert not trap.exists()


def test_a_hostile_shard_is_checked_to_its_end(tmp_path: Path) -> None:
    """`vit data check` asks the standard library's reader too, which a negative size leads round in circles."""
    record = b"14 size=-1024\n"
    tar = header(b"link", b"0\0", b"2") + header(b"a.jpg", b"%011o\0" % 0, b"0") + header(b"p", b"%011o\0" % len(record), b"x")
    (tmp_path / "x.tar").write_bytes(tar + record.ljust(BLOCK, b"\0") + header(b"b.jpg", b"0\0", b"0") + bytes(1024))
    result = vit("data", "check", "shards:x.tar", "--jobs", "1", cwd=tmp_path)
    assert result.returncode in (1, 2), result.stdout + result.stderr
    assert re.search("no number in pax records", result.stdout + result.stderr)


def test_the_limits_leave_room(tmp_path: Path) -> None:
    assert len(expand_braces("s-{000000..099999}.tar")) == 100_000 == len(list(braceexpand("s-{000000..099999}.tar")))
    assert count_braced("{a/{0..599999},b/{0..599999}}.tar") == 1_200_000 <= MOST_SHARDS
    file = tmp_path / "x.yaml"
    file.write_text(CONFIG + "optim: {lr: &rate 0.01, end_lr: *rate}\n")
    config: Config = read_config(file)[0]
    assert config.optim.end_lr == 0.01
