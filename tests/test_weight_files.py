"""Weights files of every format: read by content, never executed, never beyond the memory, and one line for what is wrong."""

import argparse
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.harness import Result, vit
from vitcli.errors import CheckpointError
from vitcli.weights import files
from vitcli.weights.files import read_tensors
from vitcli.weights.open import open_weights

MARK = "/tmp/vit-a-weights-file-was-executed"


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def state() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layers().state_dict().items()}


def save_torch(path: Path, content: Any, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def save_npz(path: Path, **arrays: Any) -> Path:
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return path


def saved(kind: str, path: Path) -> Path:
    """Write the same tensors in one of the formats."""
    if kind == "safetensors":
        save_file(state(), path)
    elif kind == "npz":
        save_npz(path, **{name: tensor.numpy() for name, tensor in state().items()})
    else:
        save_torch(path, state(), legacy=kind == "legacy")
    return path


KINDS = ("safetensors", "torch", "legacy", "npz")


@pytest.mark.parametrize("header_bytes", [2_176, 19_280])
def test_a_safetensors_file_that_begins_as_a_pickle_or_zip_does(tmp_path: Path, header_bytes: int) -> None:
    """The header's length comes first, and any byte may stand there."""
    content = saved("safetensors", tmp_path / "plain").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].ljust(header_bytes)
    (tmp_path / "weights").write_bytes(header_bytes.to_bytes(8, "little") + header + content[8 + length :])
    assert (tmp_path / "weights").read_bytes()[:2] in (b"\x80\x08", b"PK")
    found = read_tensors(tmp_path / "weights")
    assert found.kind == "safetensors"
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in state().items())


# --------------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", KINDS)
def test_the_content_counts_and_not_the_name(kind: str, tmp_path: Path) -> None:
    for name in ("weights", "a.npz", "a.safetensors", "a.pth", "a.json"):
        found = read_tensors(saved(kind, tmp_path / name))
        assert found.kind == ("torch" if kind == "legacy" else kind)
        assert found.tensors.keys() == state().keys()
        assert all(torch.equal(tensor, state()[name]) for name, tensor in found.tensors.items())


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_outlive_the_file(kind: str, tmp_path: Path) -> None:
    path = saved(kind, tmp_path / "weights")
    found = read_tensors(path)
    os.truncate(path, 0)
    assert torch.equal(found.tensors["0.weight"], state()["0.weight"])


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_scripts_save_around_the_weights(legacy: bool, tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in layers().state_dict().items()}
    content = {"epoch": 3, "model": wrapped, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "args": {"lr": 0.1}}
    found = read_tensors(save_torch(tmp_path / "a.pth", content, legacy=legacy))
    assert found.tensors.keys() == state().keys()
    assert found.metadata == {"epoch": 3, "part": "model"}
    averaged = {"state_dict": state(), "state_dict_ema": {name: tensor + 1 for name, tensor in state().items()}}
    found = read_tensors(save_torch(tmp_path / "b.pth", averaged, legacy=legacy))
    assert found.metadata["part"] == "state_dict_ema"
    assert torch.equal(found.tensors["0.weight"], state()["0.weight"] + 1)


@pytest.mark.parametrize("legacy", [False, True])
def test_parameters_and_half_precision(legacy: bool, tmp_path: Path) -> None:
    content = dict(layers().bfloat16().named_parameters())
    found = read_tensors(save_torch(tmp_path / "a.pth", content, legacy=legacy)).tensors
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert not any(tensor.requires_grad for tensor in found.values())


