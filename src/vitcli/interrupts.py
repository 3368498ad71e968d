"""SIGINT and SIGTERM as an exception that arrives where nothing can be lost.

Outside `deferred()` a signal raises `Interrupted` at once. Inside it is remembered, and raised when the training loop asks,
between two steps; a second signal then changes nothing, because what is under way is the saving.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vitcli.errors import Interrupted

__all__ = ["StopSignals"]


class StopSignals:
    """Remembers the first SIGINT or SIGTERM of a training run."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.defer = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Raise at once, or remember the signal."""
        del frame
        self.received = self.received or signum
        if not self.defer:
            raise Interrupted(signum)

    def pending(self) -> Interrupted | None:
        """Return what `check` would raise."""
        return None if self.received is None else Interrupted(self.received)

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if (interrupted := self.pending()) is not None:
            raise interrupted

    @contextmanager
    def installed(self) -> Iterator["StopSignals"]:
        """Handle both signals inside the block, and restore the handlers that stood before."""
        before = {signum: signal.signal(signum, self.handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold signals back until `check` is called or the block ends."""
        self.defer = True
        try:
            yield
        finally:
            self.defer = False
        self.check()
