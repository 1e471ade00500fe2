"""What every source of shards must do. To add one, subclass `SourceTests`."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import oracle
import pytest
from builders import hold, layouts, strategy
from checkpoint2_files import write_iteration
from encoded import contents, write
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from auto_trans.core.layout import Layout
from auto_trans.core.source import SlicedSource
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import Box
from auto_trans.errors import LayoutError, MissingSliceError, PlanError
from auto_trans.storage.formats import FORMATS
from auto_trans.storage.formats import ckpt as ckpt_module
from auto_trans.storage.sources import ScannedFiles, find_checkpoints

per_class = settings(suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow], max_examples=40)


@dataclass(frozen=True)
class Case:
    """Full weights, and the strategy that they are saved under."""

    full: dict[str, np.ndarray]
    strategy: Strategy


def arrays(*shapes):
    """Arrays of distinct numbers, named as the layers of a model: not in alphabetical order."""
    names = [f"layer.{number}.weight" for number in reversed(range(len(shapes)))]
    start = itertools.count(1, 10_000)
    return {n: (np.arange(math.prod(s)) + next(start)).astype(np.int32).reshape(s) for n, s in zip(names, shapes)}


@st.composite
def cases(draw):
    """Two parameters of any layouts that MindSpore can write on the same ranks, and one that no strategy lists."""
    first = draw(layouts())
    second = draw(
        layouts().filter(lambda layout: layout.devices == first.devices) | st.just(Layout.whole(first.devices))
    )
    shapes = []
    for layout in (first, second):
        ndim = max(len(layout.tensor_map), 1)
        shapes.append(tuple(n * draw(st.integers(1, 3)) for n in layout.grid(ndim)))
    full = arrays(*shapes)
    sliced = strategy(dict(zip(full, (first, second))))
    return Case({**full, "global_step": np.array([7], np.int32)}, sliced)


@st.composite
def boxes(draw, shape):
    """Any part of a tensor that is not empty."""
    offset = [draw(st.integers(0, n - 1)) for n in shape]
    return Box(tuple(offset), tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset)))


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory):
    return lambda: tmp_path_factory.mktemp("source")


class SourceTests(ABC):
    """Save, find, ask for shards."""

    format: ClassVar[str] = "ckpt"

    @abstractmethod
    def save(self, folder: Path, case: Case) -> tuple[Path, Strategy]:
        """Saves a case; returns where it lies and under which strategy."""

    def in_order(self, names):
        """The names of what one file holds, in its order."""
        return sorted(names) if self.format == "safetensors" else list(names)

    def write(self, path: Path, tensors) -> None:
        raws = {name: oracle.raw(array) for name, array in tensors.items()}
        write(FORMATS[self.format], path.with_suffix(f".{self.format}"), raws)

    def open(self, folder: Path, case: Case) -> SlicedSource:
        path, sliced = self.save(folder, case)
        (found,) = find_checkpoints(path)
        return SlicedSource(sliced, ScannedFiles(found))

    def read(self, shard):
        content = contents(Path(shard.file.path), shard.extents)
        return np.frombuffer(content, np.int32).reshape(shard.box.size)

    def check_shards(self, source, name, full, box):
        shards = source.shards(name, box)
        covered = np.zeros(full.shape, int)
        for shard in shards:
            assert shard.tensor == source.tensor(name)
            assert np.array_equal(self.read(shard), full[shard.box.slices()])
            common = shard.box.intersect(box) if full.shape else box
            assert common is not None, "no shard beside the box"
            covered[common.slices()] += 1
        assert (covered[box.slices()] == 1).all() and covered.sum() == box.volume, "every part exactly once"
        assert [s.box.offset for s in shards] == sorted(s.box.offset for s in shards), "in row-major order"
        assert pickle.loads(pickle.dumps(shards)) == shards
        for shard in shards:
            stat = Path(shard.file.path).stat()
            assert (shard.file.size, shard.file.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        return shards

    @per_class
    @given(data=st.data(), case=cases())
    def test_shards_cover_any_box_and_hold_its_bytes(self, new_folder, data, case):
        source = self.open(new_folder(), case)
        for name, full in case.full.items():
            if source.strategy.is_complete or source.strategy.lists(name):
                assert source.tensor(name).shape == full.shape
                self.check_shards(source, name, full, Box.whole(full.shape))
                self.check_shards(source, name, full, data.draw(boxes(full.shape)))

    def test_scalars_and_empty_tensors(self, new_folder):
        full = {"scalar": np.array(5, np.int32), "none": np.zeros((0, 4), np.int32), "w": np.arange(4, dtype=np.int32)}
        source = self.open(new_folder(), Case(full, strategy({name: Layout((2,)) for name in full})))
        self.check_shards(source, "scalar", full["scalar"], Box((), ()))
        assert source.shards("none", Box.whole((0, 4))) == []
        assert source.tensor("none").shape == (0, 4)

    def case(self):
        full = {**arrays((4, 4), (4,)), "global_step": np.array([7], np.int32)}
        first, second = list(full)[:2]
        return Case(full, strategy({first: Layout((2, 2), ((1,), (0,))), second: Layout((2, 2))}))

    def test_names_are_in_file_order(self, new_folder):
        case = self.case()
        assert list(self.open(new_folder(), case).names) == self.in_order(case.full)

    def test_what_a_file_says_of_a_tensor_is_told(self, new_folder):
        case = self.case()
        source = self.open(new_folder(), case)
        for name, full in case.full.items():
            tensor = source.tensor(name)
            assert (tensor.name, tensor.dtype, tensor.item_bytes) == (name, "Int32", 4)
            assert tensor.shape == full.shape
            shard = (
                source.at(name, 0) if not source.strategy.lists(name) else source.shards(name, Box.whole(full.shape))[0]
            )
            assert source.held_shape(name) == shard.box.size

    def test_file_that_holds_a_parameter_is_told(self, new_folder):
        case = self.case()
        source = self.open(new_folder(), case)
        read = {"ckpt": oracle.read_raw, "safetensors": oracle.read_safetensors_raw}[self.format]
        for name in case.full:
            assert name in read(Path(source.where(name)))

    def test_what_no_strategy_lists_is_there_at_every_place(self, new_folder):
        source = self.open(new_folder(), self.case())
        for place in range(4):
            shard = source.at("global_step", place)
            assert (shard.box, self.read(shard).tolist()) == (Box((0,), (1,)), [7])
            assert pickle.loads(pickle.dumps(shard)) == shard

    def test_what_may_differ_is_pairs_of_whole_shards(self, new_folder):
        for pair in self.open(new_folder(), self.case()).may_differ("global_step"):
            assert [self.read(shard).tolist() for shard in pair] == [[7], [7]]
            assert pair[0].file != pair[1].file


class DistributedTests(SourceTests):
    """What every source of rank folders must do."""

    def save(self, folder, case):
        for rank, held in hold(case.full, case.strategy).items():
            self.write(folder / f"rank_{rank}" / f"net_rank_{rank}-1_1", held)
        return folder, case.strategy

    def remove(self, folder, rank):
        (file,) = (folder / f"rank_{rank}").iterdir()
        file.unlink()
        file.parent.rmdir()

    def source(self, folder, sliced):
        (found,) = find_checkpoints(folder)
        return SlicedSource(sliced, ScannedFiles(found))

    def test_slice_that_is_nowhere_is_named(self, tmp_path):
        case = self.case()
        name = next(iter(case.full))
        folder, sliced = self.save(tmp_path, case)
        self.remove(folder, 2)
        source = self.source(folder, sliced)
        with pytest.raises(
            MissingSliceError, match=rf"slice \[1, 0\] of parameter {name} is held by source rank 2 only"
        ):
            source.shards(name, Box.whole((4, 4)))
        self.check_shards(source, name, case.full[name], Box((0, 0), (2, 4)))


class RankFoldersTests(DistributedTests):
    """What every source of rank folders that hold all their slices must do."""

    def test_stage_that_is_nowhere_is_named(self, tmp_path):
        full = arrays((4,), (4,))
        first, second = full
        case = Case(full, strategy({first: {0: Layout((2,), ((0,),))}, second: {1: Layout((2,), ((0,),))}}, stages=2))
        folder, sliced = self.save(tmp_path, case)
        source = self.source(folder, sliced)
        for name in full:
            self.check_shards(source, name, full[name], Box.whole((4,)))
        assert [source.shards(second, Box.whole((4,)))[i].file.rank for i in (0, 1)] == [2, 3]
        for rank in (2, 3):
            self.remove(folder, rank)
        with pytest.raises(MissingSliceError, match=r"no rank folder of pipeline stage 1 \(rank 2 to 3\)"):
            self.source(folder, sliced)

    def test_more_ranks_than_the_strategy_has_are_refused(self, tmp_path):
        folder, sliced = self.save(tmp_path, self.case())
        (file,) = (folder / "rank_3").iterdir()
        file.rename(file.with_name(file.name.replace("_rank_3", "_rank_4")))
        (folder / "rank_3").rename(folder / "rank_4")
        with pytest.raises(PlanError, match=r"up to rank_4\), but its strategy strategy describes 4 ranks"):
            self.source(folder, sliced)

    def test_what_may_differ_is_that_of_the_first_and_the_last_rank(self, tmp_path):
        folder, sliced = self.save(tmp_path, self.case())
        ((one, other),) = self.source(folder, sliced).may_differ("global_step")
        assert (one.file.rank, other.file.rank) == (0, 3)
        shutil.rmtree(folder / "rank_3")
        ranks = [(a.file.rank, b.file.rank) for a, b in self.source(folder, sliced).may_differ("global_step")]
        assert ranks == [(0, 1), (0, 2)], "where the last is missing, all others are compared"


class TestRankFoldersOfCkpt(RankFoldersTests):
    def test_any_replica_serves(self, tmp_path):
        case = self.case()
        name = list(case.full)[1]
        folder, sliced = self.save(tmp_path, case)
        for rank in (0, 1, 2):
            self.remove(folder, rank)
        (shard,) = self.check_shards(self.source(folder, sliced), name, case.full[name], Box.whole((4,)))
        assert shard.file.rank == 3

    @pytest.mark.parametrize("other", [np.zeros((1, 2), np.int32), np.zeros((2, 2), np.int64)])
    def test_slices_that_are_not_alike_are_refused(self, tmp_path, other):
        case = self.case()
        name = next(iter(case.full))
        folder, sliced = self.save(tmp_path, case)
        held = {**hold(case.full, sliced)[3], name: other}
        self.write(folder / "rank_3" / "net_rank_3-1_1", held)
        with pytest.raises(PlanError, match=rf"parameter {name} is .* in .*rank_3.* but \[2, 2\] Int32 in .*rank_0"):
            self.source(folder, sliced).shards(name, Box.whole((4, 4)))

    def test_parameter_that_no_strategy_lists_is_taken_from_the_same_place(self, tmp_path):
        source = self.source(*self.save(tmp_path, self.case()))
        assert [source.at("global_step", place).file.rank for place in range(6)] == [0, 1, 2, 3, 0, 1]


class TestRankFoldersOfSafetensors(RankFoldersTests):
    format = "safetensors"


class TestChunkedCkpt(RankFoldersTests):
    """Tensors that lie in several extents."""

    def write(self, path, tensors):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ckpt_module, "CHUNK_BYTES", 12)
            super().write(path, tensors)

    def test_a_shard_has_several_extents(self, tmp_path):
        case = self.case()
        name = next(iter(case.full))
        shards = self.source(*self.save(tmp_path, case)).shards(name, Box.whole((4, 4)))
        assert [[n for _, n in shard.extents] for shard in shards] == [[12, 4]] * 4


class RedundancyRemovedTests(DistributedTests):
    """A slice lies with one of the ranks that hold it only, as after MindSpore's ``remove_redundancy``."""

    def save(self, folder, case):
        sliced = case.strategy
        for rank, held in hold(case.full, sliced).items():
            kept = {}
            for name, array in held.items():
                layout = sliced.layout(name, 0)
                owners = layout.owners(layout.cell(rank, array.ndim)) if layout else (0,)
                if rank == owners[sum(map(ord, name)) % len(owners)]:
                    kept[name] = array
            if kept:
                self.write(folder / f"rank_{rank}" / f"net_rank_{rank}-1_1", kept)
        return folder, sliced

    def test_names_are_in_file_order(self, new_folder):
        """Those of the first file, and then what only others hold."""
        case = self.case()
        names = list(self.open(new_folder(), case).names)
        assert sorted(names) == sorted(case.full)


