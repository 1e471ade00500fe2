"""Measures how source files are best read: mapped, or in pieces; rows and columns, from the page cache and from the disk.

    python benchmarks/readers.py [--gigabytes 1] [--runs 5] [--latency 1] [--folder /tmp/x] [--json results.json]

A rank takes its part of four matrices of a complete ``.ckpt`` file: a quarter of their rows, or of their columns. "cold":
the file is not in the page cache. "slow": it lies on a file system in user space (`slow_disk.py`) that answers every read
after some milliseconds, as a file server does; left out where none can be mounted (it needs fusepy and libfuse). Last come
the sizes of the pieces of memory that slices are cut from, and of the buffer for rows, of which only a part is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from harness import Sample, add_arguments, dispatch, interleave, measure, table, work_folder
from synthetic import write_checkpoint

from auto_trans import loading
from auto_trans.core.plan import Copy, TensorPlan
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import Box
from auto_trans.engine import gather
from auto_trans.engine.gather import Gatherer
from auto_trans.planned import Planned
from auto_trans.storage.readers import MappedFile, PositionedFile
from auto_trans.storage.sources import find_source

READERS: dict[str, Any] = {"mapped": MappedFile, "pieces": PositionedFile}
PARTS = 4
MIB = 2**20
SLABS, ROWS = (8 * MIB, 32 * MIB, 128 * MIB), (MIB // 4, MIB, 4 * MIB)


def child(name: str, case: dict[str, Any], target: Path) -> Sample:
    """Measures one reader, or one size."""
    reader, _, size = name.partition(" ")
    if size:
        setattr(*(loading, "_KEPT_SLAB_BYTES") if case["sizes"] == "slab" else (gather, "_ROWS_BYTES"), int(size))
    tensors = parts_of(Path(case["file"]), case["what"])
    if case["cold"]:
        drop(Path(case["disk"]))
    held = []

    def run() -> None:
        memory = loading._Slabs([tensor.nbytes for tensor in tensors], loading._KEPT_SLAB_BYTES)
        with Gatherer(8 * MIB, READERS[reader]) as gatherer:
            for tensor in tensors:
                held.append(memory.take(tensor.nbytes))
                gatherer.fill(tensor, held[-1])

    return {**measure(run), "bytes": float(sum(one.nbytes for one in held))}


def parts_of(file: Path, what: str) -> list[TensorPlan]:
    """The second quarter of the rows or of the columns of all matrices."""
    whole = Strategy.complete()
    planned = Planned(find_source(file, whole), whole, whole)
    found = []
    for tensor in planned.plan.files[0].tensors:
        if what == "whole":
            found.append(tensor)
            continue
        dim = ("rows", "columns").index(what)
        size = tuple(n // PARTS if i == dim else n for i, n in enumerate(tensor.shape))
        start = tuple(n if i == dim else 0 for i, n in enumerate(size))
        copy = Copy(tensor.copies[0].shard, start, Box.whole(size))
        found.append(TensorPlan(tensor.tensor, Box(start, size), (copy,)))
    return found


def drop(file: Path) -> None:
    """Takes a file out of the page cache."""
    os.sync()
    fd = os.open(file, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@contextlib.contextmanager
def slow(folder: Path, milliseconds: float) -> Iterator[Optional[Path]]:
    """The folder through a file system that is slow to answer, or None where none can be mounted."""
    mount = folder.with_name("slow")
    mount.mkdir()
    script = Path(__file__).with_name("slow_disk.py")
    server = subprocess.Popen([sys.executable, str(script), str(folder), str(mount), str(milliseconds)])
    try:
        for _ in range(50):
            if os.path.ismount(mount) or server.poll() is not None:
                break
            time.sleep(0.1)
        yield mount if os.path.ismount(mount) else None
    finally:
        subprocess.run(["fusermount", "-u", str(mount)], check=False, stderr=subprocess.DEVNULL)
        server.terminate()
        server.wait()


def main() -> None:
    """Measures all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--latency", type=float, default=1.0, help="milliseconds that the slow disk waits (default: 1)")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []

    def run(label: str, candidates: list[str], **case: Any) -> None:
        found = interleave(__file__, candidates, case, arguments.runs, target=folder / "target")
        results.append({"case": label, "by": found})
        print(f"{label} measured", file=sys.stderr, flush=True)

    with work_folder(arguments.folder) as folder:
        disk = folder / "disk"
        side = int((arguments.gigabytes * 1e9 / 4 / 2) ** 0.5) // 128 * 128
        write_checkpoint(disk / "matrices.ckpt", {f"matrix{i}.weight": (side, side) for i in range(4)})
        small = {f"matrix{i}.weight": (512, 512) for i in range(int(arguments.gigabytes * 1e9 / 2**20))}
        write_checkpoint(disk / "small.ckpt", small)
        file = str(disk / "matrices.ckpt")
        for what in ("rows", "columns"):
            for cold in (False, True):
                run(f"{what}, {'cold' if cold else 'warm'}", list(READERS), file=file, what=what, cold=cold, disk=file)
        with slow(disk, arguments.latency) as mounted:
            for what in ("rows", "columns") if mounted else ():
                there = str(mounted / "matrices.ckpt")
                run(f"{what}, slow", list(READERS), file=there, what=what, cold=True, disk=there)
        sizes = {"cold": False, "disk": file}
        large = {"sizes": "slab", "what": "whole", "file": str(disk / "small.ckpt"), **sizes}
        run("slabs", [f"mapped {size}" for size in SLABS], **large)
        run("buffer for rows", [f"pieces {n}" for n in ROWS], sizes="rows", what="columns", file=file, **sizes)
    rows = []
    for result in results:
        for by, found in result["by"].items():
            m, best = found["median"], min(sample["wall"] for sample in found["samples"])
            name = by if not by.partition(" ")[2] else f"{int(by.partition(' ')[2]) // 1024} KiB"
            cells = (
                f"{m['wall']:.3f}",
                f"{best:.3f}",
                f"{m['cpu']:.3f}",
                f"{m['read'] / MIB:.0f}",
                f"{m['bytes'] / MIB:.0f}",
            )
            rows.append([f"{result['case']}: {name}", *cells])
    print(table(("case: by", "wall s", "fastest s", "CPU s", "read from disk MiB", "needed MiB"), rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    dispatch(child, main)
