"""Measures LoRA and safetensors merging against MindFormers' and MindSpore's own, side by side in one run.

    python benchmarks/merge.py [--gigabytes 1] [--runs 3] [--folder /tmp/x] [--json results.json]

Measured as in compare.py: every run a process of its own, the call alone, medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

import numpy as np
from compare import measure
from synthetic import llama_parameters, write_checkpoint, write_strategy

from auto_trans import convert
from auto_trans.merge_lora import merge_lora
from auto_trans.merge_safetensors import merge_safetensors


def ours_lora(case: dict[str, Any], target: Path) -> None:
    merge_lora(case["source"], target, scaling=2)


def stock_lora(case: dict[str, Any], target: Path) -> None:
    target.mkdir()
    sys.argv = ["x", "--src_ckpt_path_or_dir", case["source"], "--dst_ckpt_dir", str(target), "--lora_scaling", "2"]
    runpy.run_module("mindformers.tools.transform_ckpt_lora", run_name="__main__")


def ours_safetensors(case: dict[str, Any], target: Path) -> None:
    merge_safetensors(case["source"], target, case["strategy"])


def stock_safetensors(case: dict[str, Any], target: Path) -> None:
    import mindspore

    mindspore.unified_safetensors(case["source"], f"{case['strategy']}/ckpt_strategy_rank_0.ckpt", str(target))


RUNS: dict[str, dict[str, Callable[[dict[str, Any], Path], None]]] = {
    "LoRA": {"auto_trans": ours_lora, "stock": stock_lora},
    "safetensors": {"auto_trans": ours_safetensors, "stock": stock_safetensors},
}


def child(name: str, by: str, case: dict[str, Any], target: Path) -> None:
    """Measures one run in this process and prints the result."""
    if by == "stock":  # imports are not charged
        import mindspore  # noqa: F401

        if name == "LoRA":
            import mindformers.tools.transform_ckpt  # noqa: F401
    print("RESULT", json.dumps(measure(RUNS[name][by], case, target)))


def prepare(folder: Path, nbytes: int) -> dict[str, dict[str, Any]]:
    """Makes a complete float32 checkpoint with LoRA matrices, and float16 safetensors slices of eight ranks."""
    shapes = llama_parameters(nbytes, 4)
    for name in [n for n in shapes if n.endswith(("wq.weight", "wk.weight", "wv.weight", "wo.weight"))]:
        rows, columns = shapes[name]
        shapes[name.replace("weight", "mindpet_delta_lora_a")] = (16, columns)
        shapes[name.replace("weight", "mindpet_delta_lora_b")] = (rows, 16)
    write_checkpoint(folder / "lora.ckpt", shapes, "Float32")
    shapes = llama_parameters(nbytes)
    write_checkpoint(folder / "llama.ckpt", shapes)
    strategy = write_strategy(folder / "mp8", shapes, mp=8)
    convert(folder / "llama.ckpt", folder / "slices", None, strategy, format="safetensors")
    return {
        "LoRA": {"source": str(folder / "lora.ckpt")},
        "safetensors": {"source": str(folder / "slices"), "strategy": str(strategy)},
    }


def main() -> None:
    """Prepares, runs, and shows a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the weights (default: 1)")
    parser.add_argument("--runs", type=int, default=3, help="runs of every candidate (default: 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, default=None, help="also write the results there")
    arguments = parser.parse_args()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="auto_trans_benchmark_", dir=arguments.folder))
    results = []
    try:
        cases = prepare(folder, int(arguments.gigabytes * 1e9))
        print(f"{'merge':<12} {'by':<11} {'wall s':>8} {'CPU s':>8} {'memory MiB':>11}")
        for name, case in cases.items():
            samples: dict[str, list[dict[str, float]]] = {by: [] for by in RUNS[name]}
            for _ in range(arguments.runs):
                for by in samples:
                    command = [sys.executable, __file__, "--child", name, by, json.dumps(case), str(folder / "target")]
                    environ = {**os.environ, "GLOG_v": "3"}
                    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environ, cwd=folder)
                    samples[by].append(json.loads(out.stdout.split("RESULT", 1)[1]))
                    shutil.rmtree(folder / "target")
            for by, runs in samples.items():
                median = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
                print(
                    f"{name:<12} {by:<11} {median['wall']:>8.2f} {median['cpu']:>8.2f} {median['memory'] / 2**20:>11.1f}"
                )
                results.append({"merge": name, "by": by, "median": median, "samples": runs})
            sys.stdout.flush()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), Path(sys.argv[5]))
    else:
        main()
