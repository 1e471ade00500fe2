"""Measures the start of a safetensors job against MindFormers' own, side by side in one run.

    python benchmarks/job.py [--gigabytes 1] [--runs 5] [--folder /tmp/x] [--json results.json]

The slices of eight ranks are loaded by four, each a process with a network of its slices. "stock" is what
MindFormers calls: ``unified_safetensors`` on rank 0 while the others wait, then ``load_distributed_checkpoint`` on every
rank. "auto_trans" is the session of all ranks with two converters, then ``load_checkpoint`` and ``load_param_into_net`` of
every rank's own file. Wall time is that of the last rank, to the end of the conversion (of the merge) and to the end of the
load; CPU seconds are those of all ranks, and memory is what the busiest rank takes before it loads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import sys
from pathlib import Path
from typing import Any

from harness import Sample, add_arguments, dispatch, interleave, measure, table, work_folder
from synthetic import llama_parameters, write_checkpoint, write_strategy

from auto_trans import convert, read_strategy
from auto_trans.config import Timing
from auto_trans.coordination.election import elect
from auto_trans.coordination.session import Session
from auto_trans.core.strategy import Strategy
from auto_trans.request import Request
from auto_trans.together import SharedConversion, convert_together

RANKS, CONVERTERS = 4, 2
TIMES = ("convert", "wall", "cpu")


class Rank:
    """What a rank of either candidate does; a barrier lies between its steps where the candidate has one."""

    def __init__(self, rank: int, case: dict[str, Any], target: Path, barrier: Any) -> None:
        self.rank, self.case, self.target, self.barrier = rank, case, target, barrier

    def prepare(self) -> None:
        """What is not measured: imports, and the network."""
        import mindspore
        from mindspore import nn
        from mindspore.common.initializer import initializer
        from safetensors import safe_open

        dtype = getattr(mindspore, self.case["dtype"])

        class Slices(nn.Cell):
            def __init__(self, file: str) -> None:
                super().__init__()
                with safe_open(file, framework="np") as tensors:
                    for i, name in enumerate(tensors.keys()):
                        shape = tensors.get_slice(name).get_shape()
                        data = initializer("zeros", shape, dtype)
                        setattr(self, f"p{i}", mindspore.Parameter(data, name=name))

        (file,) = Path(self.case["reference"], f"rank_{self.rank}").iterdir()
        self.network = Slices(str(file))


class Ours(Rank):
    """Converters write every rank's file."""

    def convert(self) -> None:
        """Converts together."""
        request = Request(
            Path(self.case["source"]), self.target / "out", read_strategy(self.case["old"]), Strategy.complete(),
            format="safetensors", durable=False,
        )  # fmt: skip
        shared = SharedConversion(
            request, self.target / "strategy", lambda: read_strategy(self.case["new"]), self.target / "report.json",
            elect(RANKS, CONVERTERS), Timing(),
        )  # fmt: skip
        convert_together(Session.join(self.target / "session", self.rank, RANKS), shared)

    def load(self) -> None:
        """Loads this rank's slices."""
        import mindspore

        file = self.target / "out" / "slices" / f"rank_{self.rank}" / f"checkpoint_{self.rank}.safetensors"
        held = mindspore.load_checkpoint(str(file), format="safetensors")
        mindspore.load_param_into_net(self.network, held)


class Stock(Rank):
    """Rank 0 merges, and every rank slices."""

    def convert(self) -> None:
        """Merges on rank 0."""
        import mindspore

        if self.rank == 0:
            mindspore.unified_safetensors(self.case["source"], _file(self.case["old"]), str(self.target / "unified"))
        self.barrier.wait()

    def load(self) -> None:
        """Loads this rank's slices."""
        import mindspore

        mindspore.load_distributed_checkpoint(
            self.network, predict_strategy=_file(self.case["new"]), format="safetensors", rank_id=self.rank,
            unified_safetensors_dir=str(self.target / "unified"),
        )  # fmt: skip


