"""Tells what the demo did: ``python summary.py OUTPUT``; fails if the converted weights train differently."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

_RANKS = 4


def main() -> None:
    """Reads the logs and the report of the two runs and compares them."""
    output = Path(sys.argv[1])
    report = json.loads((output / "converted" / "auto_trans_report.json").read_text())
    print("\n  converter   slices   written      seconds")
    for converter in report["converters"]:
        first, last = converter["slices"]
        written = f"{converter['bytes_written'] / 2**20:.2f} MiB"
        print(f"  rank {converter['rank']:<6} {first} - {last}    {written:<12} {converter['seconds']:.2f}")
    print(f"  whole conversion, with all waiting: {report['seconds']:.2f} s\n")
    converted, unsliced = (_first_losses(output / f"{name}_logs") for name in ("converted", "unsliced"))
    print("  rank   first-step loss, converted   first-step loss, unsliced weights")
    for rank, (a, b) in enumerate(zip(converted, unsliced)):
        print(f"  {rank:<6} {a:<28} {b}")
    if converted != unsliced:
        sys.exit("\nthe losses differ: the conversion is wrong")
    print("\nthe converted weights train exactly like the unsliced ones")


def _first_losses(logs: Path) -> list[str]:
    losses = []
    for rank in range(_RANKS):
        found = re.search(r"loss:\[([\d.]+)/", (logs / f"worker_{rank}.log").read_text(errors="replace"))
        losses.append(found.group(1) if found else "none")
    return losses


if __name__ == "__main__":
    main()
