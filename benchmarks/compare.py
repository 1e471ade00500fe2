"""Conversion against ``mindspore.transform_checkpoints`` and against ``cp``, side by side in one run.

    python benchmarks/compare.py [--gigabytes 1] [--runs 5] [--only float16 ...] [--against cp ...] [--folder /tmp/x]

LLaMA-like weights with Adam's moments go from one parallel strategy to another (OS: optimizer shard), as float16 and
bfloat16 ``.ckpt`` and as float16 ``.safetensors``. ``cp`` copies the bytes that a conversion must physically write; "cp and
sync" is the same with the disk waited for, as auto_trans waits for it before a file gets its name. "auto_trans (job)" is the
conversion as a job has it, which does not wait for the disk, by one converter, and "auto_trans (job, 2)" by two, each a
process that is forked from one that has imported everything. Where the target has replicas ``cp`` copies all target files.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from harness import Sample, add_arguments, dispatch, interleave, measure, table, work_folder
from synthetic import Shapes, llama_parameters, with_moments, write_checkpoint, write_strategy

from auto_trans import convert, merge_strategies
from auto_trans.conversion import plan_conversion
from auto_trans.coordination.election import elect
from auto_trans.request import Request
from auto_trans.storage.sources import as_strategy


@dataclass(frozen=True)
class Parallel:
    """A parallel strategy."""

    name: str
    dp: int = 1
    mp: int = 1
    pp: int = 1
    optimizer_shard: bool = False


MP8, MP4, MP4PP2 = Parallel("mp8", mp=8), Parallel("mp4", mp=4), Parallel("mp4pp2", mp=4, pp=2)
DP2MP4, DP4MP2 = Parallel("dp2mp4", dp=2, mp=4), Parallel("dp4mp2", dp=4, mp=2)
SHARDED, RESHARDED = Parallel("dp2mp4+OS", 2, 4, 1, True), Parallel("dp4mp2+OS", 4, 2, 1, True)
Case = tuple[Optional[Parallel], Optional[Parallel]]  # None: one complete file

CASES: list[Case] = [(MP8, MP4), (None, MP8), (MP4PP2, MP4), (MP8, None), (SHARDED, RESHARDED), (SHARDED, None)]
REPLICAS: list[Case] = [(None, DP2MP4), (None, DP4MP2)]
# candidate -> how many converters it has
JOBS = {"auto_trans (job)": 1, "auto_trans (job, 2)": 2}
OTHERS = ("mindspore", "cp", "cp and sync")
# group -> its type, its format, its cases, the candidates beside auto_trans
GROUPS: dict[str, tuple[str, str, list[Case], tuple[str, ...]]] = {
    "float16": ("Float16", "ckpt", CASES, OTHERS),
    "bfloat16": ("BFloat16", "ckpt", CASES, OTHERS),
    # what MindSpore does for safetensors does not begin with complete weights
    "safetensors": ("Float16", "safetensors", [c for c in CASES if c[0]], OTHERS),
    "replicas": ("Float16", "ckpt", REPLICAS, OTHERS[1:]),
    "job": ("Float16", "ckpt", [(MP8, MP4), (None, MP8), (MP4PP2, MP4), (SHARDED, RESHARDED)], (*JOBS, *OTHERS[1:])),
}


def run(name: str, case: dict[str, Any], target: Path) -> None:
    """Runs one candidate."""
    if name == "auto_trans":
        convert(case["source"], target, case["source_strategy"], case["target_strategy"])
        return
    if name in JOBS:
        convert_in_job(case, target, JOBS[name])
        return
    if name == "mindspore":
        import mindspore

        source = case["source"] if case["source_merged"] else str(Path(case["source"]).parents[1])
        if case["format"] == "safetensors" and not case["target_merged"]:
            mindspore.unified_safetensors(source, case["source_merged"], str(target))
        else:
            merged = case["source_merged"], case["target_merged"]
            mindspore.transform_checkpoints(source, str(target), "checkpoint_", *merged, output_format=case["format"])
        return
    subprocess.run(["cp", "-r", case["written"], str(target)], check=True)
    if name == "cp and sync":
        files = sorted(str(file) for file in target.rglob("rank_*/*"))
        subprocess.run(["sync", *files], check=True)


def convert_in_job(case: dict[str, Any], target: Path, converters: int) -> None:
    """Converts as the elected ranks of a job do, each its share of the ranks."""
    strategies = as_strategy(case["source_strategy"]), as_strategy(case["target_strategy"])
    others = []
    for own in elect(strategies[1].world_size, converters):
        request = Request(Path(case["source"]), target, *strategies, ranks=tuple(own.slices), durable=False)
        if own.rank:
            others.append(multiprocessing.get_context("fork").Process(target=convert_share, args=(request,)))
            others[-1].start()
        else:
            first = request
    convert_share(first)
    for other in others:
        other.join()
        if other.exitcode:
            raise RuntimeError(f"a converter ended with {other.exitcode}")


def convert_share(request: Request) -> None:
    """Converts the share of a converter."""
    plan_conversion(request).carry_out(quiet=True)


def child(name: str, case: dict[str, Any], target: Path) -> Sample:
    """Measures one run in this process."""
    if name == "mindspore":
        import mindspore  # noqa: F401 - its import is not charged
    return measure(lambda: run(name, case, target))


def prepare(folder: Path, shapes: Shapes, dtype: str, form: str, case: Case) -> dict[str, Any]:
    """Makes the input of a case."""
    complete = folder / "complete" / "rank_0" / f"llama.{form}"
    if not complete.exists():
        write_checkpoint(complete, shapes, dtype)
    facts: dict[str, Any] = {"name": case_name(case), "format": form, "source": str(complete)}
    for side, parallel in zip(("source", "target"), case):
        strategy = merged = None
        if parallel:
            options = parallel.dp, parallel.mp, parallel.pp
            strategy = folder / f"strategy_{parallel.name}"
            write_strategy(strategy, shapes, *options, optimizer_shard=parallel.optimizer_shard)
            merged = strategy / "ckpt_strategy_rank_0.ckpt"
            if parallel.pp > 1:
                merged = folder / f"merged_{parallel.name}.ckpt"
                if not merged.exists():
                    merge_strategies(strategy, merged)
        facts[f"{side}_strategy"], facts[f"{side}_merged"] = strategy and str(strategy), merged and str(merged)
    if case[0]:
        source = folder / f"source_{case[0].name}"
        if not source.exists():
            convert(complete, source, dst_strategy=facts["source_strategy"])
        facts["source"] = str(source)
    facts["written"] = str(folder / "written")
    report = convert(facts["source"], facts["written"], facts["source_strategy"], facts["target_strategy"])
    facts["bytes"] = report.bytes_written
    return facts


def case_name(case: Case) -> str:
    """Name of a case."""
    return " -> ".join(parallel.name if parallel else "full" for parallel in case)


def compare(
    group: str, against: Sequence[str], parent: Optional[Path], nbytes: int, runs: int
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs all cases of a group and shows a table of their medians."""
    dtype, form, cases, others = GROUPS[group]
    others = tuple(name for name in others if name in against)
    shapes = with_moments(llama_parameters(nbytes // 3))
    results = []
    with work_folder(parent) as folder:
        for case in cases:
            facts = prepare(folder, shapes, dtype, form, case)
            found = interleave(__file__, ("auto_trans", *others), facts, runs, target=folder / "target")
            shutil.rmtree(facts["written"])
            results.append({"group": group, "case": facts["name"], "bytes": facts["bytes"], "by": found})
            print(f"{group}: {facts['name']} measured", file=sys.stderr, flush=True)
    show(group, results)
    return results


def show(group: str, results: Sequence[dict[str, Any]]) -> None:
    """Prints the table of a group and the geometric means of its ratios."""
    rows, ratios = [], []
    for result in results:
        medians = {name: found["median"] for name, found in result["by"].items()}
        for name, m in medians.items():
            row = [f"{result['case']}: {name}", f"{m['wall']:.2f}", f"{m['cpu']:.2f}", f"{m['memory'] / 2**20:.0f}"]
            ours = medians["auto_trans"]
            ratio = [m[key] / ours[key] for key in ("wall", "cpu")]
            rows.append([*row, *(["", ""] if name == "auto_trans" else [f"{r:.2f}" for r in ratio])])
            ratios.append((name, *ratio))
    print(f"\n{group}\n")
    print(table(("case: by", "wall s", "CPU s", "memory MiB", "wall / ours", "CPU / ours"), rows))
    for name in dict.fromkeys(name for name, *_ in ratios if name != "auto_trans"):
        means = [_geometric_mean([ratio[i] for ratio in ratios if ratio[0] == name]) for i in (1, 2)]
        print(f"\n{name}, geometric mean: {means[0]:.2f} times our wall, {means[1]:.2f} times our CPU", flush=True)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    """Measures the groups asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="groups (default: all)")
    parser.add_argument(
        "--against", nargs="+", choices=(*JOBS, *OTHERS), default=(*JOBS, *OTHERS), help="candidates (default: all)"
    )
    arguments = parser.parse_args()
    results = []
    for group in arguments.only:
        results += compare(group, arguments.against, arguments.folder, int(arguments.gigabytes * 1e9), arguments.runs)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    dispatch(child, main)
