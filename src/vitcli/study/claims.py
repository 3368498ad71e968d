"""Who works on what, in folders that any number of processes on any number of machines share.

A claim is a lock on a folder's `.lock`. The kernel takes it back from a process that dies, however it dies, unless a command
that it started lives on: that one inherits the lock, so its folder stays taken until it has ended too. Some file systems keep
such locks on each machine apart and do not say so. Therefore `.holder` says who has the claim, and whoever has it touches that
file time and again: another machine believes it until nothing there has stirred for minutes.
"""

import fcntl
import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vitcli.errors import UserError

__all__ = ["Claim", "Claims", "is_claimed"]

BEAT_SECONDS = 15.0
SILENT_SECONDS = 180.0  # longer than network file systems may show an old time: attributes are cached for a minute there
CONFIRM_SECONDS = 2.0
LOCK, HOLDER = ".lock", ".holder"

Signs = tuple[tuple[int, int] | None, ...]  # size and time of files that stir while somebody works


class Claim:
    """A folder that nobody else works in until it is released."""

    def __init__(self, folder: Path, descriptor: int, note: bytes) -> None:
        self.folder = folder
        self.descriptor = descriptor  # of the lock, for a command to inherit
        self.note = note
        self.last_beat = time.monotonic()

    def beat(self) -> bool:
        """Show now and then that somebody is at work, and tell whether the claim still holds.

        It is lost only where locks do not reach other machines and this process slept for minutes (a suspended laptop).
        """
        if time.monotonic() - self.last_beat < BEAT_SECONDS:
            return True
        self.last_beat = time.monotonic()
        path = self.folder / HOLDER
        try:
            os.utime(path)
            return path.read_bytes() == self.note
        except FileNotFoundError:
            return False
        except OSError:  # such as a file server that is away for a moment: nothing is known
            return True

    def release(self) -> None:
        """Let others have the folder."""
        path = self.folder / HOLDER
        with suppress(OSError):
            if path.read_bytes() == self.note:
                path.unlink()
        with suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # closing would not do while a process that inherited it is there
        os.close(self.descriptor)


class Claims:
    """Takes folders for this process, and remembers for how long others have been silent."""

    def __init__(self) -> None:
        self.machine = machine_id()
        self.seen: dict[Path, tuple[tuple[bytes, Signs], float]] = {}

    def take(self, folder: Path, *, signs: Sequence[Path] = ()) -> Claim | None:
        """Claim a folder, which is made if it is missing; None while somebody else has it.

        Args:
            signs: files that grow while somebody works in the folder.

        Raises:
            UserError: it cannot be made or written, or the file system has no locks.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritable(folder, error) from error
        claim = None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claim = self.sign(folder, descriptor, signs)
        except BlockingIOError:
            pass
        except OSError as error:
            raise unwritable(folder, error) from error
        finally:
            if claim is None:
                os.close(descriptor)
        if claim is not None:
            for leftover in folder.glob(".tmp-*"):  # of a process killed while it wrote
                with suppress(OSError):
                    leftover.unlink()
        return claim

    def sign(self, folder: Path, descriptor: int, signs: Sequence[Path]) -> Claim | None:
        """Write down who holds the lock, unless a process on another machine seems to."""
        path = folder / HOLDER
        own = {"machine": self.machine, "name": os.uname().nodename, "pid": os.getpid(), "since": time.time_ns()}
        note = json.dumps(own).encode()
        try:
            there = path.read_bytes()
        except FileNotFoundError:
            if not create(path, note):
                return None
            return Claim(folder, descriptor, note)
        foreign = machine_of(there) != self.machine
        if foreign and not self.is_silent(folder, there, signs):
            return None
        try:
            replace(path, note)
        except FileNotFoundError:  # who got it meanwhile took the half-written note for a leftover
            return None
        self.seen.pop(folder, None)
        if foreign:  # two may have found it silent at once, on machines whose locks do not meet: the last note counts
            time.sleep(CONFIRM_SECONDS)
            if path.read_bytes() != note:
                return None
        return Claim(folder, descriptor, note)

    def is_silent(self, folder: Path, note: bytes, signs: Sequence[Path]) -> bool:
        """Tell whether nothing has stirred since this process first looked, minutes ago; clocks of two machines never meet."""
        state = note, tuple(stamp(path) for path in (folder / HOLDER, *signs))
        before, since = self.seen.get(folder, (None, 0.0))
        if before != state:
            self.seen[folder] = state, time.monotonic()
            return False
        return time.monotonic() - since >= SILENT_SECONDS


def create(path: Path, content: bytes) -> bool:
    """Write a new file; False if there is one, which only one of several processes on several machines gets around."""
    try:
        file = open(path, "xb")  # noqa: SIM115 (closed below, where a failure to write is looked after)
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def replace(path: Path, content: bytes) -> None:
    """Write a file anew, so that a reader finds the old content or all of the new."""
    beside = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")  # containers may share host names and process numbers
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def machine_id() -> str:
    """Name this machine until it is started again: within it, locks can be relied on."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.uname().nodename


def machine_of(note: bytes) -> str | None:
    """Return the machine that a note names; None if it cannot be read."""
    try:
        return str(json.loads(note)["machine"])
    except (ValueError, KeyError, TypeError):
        return None


def stamp(path: Path) -> tuple[int, int] | None:
    """Return size and time of a file, or None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: cannot be claimed ({error.strerror}); it takes a place with room to write, on a file system with locks"
    )


def is_claimed(folder: Path) -> bool:
    """Tell whether somebody says that he works in a folder; one who was killed there may have left the note behind."""
    return (folder / HOLDER).exists()
