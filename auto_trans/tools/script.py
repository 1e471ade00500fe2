"""What the drop-in scripts share: a parser with their documentation, and errors as one line."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Callable, Optional

from auto_trans.errors import AutoTransError

__all__ = ["boolean", "run_script", "script_parser"]


def script_parser(name: str, documentation: Optional[str]) -> argparse.ArgumentParser:
    """A parser that shows the script's documentation as it is written."""
    return argparse.ArgumentParser(
        prog=name, description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def boolean(text: str) -> bool:
    """``True`` or ``False`` as a real boolean, for argparse."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return text.lower() == "true"


def run_script(name: str, work: Callable[[], str]) -> int:
    """Does the work of a script and prints its last line.

    Args:
        name: The script, for its errors.
        work: Returns the last line.

    Returns:
        The exit code: 0 done, 1 failed with an error in one line.
    """
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    try:
        print(work())
    except AutoTransError as e:
        sys.stderr.write(f"{name}: error: {e}\n")
        return 1
    return 0