class TestRedundancyRemovedFromCkpt(RedundancyRemovedTests):
    pass


class TestRedundancyRemovedFromSafetensors(RedundancyRemovedTests):
    format = "safetensors"


class CompleteTests(SourceTests):
    """What every source of complete weights must do."""

    def test_nothing_may_differ(self, new_folder):
        assert self.open(new_folder(), self.case()).may_differ("global_step") == []

    def test_every_parameter_is_one_whole_shard(self, new_folder):
        case = self.case()
        source = self.open(new_folder(), case)
        for name, full in case.full.items():
            (shard,) = source.shards(name, Box.whole(full.shape))
            assert (shard.box, shard.file.rank) == (Box.whole(full.shape), 0)
            assert source.at(name, 3) == shard


class TestCompleteCkpt(CompleteTests):
    def save(self, folder, case):
        self.write(folder / "model", case.full)
        return folder / "model.ckpt", Strategy.complete()


class TestCompleteSafetensors(CompleteTests):
    format = "safetensors"

    def save(self, folder, case):
        self.write(folder / "model", case.full)
        return folder / "model.safetensors", Strategy.complete()


class TestShardedSafetensors(CompleteTests):
    """A file for every parameter, with an index."""

    format = "safetensors"

    def save(self, folder, case):
        weight_map = {}
        for number, (name, array) in enumerate(case.full.items(), 1):
            weight_map[name] = f"model-{number:05d}-of-{len(case.full):05d}.safetensors"
            self.write(folder / weight_map[name], {name: array})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder, Strategy.complete()

    def in_order(self, names):
        return list(names)


