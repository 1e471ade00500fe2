"""What the parsers of the subcommands share."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, Optional

__all__ = ["FLAGS", "add_allowed", "add_command", "empty_argument", "in_words", "parse_ranks"]

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
    "file_suffix": "--file-suffix",
    "prefix": "--prefix",
    "format": "--format",
    "engine": "--engine",
    "processes": "--processes",
    "memory_limit": "--memory",
    "scaling": "--scaling",
    "max_shard_size": "--max-shard-size",
    "against": "--against",
    "load": "auto_trans: {load: ...}",  # of a job, for doctor
    "loader": "auto_trans: {loader: ...}",
}


def add_command(
    subparsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    examples: str,
    words: Optional[Mapping[str, str]] = None,
) -> argparse.ArgumentParser:
    """Adds a subcommand.

    Args:
        subparsers: Of the main parser.
        name: Name of the subcommand.
        run: Runs it; returns the exit code.
        help: One line in the list of subcommands.
        description: What it does.
        examples: Shown below its flags, as written.
        words: What this subcommand calls settings otherwise than `FLAGS`.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help, description=description, epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run, words={**FLAGS, **(words or {})}, parser=parser)
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


def empty_argument(argv: Sequence[str]) -> Optional[str]:
    """The argument that is empty, as by a shell variable that is not set, in words; None if all hold something."""
    for before, argument in zip(("", *argv), argv):
        if not argument:
            return f"argument {before}" if before.startswith("--") else "an argument"
        if argument.startswith("--") and argument.endswith("=") and argument.count("=") == 1:
            return f"argument {argument[:-1]}"
    return None


@contextlib.contextmanager
def in_words(words: Mapping[str, str]) -> Iterator[None]:
    """Has the errors of a part of a subcommand name settings as that part knows them."""
    from auto_trans.errors import AutoTransError

    try:
        yield
    except AutoTransError as e:
        e.told_by(words)
        raise


def parse_ranks(text: Optional[str]) -> Optional[tuple[int, ...]]:
    """Parses a list of ranks such as ``0-7,12``.

    Raises:
        ConfigError: It is no such list.
    """
    from auto_trans.errors import ConfigError

    if text is None:
        return None
    ranks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f"«ranks» must be a list such as 0-7,12, not {text!r}")
        ranks += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(ranks)
