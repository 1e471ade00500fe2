"""``auto-trans verify``: checks converted weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from auto_trans.cli.parsers import add_allowed, add_command, in_words, parse_ranks
from auto_trans.cli.tables import print_json, ranks_text

if TYPE_CHECKING:
    from auto_trans.verify import Difference

__all__ = ["add_parser"]

_EXAMPLES = """\
  are the files still what the conversion wrote:
    auto-trans verify out
  ... and those of the ranks that this node converted:
    auto-trans verify out --ranks 0-7
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
        words={"src": "--against"},
    )
    add = parser.add_argument
    add("dir", metavar="DIR", type=Path, help="the folder of the rank_N folders")
    add("--against", metavar="SRC", type=Path, help="the source that it was converted from")
    add("--src-strategy", metavar="P", help="strategy of SRC (none: SRC is complete)")
    add("--dst-strategy", metavar="P", help="strategy of DIR (none: DIR is complete)")
    add("--ranks", metavar="LIST", help="only these ranks of DIR, e.g. 0-7,12, as given to convert (default: all)")
    add("--step", metavar="E_S", help="the step of SRC that was converted (default: the latest of all ranks)")
    add_allowed(parser)
    add("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.sizes import format_bytes, plural
    from auto_trans.verify import verify_digests

    ranks = parse_ranks(arguments.ranks)
    problem = ""
    wrong: Sequence[Difference]
    if arguments.against is None:
        for flag in ("src_strategy", "dst_strategy", "step", "allow_extra", "allow_missing"):
            if getattr(arguments, flag):
                arguments.parser.error(f"argument --{flag.replace('_', '-')}: only allowed with --against")
        check = verify_digests(arguments.dir, ranks)
        wrong, what = check.differences, "every file has its digest"
        if ranks is not None:
            what = f"{plural(check.files, 'file')} of rank {ranks_text(ranks)}: {what}"
        elif not check.finished:
            problem = (
                f"{arguments.dir}: the conversion is not finished, {plural(check.files, 'file')} compared with the records; "
                f"start it again to finish it, or give the --ranks that were to be converted"
            )
    else:
        wrong, compared = _compare(arguments, ranks)
        what = f"{format_bytes(compared)} are equal to the source"
    if arguments.json:
        print_json([vars(difference) for difference in wrong])
    else:
        for difference in wrong:
            print(difference)
        if not wrong and not problem:
            print(f"{arguments.dir}: {what}")
    if problem:
        print(problem, file=sys.stderr)
    return 1 if wrong or problem else 0


def _compare(arguments: argparse.Namespace, ranks: Optional[Sequence[int]]) -> tuple[list[Any], int]:
    """The differences to the source, and the number of bytes compared."""
    from auto_trans.core.rules import Allowed
    from auto_trans.storage.sources import as_strategy, find_checkpoints, find_sources
    from auto_trans.verify import verify_against

    source, target = as_strategy(arguments.src_strategy), as_strategy(arguments.dst_strategy)
    allowed = Allowed.of(arguments.allow_extra, arguments.allow_missing)
    originals = find_sources(arguments.against, source, step=arguments.step)
    wrong: list[Any] = []
    compared = 0
    for original in originals:
        # of several complete checkpoints each was converted to a folder of its name
        folder = arguments.dir / original.name if len(originals) > 1 else arguments.dir
        with in_words({"src": "DIR"}):
            find_checkpoints(folder)
        found, nbytes = verify_against(folder, original, source, target, ranks=ranks, allowed=allowed)
        wrong += found
        compared += nbytes
    return wrong, compared
