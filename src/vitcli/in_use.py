"""Who reads a checkpoint just now, so that nobody deletes it meanwhile.

A reader of ours holds a shared lock on its files. A foreign one (cp, rsync, another program) does not, but it has one of them
open, and Linux tells so: a write lease is granted only on a file that nobody else has open. Where the file system or the owner
of the files lets no lease be taken, the locks alone count.
"""

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

__all__ = ["held", "unread"]


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Keep the directory that holds `file` from being deleted inside the block; raises OSError if it cannot be opened."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe of that name must not stop us
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        release(descriptor)


@contextmanager
def unread(directory: Path) -> Iterator[Callable[[], bool]]:
    """Look whether anybody reads a file in `directory`; the yielded function says whether nobody did so far.

    Who opens one of the files inside the block waits for its end (the kernel gives up on us after 45 seconds), and is noticed.
    Raises OSError if the directory cannot be read.
    """
    alone = True
    leased: list[int] = []
    with ExitStack() as stack:
        for file in sorted(directory.iterdir()):
            if not stat.S_ISREG(file.lstat().st_mode):
                continue
            try:
                descriptor = open_for_lock(file)
            except OSError:
                continue  # nobody's file, or not ours to read; deleting it will tell
            stack.callback(release, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                alone = False
                break
            except OSError:  # a file system without locks
                pass
            try:
                # Who opens the file makes the kernel signal us; SIGIO, the usual one, would end the process.
                fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                leased.append(descriptor)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    alone = False
                    break
        yield lambda: alone and all(fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_WRLCK for descriptor in leased)


def open_for_lock(file: Path) -> int:
    """Open a file for an exclusive lock, to which network file systems want the right to write."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        return os.open(file, os.O_RDWR | flags)
    except OSError:
        return os.open(file, os.O_RDONLY | flags)


def release(descriptor: int) -> None:
    """Give up lease and lock and close. Closing alone would not do: a loader process forked meanwhile shares the open file."""
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
