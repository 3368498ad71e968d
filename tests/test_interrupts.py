"""Signals become an exception, at once or where the loop asks."""

import os
import pickle
import signal

import pytest

from vitcli.errors import Interrupted
from vitcli.interrupts import StopSignals


def test_outside_deferred_a_signal_raises_at_once() -> None:
    with pytest.raises(Interrupted) as caught, StopSignals().installed():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_inside_deferred_it_waits_and_a_second_one_changes_nothing() -> None:
    stop, reached = StopSignals(), []
    with pytest.raises(Interrupted) as caught, stop.installed(), stop.deferred():  # noqa: PT012 (the order is the point)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("saved")
        stop.check()
        reached.append("not here")
    assert reached == ["saved"]
    assert caught.value.exit_code == 130


def test_a_signal_at_the_end_of_the_block_is_not_lost() -> None:
    stop = StopSignals()
    with pytest.raises(Interrupted), stop.installed(), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals().installed():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_nobody_who_catches_a_broken_image_catches_a_signal() -> None:
    def reader() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            raise AssertionError("swallowed") from error

    with pytest.raises(Interrupted), StopSignals().installed():
        reader()
    assert pickle.loads(pickle.dumps(Interrupted(15))).exit_code == 143