def test_arrays_of_every_order_and_kind(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    halves = torch.arange(6).bfloat16().reshape(2, 3)
    path = save_npz(
        tmp_path / "a.npz",
        fortran=np.asfortranarray(matrix),
        swapped=matrix.astype(">f4"),
        number=np.array(7),
        halves=halves.view(torch.int16).numpy().view("V2"),
    )
    found = read_tensors(path).tensors
    assert torch.equal(found["fortran"], torch.from_numpy(matrix))
    assert torch.equal(found["swapped"], torch.from_numpy(matrix))
    assert found["number"] == 7
    assert torch.equal(found["halves"], halves)
    compressed = tmp_path / "b.npz"
    np.savez_compressed(compressed, **{"a/b": matrix})
    assert torch.equal(read_tensors(compressed).tensors["a/b"], torch.from_numpy(matrix))


def sharded(folder: Path) -> Path:
    names = sorted(state())
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for part in set(places.values()):
        save_file({name: state()[name] for name in names if places[name] == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_shards_are_put_together(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    for path in (index, tmp_path):
        found = read_tensors(path)
        assert found.kind == "safetensors"
        assert all(torch.equal(tensor, state()[name]) for name, tensor in found.tensors.items())
        assert found.tensors.keys() == state().keys()


# ------------------------------------------------------------------------------------------------------------- what is not read


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def object_array(path: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = Hostile()
    save_npz(path, **{"embedding/kernel": array})


def bytearray_of(path: Path, size: int) -> None:
    """Write what torch's safe reader would allocate: bytearray(size)."""

    class Large:
        def __reduce__(self) -> tuple[Any, ...]:
            return bytearray, (size,)

    save_torch(path, {"a": Large()})


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a call in an archive": lambda path: save_torch(path, {"model": state(), "x": Hostile()}),
    "a call in the old format": lambda path: save_torch(path, {"model": state(), "x": Hostile()}, legacy=True),
    "a whole module": lambda path: save_torch(path, layers()),
    "a whole module in the old format": lambda path: save_torch(path, layers(), legacy=True),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Hostile())),
    "a pickle of data": lambda path: path.write_bytes(pickle.dumps({"a": [1.0]})),
    "an array of objects": object_array,
    "a huge bytearray": lambda path: bytearray_of(path, 1 << 50),
    "settings of argparse": lambda path: save_torch(path, {"model": state(), "args": argparse.Namespace(lr=1)}),
    "TorchScript": lambda path: path.write_bytes(torch_script()),
}


def torch_script() -> bytes:
    """Return an archive laid out as TorchScript's, which holds code."""
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/code/model.py", "print()")
    return buffer.getvalue()


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_is_executed_and_the_refusal_is_one_line(what: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    HOSTILE[what](path)
    with pytest.raises(CheckpointError, match=r"safely|unpickling can run anything") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not os.path.exists(MARK)


def test_a_refused_archive_says_what_it_holds_and_what_to_do(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "a.pth", {"model": state(), "args": argparse.Namespace(lr=1)})
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*torch\.save\(model\.state_dict"):
        read_tensors(path)


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + body


def zipped(path: Path, *arrays: tuple[str, bytes], compress: bool = False) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in arrays:
            archive.writestr(name, content)


def header_of(shape: str, descr: str = "<f4") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


def oversized_entry(path: Path) -> None:
    """Write an archive whose directory says that an array has 2^60 bytes."""
    zipped(path, ("a.npy", npy(header_of("(1,)"), bytes(4))))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")
    content[entry + 24 : entry + 28] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(content)


BAD_ARRAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bomb": (
        lambda p: zipped(p, ("a.npy", npy(header_of("(20000000,)"), bytes(80_000_000))), compress=True),
        "inflate to 80,",
    ),
    "a directory that lies": (oversized_entry, "inflate to 4,29|holds 4,29"),
    "a header that lies": (
        lambda p: zipped(p, ("a.npy", npy(header_of("(1000000000000,)"), bytes(4)))),
        "4 bytes where 4,000,",
    ),
    "a negative side": (lambda p: zipped(p, ("a.npy", npy(header_of("(-1, -1)"), bytes(4)))), "belong|damaged"),
    "text": (lambda p: zipped(p, ("a.npy", npy(header_of("(1,)", "<U1"), bytes(4)))), "expected numbers"),
    "records": (
        lambda p: zipped(p, ("a.npy", npy("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (1,)}"))),
        "belong|numbers",
    ),
    "a call in a header": (lambda p: zipped(p, ("a.npy", npy("__import__('os').system('true')"))), "damaged|header|malformed"),
    "no header": (lambda p: zipped(p, ("a.npy", b"\x93NUMPY\1")), "a.npz|damaged|magic"),
    "another version": (lambda p: zipped(p, ("a.npy", b"\x93NUMPY\7\0" + bytes(200))), "version"),
    "an empty archive": (lambda p: zipped(p), "empty or packed"),
    "other files": (lambda p: zipped(p, ("readme.txt", b"hello")), "neither arrays"),
    "one array": (lambda p: p.write_bytes(npy(header_of("(1,)"), bytes(4))), "expected an archive of named ones"),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_arrays_that_are_not_what_they_say(what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    make, message = BAD_ARRAYS[what]
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


def test_two_arrays_of_one_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        zipped(tmp_path / "a.npz", *[("a.npy", npy(header_of("(1,)"), bytes(4)))] * 2)
    with pytest.raises(CheckpointError, match="two arrays of one name"):
        read_tensors(tmp_path / "a.npz")


def test_no_more_is_read_than_there_is_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "memory_bytes", lambda: 100)
    for kind in KINDS:
        with pytest.raises(CheckpointError, match="at most 100 can be read here"):
            read_tensors(saved(kind, tmp_path / "weights"))


def test_a_torch_tensor_larger_than_its_record(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "a.pth", {"a": torch.zeros(1).expand(1 << 40)})
    with pytest.raises(CheckpointError, match="in a record of"):
        read_tensors(path)
    path = save_torch(tmp_path / "b.pth", {"a": torch.zeros(1).expand(1 << 40)}, legacy=True)
    with pytest.raises(CheckpointError, match="in a record of"):
        read_tensors(path)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_short_anywhere(kind: str, tmp_path: Path) -> None:
    whole = saved(kind, tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    for length in [*range(0, 24, 3), *range(24, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            read_tensors(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_any_byte_changed_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    whole = saved(kind, tmp_path / "whole").read_bytes()
    path = tmp_path / "changed"
    rng = np.random.default_rng(0)
    for _ in range(200):
        content = bytearray(whole)
        content[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(content)
        complaint = ""
        try:
            read_tensors(path)
        except CheckpointError as error:
            complaint = str(error)
        assert "\n" not in complaint


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "neither weights nor the index"),
        ("{}", "no `weight_map`"),
        ('{"weight_map": {"a": 1}}', "no `weight_map`"),
        ('{"weight_map": {"a": "../secret"}}', "weights beside the index"),
        ('{"weight_map": {"a": "x.index.json"}}', "weights beside the index"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: no such file"),
        ('{"weight_map": {"a": "part-0.safetensors"}}', "not as the index says: "),
        ("{" * 100_000, "neither weights nor the index"),
    ],
)
def test_a_wrong_index(index: str, message: str, tmp_path: Path) -> None:
    path = sharded(tmp_path)
    path.write_text(index)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "no tensors by name"),
        ([torch.zeros(2)], "holds a list, expected a state dict"),
        ({"model": {}}, "no tensors by name"),
        (torch.zeros(2), "holds a Tensor, expected a state dict"),
    ],
)
def test_torch_files_without_a_state_dict(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_tensors(save_torch(tmp_path / "a.pth", content))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.html").write_text("<!DOCTYPE html><html>not found</html>")
    for name, message in (
        ("gone", "no such file"),
        ("pipe", "not a plain file"),
        ("empty", "a folder without weights"),
        ("page.html", "not a weights file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_tensors(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------------- opening


def test_unknown_names_are_listed(tmp_path: Path) -> None:
    for kind in KINDS:
        with pytest.raises(CheckpointError, match=r"4 tensors by names of no layout known here \(0.bias, 0.weight, 1.bias"):
            open_weights(saved(kind, tmp_path / kind))


def fails_with(result: Result, *said: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    for words in said:
        assert words in last, last


def test_the_command_line_refuses_a_hostile_file_in_one_line(tmp_path: Path) -> None:
    HOSTILE["a call in an archive"](tmp_path / "model.pth")
    for command in (("eval", "--dataset", "shapes"), ("finetune", "--dataset", "shapes")):
        fails_with(vit(command[0], "--ckpt", str(tmp_path / "model.pth"), *command[1:], cwd=tmp_path), "posix.system", "safely")
    assert not os.path.exists(MARK)
