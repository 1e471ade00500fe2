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
        words={"src": "DIR", "dst": "OUT"},
    )
    parser.add_argument(
        "dir", metavar="DIR", type=Path, help="the folder of the strategy files, of every stage one or more"
    )
    parser.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", help="the file to write (default: DIR/merged_ckpt_strategy.ckpt)"
    )


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.sizes import plural
    from auto_trans.storage.strategies import merge_strategies, named_ranks, read_strategy

    merged = merge_strategies(arguments.dir, arguments.out)
    strategy = read_strategy(merged)
    print(f"{merged}: {plural(strategy.world_size, 'rank')} in {plural(strategy.stages, 'stage')}")
    which = f"stages 0 to {strategy.stages - 1}" if strategy.stages > 1 else "stage 0"
    print(f"{which}; the files do not tell whether there are more")
    named = named_ranks(arguments.dir)
    absent = [rank for rank in range(strategy.world_size) if rank not in named]
    if named and absent:
        print(
            f"the files of {len(absent)} of {strategy.world_size} ranks are not there (rank {absent[0]} is the first): "
            f"what the others say holds for them, but if other nodes have more files, gather those, too"
        )
    return 0
