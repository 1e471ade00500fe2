"""``auto-trans convert``: converts a checkpoint, or shows the plan."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_trans.cli.parsers import add_allowed, add_command, parse_ranks
from auto_trans.cli.tables import print_json, print_table, ranks_text, report_facts

if TYPE_CHECKING:
    from auto_trans.conversion import Conversion
    from auto_trans.request import Request

__all__ = ["add_parser"]

_EXAMPLES = """\
  cut a complete checkpoint into the slices of a job:
    auto-trans convert llama3_8b.ckpt out --dst-strategy output/strategy
  from one parallel strategy to another, with four processes:
    auto-trans convert old/checkpoint out --src-strategy old/strategy --dst-strategy output/strategy --processes 4
  back to one complete file, out/rank_0/checkpoint_0.ckpt:
    auto-trans convert old/checkpoint out --src-strategy old/strategy
  only what this node needs, where nodes share no disk:
    auto-trans convert llama3_8b.ckpt out --dst-strategy output/strategy --ranks 0-7
  to and from the Checkpoint 2.0 of MindFormers, which tells its strategy itself:
    auto-trans convert old/checkpoint out --src-strategy old/strategy --dst-strategy output/strategy --format checkpoint2
    auto-trans convert output/checkpoint out --dst-strategy new/strategy --format ckpt
  what would be done, and could it succeed:
    auto-trans convert old/checkpoint out --src-strategy old/strategy --dry-run
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        subparsers,
        "convert",
        _run,
        help="convert a checkpoint to another parallel strategy",
        description="Converts a checkpoint to another parallel strategy and writes DST/rank_N/checkpoint_N.ckpt. Started "
        "again with the same inputs it keeps what is complete; files of anything else are not overwritten.",
        examples=_EXAMPLES,
    )
    add = parser.add_argument
    add(
        "src",
        metavar="SRC",
        help="a complete file, a folder of rank_N folders, of shards with their index, or of complete files, or a "
        "Checkpoint 2.0: its root or an iteration",
    )
    add("dst", metavar="DST", help="the target folder; of several complete files each gets a folder of its name there")
    add(
        "--src-strategy",
        metavar="P",
        help="strategy file, merged file or folder of SRC (none: SRC is complete or tells)",
    )
    add("--dst-strategy", metavar="P", help="strategy file, merged file or folder of DST (none: one complete file)")
    add("--prefix", default="checkpoint_", help="beginning of the file names (default: %(default)s)")
    add("--processes", type=int, default=1, metavar="N", help="worker processes on this machine (default: 1)")
    add("--ranks", metavar="LIST", help="only these target ranks, e.g. 0-7,12 (default: all)")
    add(
        "--step",
        metavar="E_S",
        help="the step to take, as in ...-{epoch}_{step}.ckpt (default: the latest of all ranks)",
    )
    add(
        "--format",
        choices=["ckpt", "safetensors", "checkpoint2"],
        help="format of the files written, or a Checkpoint 2.0 of MindFormers (default: ckpt or safetensors as in SRC)",
    )
    add("--memory", metavar="SIZE", help="memory of a process, e.g. 512MiB (default: 64MiB)")
    add("--engine", default="native", choices=["native", "mindspore"], help="who converts (default: %(default)s)")
    add_allowed(parser)
    add(
        "--check-replicas", action="store_true", help="compare all copies of every slice first (reads every file whole)"
    )
    add("--no-reuse", action="store_true", help="convert again what is complete already")
    add("--dry-run", action="store_true", help="show the plan and whether it could succeed; convert nothing")
    add("--measure", action="store_true", help="with --dry-run: write 32 MiB beside DST to estimate the time")
    add(
        "--npu-num-per-node",
        type=int,
        metavar="N",
        help="with --dry-run: devices of a node of the job, to tell what a node reads (default: 8)",
    )
    add("--verify", action="store_true", help="compare every byte with the source afterwards")
    add("--quiet", action="store_true", help="show no progress")
    add("--json", action="store_true", help="print the plan or the report as JSON")


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.conversion import plan_conversions

    for flag, given, conflict in (
        ("--measure", arguments.measure, not arguments.dry_run),
        ("--npu-num-per-node", arguments.npu_num_per_node is not None, not arguments.dry_run),
        ("--verify", arguments.verify, arguments.dry_run),
    ):
        if given and conflict:
            arguments.parser.error(f"argument {flag}: only allowed with{'out' * arguments.dry_run} --dry-run")
    good = True
    facts: list[dict[str, Any]] = []
    conversions = plan_conversions(_request(arguments))
    for conversion in conversions:
        run = _show_plan if arguments.dry_run else _convert
        good &= run(conversion, arguments, facts)
    if arguments.json:
        print_json(facts if len(conversions) > 1 else facts[0])
    return 0 if good else 1


