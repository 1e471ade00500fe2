"""The command ``auto-trans``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Optional

from auto_trans import __version__
from auto_trans.cli import convert, doctor, inspect, merge_lora, merge_safetensors, merge_strategy, verify

__all__ = ["main"]


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
    arguments = parser.parse_args(argv)
    quiet = getattr(arguments, "quiet", False) or getattr(arguments, "json", False)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING if quiet else logging.INFO)
    from auto_trans.errors import AutoTransError

    try:
        return int(arguments.run(arguments))
    except AutoTransError as e:
        if arguments.debug:
            raise
        sys.stderr.write(f"auto-trans: error: {e}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("auto-trans: interrupted; start it again to go on where it stopped\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
