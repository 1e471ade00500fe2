"""``auto-trans convert``: a thin shell over `auto_trans.convert`."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_parser"]

_EXAMPLES = """\
examples:
  cut a complete checkpoint into the slices of a job:
    auto-trans convert llama3_8b.ckpt out --dst-strategy output/strategy
  from one parallel strategy to another:
    auto-trans convert old/checkpoint out --src-strategy old/strategy --dst-strategy output/strategy
  back to one complete file, out/rank_0/checkpoint_0.ckpt:
    auto-trans convert old/checkpoint out --src-strategy old/strategy
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint to another parallel strategy",
        description="Converts a checkpoint to another parallel strategy and writes DST/rank_N/checkpoint_N.ckpt.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", help="a complete .ckpt file, or a folder of rank_N folders")
    parser.add_argument("dst", metavar="DST", help="the target folder; what it holds already is not overwritten")
    parser.add_argument(
        "--src-strategy", metavar="P", help="strategy file, merged file or folder of SRC (none: SRC is complete)"
    )
    parser.add_argument(
        "--dst-strategy",
        metavar="P",
        help="strategy file, merged file or folder of the target (none: one complete file)",
    )
    parser.add_argument("--prefix", default="checkpoint_", help="beginning of the file names (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.conversion import convert

    report = convert(
        arguments.src,
        arguments.dst,
        arguments.src_strategy,
        arguments.dst_strategy,
        prefix=arguments.prefix,
        quiet=False,
    )
    print(report)
    return 0
