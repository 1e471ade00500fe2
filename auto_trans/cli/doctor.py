"""``auto-trans doctor``: is everything ready, before an expensive job starts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from auto_trans.cli.parsers import add_command
from auto_trans.cli.tables import print_json, print_table, ranks_text

__all__ = ["add_parser"]

_EXAMPLES = """\
  is the hook active here:
    auto-trans doctor
  will the job of this YAML convert its weights:
    auto-trans doctor my.yaml --world-size 16
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        subparsers,
        "doctor",
        _run,
        help="check the environment, and the settings of a job",
        description="Checks whether the hook is active in this environment and, with the YAML of a job, everything that can "
        "be checked before the job starts. Exits with 1 if something would make it fail.",
        examples=_EXAMPLES,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, nargs="?", help="the YAML of a job")
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="number of ranks (default: by parallel_config in the YAML)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> int:
    from auto_trans.doctor import examine

    if arguments.world_size is not None and arguments.world_size < 1:
        arguments.parser.error("argument --world-size: must be at least 1")
    if arguments.world_size is not None and arguments.config is None:
        arguments.parser.error("argument --world-size: only allowed with CONFIG.yaml")

    checks, assignments = examine(arguments.config, arguments.world_size)
    if arguments.json:
        print_json([vars(check) for check in checks])
    else:
        for check in checks:
            print(f"{check.status:<8} {check.what}")
            if check.remedy:
                print(f"{'':<8} -> {check.remedy}")
        if assignments:
            print()
            rows = [(f"rank {a.rank}", ranks_text(a.slices)) for a in assignments]
            print_table(("converter", "converts the slices of ranks"), rows)
    return 1 if any(check.status == "error" for check in checks) else 0
