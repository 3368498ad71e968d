"""Saving beside the training: what is written is what was there, nothing is lost, and errors arrive."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitcli import saving
from vitcli.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vitcli.errors import CheckpointError
from vitcli.retention import Keep
from vitcli.saving import AsyncSaver, copy_to_cpu

MANIFEST = {
    "model": {},
    "classes": ["a"],
    "preprocessing": {"image_size": (8, 8)},
    "source": "digits",
    "seed": 0,
}


def state_of(value: float) -> dict[str, Any]:
    weights = {"w": torch.full((3, 4), value), "b": torch.full((4,), value).bfloat16()}
    moments = {0: {"step": torch.tensor(value), "exp_avg": torch.full((3, 4), value)}}
    return {
        "model_state": weights,
        "ema_state": {name: tensor / 2 for name, tensor in weights.items()},
        "optimizer_state": {"state": moments, "param_groups": [{"lr": value, "betas": (0.9, 0.99), "params": [0]}]},
        "manifest": MANIFEST,
        "extra": {"scale": value},
    }


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Gate:
    """Holds the writing thread until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def save_checkpoint(self, *arguments: Any, **settings: Any) -> Path:
        self.reached.set()
        assert self.opened.wait(60)
        return save_checkpoint(*arguments, **settings)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(saving, "save_checkpoint", made.save_checkpoint)
    yield made
    made.opened.set()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path: Path, said: list[str]) -> Iterator[AsyncSaver]:
    made = AsyncSaver(tmp_path / "checkpoints", keep=Keep(last=2), say=said.append)
    yield made
    made.thread.shutdown()


def test_the_bytes_are_those_of_save_checkpoint(tmp_path: Path, saver: AsyncSaver) -> None:
    saver.save(step=7, **state_of(1.5))
    saver.close()
    save_checkpoint(tmp_path / "plain", step=7, **state_of(1.5))
    assert content_of(tmp_path / "checkpoints") == content_of(tmp_path / "plain")


def test_training_goes_on_and_changes_nothing_of_it(tmp_path: Path, saver: AsyncSaver, gate: Gate) -> None:
    state = state_of(1.0)
    saver.save(step=1, **state)  # returns although nothing is written yet
    assert gate.reached.wait(60)
    for tensor in (
        *state["model_state"].values(),
        *state["ema_state"].values(),
        *state["optimizer_state"]["state"][0].values(),
    ):
        tensor.fill_(9.0)
    state["optimizer_state"]["param_groups"][0]["lr"] = 9.0
    state["extra"]["scale"] = 9.0
    saver.check()
    assert names(tmp_path) == []
    gate.opened.set()
    saver.wait()
    loaded = load_checkpoint(tmp_path / "checkpoints" / "step_00000001")
    assert loaded.ema_state is not None
    assert torch.equal(loaded.model_state["w"], torch.ones(3, 4))
    assert torch.equal(loaded.ema_state["b"], torch.full((4,), 0.5).bfloat16())
    assert loaded.optimizer_state["state"][0]["step"] == 1.0
    assert loaded.optimizer_state["param_groups"][0]["lr"] == 1.0
    assert loaded.extra == {"scale": 1.0}


def test_one_at_a_time_and_every_one(tmp_path: Path, saver: AsyncSaver, gate: Gate) -> None:
    saver.save(step=1, **state_of(1.0))
    assert gate.reached.wait(60)
    threading.Timer(0.2, gate.opened.set).start()
    saver.save(step=2, **state_of(2.0))  # waits for the first
    assert (tmp_path / "checkpoints" / "step_00000001").is_dir()
    for step in range(3, 8):
        saver.save(step=step, **state_of(float(step)))
    saver.close()
    assert names(tmp_path / "checkpoints") == ["step_00000006", "step_00000007"]
    assert load_checkpoint(tmp_path / "checkpoints" / "step_00000007").extra == {"scale": 7.0}


def test_leaving_the_block_waits(tmp_path: Path, gate: Gate) -> None:
    with AsyncSaver(tmp_path, keep=Keep(), say=str) as saver:
        saver.save(step=1, **state_of(1.0))
        threading.Timer(0.1, gate.opened.set).start()
    assert names(tmp_path) == ["step_00000001"]
    saver.close()


def test_scores_and_further_steps_reach_the_pruning(tmp_path: Path) -> None:
    with AsyncSaver(tmp_path, keep=Keep(last=1, best=1, every_steps=4), say=str) as saver:
        for step in range(1, 9):
            scores = {done: -abs(done - 3.0) for done in range(1, step)}
            saver.save(step=step, scores=scores, also_keep={6}, **state_of(1.0))
    assert names(tmp_path) == [f"step_{step:08d}" for step in (3, 4, 6, 8)]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("call", ["save", "check", "wait", "close", "leave"])
