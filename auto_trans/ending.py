"""How a command ends: its exit code, errors in one line, and signals."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import Callable

from auto_trans.errors import AutoTransError

__all__ = ["run_command"]

_RESUME = "start it again to go on where it stopped"


class _Terminated(BaseException):
    """SIGTERM was received; not an Exception, so that nothing takes it for a failure."""


def run_command(name: str, work: Callable[[], int], words: Mapping[str, str], *, debug: bool = False) -> int:
    """Runs a command to its end.

    Args:
        name: The command, for its errors.
        work: Does it; returns the exit code.
        words: The library's name of a setting -> what the user calls it.
        debug: Show the traceback of an error.

    Returns:
        The exit code: that of the work, 1 for an error told in one line, 143 for SIGTERM, 141 where nobody reads the output.
        An interrupt ends the process by its signal, for a shell ends its loop only then.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = work()
        sys.stdout.flush()
        return code
    except AutoTransError as e:
        e.told_by(words)
        if debug:
            raise
        sys.stderr.write(f"{name}: error: {e}\n")
        return 1
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except _Terminated:
        sys.stderr.write(f"{name}: terminated; {_RESUME}\n")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted; {_RESUME}\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 128 + signal.SIGINT


def _terminate(*_: object) -> None:
    raise _Terminated
