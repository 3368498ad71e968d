"""Features are the model's, in order, the same bits from two processes, and never a damaged or another model's entry.

Run as a script, this file is what each of two processes does.
"""

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitcli import features as room
from vitcli.config import Config
from vitcli.data.loader import eval_batches
from vitcli.data.protocol import Source
from vitcli.data.sources import open_source
from vitcli.data.transforms import EvalTransform, normalise
from vitcli.distributed import SOLO, Engine, Ranks, process_group
from vitcli.features import Features, cached_features, extract_features, feature_file, head_inputs, weights_digest
from vitcli.forward import features
from vitcli.models import VisionTransformer, build_model
from vitcli.opened import OpenedModel
from vitcli.pretrained import Pretrained

CPU = torch.device("cpu")


def config_of(**data: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32},
            "data": {"source": "digits", "image_size": 16, "workers": 0, **data},
            "train": {"steps": 1, "precision": "float32"},
        }
    )


def opened_model(seed: int = 0, **data: Any) -> OpenedModel:
    config = config_of(**data)
    torch.manual_seed(seed)
    model = build_model(config.model, image_size=config.data.image_size, num_classes=10)
    assert isinstance(model, VisionTransformer)
    torch.nn.init.normal_(model.head.weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pretrained = Pretrained(state, config.model.model_dump(mode="json"), [], {}, Path("x"), 0, False, {})
    return OpenedModel(Path("x"), model, pretrained, config, CPU, 10**6)


def digits(split: Any = "val") -> Source:
    return open_source("digits", split=split, data=config_of().data)


def extract(opened: OpenedModel, source: Source, batch_size: int = 64, **options: Any) -> Features | None:
    return extract_features(
        opened.model,
        source,
        opened.config,
        device=CPU,
        batch_size=batch_size,
        warn=print,
        flops_per_image=opened.flops_per_image,
        **options,
    )


def keep(opened: OpenedModel, source: Source, *, weights: str = "", ranks: Ranks = SOLO, said: list[str]) -> Features | None:
    digest = weights or weights_digest(opened.pretrained.state)
    return cached_features(opened, source, split="val", weights=digest, batch_size=64, say=said.append, ranks=ranks)


def entry_of(opened: OpenedModel, source: Source, split: Any = "val") -> Path:
    return feature_file(opened, source, split=split, weights=weights_digest(opened.pretrained.state))


def assert_equal(found: Features | None, expected: Features | None) -> None:
    assert found is not None and expected is not None
    for name in ("values", "labels", "indices"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


# ---------------------------------------------------------------- extraction


def test_features_are_the_models_in_the_order_of_the_images() -> None:
    opened, source = opened_model(), digits()
    found = extract(opened, source)
    assert found is not None
    transform = EvalTransform(image_size=(16, 16), crop_fraction=None)
    with torch.no_grad():
        batches = list(eval_batches(source, transform, batch_size=64))
        scaled = [normalise(batch["images"], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)) for batch in batches]
        expected = torch.cat([opened.model.features(images) for images in scaled])
    np.testing.assert_array_equal(found.values, expected.numpy())
    np.testing.assert_array_equal(found.labels, np.asarray(source.labels))
    np.testing.assert_array_equal(found.indices, np.arange(len(source)))
    assert found.values.dtype == np.float32


def test_what_the_head_reads_is_the_features() -> None:
    opened, source = opened_model(), digits()
    assert_equal(extract(opened, source, forward=head_inputs), extract(opened, source, forward=features))
    assert not opened.model.head._forward_pre_hooks


def test_images_that_cannot_be_read_are_left_out_and_nothing_is_kept(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    for number in range(12):
        place = tmp_path / "photos" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(place / f"{number:02}.png")
    (tmp_path / "photos" / "class0" / "04.png").write_bytes(b"no picture")
    opened = opened_model(source=f"folder:{tmp_path / 'photos'}", on_error="skip")
    source = open_source(opened.config.data.source, split="train", data=opened.config.data)
    said: list[str] = []
    found = keep(opened, source, said=said)
    assert found is not None
    lost = [index for index in range(len(source)) if source.where(index).endswith("04.png")]
    assert sorted({*range(len(source))} - {*found.indices.tolist()}) == lost
    assert any("04.png" in line for line in said)
    assert not entry_of(opened, source).exists()


# ---------------------------------------------------------------- the cache


def test_a_second_time_the_model_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, source = opened_model(), digits()
    said: list[str] = []
    first = keep(opened, source, said=said)
    assert entry_of(opened, source).exists()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("extracted again")

    monkeypatch.setattr(room, "extract_features", refuse)
    assert_equal(keep(opened, source, said=said), first)
    assert said == []
    monkeypatch.undo()
    assert_equal(extract(opened, source), first)


def test_without_a_digest_nothing_is_kept(tmp_path: Path) -> None:
    opened = opened_model()
    found = cached_features(opened, digits(), split="val", weights=None, batch_size=64, say=print)
    assert_equal(found, extract(opened, digits()))
    assert not (tmp_path / "vit-cache" / "features").exists()


def test_an_entry_is_of_these_weights_images_and_preprocessing() -> None:
    opened, source = opened_model(), digits()
    usual = entry_of(opened, source)
    other_head = opened_model()
    other_head.pretrained.state["head.weight"] += 1.0
    assert entry_of(other_head, source) == usual
    assert entry_of(opened_model(), digits()) == usual
    others = {
        "weights": entry_of(opened_model(seed=1), source),
        "split": entry_of(opened, source, split="train"),
        "images": entry_of(opened, digits("train")),
        "mean": entry_of(opened_model(mean=[0.4, 0.5, 0.5]), source),
        "crop": entry_of(opened_model(eval_crop_fraction=0.875), source),
        "size": entry_of(opened_model(image_size=32), source),
    }
    assert len({usual, *others.values()}) == 1 + len(others), others


def test_equal_names_and_sizes_with_other_pixels_are_other_images(tmp_path: Path) -> None:
    opened = opened_model()
    paths = []
    for value in (10, 200):
        for label in ("a", "b"):
            folder = tmp_path / "flat" / label
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("0.bmp", "1.bmp"):
                Image.new("RGB", (16, 16), (value, value, value)).save(folder / name)
        source = open_source(f"folder:{tmp_path / 'flat'}", split="train", data=config_of(memory_cache_gib=0).data)
        paths.append((source.fingerprint, entry_of(opened, source)))
    assert paths[0][0] == paths[1][0]
    assert paths[0][1] != paths[1][1]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header", "foreign"])
def test_a_damaged_entry_is_extracted_again(damage: str) -> None:
    opened, source = opened_model(), digits()
    said: list[str] = []
    first = keep(opened, source, said=said)
    path = entry_of(opened, source)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "header":
        content[:8] = (1 << 60).to_bytes(8, "little")
    else:
        content = bytearray(b"PK\x03\x04 not what it was")
    path.write_bytes(content)
    assert_equal(keep(opened, source, said=said), first)
    assert len(said) == 1 and "damaged cache of features" in said[0], said
    assert_equal(keep(opened, source, said=said), first)
    assert len(said) == 1


def test_the_entries_used_longest_ago_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    source = digits()
    models = [opened_model(seed=seed) for seed in range(4)]
    entries = [entry_of(opened, source) for opened in models]
    for opened, age in zip(models[:3], (300, 400, 200)):
        keep(opened, source, said=said)
        os.utime(entry_of(opened, source), (time.time() - age,) * 2)
    keep(models[1], source, said=said)  # used again
    leftover, fresh = (entries[0].with_name(f".tmp-{name}") for name in ("old", "new"))
    for path in (leftover, fresh):
        path.write_bytes(b"half")
    os.utime(leftover, (time.time() - 2 * room.STALE_SECONDS,) * 2)
    monkeypatch.setattr(room, "MOST_CACHE_BYTES", 3 * entries[0].stat().st_size)
    keep(models[3], source, said=said)
    assert [path.exists() for path in entries] == [False, True, True, True]
    assert (leftover.exists(), fresh.exists()) == (False, True)
    assert said == []


def test_where_nothing_can_be_kept_it_is_said_and_the_features_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VIT_CACHE", str(tmp_path / "file"))
    opened, source = opened_model(), digits()
    said: list[str] = []
    assert_equal(keep(opened, source, said=said), extract(opened, source))
    assert len(said) == 1 and "cannot keep features here" in said[0]


# ---------------------------------------------------------------- two processes


def check_ranks(ranks: Ranks) -> None:
    opened, source = opened_model(), digits()
    sharded = opened_model()
    Engine(
        sharded.model, blocks=sharded.model.units(), input_shape=(3, 16, 16), parallel="fsdp", ranks=ranks, device=CPU
    )  # in place
    for batch_size in (7, 64, len(source), 1000):  # with the last two there is nothing left for one of them
        alone = extract(opened, source, batch_size)
        for judged, forward in ((opened, features), (opened, head_inputs), (sharded, head_inputs)):
            together = extract(judged, source, batch_size, forward=forward, ranks=ranks)
            if ranks.main:
                assert_equal(together, alone)
            else:
                assert together is None
    room.PIECE_BYTES = 1000
    together = extract(opened, source, 7, ranks=ranks)
    if ranks.main:
        assert_equal(together, extract(opened, source, 7))
    weights = weights_digest(opened.pretrained.state) if ranks.main else None
    options: Any = {"split": "val", "weights": weights, "batch_size": 64, "say": print, "ranks": ranks}
    for _ in range(2):  # the second time from the main rank's disk
        found = cached_features(opened, source, **options)
        assert (found is not None) == ranks.main
    if ranks.main:
        assert entry_of(opened, source).exists()
        assert_equal(found, extract(opened, source))


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    with process_group(device_type="cpu", timeout_seconds=60) as ranks:
        said = None
        try:
            check_ranks(ranks)
        except Exception:
            said = traceback.format_exc()
        ranks.any(False)
        (folder / f"{ranks.rank}.json").write_text(json.dumps(said))


@pytest.mark.slow
def test_two_processes_extract_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(tmp_path)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    for rank, output in enumerate(outputs):
        report = tmp_path / f"{rank}.json"
        assert report.exists(), output
        assert json.loads(report.read_text()) is None, json.loads(report.read_text())


if __name__ == "__main__":
    work(Path(sys.argv[1]))
