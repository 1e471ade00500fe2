"""Tells what the demo did: ``python summary.py OUTPUT``; fails if the converted weights train differently."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

_RANKS = 4


def main() -> None:
    """Reads the logs and the reports of the runs and compares them."""
    output = Path(sys.argv[1])
    for name in ("converted", "safetensors"):
        report = json.loads((output / name / "auto_trans_report.json").read_text())
        print(f"\n  {name}: {report['seconds']:.2f} s in all, waiting included")
        print("  converter   slices   written      seconds")
        for converter in report["converters"]:
            first, last = converter["slices"]
            written = f"{converter['bytes_written'] / 2**20:.2f} MiB"
            print(f"  rank {converter['rank']:<6} {first} - {last}    {written:<12} {converter['seconds']:.2f}")
    names = ("unsliced", "converted", "safetensors")
    losses = {name: _first_losses(output / f"{name}_logs") for name in names}
    print("\n  first-step loss of each rank")
    print("  rank   " + "".join(f"{name:<14}" for name in names))
    for rank in range(_RANKS):
        print(f"  {rank:<6} " + "".join(f"{losses[name][rank]:<14}" for name in names))
    if any(losses[name] != losses["unsliced"] for name in names):
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
