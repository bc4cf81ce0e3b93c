"""The mistakes a person can make, each with the exit code that a shell sees. Importing this costs nothing."""

from __future__ import annotations

INTERRUPTED = 130
"""The exit code of what was told to stop: 128 + SIGINT, as shells count."""


class ShoalError(Exception):
    """Base of all errors shown to a person as one sentence, without a traceback.

    The message names the key or file, its value and the remedy. ``exit_code`` is the process's.
    """

    exit_code = 1


class UsageError(ShoalError):
    """The command line itself is wrong."""

    exit_code = 2


class InvalidInput(ShoalError):
    """A recipe, a file or a value that cannot be used."""

    exit_code = 3


class ClusterRefused(ShoalError):
    """Ray, the cluster or an API did not do what was asked."""

    exit_code = 4


class NotFound(ShoalError):
    """A run, a recipe, a file or a checkpoint that does not exist."""

    exit_code = 5


class TimedOut(ShoalError):
    """What was waited for did not come about in the time given."""

    exit_code = 124


class TrainingFailed(ShoalError):
    """Training stopped by itself: numbers that are not finite, or too many failures in a row."""

    exit_code = 1


def last_line(error: Exception | str) -> str:
    """What an error or a traceback comes down to: its last line, up to 300 characters, without a full stop. Of an error
    of CUDA the line that names it, since PyTorch puts advice for developers below."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if "CUDA error: " in line] or lines
    if lines:
        return lines[-1][:300].rstrip(".")
    return "no reason given" if isinstance(error, str) else type(error).__name__