class TestShardedSafetensorsWithHyperParameters(TestShardedSafetensors):
    """As `merge_safetensors` writes it: what no strategy lists lies in a file that the index does not name."""

    def save(self, folder, case):
        weights = {name: array for name, array in case.full.items() if name != "global_step"}
        super().save(folder, Case(weights, case.strategy))
        if "global_step" in case.full:
            self.write(folder / "hyper_param", {"global_step": case.full["global_step"]})
        return folder, Strategy.complete()


class Checkpoint2Tests(SourceTests):
    """What every Checkpoint 2.0 must do: its metadata.json is the strategy."""

    format = "safetensors"

    def save(self, folder, case):
        try:
            return write_iteration(folder, case.full, case.strategy, saver=self.saver), case.strategy
        except LayoutError:  # an optimizer shard that metadata.json cannot tell
            assume(False)
            raise

    def saver(self, name, group):
        """The rank that saves a slice."""
        raise NotImplementedError

    def open(self, folder, case):
        (found,) = find_checkpoints(self.save(folder, case)[0])
        assert found.distributed == (case.strategy.world_size > 1)
        return SlicedSource(found.strategy(Strategy.complete()), ScannedFiles(found))

    def in_order(self, names):
        """That of the model, and that of the optimizer; last the numbers that only common.json holds."""
        common = ["epoch_num", "step_num", "loss_scale", "global_batch_size"]
        return [*sorted(names, key=lambda name: name == "global_step"), *common]


class TestCheckpoint2(Checkpoint2Tests):
    saver = None


class TestCheckpoint2WithoutRedundancy(Checkpoint2Tests):
    def saver(self, name, group):
        return group[sum(map(ord, name)) % len(group)]

    def test_names_are_in_file_order(self, new_folder):
        """Those of the first rank, and then what only others hold."""
        case = self.case()
        assert sorted(self.open(new_folder(), case).names) == sorted(self.in_order(case.full))
