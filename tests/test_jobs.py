"""Running commands side by side: places for them, and why one failed."""

from pathlib import Path

import pytest
import torch

from vitcli.jobs import begin, is_held, reason_of, slots_of
from vitcli.rundir import lock_run


def test_why_a_process_ended(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("vit: of an earlier attempt\nTraceback ...\nMemoryError\n")
    assert reason_of(1, log, log.read_text().index("Traceback")) == "MemoryError"
    assert reason_of(2, log, 0) == "of an earlier attempt"
    assert "SIGKILL" in reason_of(-9, log, 0) and "memory" in reason_of(-9, log, 0)


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert slots_of(None, torch.device("cpu")) == [{}]
    assert [set(slot) for slot in slots_of(2, torch.device("cpu"))] == [{"OMP_NUM_THREADS"}] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_of(None, torch.device("cuda"))] == ["4", "6"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_of(3, torch.device("cuda"))] == ["4", "6", "4"]


def test_only_a_living_writer_holds_a_folder(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "none")
    with lock_run(tmp_path):
        assert is_held(tmp_path)
    assert (tmp_path / ".lock").exists() and not is_held(tmp_path)


def test_what_is_printed_goes_to_two_places(tmp_path: Path) -> None:
    log, output = tmp_path / "logs" / "log.txt", tmp_path / "output"
    output.write_text("of an earlier attempt, cut off by a kill")
    for words, wanted in (("echo $WORD >&2; echo out", output), ("echo out; exit 3", None)):
        child = begin(["sh", "-c", words], log, environment={"WORD": "vit: no"}, output=wanted)
        child.process.wait()
    assert output.read_text() == "out\n" and log.read_text() == "vit: no\nout\n"
    assert child.process.returncode == 3 and child.reason() == "out"  # not what an earlier one printed
