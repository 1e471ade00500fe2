"""The command ``auto-trans``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Optional

from auto_trans import __version__
from auto_trans.cli import convert, doctor, inspect, merge_lora, merge_safetensors, merge_strategy, verify
from auto_trans.cli.parsers import empty_argument

__all__ = ["main"]

_RESUME = "start it again to go on where it stopped"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs a subcommand.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code: 0 done, 1 failed; argparse exits with 2 on wrong usage.
    """
    parser = argparse.ArgumentParser(
        prog="auto-trans", description="Converts MindSpore checkpoints from one parallel strategy to another."
    )
    parser.add_argument("--version", action="version", version=f"auto-trans {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (convert, inspect, verify, merge_strategy, merge_lora, merge_safetensors, doctor):
        command.add_parser(subparsers)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    empty = empty_argument(argv)
    if empty:
        arguments.parser.error(f"{empty} is empty: is a variable of the shell not set?")
    quiet = getattr(arguments, "quiet", False) or getattr(arguments, "json", False)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING if quiet else logging.INFO)
    from auto_trans.errors import AutoTransError

    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except AutoTransError as e:
        e.told_by(arguments.words)
        if arguments.debug:
            raise
        sys.stderr.write(f"auto-trans: error: {e}\n")
        return 1
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except _Terminated:
        sys.stderr.write(f"auto-trans: terminated; {_RESUME}\n")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        sys.stderr.write(f"auto-trans: interrupted; {_RESUME}\n")
        # a shell ends its loop only if the command dies by the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 128 + signal.SIGINT


class _Terminated(BaseException):
    """SIGTERM was received; not an Exception, so that nothing takes it for a failure."""


def _terminate(*_: object) -> None:
    raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
