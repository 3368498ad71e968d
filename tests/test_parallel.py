"""Work in processes: in order, errors as raised, no endless wait for a process that is gone."""

import os
import signal
import time

import pytest

from vitcli.data.parallel import in_processes
from vitcli.errors import DataError, UserError


def slow_square(number: int) -> int:
    time.sleep(0.02 if number % 3 == 0 else 0.0)
    return number * number


def refuse_five(number: int) -> int:
    if number == 5:
        raise DataError("five: not wanted")
    return number


def die_at_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_come_in_order(jobs: int) -> None:
    assert list(in_processes(slow_square, range(20), jobs=jobs)) == [n * n for n in range(20)]
    assert list(in_processes(slow_square, [], jobs=jobs)) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_is_raised_when_its_turn_comes(jobs: int) -> None:
    results = in_processes(refuse_five, range(9), jobs=jobs)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="^five: not wanted"):
        next(results)


def test_a_killed_process_is_an_error() -> None:
    with pytest.raises(UserError, match="ended from outside"):
        list(in_processes(die_at_two, range(8), jobs=2))


def test_the_processes_end_with_the_iterator() -> None:
    pids = in_processes(lambda number: os.getpid(), range(100), jobs=2)
    seen = {next(pids) for _ in range(10)}
    assert os.getpid() not in seen
    pids.close()
    for pid in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
