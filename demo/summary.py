"""Tells what the demo did: ``python summary.py OUTPUT JOB...``; fails if the converted weights are not the unsliced ones."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import mindspore

_RANKS = 4
Contents = dict[str, tuple[object, ...]]


def main() -> None:
    """Compares the converted weights of every job with the unsliced ones, and the runs with each other."""
    output, *jobs = Path(sys.argv[1]), *sys.argv[2:]
    unsliced = _contents(output / "first" / "checkpoint" / "rank_0" / "tiny_rank_0-1_8.ckpt")
    expected = _losses(output / "unsliced_logs")
    for job in jobs:
        report = json.loads((output / job / "auto_trans_report.json").read_text())
        print(f"\n  {job}: {report['seconds']:.2f} s, with all waiting")
        if report.get("load") == "direct":
            _show_loaded(report, output / job / "transformed_checkpoint")
        else:
            _show_converted(report, output / job / "transformed_checkpoint", unsliced)
        converted = _losses(output / f"{job}_logs")
        print("  rank   loss of the first and the last step, converted / unsliced weights")
        for rank, (a, b) in enumerate(zip(converted, expected)):
            print(f"  {rank:<6} {a[0]} - {a[-1]} ({len(a)} steps) / {b[0]} - {b[-1]} ({len(b)} steps)")
        if converted != expected:
            sys.exit("\nthe losses differ: the conversion is wrong")
    print("\nthe converted weights train exactly like the unsliced ones")


def _show_converted(report: dict[str, Any], folder: Path, unsliced: Contents) -> None:
    print("  converter   slices   written      seconds")
    for converter in report["converters"]:
        first, last = converter["slices"]
        written = f"{converter['bytes_written'] / 2**20:.2f} MiB"
        print(f"  rank {converter['rank']:<6} {first} - {last}    {written:<12} {converter['seconds']:.2f}")
    for rank in range(_RANKS):
        (file,) = folder.glob(f"*/rank_{rank}/checkpoint_{rank}.*")
        if _contents(file) != unsliced:
            sys.exit(f"{file} does not hold the unsliced weights: the conversion is wrong")
    print(f"  {len(unsliced)} tensors of {_RANKS} ranks have the bytes of the unsliced weights\n")


def _show_loaded(report: dict[str, Any], folder: Path) -> None:
    print("  loaded      parameters   bytes        seconds")
    for rank in report["ranks"]:
        nbytes = f"{rank['bytes'] / 2**20:.2f} MiB"
        print(f"  rank {rank['rank']:<6} {rank['parameters']:<12} {nbytes:<12} {rank['seconds']:.2f}")
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: something was written")
    print("  nothing was written\n")


def _contents(file: Path) -> Contents:
    """Type, shape and bytes of every tensor, as MindSpore reads them."""
    loaded = mindspore.load_checkpoint(str(file), format=file.suffix[1:]).items()
    return {name: (p.dtype, p.shape, p.asnumpy().tobytes()) for name, p in loaded}


def _losses(logs: Path) -> list[list[str]]:
    """The loss of every step, per rank."""
    losses = []
    for rank in range(_RANKS):
        log = (logs / f"worker_{rank}.log").read_text(errors="replace")
        losses.append(re.findall(r"step:\[ *\d+/ *\d+\], loss:\[([\d.]+)/", log))
        if len(losses[-1]) < 2:
            sys.exit(f"rank {rank} did not train on; see {logs}")
    return losses


if __name__ == "__main__":
    main()
