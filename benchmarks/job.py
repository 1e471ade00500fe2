"""Measures the start of a job against MindSpore's own way, side by side in one run.

    python benchmarks/job.py [--gigabytes 1] [--runs 5] [--types Float16 ...] [--forms ckpt ...] [--folder /tmp/x]
        [--json results.json]

The slices of eight ranks are loaded by four, each a process with a network of its slices. "stock" is what MindFormers calls
on a safetensors job: ``unified_safetensors`` on rank 0 while the others wait, then ``load_distributed_checkpoint`` on every
rank (outside a real job it takes every rank for rank 0: the work is the same); for ``.ckpt`` it is ``transform_checkpoints``
on rank 0 and ``load_checkpoint`` on every rank. "auto_trans" is the session of all ranks with two converters, then every
rank's own file. "direct" is the session in which every rank loads its slices straight from the old files. All end in
``load_param_into_net`` and one copy of every parameter to a buffer that is there already, in place of that to a device. Wall
time is that of the last rank, to the end of the conversion (of the merge) and to the end of the load; CPU seconds are those
of all ranks, and memory is the most that a rank takes for one of the two. Imports and the network are not charged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
from harness import Sample, add_arguments, dispatch, interleave, measure, table, work_folder
from synthetic import llama_parameters, write_checkpoint, write_strategy

from auto_trans import convert, read_strategy
from auto_trans.config import Timing
from auto_trans.coordination.election import elect
from auto_trans.coordination.session import Session
from auto_trans.core.strategy import Strategy
from auto_trans.load_together import SharedLoad, load_together
from auto_trans.loading import assemble, find_file
from auto_trans.network import as_parameters
from auto_trans.request import Request
from auto_trans.storage.formats import scan
from auto_trans.together import SharedConversion, convert_together

RANKS, CONVERTERS = 4, 2
TIMES = ("convert", "wall", "cpu")
TYPES, FORMS = ("Float16", "BFloat16"), ("ckpt", "safetensors")


class Rank:
    """What a rank of either candidate does; a barrier lies between its steps where the candidate has one."""

    def __init__(self, rank: int, case: dict[str, Any], target: Path, barrier: Any) -> None:
        self.rank, self.case, self.target, self.barrier = rank, case, target, barrier

    def prepare(self) -> None:
        """What is not measured: imports, and the network."""
        import mindspore
        from mindspore import nn
        from mindspore.common.initializer import initializer

        dtype = getattr(mindspore, self.case["dtype"])

        class Slices(nn.Cell):
            def __init__(self, file: str) -> None:
                super().__init__()
                for i, (name, tensor) in enumerate(scan(Path(file)).tensors.items()):
                    data = initializer("zeros", tensor.shape, dtype)
                    setattr(self, f"p{i}", mindspore.Parameter(data, name=name))

        (file,) = Path(self.case["reference"], f"rank_{self.rank}").iterdir()
        self.network, self.buffer = Slices(str(file)), np.ones(file.stat().st_size, np.uint8)

    def convert(self) -> None:
        """What comes before the load."""

    def use(self) -> None:
        """Uses all parameters once."""
        for parameter in self.network.get_parameters():
            data = parameter.asnumpy().reshape(-1).view(np.uint8)
            self.buffer[: data.size] = data


class Ours(Rank):
    """Converters write every rank's file."""

    def convert(self) -> None:
        """Converts together."""
        request = Request(
            Path(self.case["source"]), self.target / "out", read_strategy(self.case["old"]), Strategy.complete(),
            format=self.case["format"], durable=False,
        )  # fmt: skip
        shared = SharedConversion(
            request, self.target / "strategy", lambda: read_strategy(self.case["new"]), self.target / "report.json",
            elect(RANKS, CONVERTERS), Timing(),
        )  # fmt: skip
        convert_together(Session.join(self.target / "session", self.rank, RANKS), shared)

    def load(self) -> None:
        """Loads this rank's slices."""
        import mindspore

        (file,) = (self.target / "out" / "slices" / f"rank_{self.rank}").iterdir()
        mindspore.load_param_into_net(self.network, as_parameters(assemble(find_file(file))))


class Direct(Rank):
    """Nothing is converted."""

    def load(self) -> None:
        """Loads this rank's slices."""
        import mindspore

        shared = SharedLoad(
            Path(self.case["source"]), lambda: read_strategy(self.case["old"]), self.target / "strategy",
            lambda: read_strategy(self.case["new"]), self.target / "report.json",
        )  # fmt: skip
        session = Session.join(self.target / "session", self.rank, RANKS)
        mindspore.load_param_into_net(self.network, load_together(session, shared, as_parameters))


