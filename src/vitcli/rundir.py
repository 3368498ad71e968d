"""The run directory: one process writes it at a time, and its small files are always whole.

`config.yaml`, `manifest.json` and `summary.json` are written beside their final names, flushed and renamed. The manifest says
what made the numbers: command, versions, git revision, hardware, data fingerprint.
"""

import fcntl
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from vitcli.config_file import flatten
from vitcli.errors import RunExistsError, UserError

__all__ = [
    "lock_run",
    "write_bytes",
    "write_text",
    "write_json",
    "read_json",
    "build_manifest",
    "git_revision",
    "differing_keys",
    "without_places",
]

LOCK_NAME = ".lock"
MOST_JSON_BYTES = 64 << 20


# ---------------------------------------------------------------- one writer


class RunLock:
    """An open, locked file; gone with the process, however it dies."""

    def __init__(self, path: Path) -> None:
        self.descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        # A forked loader process shares the open file and would hold the lock for seconds after its parent was killed,
        # just when the user starts the run again; closing the copy in the child leaves the parent's lock as it is.
        os.register_at_fork(after_in_child=self.close)

    def close(self) -> None:
        """Let go; a second call does nothing."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Make `run_dir` if it is missing and keep every other process from writing to it inside the block.

    Raises:
        RunExistsError: another process holds it.
        UserError: the directory cannot be made or written.
    """
    path = run_dir / LOCK_NAME
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written ({error.strerror}); choose another run directory with --out") from error
    assert lock.descriptor is not None
    try:
        try:
            fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock.descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise RunExistsError(
                f"{run_dir}: another process (pid {holder}) is writing to this run; wait for it, stop it, or choose another "
                "run directory with --out"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: this file system cannot lock files ({error.strerror}); choose --out elsewhere") from error
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, f"{os.getpid()}\n".encode(), 0)
        for leftover in run_dir.glob(".tmp-*"):  # of a process killed while it wrote
            with suppress(OSError):  # a read-only directory, or a stranger's: the first file written will tell
                leftover.unlink()
        yield
    finally:
        lock.close()


# ---------------------------------------------------------------- whole files


def write_text(path: Path, text: str) -> None:
    """Write text, in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` into `path` so that a reader, or a kill at any moment, finds the old content or all of the new.

    Raises:
        UserError: the disk is full or not writable; the old content is as it was.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space or choose another place") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as `write_text` does; numbers must be finite."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object, or None where there is no such file.

    Raises:
        RunExistsError: the file cannot be read, or is not a JSON object of reasonable size.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_JSON_BYTES:  # a pipe would keep us waiting
            raise RunExistsError(f"{path}: not a file of ours; mend or delete it, or choose --out elsewhere")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunExistsError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise RunExistsError(f"{path}: not JSON ({error}); mend or delete it, or choose --out elsewhere") from None
    if not isinstance(value, dict):
        raise RunExistsError(f"{path}: expected a JSON object; mend or delete it, or choose --out elsewhere")
    return value


# ---------------------------------------------------------------- what made the numbers


def build_manifest(*, hardware: str, data: Mapping[str, Any], command: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what a reader needs to repeat a run, as JSON values.

    Args:
        hardware: the device in words (`device.hardware`).
        data: what was read: name, split sizes and fingerprint of each set.
        command: argv; by default this process's.
    """
    return {
        "command": list(sys.argv if command is None else command),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": sys.version.split()[0],
            **{package: installed_version(package) for package in ("torch", "torchvision", "vitcli")},
        },
        "git_revision": git_revision(Path(__file__)),
        "hardware": {"device": hardware, "cpu_cores": len(os.sched_getaffinity(0)), "machine": os.uname().machine},
        "data": dict(data),
    }


def installed_version(package: str) -> str | None:
    """Return a package's version, or None where it is used without being installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision(file: Path) -> str | None:
    """Return the commit that `file` is checked out from, with "-dirty" after local changes; None outside git.

    An installed copy inside somebody else's repository is not tracked there, so it has no revision.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", str(file.parent)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ---------------------------------------------------------------- comparing configs


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys, sorted, whose values differ; a key that one side lacks differs, even from None.

    Both sides should be JSON values. Tuples equal lists, and 1 equals 1.0, but True does not equal 1.
    """
    flat_a, flat_b = flatten(a), flatten(b)
    absent = object()

    def text(value: Any) -> str:
        if value is absent:
            return "absent"
        whole = isinstance(value, float) and value.is_integer()
        return json.dumps(int(value) if whole else value, sort_keys=True, default=str)

    return sorted(
        key for key in flat_a.keys() | flat_b.keys() if text(flat_a.get(key, absent)) != text(flat_b.get(key, absent))
    )


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a run whose data sets are named without the folder they lie in, so that moved data stays the same.

    Of `folder:` and `shards:` the last part of the place remains. It names a set and proves nothing: whoever goes on with
    moved data compares fingerprints.
    """

    def name_of(spec: Any) -> Any:
        kind, _, place = spec.partition(":") if isinstance(spec, str) else ("", "", "")
        return f"{kind}:{PurePosixPath(place).name}" if kind in ("folder", "shards") else spec

    data = settings.get("data")
    if not isinstance(data, Mapping):
        return dict(settings)
    named = {key: name_of(data[key]) for key in ("source", "val_source") if key in data}
    return {**settings, "data": {**data, **named}}
