"""Measures auto_trans against ``mindspore.transform_checkpoints`` and ``cp``, side by side in one run.

    python benchmarks/compare.py [--gigabytes 1] [--runs 3] [--folder /tmp/x] [--json results.json]

Every run is a process of its own; what is measured is the call (MindSpore's import is not charged): wall time, CPU seconds
(user and system), and the peak of anonymous memory on top of what the process had before. The runs of the candidates are
interleaved and medians are shown. ``cp`` copies the bytes that a conversion must physically write.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any, Callable

from synthetic import llama_parameters, write_checkpoint, write_strategy

from auto_trans import convert, merge_strategies

# name, source (dp, mp, pp), target (dp, mp, pp); None = one complete file
CASES: list[tuple[str, Any, Any]] = [
    ("full -> mp8", None, (1, 8, 1)),
    ("mp8 -> mp4", (1, 8, 1), (1, 4, 1)),
    ("mp4pp2 -> mp4", (1, 4, 2), (1, 4, 1)),
    ("mp8 -> full", (1, 8, 1), None),
]
CANDIDATES = ("auto_trans", "mindspore", "cp")


def run_ours(case: dict[str, Any], target: Path) -> None:
    convert(case["source"], target, case["source_strategy"], case["target_strategy"])


def run_mindspore(case: dict[str, Any], target: Path) -> None:
    import mindspore

    folder = case["source"] if case["source_strategy"] else str(Path(case["source"]).parents[1])
    mindspore.transform_checkpoints(folder, str(target), "checkpoint_", case["source_merged"], case["target_merged"])


def run_cp(case: dict[str, Any], target: Path) -> None:
    subprocess.run(["cp", "-r", case["written"], str(target)], check=True)


def measure(run: Callable[[dict[str, Any], Path], None], case: dict[str, Any], target: Path) -> dict[str, float]:
    """Runs once and measures the call."""
    peak = before = _anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cpu, begin = _cpu(), time.perf_counter()
    run(case, target)
    result = {"wall": time.perf_counter() - begin, "cpu": _cpu() - cpu, "memory": (peak - before) * 1024.0}
    done.set()
    return result


def _anonymous() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon:"))


def _cpu() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def child(name: str, case: dict[str, Any], target: Path) -> None:
    """Measures one run in this process and prints the result."""
    if name == "mindspore":
        import mindspore  # noqa: F401 - its import is not charged
    run = {"auto_trans": run_ours, "mindspore": run_mindspore, "cp": run_cp}[name]
    print("RESULT", json.dumps(measure(run, case, target)))


def prepare(folder: Path, nbytes: int, dtype: str) -> list[dict[str, Any]]:
    """Makes the inputs of all cases."""
    shapes = llama_parameters(nbytes)
    complete = folder / "complete" / "rank_0" / "llama.ckpt"
    write_checkpoint(complete, shapes, dtype)
    cases = []
    for name, source, target in CASES:
        case: dict[str, Any] = {"name": name, "source": str(complete)}
        for side, parallel in (("source", source), ("target", target)):
            strategy = merged = None
            if parallel:
                strategy = write_strategy(folder / f"strategy_{'_'.join(map(str, parallel))}", shapes, *parallel)
                merged = strategy / "ckpt_strategy_rank_0.ckpt"
                if parallel[2] > 1:
                    merged = merge_strategies(strategy, folder / f"merged_{'_'.join(map(str, parallel))}.ckpt")
            case[f"{side}_strategy"], case[f"{side}_merged"] = strategy and str(strategy), merged and str(merged)
        if source:
            made = folder / f"source_{'_'.join(map(str, source))}"
            if not made.exists():
                convert(complete, made, dst_strategy=case["source_strategy"])
            case["source"] = str(made)
        case["written"] = str(folder / "written" / name.replace(" ", ""))
        report = convert(case["source"], case["written"], case["source_strategy"], case["target_strategy"])
        case["bytes"] = report.bytes_written
        cases.append(case)
    return cases


def main() -> None:
    """Prepares, runs, and shows a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the weights (default: 1)")
    parser.add_argument("--runs", type=int, default=3, help="runs of every candidate (default: 3)")
    parser.add_argument("--dtype", default="Float16", choices=["Float16", "BFloat16", "Float32"])
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, default=None, help="also write the results there")
    arguments = parser.parse_args()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="auto_trans_benchmark_", dir=arguments.folder))
    try:
        results = compare(folder, arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def compare(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all candidates on all cases, interleaved."""
    results = []
    head = f"{'case':<15} {'by':<11} {'wall s':>8} {'CPU s':>8} {'memory MiB':>11}"
    print(f"{head}   against mindspore: wall, CPU; against cp: wall")
    for case in prepare(folder, int(arguments.gigabytes * 1e9), arguments.dtype):
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
        for _ in range(arguments.runs):
            for name in CANDIDATES:
                target = folder / "target"
                command = [sys.executable, __file__, "--child", name, json.dumps(case), str(target)]
                out = subprocess.run(
                    command, check=True, capture_output=True, text=True, env={**os.environ, "GLOG_v": "3"}
                )
                samples[name].append(json.loads(out.stdout.split("RESULT", 1)[1]))
                shutil.rmtree(target)
        medians = {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for name, runs in samples.items()
        }
        for name, m in medians.items():
            ratios = ""
            if name == "auto_trans":
                theirs, cp = medians["mindspore"], medians["cp"]
                ratios = f"   {theirs['wall'] / m['wall']:.1f}x faster, {theirs['cpu'] / m['cpu']:.1f}x less; "
                ratios += f"{m['wall'] / cp['wall']:.2f}x cp"
            print(
                f"{case['name']:<15} {name:<11} {m['wall']:>8.2f} {m['cpu']:>8.2f} {m['memory'] / 2**20:>11.1f}{ratios}"
            )
        sys.stdout.flush()
        results.append({"case": case["name"], "bytes": case["bytes"], "medians": medians, "samples": samples})
    return results


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
