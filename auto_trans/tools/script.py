"""What the drop-in scripts share: a parser with their documentation, and errors as one line."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from typing import Callable, Optional

from auto_trans.ending import run_command

__all__ = ["boolean", "run_script", "script_parser"]

_ALLOW_FLAGS = {"allow_extra": "--allow_extra GLOB", "allow_missing": "--allow_missing GLOB"}


def script_parser(name: str, documentation: Optional[str]) -> argparse.ArgumentParser:
    """A parser that shows the script's documentation as it is written."""
    parser = argparse.ArgumentParser(
        prog=name, description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--allow_extra", metavar="GLOB", action="append", default=[],
        help="ours: parameters that every rank may hold whole although no strategy lists them (may be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--allow_missing", metavar="GLOB", action="append", default=[],
        help="ours: weights that the target lists and the source may lack (may be repeated)",
    )  # fmt: skip
    return parser


def boolean(text: str) -> bool:
    """``True`` or ``False`` as a real boolean, for argparse."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return text.lower() == "true"


def run_script(name: str, work: Callable[[], str], flags: Mapping[str, str]) -> int:
    """Does the work of a script and prints its last line.

    Args:
        name: The script, for its errors.
        work: Returns the last line.
        flags: The library's name of a setting -> the script's flag; for messages.

    Returns:
        The exit code, see `auto_trans.ending.run_command`.
    """
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)

    def show() -> int:
        print(work())
        return 0

    return run_command(name, show, {**_ALLOW_FLAGS, **flags})
