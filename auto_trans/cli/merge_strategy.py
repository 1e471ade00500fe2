"""``auto-trans merge-strategy``: gathers the strategy files of all pipeline stages in one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from auto_trans.cli.parsers import add_command

__all__ = ["add_parser"]

_EXAMPLES = """\
  write output/strategy/merged_ckpt_strategy.ckpt:
    auto-trans merge-strategy output/strategy
  gather the strategy files of two nodes first:
    cp node0/strategy/*.ckpt node1/strategy/*.ckpt all/ && auto-trans merge-strategy all merged.ckpt
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        subparsers,
        "merge-strategy",
        _run,
        help="merge the strategy files of all pipeline stages",
        description="Merges a folder's strategy files into one that MindSpore's own tools read, too.",
        examples=_EXAMPLES,
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="the folder of the ckpt_strategy_rank_N.ckpt files")
    parser.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", help="the file to write (default: DIR/merged_ckpt_strategy.ckpt)"
    )


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.storage.strategies import merge_strategies, read_strategy

    strategy = read_strategy(arguments.dir)
    print(f"{merge_strategies(arguments.dir, arguments.out)}: {strategy.world_size} ranks in {strategy.stages} stages")
    return 0
