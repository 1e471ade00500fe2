"""Measures what must stay small: memory at any size, start-up, what one rank reads; and what a second process brings.

    python benchmarks/limits.py [--gigabytes 1] [--runs 5] [--folder /tmp/x] [--tmpfs /dev/shm] [--json results.json]

Memory is the peak of anonymous memory, of complete weights cut for eight ranks of tensor parallelism. The processes work on
tmpfs, so that the disk does not count. One of 64 ranks is converted from weights that are not cached; half of a layer's
bytes lie in rows of which it needs a 64th, and the pages between are read by the kernel's read-ahead.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import Sample, add_arguments, dispatch, interleave, measure, table, work_folder
from synthetic import llama_parameters, with_moments, write_checkpoint, write_strategy

from auto_trans import convert
from auto_trans.sizes import format_bytes

_STARTS = {
    "python -c pass": ["-c", "pass"],
    "import auto_trans": ["-c", "import auto_trans"],
    "auto-trans --help": ["-c", "from auto_trans.cli.main import main; main()", "--help"],
}


def child(name: str, case: dict[str, Any], target: Path) -> Sample:
    """Measures one run in this process."""
    source, strategy = case["source"], case["strategy"]
    if name.startswith("rank"):
        _forget(Path(source))
        sample = measure(lambda: convert(source, target, None, strategy, ranks=[0]))
        return {**sample, "written": (target / "rank_0" / "checkpoint_0.ckpt").stat().st_size}
    if name.startswith("process"):
        number = int(name.split()[1])
        return measure(lambda: convert(source, target, None, strategy, processes=number))
    return measure(lambda: convert(source, target, None, strategy, memory_limit=name))


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory by size of the checkpoint and by limit."""
    results = []
    for factor in (1, 4, 8):
        with work_folder(arguments.folder) as folder:
            nbytes = int(arguments.gigabytes * factor * 1e9)
            case = _inputs(folder, nbytes, 8)
            found = interleave(__file__, ("64MiB", "4MiB"), case, 1, target=folder / "target")
        results += [{"bytes": nbytes, "limit": limit, **by["median"]} for limit, by in found.items()]
    rows = [[format_bytes(r["bytes"]), r["limit"], f"{r['memory'] / 2**20:.1f}", f"{r['wall']:.2f}"] for r in results]
    print(f"\nmemory\n\n{table(('checkpoint', '--memory', 'peak MiB', 'wall s'), rows)}", flush=True)
    return results


def processes(arguments: argparse.Namespace) -> dict[str, Any]:
    """One and two worker processes on tmpfs; the start of the workers counts."""
    with work_folder(arguments.tmpfs) as folder:
        case = _inputs(folder, int(arguments.gigabytes * 2e9), 8)
        found = interleave(__file__, ("process 1", "process 2"), case, arguments.runs, target=folder / "target")
    walls = [by["median"]["wall"] for by in found.values()]
    rows = [[name, f"{by['median']['wall']:.2f}", f"{by['median']['cpu']:.2f}"] for name, by in found.items()]
    print(
        f"\nprocesses\n\n{table(('by', 'wall s', 'CPU s'), rows)}\n\n{walls[0] / walls[1]:.2f} times as fast",
        flush=True,
    )
    return found


def one_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 of 64 reads."""
    with work_folder(arguments.folder) as folder:
        # one layer with rows as long as those of a large model
        shapes = llama_parameters(int(arguments.gigabytes * 2e9), layers=1)
        shapes = {name: tuple(n // 64 * 64 for n in shape) for name, shape in shapes.items()}
        nbytes = write_checkpoint(folder / "source.ckpt", shapes)
        strategy = write_strategy(folder / "strategy", shapes, mp=64)
        case = {"source": str(folder / "source.ckpt"), "strategy": str(strategy)}
        found = interleave(__file__, ("rank 0",), case, arguments.runs, target=folder / "target")["rank 0"]
    m = found["median"]
    row = [*(format_bytes(n) for n in (nbytes, m["written"], m["read"])), f"{m['wall']:.2f}"]
    heads = "source", "needed", "read from disk", "wall s"
    print(f"\none rank of 64\n\n{table(heads, [row])}", flush=True)
    return {"bytes": nbytes, **found}


def start_up(runs: int) -> dict[str, Any]:
    """Time of short-lived interpreters, and of what the .pth file has every interpreter do."""
    compileall.compile_dir(Path(__file__).parents[1] / "auto_trans", quiet=1)  # as pip does when it installs
    samples: dict[str, list[float]] = {name: [] for name in _STARTS}
    for _ in range(runs * 4):
        for name, command in _STARTS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            samples[name].append(time.perf_counter() - begin)
    line = (Path(__file__).parents[1] / "auto_trans.pth").read_text(encoding="ascii").strip()
    code = f"import os, site, time; begin = time.perf_counter(); {line}; print(time.perf_counter() - begin)"
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    samples["the line of the .pth"] = [
        float(subprocess.run([sys.executable, "-S", "-c", code], env=environ, check=True, capture_output=True).stdout)
        for _ in range(runs * 4)
    ]
    medians = {name: statistics.median(found) for name, found in samples.items()}
    rows = [[name, f"{1000 * median:.1f}"] for name, median in medians.items()]
    print(f"\nstart-up\n\n{table(('what', 'ms'), rows)}", flush=True)
    return {"median": medians, "samples": samples}


def _inputs(folder: Path, nbytes: int, mp: int) -> dict[str, str]:
    shapes = with_moments(llama_parameters(nbytes // 3))
    write_checkpoint(folder / "source.ckpt", shapes)
    strategy = write_strategy(folder / "strategy", shapes, mp=mp)
    return {"source": str(folder / "source.ckpt"), "strategy": str(strategy)}


def _forget(path: Path) -> None:
    """Has the kernel drop what it has cached of a file."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measures all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="folder in memory (default: /dev/shm)")
    arguments = parser.parse_args()
    results = {
        "start-up": start_up(arguments.runs),
        "one rank of 64": one_rank(arguments),
        "processes": processes(arguments),
        "memory": memory(arguments),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    dispatch(child, main)
