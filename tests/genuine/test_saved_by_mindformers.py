"""Checkpoint 2.0: what MindFormers has saved, what it writes and what it reads, against boxes of the full weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from builders import layouts, strategy
from checkpoint2_files import COMMON, GENUINE
from hypothesis import HealthCheck, assume, given, settings

from auto_trans import convert, read_strategy
from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy, is_optimizer_state
from auto_trans.errors import LayoutError
from auto_trans.merge_safetensors import merge_safetensors
from auto_trans.storage.sources import find_checkpoints
from auto_trans.verify import verify_against

TESTS = Path(__file__).parents[1]
# put there by scripts/test.sh; the first whose reader and writer are those of today
MINDFORMERS = Path(sys.prefix) / "other_mindformers" / "1.9.0"
ROUND_TRIPS = [(model, case) for model, cases in oracle.CASES.items() for case in cases]
READ = [
    ("mf_llama", "dp2mp2_opt", "dp1mp2"),
    ("mf_llama", "dp2mp2pp2", "dp2mp2"),
    ("mf_llama", "dp2mp1", "dp2mp2pp2"),
    ("mf_llama", "dp1mp1", "dp1mp2"),
    ("toy", "dp2mp4_lay", "dp1mp1"),
    ("toy_moe", "dp2mp2ep2", "dp1mp1"),
]
NUMBERS = {
    "epoch_num": np.int64(1), "step_num": np.int64(7), "global_step": np.array([7], np.int32),
    "loss_scale": np.float32(1), "global_batch_size": np.int64(16),
}  # fmt: skip


def truth() -> dict[str, oracle.Raw]:
    """The full tensors as they were saved: weights but norms as bfloat16, rounded to the nearest."""
    found = {}
    for name, array in np.load(GENUINE / "truth.npz").items():
        if is_optimizer_state(name) or "norm" in name:
            found[name] = oracle.raw(array)
        else:
            bits = array.view(np.uint32)
            found[name] = oracle.raw((bits + 0x7FFF + (bits >> 16 & 1)).view(np.float32), "BFloat16")
    return found


def cut(raw: oracle.Raw, box) -> oracle.Raw:
    """A box of a tensor."""
    item = np.dtype({"BFloat16": np.uint16}.get(raw.dtype, raw.dtype.lower()))
    array = np.frombuffer(raw.content, item).reshape(raw.dims)[box.slices()]
    return oracle.Raw(raw.dtype, array.shape, array.tobytes())


def of_four_dimensions(name: str, ndim: int) -> Layout:
    """Weights over mp, moments over dp, too; the matrices that lead back on their other dimension."""
    dims = ((0,),) if ndim == 1 or not name.endswith("wo.weight") else ((), (0,))
    sliced = dims if ndim > 1 else ()
    return Layout((2, 2), sliced, -1, 2 if sliced else 1) if is_optimizer_state(name) else Layout((2, 2), sliced)


def targets() -> dict[str, Strategy]:
    full = truth()
    one = {name: of_four_dimensions(name, len(raw.dims)) for name, raw in full.items()}
    rows = {name: Layout((4,), ((0,),)) for name in full}
    stages = {
        name: {(name.rsplit("layers.", 1)[-1][0] != "0") * 1: Layout((2,), ((),) * (len(raw.dims) - 1) + ((0,),))}
        for name, raw in full.items()
    }
    return {
        "dp2mp2_opt": strategy(one),
        "rows": strategy(rows),
        "two stages": strategy(stages, stages=2),
        "two ranks": strategy({name: Layout((2,), ((0,),)) for name in full}),
    }


class TestWhatMindFormersHasSaved:
    @pytest.mark.parametrize("target", targets())
    @pytest.mark.parametrize("format", ["ckpt", "safetensors"])
    def test_every_slice_is_the_box_of_the_truth(self, tmp_path, target, format):
        sliced = targets()[target]
        convert(GENUINE / "dp2mp2_unique", tmp_path, None, sliced, format=format, check_replicas=True)
        for rank in range(sliced.world_size):
            got = read(tmp_path / f"rank_{rank}" / f"checkpoint_{rank}.{format}")
            expected = {name: oracle.raw(np.asarray(number)) for name, number in NUMBERS.items()}
            for name, raw in truth().items():
                layout = sliced.layout(name, sliced.stage_of(rank))
                if layout is not None:
                    expected[name] = cut(raw, layout.box(rank % sliced.stage_devices, raw.dims))
            assert got == expected

    def test_merged_it_is_the_truth(self, tmp_path):
        merge_safetensors(GENUINE / "dp2mp2_unique", tmp_path)
        assert read(tmp_path / "model-00001-of-00001.safetensors") == truth()
        assert set(read(tmp_path / "hyper_param.safetensors")) == set(NUMBERS)

    def test_iteration_folder_is_the_same(self, tmp_path):
        convert(GENUINE / "dp2mp2_unique" / "iteration_00000007", tmp_path, format="ckpt")
        got = read(tmp_path / "rank_0" / "checkpoint_0.ckpt")
        assert {name: raw for name, raw in got.items() if name not in NUMBERS} == truth()

    def test_one_rank_is_model_and_optimizer_together(self, tmp_path):
        convert(GENUINE / "one_rank", tmp_path)
        folder = GENUINE / "one_rank" / "iteration_00000016"
        held = {name: raw for file in folder.glob("*.safetensors") for name, raw in read(file).items()}
        got = read(tmp_path / "rank_0" / "checkpoint_0.safetensors")
        assert {name: got[name] for name in held} == held
        assert set(got) - set(held) == set(NUMBERS) - {"global_step"}, "the optimizer's own global_step is in its file"

    def test_one_rank_is_sliced(self, tmp_path):
        folder = GENUINE / "one_rank" / "iteration_00000016"
        held = {name: raw for file in folder.glob("*.safetensors") for name, raw in read(file).items()}
        rows = strategy({name: Layout((2,), ((0,),)) for name in held if name != "global_step"})
        convert(GENUINE / "one_rank", tmp_path, None, rows)
        for rank in range(2):
            got = read(tmp_path / f"rank_{rank}" / f"checkpoint_{rank}.safetensors")
            for name in rows.names():
                assert got[name] == cut(held[name], rows.layouts[name][0].box(rank, held[name].dims))

    def test_to_checkpoint_2_it_is_the_same_again(self, tmp_path):
        sliced = targets()["dp2mp2_opt"]
        convert(GENUINE / "dp2mp2_unique", tmp_path / "again", None, sliced, format="checkpoint2", prefix="tiny")
        convert(tmp_path / "again", tmp_path / "whole", format="ckpt")
        convert(GENUINE / "dp2mp2_unique", tmp_path / "expected", format="ckpt")
        file = Path("rank_0") / "checkpoint_0.ckpt"
        assert read(tmp_path / "whole" / file) == read(tmp_path / "expected" / file)
        folder = tmp_path / "again" / "iteration_00000007"
        original = GENUINE / "dp2mp2_unique" / "iteration_00000007"
        assert json.loads((folder / "common.json").read_text()) == json.loads((original / "common.json").read_text())
        (found,) = find_checkpoints(original)
        (again,) = find_checkpoints(tmp_path / "again")
        for name, tensor in found.saved.tensors.items():
            assert again.saved.tensors[name].shape == tensor.shape and again.saved.tensors[name].dtype == tensor.dtype
        assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in original.iterdir())


class TestThereAndBack:
    @pytest.mark.parametrize(("model", "case"), ROUND_TRIPS, ids=["-".join(trip) for trip in ROUND_TRIPS])
    def test_rank_folders_are_the_same_again(self, genuine, tmp_path, model, case):
        weights = genuine.model(model)
        source, sliced = genuine.source(model, case), weights.strategy(case)
        convert(source, tmp_path / "new", sliced, sliced, format="checkpoint2")
        assert (tmp_path / "new" / "latest_checkpointed_iteration.txt").is_file()
        convert(tmp_path / "new", tmp_path / "back", None, sliced, format="ckpt", check_replicas=True)
        for rank in weights.slices(case):
            (original,) = (source / f"rank_{rank}").iterdir()
            got = read(tmp_path / "back" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
            expected = read(original)
            assert {name: raw for name, raw in got.items() if name in expected} == expected
            assert set(got) - set(expected) <= {"global_step"}, "which MindFormers wants beside optimizer state"

    def test_numbers_go_to_common_and_back(self, tmp_path):
        tensors = {name: oracle.raw(np.asarray(number)) for name, number in NUMBERS.items()}
        tensors["w"] = oracle.raw(np.arange(4, dtype=np.float32))
        oracle.write_raw(tmp_path / "src" / "rank_0" / "net_rank_0-1_3.ckpt", tensors)
        sliced = strategy({"w": Layout((2,), ((0,),))})
        convert(tmp_path / "src" / "rank_0", tmp_path / "new", None, sliced, format="checkpoint2")
        common = json.loads((tmp_path / "new" / "iteration_00000007" / "common.json").read_text())
        assert common == {**COMMON, "epoch_num": 1, "global_step": 7, "loss_scale": 1.0, "global_batch_size": 16}
        convert(tmp_path / "new", tmp_path / "back", format="ckpt")
        assert read(tmp_path / "back" / "rank_0" / "checkpoint_0.ckpt") == tensors

    @pytest.mark.parametrize(
        ("tensors", "name", "iteration"),
        [
            ({"global_step": np.array([12], np.int32)}, "net_rank_0-1_3.ckpt", 12),
            ({"global_step": np.array([12], np.int32), "step_num": np.int64(14)}, "net_rank_0-1_3.ckpt", 14),
            ({"global_step": np.array([-1], np.int32)}, "net_rank_0-1_3.ckpt", 3),
            ({}, "net_rank_0-1_3.ckpt", 3),
            ({}, "net.ckpt", 0),
            ({"global_step": np.float32(12)}, "net.ckpt", 12),
        ],
    )
    def test_iteration_is_that_of_the_step(self, tmp_path, tensors, name, iteration, caplog):
        raws = {
            "w": oracle.raw(np.arange(4, dtype=np.float32)),
            **{n: oracle.raw(np.asarray(a)) for n, a in tensors.items()},
        }
        oracle.write_raw(tmp_path / "src" / "rank_0" / name, raws)
        whole = strategy({"w": Layout((1,))})
        convert(tmp_path / "src", tmp_path / "new", whole, format="checkpoint2")
        (folder,) = (tmp_path / "new").glob("iteration_*")
        assert folder.name == f"iteration_{iteration:08d}"
        assert (tmp_path / "new" / "latest_checkpointed_iteration.txt").read_text() == str(iteration)
        assert sorted(file.name for file in folder.iterdir()) == ["common.json", "model-0000000-0000001.safetensors"]
        assert "the source does not tell epoch_num" in caplog.text

    def test_parameter_of_two_stages_is_told_as_that_of_the_first(self, tmp_path):
        rows, columns = Layout((2,), ((0,),)), Layout((2,), ((), (0,)))
        tied = strategy({"tied": {0: rows, 1: columns}, "w": {1: rows}}, stages=2)
        full = {"tied": np.arange(16, dtype=np.float32).reshape(4, 4), "w": np.arange(4, dtype=np.float32)}
        oracle.write_raw(tmp_path / "full.ckpt", {name: oracle.raw(array) for name, array in full.items()})
        convert(tmp_path / "full.ckpt", tmp_path / "new", None, tied, format="checkpoint2")
        (found,) = find_checkpoints(tmp_path / "new")
        assert found.saved.tensors["tied"].ranks == (0, 1)
        convert(tmp_path / "new", tmp_path / "back", None, tied, format="ckpt")
        for rank in range(4):
            got = read(tmp_path / "back" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
            layout = tied.layout("tied", rank // 2)
            assert got["tied"] == oracle.raw(np.array(full["tied"][layout.box(rank % 2, (4, 4)).slices()]))

    def test_optimizer_state_has_a_step(self, tmp_path):
        """Without, MindFormers loads no optimizer; it is none of the parameters that are compared with the source."""
        weights = {"w": np.arange(4, dtype=np.float32), "adam_m.w": np.arange(4, dtype=np.float32)}
        oracle.write_raw(
            tmp_path / "src" / "rank_0" / "net_rank_0-1_3.ckpt", {n: oracle.raw(a) for n, a in weights.items()}
        )
        sliced = strategy({name: Layout((2,), ((0,),)) for name in weights})
        convert(tmp_path / "src" / "rank_0", tmp_path / "new", None, sliced, format="checkpoint2")
        assert json.loads(next((tmp_path / "new").glob("*/common.json")).read_text())["global_step"] == 3
        (original,) = find_checkpoints(tmp_path / "src" / "rank_0")
        assert verify_against(tmp_path / "new", original, Strategy.complete(), sliced) == ([], 32)

    @settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(layout=layouts(), other=layouts())
    def test_any_layouts(self, tmp_path_factory, layout, other):
        folder = tmp_path_factory.mktemp("any")
        ndim = max(len(layout.tensor_map), len(other.tensor_map))
        try:
            shape = [3 * a * b for a, b in zip(layout.grid(ndim), other.grid(ndim))]
        except LayoutError:
            assume(False)
        full = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        oracle.write_raw(folder / "full.ckpt", {"w": oracle.raw(full)})
        source, target = strategy({"w": layout}), strategy({"w": other})
        try:
            convert(folder / "full.ckpt", folder / "new", None, source, format="checkpoint2")
        except LayoutError as e:
            assume("cannot be written as axes" not in str(e))
            raise
        convert(folder / "new", folder / "back", None, target, format="ckpt", check_replicas=True)
        for rank in range(target.world_size):
            got = read(folder / "back" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
            assert got["w"] == oracle.raw(full[other.box(rank, tuple(shape)).slices()])


@pytest.mark.mindspore
class TestMindFormers:
    """MindFormers' own reader and writer, in a process of its own."""

    @pytest.mark.parametrize(("model", "case", "target"), READ)
    def test_it_loads_what_we_write(self, genuine, tmp_path, model, case, target):
        weights = genuine.model(model)
        sliced = weights.strategy(case)
        # on a CPU MindFormers does not reshard bfloat16
        source = oracle.save_genuine(tmp_path / "src", weights.slices(case), dict.fromkeys(weights.dtypes, "Float32"))
        convert(source, tmp_path / "new", sliced, sliced, format="checkpoint2")
        job = compiled_layouts(weights, target)
        whole = {"0": {name: None for parameters in job.values() for name in parameters}}
        for name in ("job", "whole"):
            (tmp_path / name).mkdir()
        (tmp_path / "wanted.json").write_text(json.dumps({str(tmp_path / "job"): job, str(tmp_path / "whole"): whole}))
        run(tmp_path, "mindformers_reader.py", tmp_path / "new", tmp_path / "wanted.json")
        for name, ranks in (("job", job), ("whole", whole)):
            for rank, parameters in ranks.items():
                got = np.load(tmp_path / name / f"rank_{rank}.npz")
                expected = weights.full if name == "whole" else weights.slices(target)[int(rank)]
                assert set(got) == set(parameters)
                assert all(np.array_equal(got[name], expected[name]) for name in parameters)

    @pytest.mark.parametrize("case", ["dp2mp1", "dp2mp2pp2"])
    def test_we_read_what_it_writes(self, genuine, tmp_path, case):
        weights = genuine.model("mf_llama")
        wanted = compiled_layouts(weights, case)
        names = {name for parameters in wanted.values() for name in parameters}
        np.savez(tmp_path / "full.npz", **{n: weights.full[n] for n in names}, global_step=np.array([5], np.int32))
        for (
            parameters
        ) in wanted.values():  # the moments of the embedding are sliced over dp, too, as by optimizer shard
            name = "adam_m.model.tok_embeddings.embedding_weight"
            if name in parameters:
                parameters[name]["tensor_map"][0] = list(range(len(parameters[name]["device_matrix"])))
        job = {"root": str(tmp_path / "new"), "iteration": 5, "prefix": "mf", "arrays": str(tmp_path / "full.npz")}
        (tmp_path / "job.json").write_text(json.dumps({**job, "layouts": wanted}))
        run(tmp_path, "mindformers_writer.py", tmp_path / "job.json")
        convert(tmp_path / "new", tmp_path / "whole", format="ckpt", check_replicas=True)
        got = read(tmp_path / "whole" / "rank_0" / "checkpoint_0.ckpt")
        assert set(got) == names | set(NUMBERS)
        assert all(got[name] == oracle.raw(weights.full[name]) for name in names)
        target = weights.strategy("dp1mp2")
        convert(tmp_path / "new", tmp_path / "sliced", None, target, format="ckpt")
        for rank, boxes in weights.slices("dp1mp2").items():
            got = read(tmp_path / "sliced" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
            assert all(got[name] == oracle.raw(boxes[name]) for name in read_strategy(target).names() if name in names)


def read(file: Path) -> dict[str, oracle.Raw]:
    """The tensors of a file of either format, with MindSpore's names of the types."""
    if file.suffix == ".ckpt":
        return oracle.read_raw(file)
    names = {"F32": "Float32", "BF16": "BFloat16", "I32": "Int32", "I64": "Int64"}
    return {name: raw._replace(dtype=names[raw.dtype]) for name, raw in oracle.read_safetensors_raw(file).items()}


def compiled_layouts(weights: oracle.Genuine, case: str) -> dict[str, dict[str, dict]]:
    """Rank -> parameter -> the layout that MindSpore's compiler reported."""
    compiled = json.loads((oracle.DATA / weights.model / case / "compiled_layout.json").read_text())
    found: dict[str, dict[str, dict]] = {}
    for rank, facts in compiled.items():
        for name, (matrix, tensor_map, *_) in facts["layout"].items():
            devices = int(np.prod(matrix))
            first = int(rank) // devices * devices
            if not name.startswith("accu_grads."):
                found.setdefault(rank, {})[name] = {
                    "device_matrix": matrix,
                    "tensor_map": tensor_map,
                    "rank_list": list(range(first, first + devices)),
                    "shape": list(weights.full[name].shape),
                }
    return found


def run(folder: Path, program: str, *arguments: Path) -> None:
    assert MINDFORMERS.is_dir(), f"run scripts/test.sh, which installs MindFormers {MINDFORMERS.name} there"
    done = subprocess.run(
        [sys.executable, str(TESTS / program), *map(str, arguments)], capture_output=True, text=True, timeout=300,
        cwd=folder, env={**os.environ, "PYTHONPATH": str(MINDFORMERS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
