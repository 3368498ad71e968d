"""Claims on folders: one holder at a time, whoever dies, also where locks do not reach the other machine."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from vitcli.errors import UserError
from vitcli.study import claims
from vitcli.study.claims import Claims, is_claimed


def other_machine() -> Claims:
    taker = Claims()
    taker.machine = "another"
    return taker


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let locks reach nobody, as some file systems do between machines, and a machine be given up after no time."""
    monkeypatch.setattr("vitcli.study.claims.fcntl.flock", lambda descriptor, operation: None)
    monkeypatch.setattr(claims, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(claims, "CONFIRM_SECONDS", 0.0)


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "cell"
    first = Claims().take(folder)
    assert first is not None and is_claimed(folder)
    assert Claims().take(folder) is None
    first.release()
    assert not is_claimed(folder)
    second = Claims().take(folder)
    assert second is not None and second.beat()
    second.release()


def test_what_a_killed_holder_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".holder").write_text(json.dumps({"machine": Claims().machine, "pid": 1}))
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp-half").touch()
    claim = Claims().take(tmp_path)
    assert claim is not None and not (tmp_path / ".tmp-half").exists()
    claim.release()


def test_a_command_that_lives_on_keeps_the_claim(tmp_path: Path) -> None:
    claim = Claims().take(tmp_path)
    assert claim is not None
    with subprocess.Popen(["sleep", "60"], pass_fds=[claim.descriptor]) as process:
        os.close(claim.descriptor)  # as the kernel does for a holder that is killed
        assert Claims().take(tmp_path) is None
        process.kill()
    taken = Claims().take(tmp_path)
    assert taken is not None
    taken.release()


def test_a_release_counts_although_a_command_lives_on(tmp_path: Path) -> None:
    claim = Claims().take(tmp_path)
    assert claim is not None
    with subprocess.Popen(["sleep", "60"], pass_fds=[claim.descriptor]) as process:
        claim.release()
        taken = Claims().take(tmp_path)
        assert taken is not None
        taken.release()
        process.kill()


@pytest.mark.usefixtures("apart")
def test_another_machine_is_believed_while_something_stirs(tmp_path: Path) -> None:
    folder, log = tmp_path / "cell", tmp_path / "log.txt"
    held = Claims().take(folder)
    assert held is not None
    other = other_machine()
    assert other.take(folder, signs=[log]) is None  # the first look
    log.write_text("step 1")  # the holder is dead, what it started trains on
    assert other.take(folder, signs=[log]) is None
    held.last_beat -= claims.BEAT_SECONDS + 1
    time.sleep(0.02)  # file times have a granularity
    assert held.beat()
    assert other.take(folder, signs=[log]) is None
    taken = other.take(folder, signs=[log])  # nothing stirred since
    assert taken is not None
    held.last_beat -= claims.BEAT_SECONDS + 1
    assert not held.beat() and taken.beat()
    held.release()  # which must not give away what is another's now
    assert is_claimed(folder)


def test_silence_is_counted_in_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".holder").write_text(json.dumps({"machine": "another"}))
    now = [1000.0]
    monkeypatch.setattr(claims, "CONFIRM_SECONDS", 0.0)
    monkeypatch.setattr("vitcli.study.claims.time.monotonic", lambda: now[0])
    taker = Claims()
    for seconds in (0, 60, 119):
        now[0] = 1000.0 + seconds
        assert taker.take(tmp_path) is None
    now[0] = 1000.0 + claims.SILENT_SECONDS
    claim = taker.take(tmp_path)
    assert claim is not None
    claim.release()


@pytest.mark.usefixtures("apart")
def test_of_two_that_find_it_free_at_once_one_gets_it(tmp_path: Path) -> None:
    takers = [Claims(), other_machine()]
    found = [taker.take(tmp_path) for taker in takers]
    assert [claim is not None for claim in found] == [True, False]


@pytest.mark.usefixtures("apart")
def test_of_two_that_take_over_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".holder").write_text("of a machine that lost its power")
    takers = [Claims(), other_machine()]
    assert [taker.take(tmp_path) for taker in takers] == [None, None]
    both_there = threading.Barrier(2)
    monkeypatch.setattr("vitcli.study.claims.time.sleep", lambda seconds: both_there.wait(30))
    found: list[object] = []
    threads = [threading.Thread(target=lambda taker=taker: found.append(taker.take(tmp_path))) for taker in takers]
    # both must have found it silent before one writes
    silent = [taker.is_silent(tmp_path, (tmp_path / ".holder").read_bytes(), ()) for taker in takers]
    assert silent == [True, True]
    for taker in takers:
        monkeypatch.setattr(taker, "is_silent", lambda *_: True)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in found) == 1


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be claimed"):
        Claims().take(tmp_path / "file" / "cell")