class Stock(Rank):
    """Rank 0 merges, and every rank slices."""

    def convert(self) -> None:
        """Merges on rank 0."""
        import mindspore

        strategies = [_file(self.case[side]) for side in ("old", "new")]
        if self.rank == 0 and self.case["format"] == "ckpt":
            mindspore.transform_checkpoints(self.case["source"], str(self.target / "out"), "checkpoint_", *strategies)
        elif self.rank == 0:
            mindspore.unified_safetensors(self.case["source"], strategies[0], str(self.target / "unified"))
        self.barrier.wait()

    def load(self) -> None:
        """Loads this rank's slices."""
        import mindspore

        if self.case["format"] == "ckpt":
            (file,) = (self.target / "out" / f"rank_{self.rank}").iterdir()
            mindspore.load_param_into_net(self.network, mindspore.load_checkpoint(str(file)))
            return
        mindspore.load_distributed_checkpoint(
            self.network, predict_strategy=_file(self.case["new"]), format="safetensors", rank_id=self.rank,
            unified_safetensors_dir=str(self.target / "unified"),
        )  # fmt: skip


CANDIDATES: dict[str, type[Any]] = {"direct": Direct, "auto_trans": Ours, "stock": Stock}


def _file(strategy: str) -> str:
    return f"{strategy}/ckpt_strategy_rank_0.ckpt"


def live(by: str, rank: int, case: dict[str, Any], target: Path, barrier: Any, samples: Any) -> None:
    """The process of a rank."""
    one = CANDIDATES[by](rank, case, target, barrier)
    one.prepare()
    barrier.wait()
    converted = measure(one.convert)
    loaded = measure(lambda: (one.load(), one.use()))
    samples.put((rank, converted, loaded))
    if rank == 0:
        check(one.network, Path(case["reference"], "rank_0"))


def check(network: Any, reference: Path) -> None:
    """Fails unless the network holds what it should."""
    import mindspore

    (file,) = reference.iterdir()
    for name, parameter in mindspore.load_checkpoint(str(file), format=file.suffix[1:]).items():
        held = network.parameters_dict()[name]
        if not (held.float().asnumpy() == parameter.float().asnumpy()).all():
            raise RuntimeError(f"{name} is loaded wrong")


def child(by: str, case: dict[str, Any], target: Path) -> Sample:
    """Measures one start of a job."""
    import mindspore  # noqa: F401 - once for all ranks

    context = multiprocessing.get_context("fork")
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
    walls = {rank: converted["wall"] + loaded["wall"] for rank, converted, loaded in found}
    steps = [step for _, *steps in found for step in steps]
    return {
        "convert": max(converted["wall"] for _, converted, _ in found),
        "wall": max(walls.values()),
        "cpu": sum(step["cpu"] for step in steps),
        "memory": max(step["memory"] for step in steps),
        **{f"wall of rank {rank}": walls[rank] for rank in sorted(walls)},
    }


def prepare(folder: Path, nbytes: int, dtype: str, form: str) -> dict[str, str]:
    """Makes the slices of eight ranks, and what four ranks are to load."""
    shapes = llama_parameters(nbytes)
    write_checkpoint(folder / "llama.ckpt", shapes, dtype)
    old, new = write_strategy(folder / "mp8", shapes, mp=8), write_strategy(folder / "mp4", shapes, mp=4)
    for target, strategy in ((folder / "slices", old), (folder / "reference", new)):
        convert(folder / "llama.ckpt", target, None, strategy, format=form)
        for manifest in target.glob("*.json"):
            manifest.unlink()
    (folder / "llama.ckpt").unlink()
    places = {"source": folder / "slices", "reference": folder / "reference", "old": old, "new": new}
    return {"dtype": dtype.lower(), "format": form, **{name: str(path) for name, path in places.items()}}


def main() -> None:
    """Prepares, runs, and shows a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, help="types (default: both)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="formats (default: both)")
    arguments = parser.parse_args()
    results, rows = [], []
    for dtype, form in itertools.product(arguments.types, arguments.forms):
        with work_folder(arguments.folder) as folder:
            case = prepare(folder, int(arguments.gigabytes * 1e9), dtype, form)
            found = interleave(__file__, list(CANDIDATES), case, arguments.runs, target=folder / "target")
        results.append({"job": f"{form} 8 -> 4, {dtype}", "by": found})
        print(f"{dtype} {form} measured", file=sys.stderr, flush=True)
        stock = found["stock"]["median"]
        for by, m in ((by, result["median"]) for by, result in found.items()):
            row = [f"{dtype.lower()} {form}: {by}", *(f"{m[key]:.2f}" for key in TIMES), f"{m['memory'] / 2**20:.0f}"]
            rows.append([*row, *("" if m is stock else f"{stock[key] / m[key]:.1f}" for key in TIMES[1:])])
    heads = ("8 -> 4 ranks: by", "convert s", "and load s", "CPU s", "memory MiB", "stock / this, wall", "CPU")
    print(table(heads, rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    dispatch(child, main)