def test_an_error_arrives_at_the_next_call_once(
    tmp_path: Path, saver: AsyncSaver, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        saver.save(step=1, **state_of(1.0))
        assert saver.writing is not None
        saver.writing.exception(60)
    calls = {
        "save": lambda: saver.save(step=2, **state_of(1.0)),
        "check": saver.check,
        "wait": saver.wait,
        "close": saver.close,
        "leave": lambda: saver.__exit__(None, None, None),
    }
    with pytest.raises(CheckpointError, match=r"step_00000001: cannot save .*No space left on device"):
        calls[call]()
    assert names(tmp_path / "checkpoints") == []
    saver.wait()
    if call not in ("close", "leave"):
        saver.save(step=3, **state_of(1.0))
    saver.close()


def test_a_defect_of_ours_arrives_too(saver: AsyncSaver) -> None:
    saver.save(step=1, **{**state_of(1.0), "manifest": {}})
    with pytest.raises(ValueError, match="model"):
        saver.close()


def test_ctrl_c_stops_the_waiting_and_not_the_writing(tmp_path: Path, saver: AsyncSaver, gate: Gate) -> None:
    saver.save(step=1, **state_of(1.0))
    assert gate.reached.wait(60)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            saver.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(tmp_path) == []
    gate.opened.set()
    saver.close()
    load_checkpoint(tmp_path / "checkpoints" / "step_00000001")


def test_what_the_thread_has_to_say_is_said_here_and_once(tmp_path: Path, said: list[str]) -> None:
    where: list[threading.Thread] = []

    def say(text: str) -> None:
        said.append(text)
        where.append(threading.current_thread())

    with AsyncSaver(tmp_path, keep=Keep(last=1), say=say) as saver:
        saver.save(step=1, **state_of(1.0))
        saver.wait()
        with open(tmp_path / "step_00000001" / "model.safetensors"):
            for step in (2, 3):
                saver.save(step=step, **state_of(1.0))
                saver.wait()
            assert said == [f"{tmp_path / 'step_00000001'} is being read: kept until nobody does"]
        saver.save(step=4, **state_of(1.0))
    assert len(said) == 1
    assert where == [threading.main_thread()]
    assert names(tmp_path) == ["step_00000004"]


# ---------------------------------------------------------------- the copy


def test_the_copy_shares_no_memory() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    value = {"a": base, "b": [base.T, (base[1:], 3, "x", None)], "p": nn.Parameter(base), 4: {"c": torch.tensor(True)}}
    copied = copy_to_cpu(value)
    assert torch.equal(copied["b"][0], base.T)
    assert type(copied["b"][1]) is tuple
    assert copied["b"][1][1:] == (3, "x", None)
    assert not copied["p"].requires_grad
    tensors = [copied["a"], copied["b"][0], copied["b"][1][0], copied["p"], copied[4]["c"]]
    assert len({tensor.data_ptr() for tensor in tensors} | {base.data_ptr()}) == len(tensors) + 1


def test_tensors_that_are_given_away_are_not_copied(saver: AsyncSaver, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(value: Any) -> Any:
        raise AssertionError("copied")

    monkeypatch.setattr(saving, "copy_to_cpu", never)
    saver.save(step=1, owned=True, **state_of(1.0))
    saver.close()


@pytest.mark.gpu
def test_the_copy_of_a_gpus_tensors() -> None:
    value = [torch.randn(1000, 1000, device="cuda") for _ in range(8)]
    expected = [tensor.cpu() for tensor in value]
    copied = copy_to_cpu({"state": value})["state"]
    for tensor in value:
        tensor.zero_()
    assert all(tensor.is_pinned() for tensor in copied)
    assert all(torch.equal(*pair) for pair in zip(copied, expected))


def test_a_killed_save_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writing dies between the last write and the rename, as by SIGKILL: the checkpoint before it is the newest."""
    with AsyncSaver(tmp_path / "checkpoints", keep=Keep(), say=str) as saver:
        saver.save(step=1, **state_of(1.0))
        saver.wait()
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(os, "rename", lambda *paths: os._exit(9))
            save_checkpoint(tmp_path / "checkpoints", step=2, **state_of(2.0))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert len(names(tmp_path / "checkpoints")) == 2
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000001"
        saver.save(step=2, **state_of(2.0))
    assert names(tmp_path / "checkpoints") == ["step_00000001", "step_00000002"]
