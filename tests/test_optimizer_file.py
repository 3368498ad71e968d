"""An optimiser's state on disk: every state comes back, nothing hostile is built."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitcli.errors import CheckpointError
from vitcli.optimizer_file import END, read_optimizer, write_optimizer

REFUSED = r"optimizer\.pt: not an optimizer state that loads safely"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "optimizer.pt"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def trained(kind: Any, **settings: Any) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = kind(list(model.named_parameters()), lr=0.1, **settings)
    for _ in range(2):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
    ],
)
def test_states_come_back(path: Path, kind: Any, settings: dict[str, Any]) -> None:
    state = trained(kind, **settings).state_dict()
    write_optimizer(path, state)
    assert same(read_optimizer(path), state)
    assert same(torch.load(path, weights_only=True), state)


def test_tensors_of_every_kind_come_back(path: Path) -> None:
    base = torch.arange(12).reshape(3, 4)
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
    tensors = {str(kind): base.to(kind) for kind in kinds}
    state = {**tensors, "column": base.T, "part": base[1:], "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    write_optimizer(path, {"state": {0: state}, "param_groups": [{"betas": (0.9, 0.99), "none": None, "on": True}]})
    assert same(read_optimizer(path)["state"][0], state)


def test_equal_states_give_equal_bytes(path: Path) -> None:
    """A resumed run's state has other objects in another order than that of one never interrupted."""
    optimizer, resumed = trained(torch.optim.AdamW), trained(torch.optim.AdamW)
    write_optimizer(path, optimizer.state_dict())
    expected = path.read_bytes()
    resumed.load_state_dict(read_optimizer(path))
    write_optimizer(path, resumed.state_dict())
    assert path.read_bytes() == expected
    state = optimizer.state_dict()
    shuffled = {
        "param_groups": [
            dict(reversed({"".join(list(k)): v for k, v in group.items()}.items())) for group in state["param_groups"]
        ],
        "state": OrderedDict(reversed({key: dict(reversed(value.items())) for key, value in state["state"].items()}.items())),
    }
    write_optimizer(path, shuffled)
    assert path.read_bytes() == expected


# ---------------------------------------------------------------- archives that torch would not write


