"""How the benchmarks measure: every run a process of its own, candidates interleaved, medians of the runs.

What is measured is a call (imports are not charged): wall time, CPU seconds (user and system, children too), the peak of
anonymous memory on top of what the process had before, and the bytes read from the disk.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional

__all__ = [
    "Sample", "add_arguments", "dispatch", "in_fork", "interleave", "interleave_forks", "measure", "table", "work_folder",
]  # fmt: skip

Sample = dict[str, float]


def measure(run: Callable[[], Any]) -> Sample:
    """Runs once and measures the call."""
    peak = before = _anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cpu, read, begin = _cpu(), _read(), time.perf_counter()
    run()
    sample = {"wall": time.perf_counter() - begin, "cpu": _cpu() - cpu, "read": float(_read() - read)}
    done.set()
    watcher.join()
    return {**sample, "memory": (max(peak, _anonymous()) - before) * 1024.0}


def dispatch(child: Callable[[str, dict[str, Any], Path], Sample], main: Callable[[], None]) -> None:
    """Runs a benchmark's ``main``, or in the processes that `interleave` starts its ``child``, and prints the sample."""
    if sys.argv[1:2] != ["--child"]:
        return main()
    sample = child(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
    print(f"\n{json.dumps(sample)}")  # some tools leave their last line open


def interleave(
    script: str, candidates: Sequence[str], case: Mapping[str, Any], runs: int, *, target: Path
) -> dict[str, dict[str, Any]]:
    """Runs ``script --child CANDIDATE CASE TARGET`` in turn, which prints a sample as JSON on its last line.

    The disk is idle when a run begins, and its output is removed afterwards. The first candidate runs once before, so that
    the input is cached for all.

    Returns:
        Candidate -> its median and its samples.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    for run in range(runs + 1):
        for name in candidates if run else candidates[:1]:
            os.sync()
            command = [sys.executable, script, "--child", name, json.dumps(case), str(target)]
            environ = {**os.environ, "GLOG_v": "3"}
            out = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=target.parent)
            if out.returncode:
                raise RuntimeError(f"{name} failed in {case}:\n{out.stdout[-2000:]}{out.stderr[-4000:]}")
            if run:
                samples[name].append(json.loads(out.stdout.strip().splitlines()[-1]))
            shutil.rmtree(target, ignore_errors=True)
    return _with_medians(samples)


def interleave_forks(run: Callable[[str], Sample], candidates: Sequence[str], runs: int) -> dict[str, dict[str, Any]]:
    """Runs candidates in turn, each run in a fork of this process, which has imported all that they need.

    For imports that take longer than what is measured. See `interleave`, which starts new processes, for the rest.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    for number in range(runs + 1):
        for name in candidates if number else candidates[:1]:
            os.sync()
            sample = in_fork(lambda name=name: run(name))  # type: ignore[misc]
            if number:
                samples[name].append(sample)
    return _with_medians(samples)


def in_fork(run: Callable[[], Any]) -> Any:
    """What a call returns in a fork of this process, where that is JSON.

    Raises:
        RuntimeError: It failed.
    """
    read, write = os.pipe()
    fork = os.fork()
    if not fork:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # progress bars
            os.write(write, json.dumps(run()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as f:
        found = f.read()
    if os.waitpid(fork, 0)[1]:
        raise RuntimeError("a run failed")
    return json.loads(found)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well in a terminal; all columns but the first are aligned right."""
    width = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    ruler = ["-" * width[0], *("-" * (n - 1) + ":" for n in width[1:])]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(width[0]), *(cell.rjust(n) for cell, n in zip(cells[1:], width[1:]))]
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(cells) for cells in (heads, ruler, *rows))


def add_arguments(parser: Any, runs: int = 5) -> None:
    """Adds the arguments that all benchmarks have."""
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (default: 1)")
    parser.add_argument("--runs", type=int, default=runs, help=f"measured runs of every candidate (default: {runs})")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, default=None, help="also write the results there")


@contextmanager
def work_folder(parent: Optional[Path] = None) -> Iterator[Path]:
    """A folder that is removed afterwards."""
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="auto_trans_benchmark_", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_medians(samples: Mapping[str, list[Sample]]) -> dict[str, dict[str, Any]]:
    return {
        name: {"median": {key: statistics.median(run[key] for run in runs) for key in runs[0]}, "samples": runs}
        for name, runs in samples.items()
    }


def _anonymous() -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon:"))


def _read() -> int:
    with open("/proc/self/io", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("read_bytes:"))


def _cpu() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)
