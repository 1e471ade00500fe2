"""The command ``auto-trans``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Optional

from auto_trans import __version__
from auto_trans.cli import convert, doctor, inspect, merge_lora, merge_safetensors, merge_strategy, verify
from auto_trans.cli.parsers import empty_argument
from auto_trans.ending import run_command

__all__ = ["main"]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs a subcommand.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code, see `auto_trans.ending.run_command`; argparse exits with 2 on wrong flags.
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
    return run_command("auto-trans", lambda: int(arguments.run(arguments)), arguments.words, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