def archive(records: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive of these records with an end like torch's."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in records.items():
            file.writestr(name, content)
    body, end = buffer.getvalue()[:-22], struct.unpack("<4s4H2LH", buffer.getvalue()[-22:])
    count, size, start = end[4], end[5], end[6]
    here = len(body)
    return body + END.pack(
        b"PK\6\6",
        44,
        45,
        45,
        0,
        0,
        count,
        count,
        size,
        start,
        b"PK\6\7",
        0,
        here,
        1,
        b"PK\5\6",
        0,
        0,
        count,
        count,
        size,
        start,
        0,
    )


class Raw:
    """Pickles as the call of a function by name."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Record:
    def __init__(self, key: str, elements: Any, storage: Any = torch.FloatStorage) -> None:
        self.pid = ("storage", storage, key, "cpu", elements)


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Record) else None


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(value)
    return buffer.getvalue()


def tensor(record: Any, offset: Any, size: Any, stride: Any) -> Raw:
    return Raw(torch._utils._rebuild_tensor_v2, record, offset, size, stride, False, OrderedDict())


def with_pickle(content: bytes, **more: bytes) -> bytes:
    records = {
        "archive/data.pkl": content,
        "archive/byteorder": b"little",
        "archive/version": b"3\n",
        "archive/data/0": bytes(16),
    }
    return archive({**records, **more})


def test_the_harness_itself_makes_archives_that_load(path: Path) -> None:
    path.write_bytes(with_pickle(pickled({"w": tensor(Record("0", 4), 0, (4,), (1,))})))
    assert same(read_optimizer(path), {"w": torch.zeros(4)})


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("pwned",))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "code": lambda: with_pickle(pickled({"w": Evil()})),
    "a bytearray of 1 TB": lambda: with_pickle(pickled({"w": Raw(bytearray, 1 << 40)})),
    "a complex": lambda: with_pickle(pickled({"w": 1j})),
    "a record too short": lambda: with_pickle(pickled({"w": tensor(Record("0", 1 << 40), 0, (1 << 40,), (1,))})),
    "no such record": lambda: with_pickle(pickled({"w": tensor(Record("1", 4), 0, (4,), (1,))})),
    "a record that is no name": lambda: with_pickle(pickled({"w": tensor(Record(["0"], 4), 0, (4,), (1,))})),
    "another type of record": lambda: with_pickle(pickled({"w": tensor(Record("0", 4, torch.nn.Linear), 0, (4,), (1,))})),
    "no tensor's record": lambda: with_pickle(pickled({"w": tensor([0.0] * 4, 0, (4,), (1,))})),
    "larger than its record": lambda: with_pickle(pickled({"w": tensor(Record("0", 4), 0, (1 << 40,), (0,))})),
    "beyond its record": lambda: with_pickle(pickled({"w": tensor(Record("0", 4), 3, (4,), (1,))})),
    "a far stride": lambda: with_pickle(pickled({"w": tensor(Record("0", 4), 0, (2,), (1 << 40,))})),
    "before its record": lambda: with_pickle(pickled({"w": tensor(Record("0", 4), -1, (4,), (1,))})),
    "a negative size": lambda: with_pickle(pickled({"w": tensor(Record("0", 4), 0, (-1,), (1,))})),
    "sizes that are no numbers": lambda: with_pickle(pickled({"w": tensor(Record("0", 4), 0, ("a",), (1,))})),
    "sizes without end": lambda: with_pickle(pickled({"w": tensor(Record("0", 4), 0, 3, 3)})),
    "a thousand dimensions": lambda: with_pickle(pickled({"w": tensor(Record("0", 4), 0, (1,) * 1000, (1,) * 1000)})),
    "hooks": lambda: with_pickle(pickled({"w": Raw(torch._utils._rebuild_parameter, 1, True, OrderedDict())})),
    "an attribute": lambda: with_pickle(b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb."),
    "an extension": lambda: with_pickle(b"\x80\x02\x82\x01."),
    "a memo of 16 GB": lambda: with_pickle(b"\x80\x02}r\xff\xff\xff\x7f."),
    "a memo of 16 GB in words": lambda: with_pickle(b"\x80\x02}p2147483647\n."),
    "bytes of 1 EB": lambda: with_pickle(b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"."),
    "a number of 10,000 digits": lambda: with_pickle(b"\x80\x02I" + b"9" * 10_000 + b"\n."),
    "a pickle cut short": lambda: with_pickle(pickled({"w": 1})[:-3]),
    "an empty pickle": lambda: with_pickle(b""),
    "no dict": lambda: with_pickle(pickled([1, 2])),
    "no pickle": lambda: archive({"archive/data/0": bytes(16)}),
    "a TorchScript archive": lambda: with_pickle(pickled({}), **{"archive/constants.pkl": pickled(())}),
    "a path out of it": lambda: with_pickle(pickled({}), **{"archive/../../x": b""}),
    "a record inflated": lambda: archive({"archive/data.pkl": pickled({}), "archive/data/0": bytes(1 << 20)}, compression=8),
    "a pickle of 9 MB": lambda: with_pickle(pickled({"w": "x" * (9 << 20)})),
    "something before it": lambda: b"\0" * 64 + with_pickle(pickled({})),
    "something after it": lambda: with_pickle(pickled({})) + b"\0",
    "a zip of somebody's": lambda: zipped({"archive/data.pkl": pickled({})}),
    "two directories": lambda: two_directories(),
    "nothing": lambda: b"",
    "zeros": lambda: bytes(1000),
    "a bare pickle": lambda: pickle.dumps({"w": Evil()}),
}  # fmt: skip


def zipped(records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in records.items():
            file.writestr(name, content)
    return buffer.getvalue()


def two_directories() -> bytes:
    """Return an archive that Python reads as harmless and a reader of absolute offsets as hostile."""
    hostile, harmless = with_pickle(pickled({"w": Raw(bytearray, 1 << 40)})), with_pickle(pickled({}))
    end = list(END.unpack(harmless[-END.size :]))
    end[12] = len(hostile) - END.size  # the locator points to the other one
    return hostile + harmless[: -END.size] + END.pack(*end)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    path.write_bytes(HOSTILE[name]())
    with pytest.raises(CheckpointError, match=REFUSED) as caught:
        read_optimizer(path)
    assert "\n" not in str(caught.value)
    assert [item.name for item in path.parent.iterdir()] == ["optimizer.pt"]


@pytest.mark.parametrize(
    "name", ["a bytearray of 1 TB", "larger than its record", "a far stride", "a record too short", "a memo of 16 GB"]
)
def test_refused_before_torch_reads_it(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(HOSTILE[name]())

    def never(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(CheckpointError, match=REFUSED):
        read_optimizer(path)


def test_two_records_of_one_name(path: Path) -> None:
    twice = with_pickle(pickled({"w": 1})).replace(b"archive/version", b"archive/data/0\0"[:15])
    path.write_bytes(twice)
    with pytest.raises(CheckpointError, match=REFUSED):
        read_optimizer(path)


def test_any_cut_and_any_flipped_bit_gives_a_state_or_our_error(path: Path) -> None:
    write_optimizer(path, trained(torch.optim.SGD, momentum=0.9).state_dict())
    content = path.read_bytes()
    for position in range(0, len(content), 13):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        for hurt in (bytes(changed), content[:position]):
            path.write_bytes(hurt)
            with suppress(CheckpointError):
                assert isinstance(read_optimizer(path), dict)


def test_a_missing_file_is_the_systems_to_report(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_optimizer(path)
