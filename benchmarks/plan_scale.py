"""Measures planning at scale, without tensors: a 405B-like model on up to thousands of ranks.

    python benchmarks/plan_scale.py [--layers 126] [--ranks 64 512 4096 8192] [--json results.json]

The model has 126 layers (about 1,100 parameters, with Adam moments 3,400). Each conversion goes from dp * 8 * 8 (data,
tensor, pipeline parallelism) to half the data parallelism and twice the stages; 4,096 ranks are dp64 mp8 pp8 -> dp32 mp8
pp16. Replicated, data parallel ranks hold the same; with optimizer shard (OS) every rank holds something else. Shown are
time and memory of the whole plan, the time of one rank's plan, and what the converters read and write by
transform_process_num.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harness import table

from auto_trans.coordination.election import elect
from auto_trans.core.layout import Layout
from auto_trans.core.planning import make_plan
from auto_trans.core.source import SlicedSource
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import Extent, SourceFile
from auto_trans.core.work import share_out
from auto_trans.sizes import format_bytes

_HIDDEN, _FEED, _VOCABULARY, _KV = 16384, 53248, 128256, 1024
_SLICED = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
_PROCESSES = (1, 8, 64, 512)


class Meta(NamedTuple):
    """A tensor that is nowhere stored."""

    dtype: str
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    nbytes: int
    segments: tuple[Extent, ...]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> Meta:
        """A slice of a parameter; the moments are float32."""
        dtype, item = ("Float32", 4) if name.startswith("adam") else ("BFloat16", 2)
        nbytes = item * math.prod(shape)
        return cls(dtype, shape, shape, nbytes, ((0, nbytes),))


@dataclass
class Index:
    """The heads that the files of a job would have; no files are needed to plan."""

    strategy: Strategy
    shapes: Mapping[str, tuple[int, ...]]
    _stages: dict[int, dict[str, Meta]] = field(default_factory=dict)
    _files: dict[int, SourceFile] = field(default_factory=dict)

    @property
    def ranks(self) -> Sequence[int]:
        """All ranks."""
        return range(self.strategy.world_size)

    def tensors(self, rank: int) -> Mapping[str, Meta]:
        """The slices of a rank."""
        stage = self.strategy.stage_of(rank)  # all ranks of a stage have slices of the same shape
        if stage not in self._stages:
            self._stages[stage] = {
                name: Meta.of(name, self.strategy.layouts[name][stage].slice_shape(self.shapes[name]))
                for name in self.strategy.names(stage)
            }
        return self._stages[stage]

    def file(self, rank: int, name: str) -> SourceFile:
        """The file of a rank."""
        if rank not in self._files:
            self._files[rank] = SourceFile(self.describe(rank), 0, 0, rank)
        return self._files[rank]

    def describe(self, rank: int) -> str:
        """A name."""
        return f"rank_{rank}"


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, moments included."""
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.embedding_weight": (_VOCABULARY, _HIDDEN)}
    for i in range(layers):
        for name, shape in {
            "wq": (_HIDDEN, _HIDDEN), "wk": (_KV, _HIDDEN), "wv": (_KV, _HIDDEN), "wo": (_HIDDEN, _HIDDEN),
            "w1": (_FEED, _HIDDEN), "w2": (_HIDDEN, _FEED), "w3": (_FEED, _HIDDEN),
            "attention_norm": (_HIDDEN,), "ffn_norm": (_HIDDEN,),
        }.items():  # fmt: skip
            shapes[f"layers.{i}.{name}.weight"] = shape
    shapes["norm_out.weight"], shapes["lm_head.weight"] = (_HIDDEN,), (_VOCABULARY, _HIDDEN)
    return {**shapes, **{f"adam_{m}.{n}": s for n, s in shapes.items() for m in "mv"}}


