"""The same work on many pieces, in several processes: results in order, errors as they were raised.

What is worked on reaches each process once; a piece is named by its number alone. A process that is killed, say for want of
memory, is an error and no endless wait.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

from vitcli.errors import UserError

__all__ = ["available_cores", "in_processes"]

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2  # pieces that wait at each process, so that none is idle while a result is fetched


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, jobs: int | None = None
) -> Generator[Result, None, None]:
    """Yield work(task) for every task, in order.

    Args:
        jobs: processes; None takes one for each core, 1 works in this process.

    Raises:
        Exception: what `work` raised, when its turn comes.
        UserError: a process was killed.
    """
    jobs = min(available_cores() if jobs is None else jobs, len(tasks))
    if jobs <= 1:
        for task in tasks:
            yield work(task)
        return
    workers: list[tuple[BaseProcess, Connection]] = []
    held_back = {signal.SIGINT, signal.SIGTERM}
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)  # until the new processes have their own handlers
        try:
            for _ in range(jobs):
                workers.append(start(work, tasks, [connection for _, connection in workers]))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from collect(workers, len(tasks))
    finally:
        for process, connection in workers:
            process.terminate()
            connection.close()
        for process, _ in workers:
            process.join()


def start(work: Callable[[Task], Any], tasks: Sequence[Task], others: Sequence[Connection]) -> tuple[BaseProcess, Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(theirs, [ours, *others], work, tasks), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def serve(connection: Connection, inherited: Sequence[Connection], work: Callable[[Task], Any], tasks: Sequence[Task]) -> None:
    """Answer numbers of pieces with (number, result, error) until the main process closes the line, or is gone."""
    for end in inherited:  # a forked copy would keep the line open when the main process is killed
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends these
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    while True:
        try:
            number = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer: tuple[int, Any, Exception | None] = (number, work(tasks[number]), None)
        except Exception as error:
            error.add_note(f"in a working process: {traceback.format_exc()}")  # what --debug shows
            answer = (number, None, error)
        try:
            connection.send(answer)
        except ConnectionError:
            return


def collect(workers: Sequence[tuple[BaseProcess, Connection]], count: int) -> Generator[Any, None, None]:
    """Hand out the pieces 0 to count - 1 and yield their results in order."""
    processes = {connection: process for process, connection in workers}
    handed_out = 0

    def hand_out(connection: Connection) -> None:
        nonlocal handed_out
        if handed_out < count:
            connection.send(handed_out)
            handed_out += 1

    for _ in range(AHEAD):
        for connection in processes:
            hand_out(connection)
    early: dict[int, tuple[Any, Exception | None]] = {}
    for number in range(count):
        while number not in early:
            for ready in wait(list(processes)):
                connection = cast(Connection, ready)
                try:
                    done, result, error = connection.recv()
                    hand_out(connection)
                except (EOFError, ConnectionError):
                    process = processes[connection]
                    process.join()
                    raise UserError(
                        f"a working process was ended from outside (exit code {process.exitcode}), often for want of memory; "
                        "run the command again, with fewer --jobs"
                    ) from None
                early[done] = (result, error)
        result, error = early.pop(number)
        if error is not None:
            raise error
        yield result
