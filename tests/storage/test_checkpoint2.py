"""Checkpoint 2.0: which iteration is meant, what metadata.json and common.json tell, and what contradicts itself."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from typing import ClassVar

import numpy as np
import oracle
import pytest
from builders import request, strategy
from checkpoint2_files import COMMON, GENUINE, change, write_iteration

from auto_trans.conversion import Conversion, plan_conversion
from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import Box
from auto_trans.errors import (
    AutoTransError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)
from auto_trans.storage.checkpoint import Checkpoint
from auto_trans.storage.checkpoint2.common import Common, read_common
from auto_trans.storage.checkpoint2.find import is_checkpoint2
from auto_trans.storage.checkpoint2.metadata import format_metadata, parse_metadata, read_metadata
from auto_trans.storage.scanned import ScannedFiles
from auto_trans.storage.sources import find_checkpoints, find_sources

NAME = "model.layers.0.attention.wq.weight"
MODEL_0 = "tiny-model-0000000-0000004.safetensors"
SLICED = strategy({"w": Layout((2, 2), ((1,), (0,))), "adam_m.w": Layout((2, 2), ((1,), (0,))), "norm": Layout((2, 2))})
FULL = {
    "w": np.arange(16, dtype=np.float32).reshape(4, 4),
    "adam_m.w": np.arange(16, 32, dtype=np.float32).reshape(4, 4),
    "norm": np.arange(4, dtype=np.float32),
}


@pytest.fixture
def root(tmp_path):
    """A copy of the genuine checkpoint of four ranks."""
    return shutil.copytree(GENUINE / "dp2mp2_unique", tmp_path / "root")


@pytest.fixture
def folder(root):
    """Its iteration."""
    return root / "iteration_00000007"


def found_at(path, **choices):
    (found,) = find_checkpoints(path, **choices)
    return found


def planned(path):
    return plan_conversion(request(path, path.parent / "out"))


class TestWhichIteration:
    def test_root_and_iteration_are_the_same_checkpoint(self, root, folder):
        assert found_at(root) == found_at(folder)
        found = found_at(root)
        assert (found.name, found.step, found.distributed) == ("iteration_00000007", 7, True)
        assert found.saved.strategy.world_size == 4 and sorted(found.files) == [0, 1, 2, 3]

    def test_of_several_that_which_the_tracker_names(self, tmp_path):
        for number in (9, 12, 7):
            write_iteration(tmp_path, FULL, SLICED, number=number)
        assert found_at(tmp_path).step == 7
        assert found_at(tmp_path / "iteration_00000012").step == 12

    def test_one_rank_is_complete(self):
        found = found_at(GENUINE / "one_rank")
        assert not found.distributed and found.saved is None and not found.is_sharded
        assert [file.name[:9] for file in found.files[0]] == ["tiny-mode", "tiny-opt-"]
        assert found.strategy(Strategy.complete()).is_complete

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            (
                "3",
                CheckpointNotFoundError,
                "names iteration 3, but .*iteration_00000003 is not found; .*iteration_00000007",
            ),
            (
                "",
                CorruptCheckpointError,
                "holds '', which is no iteration; there is iteration_00000007: give the folder",
            ),
            ("-7", CorruptCheckpointError, "holds '-7', which is no iteration"),
            ("release", CorruptCheckpointError, "holds 'release', which is no iteration"),
            ("9" * 30, CorruptCheckpointError, "which is no iteration"),
            (b"\xff\xfe", CorruptCheckpointError, "cannot be read"),
            (
                None,
                CheckpointNotFoundError,
                "is not found, so that no iteration is known .*; there is iteration_00000007",
            ),
        ],
    )
    def test_tracker_that_names_no_iteration_is_told(self, root, text, error, message):
        tracker = root / "latest_checkpointed_iteration.txt"
        tracker.unlink()
        if text is not None:
            tracker.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(error, match=message):
            find_checkpoints(root)

    def test_tracker_alone_is_told(self, root, folder):
        shutil.rmtree(folder)
        with pytest.raises(CheckpointNotFoundError, match=r"names iteration 7, but .* there is none"):
            find_checkpoints(root)

    def test_empty_iteration_is_told(self, root, folder):
        shutil.rmtree(folder)
        folder.mkdir()
        with pytest.raises(CheckpointNotFoundError, match="holds no files of an iteration"):
            find_checkpoints(root)

    def test_metadata_alone_is_told(self, folder):
        for file in folder.glob("*.safetensors"):
            file.unlink()
        with pytest.raises(CheckpointNotFoundError, match=r"says that tiny-.* is not found; copy the missing files"):
            find_checkpoints(folder)

    def test_other_files_in_a_folder_of_that_name_are_what_they_are(self, tmp_path):
        oracle.write_raw(tmp_path / "iteration_00000007" / "x.ckpt", {"w": oracle.raw(FULL["w"])})
        assert not found_at(tmp_path / "iteration_00000007").iteration
        assert not is_checkpoint2(tmp_path / "iteration_00000007")

    @pytest.mark.parametrize("name", [MODEL_0, "tiny-opt-0000003-0000004.safetensors"])
    def test_a_file_is_no_checkpoint(self, folder, name):
        with pytest.raises(
            UnsupportedCheckpointError, match=f"{name} is a file of a Checkpoint 2.0 .* give the folder"
        ):
            find_checkpoints(folder / name)

    def test_the_file_of_one_rank_is_no_checkpoint_either(self):
        (file,) = (GENUINE / "one_rank" / "iteration_00000016").glob("*-model-*")
        with pytest.raises(UnsupportedCheckpointError, match="give the folder of its iteration, or the one above"):
            find_checkpoints(file)

    def test_its_files_in_rank_folders_are_refused(self, tmp_path, folder):
        for rank in range(4):
            (tmp_path / "x" / f"rank_{rank}").mkdir(parents=True)
            file = f"tiny-model-000000{rank}-0000004.safetensors"
            shutil.copy(folder / file, tmp_path / "x" / f"rank_{rank}")
        with pytest.raises(UnsupportedCheckpointError, match=r"is a file of a Checkpoint 2\.0"):
            find_checkpoints(tmp_path / "x")

    def test_rank_folders_beside_it_are_taken_with_a_warning(self, root, caplog):
        oracle.write_raw(root / "rank_0" / "x.ckpt", {"w": oracle.raw(FULL["w"])})
        assert not found_at(root).iteration
        assert "holds rank folders and a Checkpoint 2.0; the rank folders are used" in caplog.text

    @pytest.mark.parametrize(("choice", "name"), [("step", "step"), ("suffix", "file_suffix")])
    def test_a_step_is_chosen_by_its_folder(self, root, choice, name):
        with pytest.raises(ConfigError, match=rf"has iterations; give the folder of one \(src\) and leave {name} out"):
            find_checkpoints(root, **{choice: "1_7"})

    def test_a_strategy_for_it_is_refused(self, root):
        with pytest.raises(
            ConfigError, match=r"its metadata.json tells how it is sliced; leave .* out \(src_strategy\)"
        ):
            find_sources(root, SLICED)
        with pytest.raises(ConfigError, match="it is of one rank; leave the source strategy"):
            find_sources(GENUINE / "one_rank", SLICED)

    def test_is_checkpoint2_by_its_names(self, root, folder, tmp_path):
        for path in (root, folder, folder / MODEL_0, GENUINE / "one_rank"):
            assert is_checkpoint2(path)
        oracle.write_raw(tmp_path / "rank_0" / "x.ckpt", {"w": oracle.raw(FULL["w"])})
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "model-00001-of-00002.safetensors").touch()
        for path in (
            tmp_path,
            tmp_path / "rank_0" / "x.ckpt",
            tmp_path / "hf",
            tmp_path / "nowhere",
            folder / "metadata.json",
        ):
            assert not is_checkpoint2(path)

    def test_other_ranks_know_it_by_what_the_leader_tells(self, root):
        for found in (found_at(root), found_at(GENUINE / "one_rank")):
            again = Checkpoint.from_json(json.loads(json.dumps(found.as_json())))
            assert again == found and again.saved == found.saved
            assert pickle.loads(pickle.dumps(found)) == found


class TestMetadata:
    def test_formatted_again_it_is_what_mindformers_wrote(self, folder):
        """All but the ranks that hold a slice: which of them has saved it is no matter of the layout."""
        original = json.loads((folder / "metadata.json").read_text())
        saved = read_metadata(folder / "metadata.json")
        again = json.loads(json.dumps(format_metadata(saved.tensors.values())))
        for content in (original, again):
            for described in content["state_dict_metadata"].values():
                del described["layout"]["alias_name"]
            for places in content["storage_data"].values():
                for place in places:
                    del place["rank_group"]
        assert again == original
        order = ["device_matrix", "tensor_map", "interleaved_parallel", "alias_name", "rank_list"]
        (layout,) = {
            tuple(d["layout"]) for d in format_metadata(saved.tensors.values())["state_dict_metadata"].values()
        }
        assert list(layout) == order, "MindFormers reads it by the order of the keys"

    def test_slice_numbers_are_no_offsets_of_elements(self, folder):
        saved = read_metadata(folder / "metadata.json")
        layout = saved.strategy.layouts[f"adam_m.{NAME}"][0]
        boxes = {saved.held[rank][f"adam_m.{NAME}"]: layout.box(rank, (16, 16)) for rank in range(4)}
        assert [box.offset for box in boxes.values()] == [(0, 0), (8, 0), (4, 0), (12, 0)]

    def test_parameter_without_layout_is_whole(self, tmp_path):
        folder = write_iteration(tmp_path, FULL, SLICED)
        change(folder, lambda content: content["state_dict_metadata"]["norm"].update(layout=None))
        conversion = planned(tmp_path)
        assert conversion.source.tensor("norm").shape == (4,)

    @pytest.mark.parametrize(
        "edit",
        [
            lambda m: _layout(m).update(interleaved_parallel=1),
            lambda m: _layout(m).update(tensor_map=[[0], [-1]], alias_name=["x", "y"]),
            lambda m: _entry(m)["properties"].update(dtype="bfloat16", allow_shape_mismatch=True, replica_id=0),
            lambda m: _entry(m)["chunk"].append({"global_offset": [3], "local_shape": [4, 16]}),
        ],
    )
    def test_what_says_the_same_in_another_way_is_the_same(self, folder, edit):
        before = read_metadata(folder / "metadata.json")
        assert read_metadata(change(folder, edit)) == before

    BAD: ClassVar = {
        "no object": (lambda m: m.clear(), "it has no state_dict_metadata"),
        "nothing": (lambda m: (m["state_dict_metadata"].clear(), m["storage_data"].clear()), "it tells of no parameters"),
        "no storage": (lambda m: m.pop("storage_data"), "it has no storage_data"),
        "unknown slice": (lambda m: m["storage_data"].update({"('w', (0,))": []}), r"storage_data tells of \('w', \(0,\)\)"),
        "slice without file": (lambda m: m["storage_data"].pop(f"('{NAME}', (1,))"), f"{NAME}: slice 1 is in no file"),
        "no properties": (lambda m: _entry(m).pop("properties"), f"parameter {NAME}: .*KeyError"),
        "type": (lambda m: _entry(m)["properties"].update(dtype="Float7"), f"{NAME} is of type Float7, which cannot be"),
        "mismatch": (lambda m: _entry(m)["properties"].update(allow_shape_mismatch=0), "allow_shape_mismatch is 0"),
        "shape": (lambda m: _entry(m).update(global_shape=[16, "16"]), "'16'.* is no list of sizes"),
        "huge shape": (lambda m: _entry(m).update(global_shape=[2**62, 2**62]), "its shape is"),
        "negative": (lambda m: _entry(m).update(global_shape=[-16, 16]), "is no list of sizes"),
        "true": (lambda m: _entry(m).update(global_shape=[True, 16]), "is no list of sizes"),
        "uneven": (lambda m: _entry(m).update(global_shape=[15, 16]), "does not divide evenly"),
        "interleaved": (lambda m: _layout(m).update(interleaved_parallel=True), "is sliced with interleaved_parallel"),
        "interleaved 2": (lambda m: _layout(m).update(interleaved_parallel=2), "is sliced with interleaved_parallel"),
        "interleaved alias": (
            lambda m: _layout(m).update(alias_name=["a", "interleaved_parallel"]),
            "is sliced with interleaved_parallel",
        ),
        "matrix": (lambda m: _layout(m).update(device_matrix=[2, 3]), "does not fit device_matrix"),
        "rank twice": (lambda m: _layout(m).update(rank_list=[0, 1, 2, 2]), "does not fit device_matrix"),
        "huge rank": (lambda m: _layout(m).update(rank_list=[0, 1, 2, 2**40]), "does not fit device_matrix"),
        "ranks": (lambda m: _layout(m).update(rank_list=[1, 0, 2, 3]), "lies on rank 1, 0, 2, 3, which is no"),
        "map": (lambda m: _layout(m).update(tensor_map=[0]), r"tensor_map \[0\] does not fit shape \[16, 16\]"),
        "axis": (lambda m: _layout(m).update(tensor_map=[2, -1]), "does not fit dev_matrix"),
        "axis below": (lambda m: _layout(m).update(tensor_map=[-2, -1]), "is no entry of a tensor_map"),
        "fragments": (lambda m: _entry(m).update(axis_fragmentations=[1, 2]), "but its layout cuts it"),
        "offset": (lambda m: _entry(m)["chunk"][1].update(global_offset=[8]), "has global_offset 1, the number of a slice"),
        "offset by dimension": (lambda m: _entry(m)["chunk"][1].update(global_offset=[8, 0]), "ValueError"),
        "local shape": (lambda m: _entry(m)["chunk"][1].update(local_shape=[8, 8]), r"no chunk of shape \[8, 16\]"),
        "file": (lambda m: _place(m).update(file_name="../../tiny.safetensors"), "is no name of a file of an iteration"),
        "file elsewhere": (lambda m: _place(m).update(file_name=f"../{MODEL_0}"), "is no name of a file of an iteration"),
        "no name": (lambda m: _place(m).update(file_name=7), "it lies in 7"),
        "rank": (lambda m: _place(m).update(storage_rank="2"), "it lies with rank '2'"),
        "rank below": (lambda m: _place(m).update(storage_rank=-1), "it lies with rank -1"),
        "group": (lambda m: _place(m).update(rank_group=None), "TypeError|ValueError"),
        "wrong rank": (lambda m: _place(m).update(storage_rank=1), "is a file of rank|should hold slice"),
        "missing file": (
            lambda m: _place(m).update(file_name="tiny-model-0000009-0000004.safetensors", storage_rank=0),
            f"tiny-model-0000009-0000004.safetensors holds parameter {NAME} of rank 0, but .* is not found",
        ),
    }  # fmt: skip

    @pytest.mark.parametrize("case", BAD)
    def test_what_is_told_wrongly_is_an_error_that_names_it(self, folder, case):
        edit, text = self.BAD[case]
        path = change(folder, edit)
        with pytest.raises(AutoTransError, match=text) as caught:
            find_checkpoints(folder)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"state_dict_metadata": []}'])
    def test_damaged_file_is_told(self, folder, content):
        (folder / "metadata.json").write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match=r"metadata\.json"):
            find_checkpoints(folder)

    @pytest.mark.parametrize("junk", [None, 1, "x", [], {}, [[]], {"a": 1}])
    def test_whatever_stands_anywhere_is_no_crash(self, folder, junk):
        original = json.loads((folder / "metadata.json").read_text())
        entry = original["state_dict_metadata"][NAME]
        for part, keys in (
            (entry, list(entry)),
            (entry["layout"], list(entry["layout"])),
            (entry["properties"], ["dtype"]),
        ):
            for key in keys:
                before, part[key] = part[key], junk
                with contextlib.suppress(CorruptCheckpointError, UnsupportedCheckpointError):
                    parse_metadata(original, "m")
                part[key] = before
        for value in ([junk], junk, [{"file_name": junk, "storage_rank": junk, "rank_group": junk}]):
            content = {**original, "storage_data": {**original["storage_data"], f"('{NAME}', (0,))": value}}
            with pytest.raises(AutoTransError, match=f"m: parameter {NAME}"):
                parse_metadata(content, "m")


def _entry(content):
    return content["state_dict_metadata"][NAME]


def _layout(content):
    return _entry(content)["layout"]


def _place(content):
    return content["storage_data"][f"('{NAME}', (0,))"][0]


class TestFiles:
    def test_file_that_is_missing_is_named_with_what_it_holds(self, folder):
        (folder / MODEL_0).unlink()
        with pytest.raises(CheckpointNotFoundError, match=f"says that {MODEL_0} holds parameter .* of rank 0, but"):
            find_checkpoints(folder)

    def test_missing_metadata_is_told(self, folder):
        (folder / "metadata.json").unlink()
        with pytest.raises(CheckpointNotFoundError, match=r"one file of several, but no metadata\.json"):
            find_checkpoints(folder)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("other-model-0000000-0000004.safetensors", "which are of two saves"),
            ("tiny-model-0000000-0000008.safetensors", "which are of two saves"),
        ],
    )
    def test_files_of_another_save_are_refused(self, folder, name, text):
        shutil.copy(folder / MODEL_0, folder / name)
        with pytest.raises(CorruptCheckpointError, match=text):
            find_checkpoints(folder)

    def test_file_of_another_number_of_ranks_is_refused(self, tmp_path):
        folder = write_iteration(tmp_path, {"w": FULL["w"]}, strategy({"w": Layout((2, 2), ((1,), (0,)))}))
        file = oracle.write_safetensors_raw(folder / "opt-0000000-0000008.safetensors", {"x": oracle.raw(FULL["w"])})
        with pytest.raises(CorruptCheckpointError, match=f"{file.name} is a file of 8 ranks, but .* tells of 4 ranks"):
            find_checkpoints(folder)

    def test_file_that_no_metadata_names_belongs_to_the_rank_of_its_number(self, tmp_path):
        weights = {name: FULL[name] for name in ("w", "norm")}
        write_iteration(tmp_path, {**weights, "global_step": np.array([9], np.int32)}, SLICED)
        source = planned(tmp_path).source
        assert [source.at("global_step", rank).file.rank for rank in range(4)] == [0, 1, 2, 3]
        assert source.where("global_step").endswith("opt-0000000-0000004.safetensors")

    @pytest.mark.parametrize(
        ("lie", "text"),
        [
            (np.zeros((2, 3), np.float32), r"is \[2, 3\] Float32 in .*, but \[2, 2\] Float32 by .*metadata.json"),
            (np.zeros((2, 2), np.float16), r"is \[2, 2\] Float16 in .*, but \[2, 2\] Float32 by .*metadata.json"),
        ],
    )
    def test_shard_that_lies_is_named(self, tmp_path, lie, text):
        folder = write_iteration(tmp_path, FULL, SLICED)
        tensors = {"w": oracle.raw(lie), "norm": oracle.raw(FULL["norm"])}
        oracle.write_safetensors_raw(folder / "model-0000003-0000004.safetensors", tensors)
        with pytest.raises(CorruptCheckpointError, match=f"parameter w of rank 3 {text}"):
            planned(tmp_path).check()

    def test_parameter_that_its_file_lacks_is_named(self, tmp_path):
        folder = write_iteration(tmp_path, FULL, SLICED)
        oracle.write_safetensors_raw(folder / "model-0000003-0000004.safetensors", {"norm": oracle.raw(FULL["norm"])})
        with pytest.raises(
            CorruptCheckpointError, match=r"parameter w of rank 3 is not in .*model-0000003.* says that it"
        ):
            planned(tmp_path).check()

    def test_what_no_file_holds_was_not_saved(self, tmp_path):
        """As the accumulated gradients of pipeline jobs, which are in the graph, but not in network or optimizer."""
        folder = write_iteration(tmp_path, FULL, SLICED)

        def list_gradients(content):
            content["state_dict_metadata"]["accu_grads.w"] = content["state_dict_metadata"]["w"]
            for number in range(4):
                places = content["storage_data"][f"('w', ({number},))"]
                content["storage_data"][f"('accu_grads.w', ({number},))"] = places

        change(folder, list_gradients)
        conversion = planned(tmp_path)
        conversion.check()
        assert "accu_grads.w" not in conversion.source.names

    def test_files_that_changed_places_are_refused(self, tmp_path):
        """With redundancy removed each file holds what the others lack, whole weights among them."""
        shutil.copytree(GENUINE / "dp2mp2_unique", tmp_path / "saved")
        (iteration,) = (tmp_path / "saved").glob("iteration_*")
        first, second = sorted(iteration.glob("*model-*.safetensors"))[:2]
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
        with pytest.raises(
            CorruptCheckpointError, match=r"is not in .*model-000000[01]-.*metadata.json says that it is"
        ):
            planned(tmp_path / "saved").check()

    def test_whole_weight_that_no_file_holds_is_missed(self, tmp_path):
        shutil.copytree(GENUINE / "dp2mp2_unique", tmp_path / "saved")
        (iteration,) = (tmp_path / "saved").glob("iteration_*")
        for file in iteration.glob("*model-*.safetensors"):
            held = oracle.read_safetensors_raw(file)
            if "model.norm_out.weight" in held:
                names = {"F32": "Float32", "BF16": "BFloat16"}
                kept = {n: r._replace(dtype=names[r.dtype]) for n, r in held.items() if n != "model.norm_out.weight"}
                oracle.write_safetensors_raw(file, kept)
        with pytest.raises(CorruptCheckpointError, match=r"model.norm_out.weight of rank . is not in"):
            planned(tmp_path / "saved").check()

    def test_numbers_of_other_stages_are_not_taken(self, tmp_path):
        staged = strategy({"a": {0: Layout((2,), ((0,),))}, "b": {1: Layout((2,), ((0,),))}}, stages=2)
        full = {"a": np.arange(4, dtype=np.float32), "b": np.arange(4, 8, dtype=np.float32)}
        write_iteration(tmp_path, full, staged, foreign=True)
        conversion = planned(tmp_path)
        conversion.check()
        for name, array in full.items():
            shards = conversion.source.shards(name, Box.whole((4,)))
            assert [shard.file.rank for shard in shards] == ([0, 1] if name == "a" else [2, 3])
            assert [_floats(shard) for shard in shards] == [array[:2].tolist(), array[2:].tolist()]

    @pytest.mark.parametrize("saver", [None, lambda name, group: group[0], lambda name, group: group[-1]])
    def test_parameter_of_two_stages_is_found_with_any_of_them(self, tmp_path, saver):
        tied = strategy(
            {"tied": {0: Layout((2,), ((0,),)), 1: Layout((2,), ((0,),))}, "w": {1: Layout((2,))}}, stages=2
        )
        full = {"tied": np.arange(4, dtype=np.float32), "w": np.arange(2, dtype=np.float32), "seen": np.float32([3])}
        folder = write_iteration(tmp_path, full, tied, saver=saver)

        def only_the_second_stage(content):
            for number in range(2):
                places = content["storage_data"][f"('tied', ({number},))"]
                places[:] = [place for place in places if place["storage_rank"] > 1]

        change(folder, only_the_second_stage)
        source = planned(tmp_path).source
        assert [_floats(shard) for shard in source.shards("tied", Box.whole((4,)))] == [[0, 1], [2, 3]]
        own = [source.at("seen", place).file for place in range(2)]
        assert [(file.rank, file.path[-27:-20]) for file in own] == [(0, "0000000"), (1, "0000001")], (
            "what no metadata tells"
        )

    @pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2)])
    def test_parameter_that_stages_slice_in_their_own_ways_is_read_from_the_first(self, tmp_path, first, second):
        by_rows = {2: Layout((2, 2), ((0,), ())), 4: Layout((4,), ((0,), ()))}
        tied = strategy(
            {"tied": {0: by_rows[first], 1: by_rows[second]}, "w": {0: Layout((4,))}, "v": {1: Layout((4,))}}, stages=2
        )
        full = {"tied": np.arange(24, dtype=np.float32).reshape(8, 3), "w": np.arange(2.0), "v": np.arange(3.0)}
        full = {name: array.astype(np.float32) for name, array in full.items()}
        write_iteration(tmp_path, full, tied)
        shards = planned(tmp_path).source.shards("tied", Box.whole((8, 3)))
        assert [number for shard in shards for number in _floats(shard)] == full["tied"].ravel().tolist()

    def test_names_of_any_characters(self, tmp_path):
        odd = {"it's": FULL["w"], 'a "b"': FULL["w"] + 1, "naïve.名前\\n": FULL["w"] + 2}
        write_iteration(tmp_path, odd, strategy({name: Layout((2,), ((0,),)) for name in odd}))
        source = planned(tmp_path).source
        assert set(odd) < set(source.names)

    def test_parameter_in_both_files_of_one_rank_is_refused(self, tmp_path):
        folder = write_iteration(tmp_path, {"w": FULL["w"]}, Strategy.complete(), states=("x",))
        shutil.copy(folder / "model-0000000-0000001.safetensors", folder / "opt-0000000-0000001.safetensors")
        with pytest.raises(CorruptCheckpointError, match=r"parameter w is in model-.* and in opt-"):
            planned(tmp_path)

    def test_request_is_another_one_when_metadata_or_common_change(self, tmp_path):
        folder = write_iteration(tmp_path, FULL, SLICED)
        wanted = request(tmp_path, tmp_path / "out")
        digests = {Conversion(wanted, found_at(tmp_path)).target._manifest._request}
        for name in ("metadata.json", "common.json"):
            (folder / name).write_text((folder / name).read_text() + "\n")
            digests.add(Conversion(wanted, found_at(tmp_path)).target._manifest._request)
        assert len(digests) == 3

    def test_the_mindspore_engine_does_not_know_it(self, tmp_path):
        write_iteration(tmp_path / "src", FULL, SLICED)
        conversion = plan_conversion(request(tmp_path / "src", tmp_path / "out", engine="mindspore"))
        with pytest.raises(ConfigError, match="which the mindspore engine does not know"):
            conversion.run(quiet=True)


def _floats(shard):
    with open(shard.file.path, "rb") as file:
        file.seek(shard.extents[0][0])
        return np.frombuffer(file.read(shard.extents[0][1]), np.float32).tolist()


class TestCommon:
    def test_numbers_are_parameters_where_no_file_holds_them(self, tmp_path):
        write_iteration(tmp_path, {**FULL, "global_step": np.array([9], np.int32)}, SLICED)
        files = ScannedFiles(found_at(tmp_path))
        for rank in range(4):
            tensors = files.tensors(rank)
            told = {name: (tensors[name].dtype, tensors[name].dims) for name in tensors if name in COMMON}
            assert told == {
                "epoch_num": ("Int64", ()), "step_num": ("Int64", ()), "global_step": ("Int32", (1,)),
                "loss_scale": ("Float32", ()), "global_batch_size": ("Int64", ()),
            }  # fmt: skip
            assert files.file(rank, "global_step").path.endswith(f"opt-000000{rank}-0000004.safetensors")
            kept = files.file(rank, "epoch_num")
            assert kept.path.endswith("common.json") and kept.rank == rank
            offset, nbytes = tensors["loss_scale"].segments[0]
            assert np.frombuffer(kept.contents[offset : offset + nbytes], np.float32) == COMMON["loss_scale"]

    def test_missing_file_is_told_and_nothing_is_known(self, tmp_path, caplog):
        folder = write_iteration(tmp_path, FULL, SLICED)
        (folder / "common.json").unlink()
        planned(tmp_path).check()
        assert caplog.text.count("common.json is not there") == 1

    @pytest.mark.parametrize(
        "content",
        [b"", b"[]", b"\xff", b'{"step_num": "7"}', b'{"step_num": -1}', b'{"step_num": true}', b'{"global_step": 1.5}',
         b'{"loss_scale": NaN}', b'{"global_step": 4294967296}', b'{"loss_scale": "1"}', b'{"epoch_num": [1]}'],
    )  # fmt: skip
    def test_damaged_file_is_told(self, tmp_path, content):
        folder = write_iteration(tmp_path, FULL, SLICED)
        (folder / "common.json").write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match=r"common\.json"):
            planned(tmp_path).check()

    def test_what_is_not_known_is_left_out(self, tmp_path):
        write_iteration(tmp_path, FULL, SLICED, common={"step_num": 3, "loss_scale": None, "from_a_later_version": {}})
        assert set(planned(tmp_path).source.names) == {*FULL, "step_num"}

    def test_it_is_written_as_it_is_read(self, tmp_path):
        path = tmp_path / "common.json"
        for common in (Common(), Common(1, 2, 3, 0.5, 4), Common(1, 2, 3, None, 4, 5)):
            path.write_text(json.dumps(common.as_json()))
            assert read_common(path) == common
        assert "consumed_samples" not in Common(1, 2, 3, 0.5, 4).as_json(), "MindFormers 1.9 fails on it"
        assert list(Common().as_json()) == list(COMMON)
