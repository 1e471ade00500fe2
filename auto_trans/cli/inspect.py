"""``auto-trans inspect``: shows what strategies and checkpoints hold."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_trans.cli.parsers import add_command, in_words
from auto_trans.cli.tables import print_json, print_table, ranks_text

if TYPE_CHECKING:
    from auto_trans.core.strategy import Strategy

__all__ = ["add_parser"]

_EXAMPLES = """\
  how is every parameter sliced:
    auto-trans inspect output/strategy
  with shapes, and bytes per rank:
    auto-trans inspect output/strategy --weights output/checkpoint
  what is in a checkpoint:
    auto-trans inspect output/checkpoint --param '*wq*'
  what differs between two jobs, and a page that shows it:
    auto-trans inspect old/strategy --diff new/strategy --weights old/checkpoint --html page.html
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        subparsers,
        "inspect",
        _run,
        help="show what a strategy or a checkpoint holds",
        description="Shows how a strategy slices the parameters of a job, or what the files of a checkpoint hold.",
        examples=_EXAMPLES,
        words={"src": "PATH", "dst": "--html", "src_strategy": "PATH"},
    )
    add = parser.add_argument
    add("path", metavar="PATH", type=Path, help="a strategy file or folder, or a checkpoint file or folder")
    add("--weights", metavar="P", type=Path, help="a checkpoint saved under the strategy, which tells the shapes")
    add("--diff", metavar="B", help="another strategy: show what differs")
    add("--param", metavar="GLOB", default="*", help="only parameters whose name matches")
    add("--crc", action="store_true", help="compute the crc of files that carry one (reads them whole)")
    add("--html", metavar="FILE", type=Path, help="write a page that shows the slices of every parameter")
    add("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.core.strategy import Strategy
    from auto_trans.describe import describe_checkpoint, read_path

    found = read_path(arguments.path)
    if isinstance(found, Strategy):
        _refuse(arguments, "a strategy", "crc")
        _show_strategy(arguments, found)
        return 0
    _refuse(arguments, "a checkpoint", "html", "diff", "weights")
    facts = [describe_checkpoint(checkpoint, arguments.param, check_crc=arguments.crc) for checkpoint in found]
    if arguments.param != "*":
        _check_match(arguments, (p["name"] for checkpoint in facts for p in checkpoint["parameters"]))
    if arguments.json:
        print_json(facts)
    else:
        for checkpoint in facts:
            _show_checkpoint(checkpoint)
    return 1 if any(file["crc"] == "wrong" for checkpoint in facts for file in checkpoint["files"]) else 0


def _refuse(arguments: argparse.Namespace, what: str, *flags: str) -> None:
    """Refuses flags that say nothing about what the path turned out to be."""
    for flag in flags:
        if getattr(arguments, flag):
            arguments.parser.error(f"argument --{flag}: {arguments.path} is {what}, for which it has no meaning")


def _check_match(arguments: argparse.Namespace, names: Iterable[str]) -> None:
    from auto_trans.errors import ConfigError

    if not any(fnmatchcase(name, arguments.param) for name in names):
        paths = [str(path) for path in (arguments.path, arguments.diff) if path]
        raise ConfigError(f"no parameter of {' or '.join(paths)} matches --param {arguments.param!r}")


def _show_strategy(arguments: argparse.Namespace, strategy: Strategy) -> None:
    from auto_trans.describe import describe_strategy, differences
    from auto_trans.page import write_page
    from auto_trans.storage.sources import find_checkpoints
    from auto_trans.storage.strategies import read_strategy

    other = read_strategy(arguments.diff) if arguments.diff else None
    if arguments.html and arguments.json:
        arguments.parser.error("argument --json: not allowed with argument --html")
    if other is not None and arguments.weights and not arguments.html:
        arguments.parser.error("argument --weights: not allowed with argument --diff, save with --html")
    listed = [name for one in (strategy, other) if one is not None for name in (*one.names(), *one.refused)]
    _check_match(arguments, listed)
    with in_words({"src": "--weights"}):
        weights = find_checkpoints(arguments.weights)[0] if arguments.weights else None
        facts = describe_strategy(strategy, weights, arguments.param)
    if arguments.html:
        write_page(arguments.html, strategy, other, weights, arguments.param)
        print(f"written: {arguments.html}")
    elif other is not None:
        found = differences(strategy, other, arguments.param)
        if arguments.json:
            print_json(found)
        elif found:
            print_table(("parameter", "before", "after"), [(d["name"], d["before"], d["after"]) for d in found])
        else:
            print("no parameter is sliced differently")
    elif arguments.json:
        print_json(facts)
    else:
        _print_strategy(facts)


def _print_strategy(facts: dict[str, Any]) -> None:
    from auto_trans.sizes import format_bytes, plural

    stages = plural(facts["stages"], "stage")
    print(f"{facts['strategy']}: {plural(facts['world_size'], 'rank')} in {stages}\n")
    rows = [
        (
            p["name"],
            ", ".join(map(str, p["stages"])),
            " x ".join(map(str, p["shape"])) if "shape" in p else "-",
            " x ".join(map(str, p["full_shape"])) if "shape" in p else "-",
            p["sliced"],
        )
        for p in facts["parameters"]
    ]
    print_table(("parameter", "stage", "shape per rank", "full shape", "sliced"), rows)
    if "bytes_per_rank" in facts:
        print()
        sizes = [(rank, format_bytes(nbytes)) for rank, nbytes in enumerate(facts["bytes_per_rank"])]
        print_table(("rank", "size"), sizes, right=(0, 1))


def _show_checkpoint(facts: dict[str, Any]) -> None:
    from auto_trans.sizes import format_bytes

    print(f"{facts['checkpoint']} ({facts['format']}): {facts['kind']}\n")
    rows = [
        (
            p["name"],
            p["dtype"],
            " x ".join(map(str, p["shape"])) or "()",
            format_bytes(p["bytes"]),
            ranks_text(p["ranks"]),
        )
        for p in facts["parameters"]
    ]
    print_table(("parameter", "type", "shape", "size", "ranks"), rows, right=(3,))
    print()
    files = [(f["rank"], format_bytes(f["bytes"]), f["parameters"], f["crc"], f["file"]) for f in facts["files"]]
    print_table(("rank", "size", "parameters", "crc", "file"), files, right=(0, 1, 2))
