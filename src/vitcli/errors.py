"""Every error a user can mend, in one place.

The command line prints such an error as one line (what, where, what was expected, what to do) and exits with `exit_code`;
`--debug` shows the traceback. Anything else that escapes is a defect of ours and keeps its traceback.
"""

import signal

__all__ = ["CheckpointError", "ConfigError", "DataError", "ExampleError", "Interrupted", "RunExistsError", "UserError"]


class UserError(Exception):
    """Something the user can mend; the message is one complete line."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or range, or contradicts another one."""


class DataError(UserError):
    """A data set is missing, unreadable, or does not fit what is asked of it."""


class ExampleError(DataError):
    """One example cannot be read; `position` says which of those asked for."""

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(message, position)
        self.position = position

    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointError(UserError):
    """A checkpoint or weights file is missing, damaged, or belongs to another model."""


class RunExistsError(UserError):
    """The run directory belongs to another config, or another process is writing to it."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; everything worth keeping is saved before this reaches the command line.

    No `Exception`, as KeyboardInterrupt is none: who catches a broken image must not catch this.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.args[0]).name}"
