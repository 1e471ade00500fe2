"""Measures LoRA and safetensors merging against MindFormers' and MindSpore's own, side by side in one run.

    python benchmarks/merge.py [--gigabytes 1] [--runs 5] [--folder /tmp/x] [--json results.json]

Complete float32 weights with LoRA matrices, and the float16 slices of eight ranks.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any, Callable

from harness import Sample, add_arguments, dispatch, interleave, measure, table, work_folder
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


def child(by: str, case: dict[str, Any], target: Path) -> Sample:
    """Measures one run in this process."""
    if by == "stock":  # imports are not charged
        import mindspore  # noqa: F401

        if case["name"] == "LoRA":
            import mindformers.tools.transform_ckpt  # noqa: F401
    return measure(lambda: RUNS[case["name"]][by](case, target))


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
    add_arguments(parser)
    arguments = parser.parse_args()
    results, rows = [], []
    with work_folder(arguments.folder) as folder:
        for name, case in prepare(folder, int(arguments.gigabytes * 1e9)).items():
            found = interleave(
                __file__, list(RUNS[name]), {"name": name, **case}, arguments.runs, target=folder / "target"
            )
            results.append({"merge": name, "by": found})
            ours = found["auto_trans"]["median"]
            for by, m in ((by, result["median"]) for by, result in found.items()):
                row = [f"{name}: {by}", f"{m['wall']:.2f}", f"{m['cpu']:.2f}", f"{m['memory'] / 2**20:.0f}"]
                ratios = ["", ""] if m is ours else [f"{m[key] / ours[key]:.2f}" for key in ("wall", "cpu")]
                rows.append([*row, *ratios])
            print(f"{name} measured", file=sys.stderr, flush=True)
    print(table(("merge: by", "wall s", "CPU s", "memory MiB", "wall / ours", "CPU / ours"), rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    dispatch(child, main)
