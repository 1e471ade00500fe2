"""Measures a direct load of one rank against MindSpore's loaders, side by side in one run.

    python benchmarks/load.py [--gigabytes 1] [--runs 5] [--only rank names] [--folder /tmp/x] [--json results.json]

"rank": LLaMA-like weights with Adam's moments lie as one parallel strategy saved them (OS: optimizer shard), and a rank of
another loads its slices. "direct" takes them from there: reads the strategies, plans, and assembles. "file" reads with
auto_trans, and "mindspore" with ``mindspore.load_checkpoint``, the file of this rank that is converted already.

"names": one complete safetensors set with its index, under HuggingFace's names, goes to four ranks. "direct" renames, plans
and assembles; "mindspore" is ``load_distributed_checkpoint`` with ``name_map``. Both load for rank 0, for which MindSpore
takes every process outside a job.

All give parameters of MindSpore, by name. MindSpore maps a safetensors file and reads it only when its parameters are used,
so two things are measured: the load, and the load with one use, in which the bytes of every parameter are copied once to a
buffer that is there already. That stands for the copy to a device. Imports are not charged, nor is what MindSpore sets up
for its first parameter; to read strategies is. Where ratios are goals: mindspore to direct, the load with its use.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

from compare import MP4, MP4PP2, MP8, RESHARDED, SHARDED, Case, Parallel, case_name
from compare import prepare as prepare_case
from harness import Sample, add_arguments, in_fork, interleave_forks, measure, table, work_folder
from synthetic import Shapes, llama_parameters, with_moments, write_checkpoint, write_strategy

from auto_trans import read_strategy
from auto_trans.arrays import find_slices
from auto_trans.core.edits import Rename
from auto_trans.core.rules import NOTHING
from auto_trans.core.strategy import Strategy
from auto_trans.loading import Loaded, Names, assemble, file_of_rank, find_file
from auto_trans.planned import Planned
from auto_trans.storage.sources import find_source

RANK = 3
CASES: list[Case] = [(MP8, MP4), (None, MP8), (MP4PP2, MP4), (SHARDED, RESHARDED)]
TYPES, FORMS, GROUPS = ("Float16", "BFloat16"), ("ckpt", "safetensors"), ("rank", "names")
FILES_OF_SET = 4
USED = ("wall used", "cpu used")
# the network's words for a parameter, and HuggingFace's
_WORDS = {
    "tok_embeddings.embedding_weight": "embed_tokens.weight", "attention.": "self_attn.", ".wq.": ".q_proj.",
    ".wk.": ".k_proj.", ".wv.": ".v_proj.", ".wo.": ".o_proj.", "feed_forward.": "mlp.", ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.", ".w3.": ".up_proj.", "attention_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.", "norm_out.": "norm.",
}  # fmt: skip


def load(name: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Loads with one candidate."""
    import mindspore

    from auto_trans.network import as_parameters

    if name == "mindspore" and "map" in case:
        return mindspore.load_distributed_checkpoint(
            mindspore.nn.Cell(), predict_strategy=case["target_file"], unified_safetensors_dir=case["stock"],
            format="safetensors", name_map=case["map"], return_param_dict=True,
        )  # fmt: skip
    if name == "mindspore":
        return mindspore.load_checkpoint(case["file"], format=case["format"])
    return as_parameters(slices(name, case))


def slices(name: str, case: Mapping[str, Any]) -> Iterator[Loaded]:
    """What auto_trans reads."""
    if name == "file":
        return assemble(find_file(Path(case["file"])))
    if "map" not in case:
        strategies = case["source_strategy"], case["target_strategy"]
        return assemble(find_slices(case["source"], RANK, *strategies, Names(), step=None, allowed=NOTHING))
    whole, target = Strategy.complete(), read_strategy(case["target_strategy"])
    checkpoint = find_source(case["source"], whole)
    planned = Planned(checkpoint, whole, target, [0], edits=(Rename(tuple(case["map"].items())),))
    return assemble(file_of_rank(planned, 0).tensors)