def _convert(conversion: Conversion, arguments: argparse.Namespace, facts: list[dict[str, Any]]) -> bool:
    report = conversion.carry_out(quiet=arguments.quiet or arguments.json)
    facts.append(report_facts(report))
    if not arguments.json:
        print(report)
    return not arguments.verify or _verify(conversion, quiet=arguments.json)


def _request(arguments: argparse.Namespace) -> Request:
    from auto_trans.config import parse_memory
    from auto_trans.core.rules import Allowed
    from auto_trans.request import Request
    from auto_trans.storage.sources import as_strategy

    return Request(
        Path(arguments.src), Path(arguments.dst), as_strategy(arguments.src_strategy), as_strategy(arguments.dst_strategy),
        ranks=parse_ranks(arguments.ranks), prefix=arguments.prefix, format=arguments.format,
        allowed=Allowed.of(arguments.allow_extra, arguments.allow_missing), step=arguments.step,
        engine=arguments.engine, processes=arguments.processes, memory_limit=parse_memory(arguments.memory),
        check_replicas=arguments.check_replicas, reuse=not arguments.no_reuse,
    )  # fmt: skip


def _verify(conversion: Conversion, *, quiet: bool) -> bool:
    from auto_trans.sizes import format_bytes
    from auto_trans.verify import verify_against

    request = conversion.request
    wrong, compared = verify_against(
        request.dst, conversion.checkpoint, request.from_strategy, request.to_strategy, ranks=conversion.plan.ranks,
        allowed=request.allowed,
    )  # fmt: skip
    for difference in wrong:
        print(difference, file=sys.stderr if quiet else sys.stdout)
    if not wrong and not quiet:
        print(f"verified: {format_bytes(compared)} equal to the source")
    return not wrong


def _show_plan(conversion: Conversion, arguments: argparse.Namespace, facts: list[dict[str, Any]]) -> bool:
    from auto_trans.config import parse_npu_num
    from auto_trans.describe import describe_plan
    from auto_trans.sizes import format_bytes

    node_devices = parse_npu_num(arguments.npu_num_per_node)
    plan = describe_plan(conversion, measure=arguments.measure, words=arguments.words, node_devices=node_devices)
    facts.append(plan)
    if arguments.json:
        return not plan["problem"]
    rows = [
        (
            ranks_text(file["ranks"]),
            ranks_text(file["source_ranks"]),
            format_bytes(file["bytes"]),
            "already there" if file["reused"] else file["file"],
        )
        for file in plan["files"]
    ]
    print_table(("target ranks", "read source ranks", "size", "file (other ranks: links)"), rows, right=(2,))
    print(f"\nto read    {format_bytes(plan['bytes_read'])}")
    print(f"to write   {format_bytes(plan['bytes_written'])}, {format_bytes(plan['disk_free'])} free there")
    print(f"memory     {format_bytes(plan['memory'])} at most, {format_bytes(plan['memory_available'])} available")
    if plan["seconds"] is not None:
        print(f"time       about {max(plan['seconds'], 0.1):.1f} s, by a short measured copy")
    else:
        print("time       not measured; --measure writes 32 MiB beside DST to tell")
    for key, text in (
        ("carried", "carried over as they are"),
        ("absent", "not in the source"),
        ("dropped", "left out"),
    ):
        if plan[key]:
            print(f"{text}: {', '.join(plan[key][:5])}{' ...' if len(plan[key]) > 5 else ''}")
    for warning in plan["warnings"]:
        print(f"warning: {warning}")
    _show_advice(plan["transform_process_num"])
    if conversion.request.to_strategy.world_size > 1:
        _show_direct(plan["direct"])
    if plan["problem"]:
        print(f"\nit could not succeed: {plan['problem']}")
    return not plan["problem"]


def _show_direct(reads: dict[str, int]) -> None:
    from auto_trans.sizes import format_bytes

    devices = f"{reads['npu_num_per_node']} devices a node"
    print(f"\nin a job with auto_trans: {{load: direct}}, which writes nothing (tensors, {devices}):")
    rows = [(f"a {one}", *(format_bytes(reads[key]) for key in (one, f"{one}s"))) for one in ("rank", "node")]
    print_table(("", "busiest reads", "all read"), rows, right=(1, 2))
    print("what several ranks of a node read comes from its page cache, and counts once")


def _show_advice(advice: list[dict[str, Any]]) -> None:
    from auto_trans.sizes import format_bytes

    if not advice:
        return
    rows = [
        (
            str(entry["transform_process_num"]),
            format_bytes(entry["busiest_reads"]),
            format_bytes(entry["busiest_writes"]),
            format_bytes(entry["all_write"]),
            str(entry["writing"]),
        )
        for entry in advice
    ]
    print("\nin a job, by transform_process_num (tensors, without links):")
    heads = ("transform_process_num", "busiest reads", "busiest writes", "all write", "converters that write")
    print_table(heads, rows, right=(0, 1, 2, 3, 4))
    best = min(advice, key=lambda entry: (entry["busiest_writes"], entry["transform_process_num"]))
    print(f"more than {best['transform_process_num']} would not be faster: no converter would write less")
