"""``auto-trans merge-lora``: merges LoRA weights into the base weights."""

from __future__ import annotations

import argparse
from typing import Any

from auto_trans.cli.parsers import add_allowed, add_command, parse_ranks
from auto_trans.cli.tables import print_json, report_facts

__all__ = ["add_parser"]

_EXAMPLES = """\
  complete weights, trained with lora_alpha 16 and lora_rank 8:
    auto-trans merge-lora finetuned.ckpt merged --scaling 16/8
  distributed weights to one complete file:
    auto-trans merge-lora output/checkpoint merged --src-strategy output/strategy --scaling 16/8
  distributed weights straight to the slices of another job:
    auto-trans merge-lora output/checkpoint merged --src-strategy output/strategy --dst-strategy new/strategy --scaling 2
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        subparsers,
        "merge-lora",
        _run,
        help="merge LoRA weights into the base weights",
        description="Merges LoRA weights into the base weights beside them: W' = W + (B @ A) * scaling.",
        examples=_EXAMPLES,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="a complete file, or a folder of rank_N folders, with base and LoRA weights")
    add("dst", metavar="DST", help="the target folder; gets rank_N/checkpoint_N.ckpt")
    add("--src-strategy", metavar="P", help="strategy of SRC (none: SRC is complete)")
    add("--dst-strategy", metavar="P", help="strategy of the target (none: one complete file)")
    add("--scaling", required=True, metavar="S", help="lora_alpha/lora_rank, as a number or as 16/8")
    add("--prefix", default="checkpoint_", help="beginning of the file names (default: %(default)s)")
    add("--ranks", metavar="LIST", help="only these target ranks, e.g. 0-7,12 (default: all)")
    add(
        "--step",
        metavar="E_S",
        help="the step to take, as in ...-{epoch}_{step}.ckpt (default: the latest of all ranks)",
    )
    add("--format", choices=["ckpt", "safetensors"], help="format of the files written (default: that of SRC)")
    add("--processes", type=int, default=1, metavar="N", help="worker processes on this machine (default: 1)")
    add_allowed(parser)
    add("--memory", metavar="SIZE", help="memory for the parts that are merged (default: 64MiB)")
    add("--quiet", action="store_true", help="show no progress")
    add("--json", action="store_true", help="print the report as JSON")


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.merge_lora import merge_lora, parse_scaling
    from auto_trans.sizes import plural

    report = merge_lora(
        arguments.src, arguments.dst, arguments.src_strategy, arguments.dst_strategy, scaling=arguments.scaling,
        prefix=arguments.prefix, ranks=parse_ranks(arguments.ranks), step=arguments.step, format=arguments.format,
        processes=arguments.processes, memory_limit=arguments.memory, allow_extra=tuple(arguments.allow_extra),
        allow_missing=tuple(arguments.allow_missing), quiet=arguments.quiet or arguments.json,
    )  # fmt: skip
    scaling = parse_scaling(arguments.scaling)
    if arguments.json:
        print_json({**report_facts(report), "merged": report.with_lora, "scaling": scaling})
    else:
        print(f"{report}\n{plural(len(report.with_lora), 'LoRA weight')} merged with scaling {scaling:g}")
    return 0