def as_bytes(parameter: Any) -> Any:
    """The bytes of a parameter, without a copy."""
    import numpy as np

    return parameter.asnumpy().reshape(-1).view(np.uint8)


def measure_one(name: str, case: Mapping[str, Any]) -> Sample:
    """Measures one load in this process."""
    import mindspore
    import numpy as np

    load(name, {**case, **case["warm_up"]})
    buffer = np.ones(case["largest"], np.uint8)
    held: dict[str, mindspore.Parameter] = {}

    def use() -> None:
        for parameter in held.values():
            data = as_bytes(parameter)
            buffer[: data.size] = data

    loaded = measure(lambda: held.update(load(name, case)))
    used = measure(use)
    both = {f"{key} used": loaded[key] + used[key] for key in ("wall", "cpu", "read")}
    return {**loaded, **both, "bytes": float(sum(as_bytes(one).size for one in held.values()))}


def check(case: Mapping[str, Any], candidates: Sequence[str]) -> bool:
    """Fails unless all candidates load the same."""
    ours, *others = [{name: as_bytes(one) for name, one in load(by, case).items()} for by in candidates]
    for by, other in zip(candidates[1:], others):
        wrong = [name for name in ours.keys() | other.keys() if not _alike(ours.get(name), other.get(name))]
        if wrong:
            raise RuntimeError(f"{candidates[0]} and {by} differ in {wrong[:3]} ({len(wrong)} in all)")
    return True


