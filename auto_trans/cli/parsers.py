"""What the parsers of the subcommands share."""

from __future__ import annotations

import argparse
from typing import Any, Callable

__all__ = ["FLAGS", "add_allowed", "add_command"]

# The library's name of a setting -> what the command line calls it; for messages.
FLAGS = {
    "src": "SRC",
    "dst": "DST",
    "src_strategy": "--src-strategy",
    "dst_strategy": "--dst-strategy",
    "allow_extra": "--allow-extra GLOB",
    "allow_missing": "--allow-missing GLOB",
    "ranks": "--ranks",
    "step": "--step",
    "prefix": "--prefix",
    "format": "--format",
    "engine": "--engine",
    "processes": "--processes",
    "memory_limit": "--memory",
    "scaling": "--scaling",
    "max_shard_size": "--max-shard-size",
}


def add_command(
    subparsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Adds a subcommand.

    Args:
        subparsers: Of the main parser.
        name: Name of the subcommand.
        run: Runs it; returns the exit code.
        help: One line in the list of subcommands.
        description: What it does.
        examples: Shown below its flags, as written.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help, description=description, epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def add_allowed(parser: argparse.ArgumentParser) -> None:
    """Adds the flags by which a user takes responsibility for what looks wrong."""
    parser.add_argument(
        "--allow-extra", metavar="GLOB", action="append", default=[],
        help="parameters that every rank may hold whole although no strategy lists them (may be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-missing", metavar="GLOB", action="append", default=[],
        help="weights that the target lists and the source may lack (may be repeated)",
    )  # fmt: skip
