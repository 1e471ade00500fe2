"""``auto-trans verify``: checks converted weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from auto_trans.cli.parsers import add_allowed, add_command
from auto_trans.cli.tables import print_json

__all__ = ["add_parser"]

_EXAMPLES = """\
  are the files still what the conversion wrote:
    auto-trans verify out
  is every byte that of the source:
    auto-trans verify out --against old/checkpoint --src-strategy old/strategy --dst-strategy new/strategy
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        subparsers,
        "verify",
        _run,
        help="check converted weights",
        description="Compares converted weights with the digests of their manifest, or every byte with the source. Exits "
        "with 1 and names file, parameter and rank of what differs.",
        examples=_EXAMPLES,
    )
    add = parser.add_argument
    add("dir", metavar="DIR", type=Path, help="the folder of the rank_N folders")
    add("--against", metavar="SRC", type=Path, help="the source that it was converted from")
    add("--src-strategy", metavar="P", help="strategy of SRC (none: SRC is complete)")
    add("--dst-strategy", metavar="P", help="strategy of DIR (none: DIR is complete)")
    add("--step", metavar="E_S", help="the step of SRC that was converted (default: the latest of all ranks)")
    add_allowed(parser)
    add("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.errors import ConfigError
    from auto_trans.sizes import format_bytes
    from auto_trans.verify import verify_digests

    if arguments.against is None:
        if arguments.src_strategy or arguments.dst_strategy:
            raise ConfigError("strategies are only needed with --against")
        wrong, what = verify_digests(arguments.dir), "every file has its digest"
    else:
        wrong, compared = _compare(arguments)
        what = f"{format_bytes(compared)} are equal to the source"
    if arguments.json:
        print_json([vars(difference) for difference in wrong])
    else:
        for difference in wrong:
            print(difference)
        if not wrong:
            print(f"{arguments.dir}: {what}")
    return 1 if wrong else 0


def _compare(arguments: argparse.Namespace) -> tuple[list[Any], int]:
    """The differences to the source, and the number of bytes compared."""
    from auto_trans.core.rules import Allowed
    from auto_trans.storage.sources import as_strategy, find_sources
    from auto_trans.verify import verify_against

    source, target = as_strategy(arguments.src_strategy), as_strategy(arguments.dst_strategy)
    allowed = Allowed(tuple(arguments.allow_extra), tuple(arguments.allow_missing))
    originals = find_sources(arguments.against, source, step=arguments.step)
    wrong: list[Any] = []
    compared = 0
    for original in originals:
        # of several complete checkpoints each was converted to a folder of its name
        folder = arguments.dir / original.name if len(originals) > 1 else arguments.dir
        found, nbytes = verify_against(folder, original, source, target, allowed=allowed)
        wrong += found
        compared += nbytes
    return wrong, compared