CANDIDATES: dict[str, type[Any]] = {"auto_trans": Ours, "stock": Stock}


def _file(strategy: str) -> str:
    return f"{strategy}/ckpt_strategy_rank_0.ckpt"


def live(by: str, rank: int, case: dict[str, Any], target: Path, barrier: Any, samples: Any) -> None:
    """The process of a rank."""
    one = CANDIDATES[by](rank, case, target, barrier)
    one.prepare()
    barrier.wait()
    samples.put([measure(one.convert), measure(one.load)])
    if rank == 0:
        check(one.network, Path(case["reference"], "rank_0"))


def check(network: Any, reference: Path) -> None:
    """Fails unless the network holds what it should."""
    import mindspore

    (file,) = reference.iterdir()
    for name, parameter in mindspore.load_checkpoint(str(file), format="safetensors").items():
        held = network.parameters_dict()[name]
        if not (held.float().asnumpy() == parameter.float().asnumpy()).all():
            raise RuntimeError(f"{name} is loaded wrong")


def child(by: str, case: dict[str, Any], target: Path) -> Sample:
    """Measures one start of a job."""
    context = multiprocessing.get_context("spawn")
    barrier, samples = context.Barrier(RANKS), context.Queue()
    target.mkdir()
    ranks = [context.Process(target=live, args=(by, r, case, target, barrier, samples)) for r in range(RANKS)]
    for rank in ranks:
        rank.start()
    found: list[Any] = []
    while len(found) < RANKS:
        try:
            found.append(samples.get(timeout=5))
        except queue.Empty:
            if any(rank.exitcode for rank in ranks):
                for rank in ranks:
                    rank.kill()
                raise RuntimeError("a rank failed") from None
    for rank in ranks:
        rank.join()
        if rank.exitcode:
            raise RuntimeError(f"a rank ended with {rank.exitcode}")
    return {
        "convert": max(steps[0]["wall"] for steps in found),
        "wall": max(sum(step["wall"] for step in steps) for steps in found),
        "cpu": sum(step["cpu"] for steps in found for step in steps),
        "memory": max(steps[0]["memory"] for steps in found),
    }


def prepare(folder: Path, nbytes: int, dtype: str) -> dict[str, str]:
    """Makes the slices of eight ranks, and what four ranks are to load."""
    shapes = llama_parameters(nbytes)
    write_checkpoint(folder / "llama.ckpt", shapes, dtype)
    old, new = write_strategy(folder / "mp8", shapes, mp=8), write_strategy(folder / "mp4", shapes, mp=4)
    for target, strategy in ((folder / "slices", old), (folder / "reference", new)):
        convert(folder / "llama.ckpt", target, None, strategy, format="safetensors")
        for manifest in target.glob("*.json"):
            manifest.unlink()
    (folder / "llama.ckpt").unlink()
    places = {"source": folder / "slices", "reference": folder / "reference", "old": old, "new": new}
    return {"dtype": dtype.lower(), **{name: str(path) for name, path in places.items()}}


def main() -> None:
    """Prepares, runs, and shows a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    results, rows = [], []
    for dtype in ("Float16", "BFloat16"):
        with work_folder(arguments.folder) as folder:
            case = prepare(folder, int(arguments.gigabytes * 1e9), dtype)
            found = interleave(__file__, list(CANDIDATES), case, arguments.runs, target=folder / "target")
        results.append({"job": f"safetensors 8 -> 4, {dtype}", "by": found})
        ours = found["auto_trans"]["median"]
        for by, m in ((by, result["median"]) for by, result in found.items()):
            row = [f"{dtype}: {by}", *(f"{m[key]:.2f}" for key in TIMES), f"{m['memory'] / 2**20:.0f}"]
            rows.append([*row, *("" if m is ours else f"{m[key] / ours[key]:.1f}" for key in TIMES)])
    heads = ("8 -> 4 ranks: by", "convert s", "and load s", "CPU s", "memory MiB", *(f"{key} / ours" for key in TIMES))
    print(table(heads, rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    dispatch(child, main)