def _alike(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one.shape == other.shape and bool((one == other).all())


def prepare_rank(folder: Path, shapes: Shapes, dtype: str, form: str, case: Case) -> dict[str, Any]:
    """Makes the source of a case, and the file of this rank."""
    facts = prepare_case(folder, shapes, dtype, form, case)
    (file,) = Path(facts["written"], f"rank_{RANK}").glob(f"*.{form}")
    return {**facts, "file": str(file)}


def huggingface_name(name: str) -> str:
    """The name that HuggingFace gives a parameter."""
    for ours, theirs in _WORDS.items():
        name = name.replace(ours, theirs)
    return name


def prepare_names(folder: Path, shapes: Shapes, dtype: str, parallel: Parallel) -> dict[str, Any]:
    """Makes a complete set under other names, and the strategy that it is loaded under."""
    strategy = write_strategy(folder / "strategy", shapes, parallel.dp, parallel.mp)
    names, source = {name: huggingface_name(name) for name in shapes}, folder / "huggingface"
    size, parts = sum(map(math.prod, shapes.values())), [dict[str, tuple[int, ...]]() for _ in range(FILES_OF_SET)]
    done = 0
    for name, shape in shapes.items():
        parts[min(done * FILES_OF_SET // size, FILES_OF_SET - 1)][names[name]] = shape
        done += math.prod(shape)
    where = {}
    for number, part in enumerate(parts, 1):
        file = source / f"model-{number:05}-of-{FILES_OF_SET:05}.safetensors"
        write_checkpoint(file, part, dtype)
        where.update(dict.fromkeys(part, file.name))
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    stock = folder / "mindspore"  # the same files, with the index that MindSpore wants
    shutil.copytree(source, stock, copy_function=os.link, ignore=shutil.ignore_patterns("*.json"))
    (stock / "param_name_map.json").write_text(json.dumps({name: where[names[name]] for name in shapes}))
    return {
        "source": str(source), "stock": str(stock), "target_strategy": str(strategy), "map": names, "format": "safetensors",
        "target_file": str(strategy / "ckpt_strategy_rank_0.ckpt"),
    }  # fmt: skip


def measure_case(what: str, case: dict[str, Any], candidates: Sequence[str], runs: int) -> dict[str, Any]:
    """Checks and measures all candidates."""
    import mindspore  # noqa: F401 - once for all that is forked

    in_fork(lambda: check(case, candidates))
    found = interleave_forks(lambda name: measure_one(name, case), candidates, runs)
    print(f"{what} measured", file=sys.stderr, flush=True)
    return {"case": what, "by": found}


def measure_rank(parent: Any, nbytes: int, runs: int, dtype: str, form: str) -> list[dict[str, Any]]:
    """Measures what one rank loads, with all cases of a type and a format."""
    small = with_moments(llama_parameters(0))
    shapes, results = with_moments(llama_parameters(nbytes // 3)), []
    for case in CASES:
        with work_folder(parent) as folder:
            warm_up = prepare_rank(folder / "small", small, dtype, form, case)
            facts = prepare_rank(folder / "large", shapes, dtype, form, case)
            facts.update(warm_up=warm_up, largest=2 * max(map(math.prod, shapes.values())))
            what = f"{case_name(case)}, {dtype.lower()} {form}"
            results.append(measure_case(what, facts, ("direct", "file", "mindspore"), runs))
    return results


def measure_names(parent: Any, nbytes: int, runs: int, dtype: str) -> list[dict[str, Any]]:
    """Measures what one rank loads of weights under other names."""
    shapes = llama_parameters(nbytes)
    with work_folder(parent) as folder:
        case = prepare_names(folder / "large", shapes, dtype, MP4)
        warm_up = prepare_names(folder / "small", llama_parameters(0), dtype, MP4)
        case.update(warm_up=warm_up, largest=2 * max(map(math.prod, shapes.values())))
        return [measure_case(f"HuggingFace -> mp4, {dtype.lower()}", case, ("direct", "mindspore"), runs)]


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Prints a table of medians, and the geometric means of the ratios of medians and of the fastest runs."""
    rows = []
    ratios: dict[str, list[list[float]]] = {}
    for result in results:
        ours, ours_best = (_statistic(result["by"]["direct"], how) for how in (statistics.median, min))
        for by, found in result["by"].items():
            m, best = (_statistic(found, how) for how in (statistics.median, min))
            cells = [f"{m[key]:.2f}" for key in USED] + [f"{best[key]:.3f}" for key in ("wall", *USED)]
            cells += [f"{m['memory'] / 2**20:.0f}", f"{m['bytes'] / 2**20:.0f}"]
            found_ratios = [one[key] / other[key] for one, other in ((ours, m), (ours_best, best)) for key in USED]
            name = f"{result['case']}: {by}"
            rows.append([name, *cells, *("" if by == "direct" else f"{ratio:.2f}" for ratio in found_ratios)])
            ratios.setdefault(by, []).append(found_ratios)
    heads = ["and use s", "CPU s", "fastest load s", "and use s", "CPU s", "memory MiB", "slices MiB"]
    heads += ["direct / this", "CPU", "fastest", "CPU"]
    print(table(("case: by", *heads), rows))
    for by in (by for by in ratios if by != "direct"):
        means = [f"{math.exp(statistics.fmean(map(math.log, column))):.2f}" for column in zip(*ratios[by])]
        print(
            "\ndirect takes {} of the wall time of {by} and {} of its CPU; in the fastest runs {} and {}".format(
                *means, by=by
            )
        )
    sys.stdout.flush()


def _statistic(found: Mapping[str, Any], how: Callable[[list[float]], float]) -> dict[str, float]:
    samples = found["samples"]
    return {key: how([sample[key] for sample in samples]) for key in samples[0]}


def main() -> None:
    """Measures the groups asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="groups (default: all)")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, help="types (default: both)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="formats of ranks (default: both)")
    arguments = parser.parse_args()
    parent, nbytes, runs = arguments.folder, int(arguments.gigabytes * 1e9), arguments.runs
    results: list[dict[str, Any]] = []
    for group in arguments.only:
        found: list[dict[str, Any]] = []
        for dtype in arguments.types:
            for form in arguments.forms if group == "rank" else ():
                found += measure_rank(parent, nbytes, runs, dtype, form)
            if group == "names":
                found += measure_names(parent, nbytes, runs, dtype)
        print(f"\n{group}\n")
        show(found)
        results += [{"group": group, **result} for result in found]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
