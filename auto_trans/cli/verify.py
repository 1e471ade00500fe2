"""``auto-trans verify``: checks converted weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from auto_trans.cli.tables import print_json

__all__ = ["add_parser"]

_EXAMPLES = """\
examples:
  are the files still what the conversion wrote:
    auto-trans verify out
  is every byte that of the source:
    auto-trans verify out --against old/checkpoint --src-strategy old/strategy --dst-strategy new/strategy
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="check converted weights",
        description="Compares converted weights with the digests of their manifest, or every byte with the source. Exits "
        "with 1 and names file, parameter and rank of what differs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dir", metavar="DIR", type=Path, help="the folder of the rank_N folders")
    add("--against", metavar="SRC", type=Path, help="the source that it was converted from")
    add("--src-strategy", metavar="P", help="strategy of SRC (none: SRC is complete)")
    add("--dst-strategy", metavar="P", help="strategy of DIR (none: DIR is complete)")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.errors import ConfigError
    from auto_trans.sizes import format_bytes
    from auto_trans.storage.scanned import as_strategy, find_source
    from auto_trans.verify import verify_against, verify_digests

    if arguments.against is None:
        if arguments.src_strategy or arguments.dst_strategy:
            raise ConfigError("strategies are only needed with --against")
        wrong, what = verify_digests(arguments.dir), "every file has its digest"
    else:
        source, target = as_strategy(arguments.src_strategy), as_strategy(arguments.dst_strategy)
        (original,) = find_source(arguments.against, source)
        wrong, compared = verify_against(arguments.dir, original, source, target)
        what = f"{format_bytes(compared)} are equal to the source"
    if arguments.json:
        print_json([vars(difference) for difference in wrong])
    else:
        for difference in wrong:
            print(difference)
        if not wrong:
            print(f"{arguments.dir}: {what}")
    return 1 if wrong else 0