def strategy_of(
    shapes: Mapping[str, tuple[int, ...]], layers: int, dp: int, mp: int, pp: int, *, optimizer_shard: bool
) -> Strategy:
    """The strategy of a job with these parallelisms."""
    layouts: dict[str, dict[int, Layout]] = {}
    for name, shape in shapes.items():
        block = int(name.partition("layers.")[2].split(".")[0]) if "layers." in name else 0
        stage = block * pp // layers if "layers." in name else (0 if "tok" in name else pp - 1)
        sliced = _SLICED.get(name.split(".")[-2])
        tensor_map = tuple((0,) if dim == sliced else () for dim in range(len(shape)))
        replicas, step = (dp * mp, 1) if sliced is None else (dp, mp)
        rows = shape[0] // mp if sliced == 0 else shape[0]
        shard = (math.gcd(rows, replicas), step) if optimizer_shard and len(shape) > 1 else (0, 0)
        layouts[name] = {stage: Layout((dp, mp), tensor_map, *shard, ndims=(len(shape),))}
    name = f"dp{dp} mp{mp} pp{pp}" + " OS" * optimizer_shard
    return Strategy(pp, dp * mp, layouts, origin=name)


def measure(ranks: int, layers: int, *, optimizer_shard: bool) -> dict[str, Any]:
    """Plans one conversion in this process."""
    shapes = shapes_of(layers)
    stages = 8 if ranks >= 512 else 2
    dp = ranks // 8 // stages
    source = strategy_of(shapes, layers, dp, 8, stages, optimizer_shard=optimizer_shard)
    target = strategy_of(shapes, layers, dp // 2, 8, stages * 2, optimizer_shard=optimizer_shard)
    begin = time.perf_counter()
    make_plan(SlicedSource(source, Index(source, shapes)), target, [ranks // 2])
    one = time.perf_counter() - begin
    before = _peak()
    begin = time.perf_counter()
    plan = make_plan(SlicedSource(source, Index(source, shapes)), target)
    whole = time.perf_counter() - begin
    memory = _peak() - before
    converters = {}
    for number in (n for n in _PROCESSES if n <= ranks):
        found = share_out(plan, [assignment.slices for assignment in elect(ranks, number)])
        converters[number] = {
            "busiest_reads": max(share.read for share in found),
            "busiest_writes": max(share.written for share in found),
            "all_write": sum(share.written for share in found),
            "writing": sum(share.written > 0 for share in found),
        }
    return {
        "source": source.origin, "target": target.origin, "ranks": ranks, "parameters": len(shapes), "seconds": whole,
        "one_rank_seconds": one, "memory": memory, "distinct_files": len(plan.files),
        "distinct_slices": sum(len(file.tensors) for file in plan.files), "bytes": plan.nbytes, "converters": converters,
    }  # fmt: skip


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measures every size in a process of its own, and shows a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=126)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512, 4096, 8192])
    parser.add_argument("--json", type=Path, default=None, help="also write the results there")
    parser.add_argument("--child", nargs=2, type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        ranks, sharded = arguments.child
        print(json.dumps(measure(ranks, arguments.layers, optimizer_shard=bool(sharded))))
        return
    results = []
    for ranks, sharded in itertools.product(arguments.ranks, (0, 1)):
        command = [sys.executable, __file__, "--layers", str(arguments.layers), "--child", str(ranks), str(sharded)]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"{results[-1]['target']} planned", file=sys.stderr, flush=True)
    heads = "ranks", "from", "to", "plan s", "one rank s", "memory MiB", "distinct files", "distinct slices"
    rows = [
        [
            str(r["ranks"]), r["source"], r["target"], f"{r['seconds']:.2f}", f"{r['one_rank_seconds']:.2f}",
            f"{r['memory'] / 2**20:.0f}", f"{r['distinct_files']:,}", f"{r['distinct_slices']:,}",
        ]
        for r in results
    ]  # fmt: skip
    print(table(heads, rows))
    heads = "to", "transform_process_num", "busiest reads", "busiest writes", "all write", "converters that write"
    rows = [
        [
            r["target"], number, format_bytes(c["busiest_reads"]), format_bytes(c["busiest_writes"]),
            format_bytes(c["all_write"]), str(c["writing"]),
        ]
        for r in results
        for number, c in r["converters"].items()
    ]  # fmt: skip
    print(f"\n{table(heads, rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
