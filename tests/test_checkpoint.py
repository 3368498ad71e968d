"""Checkpoints: whole or not there, and every kind of damage is found."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitcli import checkpoint
from vitcli.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_weights_file,
    save_checkpoint,
    verify_checkpoint,
)
from vitcli.errors import CheckpointError

MANIFEST = {
    "model": {"patch_size": 4, "width": 8},
    "classes": ["cat", "dög", "a/b"],
    "preprocessing": {"image_size": (8, 8), "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "eval_crop_fraction": None},
    "source": "digits",
    "seed": 3,
}
FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json"]


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(5, 4, generator=generator)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(directory: Path, step: int, *, seed: int = 0, ema: bool = True) -> Path:
    model, optimizer = trained(seed)
    state = model.state_dict()
    averaged = {name: 2 * tensor for name, tensor in state.items()} if ema else None
    return save_checkpoint(
        directory,
        step=step,
        model_state=state,
        ema_state=averaged,
        optimizer_state=optimizer.state_dict(),
        manifest=MANIFEST,
    )


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1000)
    assert path.name == "step_00001000"
    assert sorted(item.name for item in path.iterdir()) == sorted(FILES)
    model, optimizer = trained()
    loaded = load_checkpoint(path)
    assert loaded.step == 1000
    assert loaded.ema_state is not None
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model_state[name], tensor)
        assert torch.equal(loaded.ema_state[name], 2 * tensor)
    fresh, fresh_optimizer = trained(seed=1)
    fresh.load_state_dict(loaded.model_state)
    fresh_optimizer.load_state_dict(loaded.optimizer_state)
    for one, other in zip(optimizer.state.values(), fresh_optimizer.state.values()):
        assert all(torch.equal(one[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert loaded.manifest["classes"] == MANIFEST["classes"]
    assert loaded.manifest["preprocessing"]["image_size"] == [8, 8]


def test_without_ema(tmp_path: Path) -> None:
    loaded = load_checkpoint(save(tmp_path, 1, ema=False))
    assert loaded.ema_state is None


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    # the safetensors library alone orders its metadata at random: 1 in 2^7 that this passes without our sorting
    contents = [content_of(save(tmp_path / str(number), 7)) for number in range(8)]
    assert all(content == contents[0] for content in contents)


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "whole": base,
        "transposed": base.T,
        "shared": base,
        "slice": base[1:],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "half": base.to(torch.bfloat16),
        "mask": base > 3,
        "leaf": nn.Parameter(base.clone()),
    }
    path = save_checkpoint(tmp_path, step=1, model_state=state, ema_state=None, optimizer_state={}, manifest=MANIFEST)
    loaded = load_checkpoint(path).model_state
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach())


def test_the_weights_file_stands_alone(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    alone = tmp_path / "elsewhere.safetensors"
    shutil.copy(path / "model.safetensors", alone)
    found = load_weights_file(alone)
    assert (found.step, found.is_ema, found.model, found.classes) == (5, False, MANIFEST["model"], MANIFEST["classes"])
    assert found.source_path == alone
    assert (found.manifest["source"], found.manifest["seed"]) == ("digits", 3)
    assert load_file(alone).keys() == found.state.keys()  # the library reads it too


def test_three_ways_to_name_weights(tmp_path: Path) -> None:
    older = save(tmp_path / "checkpoints", 5, seed=1)
    newer = save(tmp_path / "checkpoints", 10, seed=2)
    (tmp_path / "manifest.json").write_text("{}")  # the run's own
    assert load_weights_file(tmp_path).source_path == newer / "ema.safetensors"
    assert load_weights_file(older).source_path == older / "ema.safetensors"
    assert load_weights_file(older / "model.safetensors").is_ema is False
    flip_bit(newer / "ema.safetensors", -1)
    said: list[str] = []
    assert load_weights_file(tmp_path, say=said.append).step == 5
    assert len(said) == 1
    assert "step_00000010/ema.safetensors" in said[0]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("bit", [0, 5, 7])
def test_one_flipped_bit_is_found(tmp_path: Path, name: str, place: str, bit: int) -> None:
    path = save(tmp_path, 1)
    length = (path / name).stat().st_size
    verify_checkpoint(path)
    flip_bit(path / name, {"first": 0, "middle": length // 2, "last": length - 2}[place], bit)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_any_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    whole = (path / "manifest.json").read_bytes()
    for position in range(0, len(whole) - 1, 5):  # the last byte is the newline
        flip_bit(path / "manifest.json", position, position % 8)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            checkpoint.read_manifest(path / "manifest.json")
        (path / "manifest.json").write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_missing_files_are_found(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    content = (path / name).read_bytes()
    for length in (0, len(content) // 2, len(content) - 2):
        (path / name).write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.*missing"):
        load_checkpoint(path)


def test_sizes_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with open(path / "optimizer.pt", "ab") as file:
        file.write(b"x")
    size = (path / "optimizer.pt").stat().st_size
    with pytest.raises(CheckpointError, match=f"has {size:,} bytes, {size - 1:,} were written"):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": "1"}, "step"),
        ({"classes": None}, "classes"),
        ({"layout": 99}, "layout 99"),
        ({"layout": "9" * 10_000}, r"layout .{1,200}, this version"),
        ({"files": []}, "files"),
        ({"files": {"../../secret": {"bytes": 1, "sha256": ""}}}, "files"),
        ({"files": {"model.safetensors": {}, "optimizer.pt": {}}}, "size and SHA-256"),
    ],
)
def test_malformed_manifest(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = save(tmp_path, 1)
    body = {**checkpoint.read_manifest(path / "manifest.json"), **change}
    (path / "manifest.json").write_text(json.dumps({**body, "sha256": checkpoint.sha256_of_json(body)}))
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["", "[]", "null", '"step"', "{", "\x00\x01", "{}"])
def test_manifest_that_is_no_manifest(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(path)


def test_latest_falls_back_and_says_so(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    paths = [save(tmp_path / "checkpoints", step) for step in (1, 2, 10, 123456789)]
    said: list[str] = []
    assert latest_checkpoint(tmp_path, say=said.append) == paths[3]
    assert said == []
    flip_bit(paths[3] / "model.safetensors", 200)
    (paths[2] / "optimizer.pt").unlink()
    assert latest_checkpoint(tmp_path, say=said.append) == paths[1]
    assert ["step_123456789" in said[0], "step_00000010" in said[1], len(said)] == [True, True, 2]
    for path in paths[:2]:
        (path / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        load_weights_file(tmp_path)


def test_leftovers_of_a_kill_are_never_read_and_go_at_the_next_save(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    whole = save(directory, 1)
    leftover = directory / ".tmp-step_00000002-4711"
    shutil.copytree(whole, leftover)  # killed between the last write and the rename
    assert latest_checkpoint(tmp_path) == whole
    save(directory, 2)
    assert sorted(path.name for path in directory.iterdir()) == ["step_00000001", "step_00000002"]


def test_sound_checkpoint_is_kept_and_damaged_one_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 1, seed=1)
    before = content_of(path)
    inode = path.stat().st_ino
    assert save(tmp_path, 1, seed=2) == path
    assert content_of(path) == before
    assert path.stat().st_ino == inode
    flip_bit(path / "optimizer.pt", 100)
    save(tmp_path, 1, seed=1)
    assert content_of(path) == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_reader_of_a_leftover_is_not_disturbed(tmp_path: Path) -> None:
    leftover = tmp_path / ".tmp-step_00000002-4711"
    shutil.copytree(save(tmp_path, 1), leftover)
    (tmp_path / ".tmp-step_00000003-4711").symlink_to(leftover)
    with open(leftover / "optimizer.pt"):
        save(tmp_path, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == [leftover.name, "step_00000001", "step_00000002"]
    save(tmp_path, 3)
    assert not leftover.exists()


def test_latest_of_some(tmp_path: Path) -> None:
    paths = [save(tmp_path / "checkpoints", step) for step in (10, 13, 20, 27)]
    assert latest_checkpoint(tmp_path, up_to=26) == paths[2]
    assert latest_checkpoint(tmp_path, up_to=19) == paths[1]
    assert latest_checkpoint(tmp_path, up_to=19, every_steps=10) == paths[0]
    assert latest_checkpoint(tmp_path, every_steps=10) == paths[2]
    assert latest_checkpoint(tmp_path, up_to=9) is None


def test_what_else_a_run_needs(tmp_path: Path) -> None:
    model, optimizer = trained()
    arguments = {"ema_state": None, "optimizer_state": optimizer.state_dict(), "manifest": MANIFEST}
    extra = {"loss_scale": {"scale": 1024.0}, "list": [1, None]}
    path = save_checkpoint(tmp_path, step=1, model_state=model.state_dict(), extra=extra, **arguments)
    assert load_checkpoint(path).extra == extra
    assert b"loss_scale" not in (path / "model.safetensors").read_bytes()
    assert load_checkpoint(save(tmp_path, 2)).extra == {}
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, step=3, model_state=model.state_dict(), extra={"x": float("nan")}, **arguments)


# ---------------------------------------------------------------- a hand that means harm


def sign(path: Path, change: dict[str, Any]) -> None:
    """Rewrite a manifest so that its checksum is right."""
    body = {**checkpoint.read_manifest(path / "manifest.json"), **change}
    (path / "manifest.json").write_text(json.dumps({**body, "sha256": checkpoint.sha256_of_json(body)}))


@pytest.mark.parametrize(
    "change",
    [
        {"step": True},
        {"step": -1},
        {"step": 10**30},
        {"step": 2},  # the directory says 1
        {"classes": [1]},
        {"preprocessing": {}},
        {"preprocessing": {"image_size": [8, 0]}},
        {"preprocessing": {"image_size": [8, "8"]}},
        {"extra": [1]},
        {"files": {"model.safetensors": {"bytes": "x", "sha256": ""}, "optimizer.pt": {"bytes": 1, "sha256": ""}}},
        {"files": {"model.safetensors": {"bytes": -1, "sha256": ""}, "optimizer.pt": {"bytes": 1, "sha256": 1}}},
        {"files": {"model.safetensors": None, "optimizer.pt": []}},
    ],
)
def test_values_that_no_save_writes(tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(tmp_path / "checkpoints", 1)
    sign(path, change)
    with pytest.raises(CheckpointError, match=r"manifest\.json: .* damaged"):
        load_checkpoint(path)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, '{"step": ' + "9" * 10_000 + "}", '"\\ud800"']
)
def test_json_that_exhausts_its_reader(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: .* damaged") as caught:
        load_checkpoint(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_plain_file_is_not_opened(tmp_path: Path, name: str) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
        path = save(tmp_path, 1)
        (path / name).unlink()
        make(path / name)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(path)
        shutil.rmtree(path)


def test_a_file_larger_than_the_memory_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    size = 1 << 43  # nothing but holes: takes no room on the disk
    for name in ("model.safetensors", "optimizer.pt", "manifest.json"):
        os.truncate(path / name, size)
        with pytest.raises(CheckpointError, match=rf"{name}: has {size:,} bytes; at most"):
            load_checkpoint(path)
        path = save(tmp_path, 1)
    lone = tmp_path / "lone.safetensors"
    shutil.copy(path / "model.safetensors", lone)
    os.truncate(lone, size)
    with pytest.raises(CheckpointError, match="at most"):
        load_weights_file(lone)


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        (65 << 20).to_bytes(8, "little") + bytes(66 << 20),
        safetensors(b"[" * 100_000),
        safetensors(b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', bytes(4)),
        safetensors(b'{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
        safetensors(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(4)),
        safetensors(b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
        safetensors(
            b'{"v":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        safetensors(b'{"__metadata__":{"vit":"' + b"[" * 100_000 + b'"}}'),
    ],
)
def test_safetensors_headers_that_lie(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.safetensors: ") as caught:
        load_weights_file(path)
    assert "\n" not in str(caught.value)


def test_a_header_that_begins_like_a_pickle_is_one_all_the_same(tmp_path: Path) -> None:
    model, _ = trained()
    for name in ("x" * extra for extra in range(300)):  # some header's length ends in 0x80, a pickle's first byte
        about = {**MANIFEST, "source": name, "layout": 1, "step": 1, "is_ema": False}
        checkpoint.write_weights(path := tmp_path / "w.safetensors", model.state_dict(), about=about)
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert load_weights_file(path).step == 1


def test_weights_without_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    checkpoint.write_weights(path, {"w": torch.ones(2)}, about={**json.loads(json.dumps(MANIFEST)), "layout": 1, "step": 1})
    with pytest.raises(CheckpointError, match="is_ema"):
        load_weights_file(path)


@pytest.mark.parametrize("name", ["step_1", "step_0000000001", "step_٠٠٠٠٠٠٠١", "step_00000001.old", "step_" + "9" * 30])
def test_names_that_are_not_ours(tmp_path: Path, name: str) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / "checkpoints" / name)
    assert latest_checkpoint(tmp_path) is None


# ---------------------------------------------------------------- a disk that refuses


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let no file of this process grow beyond 20 kB, the nearest thing to a full disk that needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("too_big", ["weights", "optimizer", "manifest"])
@pytest.mark.usefixtures("small_files")
def test_full_disk_leaves_earlier_checkpoints_and_no_rubbish(tmp_path: Path, too_big: str) -> None:
    first = save(tmp_path, 1)
    small, big = {"w": torch.ones(2)}, {"w": torch.ones(20_000)}
    with pytest.raises(CheckpointError, match=r"step_00000002: cannot save .*File too large") as caught:
        save_checkpoint(
            tmp_path,
            step=2,
            model_state=big if too_big == "weights" else small,
            ema_state=None,
            optimizer_state=big if too_big == "optimizer" else small,
            manifest={**MANIFEST, "classes": ["c" * 30_000 if too_big == "manifest" else "c"]},
        )
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    verify_checkpoint(first)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_oserror_late_in_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    first = save(tmp_path, 1)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CheckpointError, match=r"step_00000002: cannot save .*No space left on device"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="cannot save"):
        save(tmp_path / "checkpoints", 1)


def test_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "flush_to_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_manifest_must_be_complete_when_saving(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes"):
        save_checkpoint(
            tmp_path,
            step=1,
            model_state={},
            ema_state=None,
            optimizer_state={},
            manifest={key: value for key, value in MANIFEST.items() if key != "classes"},
        )


# ---------------------------------------------------------------- paths that are no weights


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def test_what_is_not_weights_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights: dict[str, Tensor] = {"w": torch.ones(2)}
    save_file(weights, "bare.safetensors")
    save_file(weights, "foreign.safetensors", metadata={"format": "pt"})
    save_file(weights, "nonsense.safetensors", metadata={"vit": "{"})
    save_file(weights, "list.safetensors", metadata={"vit": "[]"})
    save_file(weights, "empty.safetensors", metadata={"vit": "{}"})
    torch.save({"w": Evil()}, "zip.pt")
    torch.save({"w": Evil()}, "pickle.pt", _use_new_zipfile_serialization=False)
    Path("random.bin").write_bytes(bytes(range(256)))
    Path("zero.safetensors").write_bytes(b"")
    header = b'{"w":{"dtype":"\\u001f","shape":[1],"data_offsets":[0,4]}}'  # comes back in the library's message
    Path("control.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    Path("directory").mkdir()
    Path("run/checkpoints").mkdir(parents=True)
    Path("step_00000001").mkdir()
    cases = {
        "missing": "no such file",
        "bare.safetensors": "does not say which model",
        "foreign.safetensors": "does not say which model",
        "nonsense.safetensors": "not JSON",
        "list.safetensors": "not a JSON object",
        "empty.safetensors": "not what was written",
        "zip.pt": "unpickling can run anything",
        "pickle.pt": "unpickling can run anything",
        "random.bin": "not a safetensors file",
        "zero.safetensors": "not a safetensors file",
        "control.safetensors": "not a safetensors file",
        "directory": "neither a run directory",
        "run": "no sound checkpoint",
        "step_00000001": r"manifest\.json: the file is missing",
    }
    for name, says in cases.items():
        with pytest.raises(CheckpointError, match=says) as caught:
            load_weights_file(Path(name))
        assert name in str(caught.value)
        assert str(caught.value).isprintable()
    assert not Path("pwned").exists()


@pytest.mark.parametrize("part", ["header", "metadata", "tensors"])
def test_one_flipped_bit_in_a_lone_file_is_found(tmp_path: Path, part: str) -> None:
    path = tmp_path / "lone.safetensors"
    shutil.copy(save(tmp_path, 1) / "model.safetensors", path)
    content = path.read_bytes()
    position = {"header": 0, "metadata": content.index(b"cat"), "tensors": len(content) - 1}[part]
    load_weights_file(path)
    flip_bit(path, position, 1)
    with pytest.raises(CheckpointError, match=r"lone\.safetensors"):
        load_weights_file(path)


def test_optimizer_state_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums only say who wrote it last: a pickle with valid checksums is still not run."""
    path = save(tmp_path, 1, ema=False)
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Evil()}, path / "optimizer.pt")
    body = checkpoint.read_manifest(path / "manifest.json")
    size = (path / "optimizer.pt").stat().st_size
    body["files"]["optimizer.pt"] = {"bytes": size, "sha256": checkpoint.sha256_of(path / "optimizer.pt")}
    (path / "manifest.json").write_text(json.dumps({**body, "sha256": checkpoint.sha256_of_json(body)}))
    verify_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: not an optimizer state that loads safely"):
        load_checkpoint(path)
    assert not (tmp_path / "pwned").exists()
