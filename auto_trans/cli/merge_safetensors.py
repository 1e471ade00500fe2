"""``auto-trans merge-safetensors``: merges distributed weights into one complete set of safetensors files."""

from __future__ import annotations

import argparse
from typing import Any

from auto_trans.cli.parsers import add_allowed, add_command

__all__ = ["add_parser"]

_EXAMPLES = """\
  the latest step, without optimizer state:
    auto-trans merge-safetensors output/checkpoint merged --src-strategy output/strategy --filter-out-param-prefix adam_
  the files that end with -3_200.safetensors:
    auto-trans merge-safetensors output/checkpoint merged --src-strategy output/strategy --file-suffix 3_200
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        subparsers,
        "merge-safetensors",
        _run,
        help="merge distributed weights into complete safetensors files",
        description="Merges distributed weights into safetensors files with the indices of HuggingFace and MindSpore.",
        examples=_EXAMPLES,
        words={"file_suffix": "--file-suffix"},
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="a folder of rank_N folders")
    add("dst", metavar="DST", help="the target folder")
    add(
        "--src-strategy",
        metavar="P",
        help="strategy file, merged file or folder of SRC (none: SRC is a Checkpoint 2.0)",
    )
    add("--file-suffix", metavar="S", help="end of the file names to take, e.g. 1_1 (default: the latest step)")
    add("--max-shard-size", metavar="SIZE", default="5GB", help="largest size of a file (default: %(default)s)")
    add(
        "--filter-out-param-prefix", metavar="P", nargs="+", action="extend", default=[],
        help="leave out parameters that begin so (may be repeated)",
    )  # fmt: skip
    add("--check-replicas", action="store_true", help="compare all copies of every slice (reads every file whole)")
    add("--processes", type=int, default=1, metavar="N", help="worker processes on this machine (default: 1)")
    add_allowed(parser)
    add("--memory", metavar="SIZE", help="memory of the merge (default: 64MiB)")
    add("--quiet", action="store_true", help="show no progress")


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.merge_safetensors import merge_safetensors
    from auto_trans.sizes import format_bytes, plural

    report = merge_safetensors(
        arguments.src, arguments.dst, arguments.src_strategy, file_suffix=arguments.file_suffix,
        max_shard_size=arguments.max_shard_size, filter_out_param_prefix=arguments.filter_out_param_prefix,
        check_replicas=arguments.check_replicas, processes=arguments.processes, memory_limit=arguments.memory,
        allow_extra=arguments.allow_extra, allow_missing=arguments.allow_missing, quiet=arguments.quiet,
    )  # fmt: skip
    size = format_bytes(report.total_size)
    kept = f", {report.reused} of them there already" if report.reused else ""
    print(
        f"{report.target}: {plural(report.parameters, 'parameter')}, {size}, in {plural(len(report.files), 'file')}{kept}"
    )
    return 0
