"""The ranks of a session load together, each its own slices and nothing through a file; here they are threads."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import oracle
import pytest
from builders import hold, save, strategy
from checkpoint2_files import COMMON, write_iteration

from auto_trans import load_together as module
from auto_trans import read_strategy
from auto_trans.config import Timing
from auto_trans.coordination import session
from auto_trans.coordination.joining import Joined
from auto_trans.coordination.session import Session
from auto_trans.core.consistency import Network
from auto_trans.core.layout import Layout
from auto_trans.core.rules import Allowed
from auto_trans.core.strategy import Strategy
from auto_trans.errors import (
    AutoTransError,
    CheckpointNotFoundError,
    InsufficientMemoryError,
    MissingSliceError,
    PlanError,
    RankFailedError,
    RankLostError,
    SourceChangedError,
    StrategyError,
)
from auto_trans.load_together import SharedLoad, load_together
from auto_trans.log import logger
from auto_trans.process import Process
from auto_trans.storage import capacity
from auto_trans.storage.readers import LocalReader

TIMING = Timing(poll_min=0.002, poll_max=0.02, heartbeat_interval=0.5, heartbeat_timeout=20)
HERE = Process.current()
DP4, MP4 = Layout((4,), ((), ())), Layout((4,), ((0,), ()))
ROWS, COLUMNS = Layout((2, 2), ((0,), ())), Layout((2, 2), ((), (0,)))  # each slice lies with two ranks
LAYOUTS = {"rows": ROWS, "columns": COLUMNS, "dp4": DP4, "mp4": MP4}
FULL = {"layer.w": np.arange(32).reshape(4, 8), "layer.v": np.arange(16).reshape(4, 4), "global_step": np.array(9)}
LISTED = ["layer.w", "layer.v"]


class Job:
    """The ranks of a job that load what was saved under one strategy into another."""

    def __init__(self, folder, source=ROWS, target=COLUMNS, ranks=4):
        self.folder, self.src, self.ranks = folder, folder / "net", ranks
        self.source, self.target = self.strategy(source), self.strategy(target)
        self.full, self.options, self.networks, self.make = FULL, {}, {}, list
        self.processes = [HERE] * ranks
        self.read: dict[str, int] = defaultdict(int)
        self.errors: dict[int, AutoTransError] = {}
        self.loaded: dict[int, list] = {}
        self.strategy_dir.mkdir(parents=True)

    @staticmethod
    def strategy(layout):
        return layout if isinstance(layout, Strategy) else strategy(dict.fromkeys(LISTED, layout), origin=f"{layout}")

    @property
    def strategy_dir(self):
        return self.folder / "strategy"

    @property
    def report(self):
        return json.loads((self.folder / "report.json").read_text())

    def file(self, rank):
        return self.src / f"rank_{rank}" / f"net_rank_{rank}-1_1.ckpt"

    def save(self, held=None):
        """Saves the source, of which a test may hold something else."""
        save(self.src, hold(self.full, self.source) if held is None else held)
        return self

    def run(self):
        """Runs all ranks: what those that failed have raised."""
        if not self.src.exists():
            self.save()
        threads = [threading.Thread(target=self._live, args=(rank,), name=f"rank {rank}") for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.errors

    def succeeds(self, expected=None):
        """Runs all ranks, and compares what each has with what it should hold: rank -> parameter -> array."""
        assert not self.run(), self.errors
        for rank, arrays in (hold(self.full, self.target) if expected is None else expected).items():
            got = self.arrays(rank)
            assert got.keys() == arrays.keys()
            assert all(np.array_equal(got[name], array) for name, array in arrays.items()), rank
        return self.report

    def fails(self, error, message, rank=0):
        """Runs all ranks: one fails, and all others with its error and traceback."""
        errors = self.run()
        assert list(sorted(errors)) == list(range(self.ranks)), "all ranks end"
        assert isinstance(errors[rank], error), errors[rank]
        assert message in str(errors[rank]), errors[rank]
        for other in set(errors) - {rank}:
            assert isinstance(errors[other], RankFailedError) and errors[other].rank == rank
            assert f"rank {rank} failed with {type(errors[rank]).__name__}" in str(errors[other])
            assert "Traceback (most recent call last)" in errors[other].original
        assert not (self.folder / "report.json").exists() and not self.loaded
        return errors

    def arrays(self, rank):
        return {one.name: one.data.view(np.float32).reshape(one.shape) for one in self.loaded[rank]}

    def _live(self, rank):
        if self.processes[rank] is not HERE:
            return
        own = Session(Joined(self.folder / "session", tuple(self.processes)), rank, TIMING)
        try:
            self.loaded[rank] = load_together(own, self._shared(rank), self.make)
        except AutoTransError as e:
            own.fail(e)
            self.errors[rank] = e

    def _shared(self, rank):
        def count(what, result):
            self.read[f"{what} by rank {rank}"] += 1
            return result

        shared = SharedLoad(
            self.src, lambda: count("source", self.source), self.strategy_dir, lambda: count("target", self.target),
            self.folder / "report.json", network=self.networks.get(rank),
        )  # fmt: skip
        return dataclasses.replace(shared, **self.options)


@pytest.fixture(autouse=True)
def watchful(monkeypatch):
    """Ranks that wait look for failures often, so that the tests are quick."""
    monkeypatch.setattr(session, "_WATCH_SECONDS", 0.02)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.fixture
def opened(monkeypatch):
    """The files that every rank opens: name of its thread -> their paths."""
    paths: dict[str, set[str]] = defaultdict(set)
    init = LocalReader.__init__

    def record(self, path):
        paths[threading.current_thread().name].add(str(path))
        init(self, path)

    monkeypatch.setattr(LocalReader, "__init__", record)
    return paths


def once_prepared(monkeypatch, rank, do):
    """Has something happen between rank 0's look at the source and that of another rank."""
    original = module._from_json

    def from_json(content):
        if threading.current_thread().name == f"rank {rank}":
            do()
        return original(content)

    monkeypatch.setattr(module, "_from_json", from_json)


# what each rank gets


@pytest.mark.parametrize("target", [*LAYOUTS, "complete"])
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_rank_gets_its_slices_and_nothing_is_written_but_the_report(tmp_path, snapshot, source, target):
    job = Job(tmp_path, LAYOUTS[source], LAYOUTS.get(target, Strategy.complete(4))).save()
    before = snapshot(tmp_path)
    job.succeeds()
    after = snapshot(tmp_path)
    assert {name for name in after.keys() - before.keys() if not name.startswith("session")} == {"report.json"}
    assert {name: after[name] for name in before} == before


def test_complete_weights_are_sliced(tmp_path):
    job = Job(tmp_path, Strategy.complete())
    job.src = tmp_path / "net.ckpt"
    oracle.write_raw(job.src, {name: oracle.raw(array.astype(np.float32)) for name, array in FULL.items()})
    job.succeeds()


def test_of_several_complete_checkpoints_the_last_that_holds_a_parameter_gives_it(tmp_path):
    job = Job(tmp_path, Strategy.complete())
    files = {"a": {"layer.w": FULL["layer.w"] + 1, "layer.v": FULL["layer.v"]}, "b": {"layer.w": FULL["layer.w"]}}
    for file, arrays in files.items():
        raws = {name: oracle.raw(array.astype(np.float32)) for name, array in arrays.items()}
        oracle.write_raw(job.src / f"{file}.ckpt", raws)
    job.full = {name: FULL[name] for name in LISTED}
    job.options = {"allowed": Allowed(missing=("layer.v",))}
    report = job.succeeds()
    assert [rank["parameters"] for rank in report["ranks"]] == [2] * 4, "each parameter is read once"
    assert [rank["bytes"] for rank in report["ranks"]] == [4 * (16 + 8)] * 4


@pytest.mark.parametrize(
    "source, target", [("dp2mp2pp2", "dp2mp2"), ("dp2mp2_opt", "dp2mp2pp2"), ("dp1mp1", "dp2mp2pp2")]
)
def test_stages_are_loaded_and_their_strategies_merged(genuine, tmp_path, snapshot, source, target):
    weights = genuine.model("mf_llama")
    held = weights.slices(target)
    to = read_strategy(weights.strategy(target))
    job = Job(tmp_path, read_strategy(weights.strategy(source)), to, ranks=len(held))
    job.src = genuine.source("mf_llama", source)
    for file in weights.strategy(target).iterdir():
        shutil.copy(file, job.strategy_dir)
    before = snapshot(job.src)
    assert not job.run(), job.errors
    for rank, boxes in held.items():
        got = {one.name: one for one in job.loaded[rank]}
        for name, box in boxes.items():
            assert got[name].data.tobytes() == oracle.raw(box, weights.dtypes[name]).content, (rank, name)
    assert snapshot(job.src) == before
    merged = job.strategy_dir / "merged_ckpt_strategy.ckpt"
    assert merged.exists() == (to.stages > 1)
    assert to.stages == 1 or read_strategy(merged).layouts == to.layouts


def checkpoint2(folder):
    """A job whose source is a Checkpoint 2.0, and the folder of its iteration."""
    job = Job(folder, Strategy.complete())
    job.full = {name: FULL[name].astype(np.float32) for name in LISTED}
    iteration = write_iteration(job.src, job.full, strategy(dict.fromkeys(LISTED, ROWS)), common=COMMON)
    return job, iteration


def test_checkpoint_2_tells_of_itself_how_it_is_sliced(tmp_path):
    job, _ = checkpoint2(tmp_path)
    assert not job.run(), job.errors
    for rank, held in hold(job.full, job.target).items():
        got = {one.name: one.data for one in job.loaded[rank]}
        assert all(
            np.array_equal(got[name].view(np.float32).reshape(array.shape), array) for name, array in held.items()
        )
        assert got["global_step"].view(np.int32) == COMMON["global_step"], "the numbers come from common.json"


def test_parameters_bear_the_names_that_the_network_has_for_them(tmp_path):
    job = Job(tmp_path, Strategy.complete())
    job.src = tmp_path / "net.safetensors"
    foreign = {"foreign.w": FULL["layer.w"], "foreign.v": FULL["layer.v"]}
    raws = {name: oracle.raw(array.astype(np.float32)) for name, array in foreign.items()}
    oracle.write_safetensors_raw(job.src, raws)
    job.full = {name: FULL[name] for name in LISTED}
    asked = []

    def read_names(checkpoint):
        asked.append((threading.current_thread().name, checkpoint.path))
        return {"layer.w": "foreign.w", "layer.v": "foreign.v"}

    job.options = {"read_names": read_names}
    job.networks = dict.fromkeys(range(4), Network({name: FULL[name].shape for name in LISTED}))
    job.succeeds()
    assert asked == [("rank 0", job.src)], "the leader asks, and tells the others"


def test_what_the_model_has_no_place_for_is_left_out_of_a_published_model(tmp_path, told):
    """As a vision tower beside a language model: it is named, and nobody reads it."""
    job = Job(tmp_path, Strategy.complete())
    job.src = tmp_path / "net.safetensors"
    arrays = {"foreign.w": FULL["layer.w"], "foreign.v": FULL["layer.v"], "tower.w": np.ones((7, 7))}
    oracle.write_safetensors_raw(job.src, {n: oracle.raw(array.astype(np.float32)) for n, array in arrays.items()})
    job.full = {name: FULL[name] for name in LISTED}
    job.options = {
        "read_names": lambda checkpoint: {"layer.w": "foreign.w", "layer.v": "foreign.v", "tower.weight": "tower.w"}
    }
    job.succeeds()
    assert "left out, the model does not have them: tower.w" in " ".join(told())


def test_what_cannot_be_made_of_the_slices_of_a_rank_ends_all(job, monkeypatch):
    """A parameter that MindSpore refuses, say: who trains on would wait for that rank in vain."""

    def make(slices):
        made = list(slices)
        if threading.current_thread().name == "rank 2":
            raise PlanError("no parameter can be made of layer.w")
        return made

    job.make = make
    job.fails(PlanError, "no parameter can be made of layer.w", 2)


def test_two_parameters_of_one_name_reach_every_rank_as_an_error(tmp_path):
    job = Job(tmp_path, DP4)
    job.options = {"read_names": lambda checkpoint: {"layer.w": "layer.v"}}
    job.fails(PlanError, "would both be named layer.w")


def test_scalars_reach_every_rank_as_the_rank_at_the_same_place_held_them(tmp_path):
    job = Job(tmp_path, ROWS, MP4)
    held = hold(FULL, job.source)
    for rank in range(4):
        held[rank]["global_step"] = np.array(rank)
    job.save(held)
    assert not job.run()
    assert [job.arrays(rank)["global_step"] for rank in range(4)] == [0, 1, 2, 3]


def test_fewer_ranks_and_more_load_what_others_saved(tmp_path):
    two = Layout((2,), ((0,), ()))
    Job(tmp_path / "fewer", MP4, two, ranks=2).succeeds()
    Job(tmp_path / "more", two, MP4).succeeds()
    Job(tmp_path / "one", MP4, Strategy.complete(), ranks=1).succeeds()


# who reads what


def test_rank_0_alone_reads_the_strategies(job):
    job.succeeds()
    assert job.read == {"source by rank 0": 1, "target by rank 0": 1}


def test_ranks_open_only_the_files_that_they_need(tmp_path, opened):
    """By rows every rank has its slice where it was; besides, the first file of the stage tells the shapes."""
    job = Job(tmp_path, MP4, MP4)
    job.succeeds()
    for rank in range(1, 4):
        assert opened[f"rank {rank}"] == {str(job.file(0)), str(job.file(rank))}
    assert opened["rank 0"] == {str(job.file(rank)) for rank in range(4)}, "the leader looks at all"


def test_replicas_read_the_first_rank_that_holds_their_slice(tmp_path, opened):
    job = Job(tmp_path, DP4, DP4)
    job.full = {name: FULL[name] for name in LISTED}
    job.succeeds()
    assert all(opened[f"rank {rank}"] == {str(job.file(0))} for rank in range(1, 4))
    assert [rank["files"] for rank in job.report["ranks"]] == [1] * 4


def test_what_no_file_holds_is_looked_for_by_the_leader_only(tmp_path, opened):
    """Strategies list the state of the optimizer, too, and those of pipeline jobs gradients that are never saved."""
    listed = [*LISTED, "adam_m.layer.w", "accu_grads.layer.w"]
    job = Job(tmp_path, *(strategy(dict.fromkeys(listed, MP4), origin=side) for side in ("source", "target")))
    held = hold({name: FULL[name] for name in LISTED}, job.source)
    job.save(held).succeeds(held)
    for rank in range(1, 4):
        assert opened[f"rank {rank}"] == {str(job.file(0)), str(job.file(rank))}


def test_where_redundancy_was_removed_the_leader_tells_who_holds_what(tmp_path, opened):
    job = Job(tmp_path, DP4, DP4)
    job.full = {name: FULL[name] for name in LISTED}
    job.save({0: {"layer.w": FULL["layer.w"]}, 1: {"layer.v": FULL["layer.v"]}, 2: {"global_step": np.array(1)}})
    assert not job.run()
    assert all(job.arrays(rank).keys() == {*LISTED, "global_step"} for rank in range(4))
    assert str(job.file(1)) in opened["rank 3"] and not (job.src / "rank_3").exists()


def test_arrays_in_no_strategy_are_compared_by_the_leader_only(tmp_path, opened):
    job = Job(tmp_path, MP4, MP4)
    job.full = {**FULL, "table": np.arange(4)}
    job.options = {"allowed": Allowed(extra=("table",))}
    job.succeeds()
    for rank in (1, 2):
        assert opened[f"rank {rank}"] <= {str(job.file(0)), str(job.file(rank)), str(job.file(3))}


# what is checked on behalf of all


@pytest.mark.parametrize("lost", [1, 3])
def test_slice_that_only_another_rank_needs_is_missed_by_the_leader(tmp_path, lost):
    job = Job(tmp_path, MP4, MP4).save()
    shutil.rmtree(job.src / f"rank_{lost}")
    job.fails(MissingSliceError, f"held by source rank {lost} only")


def test_files_whose_heads_differ_are_refused(job):
    held = hold(FULL, job.source)
    held[3]["layer.v"] = np.arange(3)
    job.save(held).fails(PlanError, f"which the strategy {job.source.origin} does not tell apart")


def test_parameter_that_only_some_files_hold_is_refused(job):
    held = hold(FULL, job.source)
    held[3]["more"] = np.arange(3)
    job.save(held).fails(PlanError, "parameter more is in")


def test_arrays_in_no_strategy_that_differ_are_refused(job):
    held = hold({**FULL, "table": np.arange(4)}, job.source)
    held[3]["table"] = np.arange(4) + 1
    job.options = {"allowed": Allowed(extra=("table",))}
    job.save(held).fails(PlanError, "parameter table is in no strategy, but differs")


def test_shapes_that_contradict_each_other_are_refused(job):
    """The moments of a weight are as large as it is, unless the strategy is another's."""
    listed = {"layer.w": ROWS, "layer.v": ROWS, "adam_m.layer.w": DP4}
    job.source = strategy(listed, origin="source")
    held = hold({**FULL, "adam_m.layer.w": FULL["layer.w"][:2]}, job.source)
    job.save(held).fails(PlanError, "contradict each other")


@pytest.mark.parametrize(
    "target, message",
    [
        (strategy({"other.w": COLUMNS}, origin="theirs"), "they are of another model"),
        (strategy({"layer.w": COLUMNS}, origin="theirs"), "parameter layer.v is in the source, but not in the target"),
        (strategy(dict.fromkeys([*LISTED, "layer.bias"], COLUMNS), origin="theirs"), "lacks parameter layer.bias"),
        (
            strategy({"layer.w": Layout((2, 2), ((1, 0), ())), "layer.v": Layout((8,), ((0,), ()))}),
            "does not fit strategy",
        ),
    ],
)
def test_target_strategy_of_something_else_is_refused(job, target, message):
    job.target = target
    job.fails(PlanError, message)


def test_target_strategy_of_fewer_ranks_is_refused(job):
    job.target = strategy(dict.fromkeys(LISTED, Layout((2,), ((0,), ()))), origin="theirs")
    errors = job.run()
    assert sorted(errors) == list(range(4)) and not (job.folder / "report.json").exists()
    assert any("not in the target, which has ranks 0 to 1" in str(error) for error in errors.values())


@pytest.mark.parametrize("rank", [0, 2])
def test_network_of_another_shape_on_one_rank_stops_all(job, rank):
    right = Network({name: FULL[name].shape for name in LISTED})
    job.networks = {**dict.fromkeys(range(4), right), rank: Network({"layer.w": (5, 8)})}
    job.fails(PlanError, "parameter layer.w is [5, 8] in the network", rank)


def test_source_that_is_not_there_is_told_to_all(job, tmp_path):
    tmp_path.joinpath("net").mkdir()
    job.fails(CheckpointNotFoundError, "holds neither rank_N folders nor checkpoint files")


def test_strategy_that_cannot_be_read_is_told_to_all(job):
    def read():
        raise StrategyError("strategy x is damaged")

    job.options = {"read_source": read}
    job.fails(StrategyError, "strategy x is damaged")


# what happens meanwhile


@pytest.mark.parametrize("rank", [1, 3])
def test_source_that_changes_after_rank_0_looked_is_noticed_by_the_rank_that_reads_it(tmp_path, monkeypatch, rank):
    job = Job(tmp_path, MP4, MP4).save()
    once_prepared(monkeypatch, rank, lambda: os.utime(job.file(rank), ns=(0, 0)))
    errors = job.fails(SourceChangedError, "was written to since it was chosen", rank)
    assert str(job.file(rank)) in str(errors[0]), "the others are told of which file"


def test_source_that_disappears_after_rank_0_looked_is_named(tmp_path, monkeypatch):
    job = Job(tmp_path, MP4, MP4).save()
    once_prepared(monkeypatch, 2, job.file(2).unlink)
    job.fails(AutoTransError, f"{job.file(2)} cannot be read", 2)


def test_source_that_changes_while_a_rank_reads_it_is_noticed(tmp_path, monkeypatch):
    job = Job(tmp_path, MP4, MP4).save()

    def read_and_touch(tensors, progress):
        for one in original(tensors, progress):
            if threading.current_thread().name == "rank 3":
                os.utime(job.file(3), ns=(0, 0))
            yield one

    original = module.assemble
    monkeypatch.setattr(module, "assemble", read_and_touch)
    job.fails(SourceChangedError, str(job.file(3)), 3)


@pytest.mark.parametrize("name", ["common.json", "metadata.json"])
def test_what_tells_of_a_checkpoint_2_and_changes_after_rank_0_looked_is_noticed(tmp_path, monkeypatch, name):
    job, iteration = checkpoint2(tmp_path)
    once_prepared(monkeypatch, 1, lambda: os.utime(iteration / name, ns=(0, 0)))
    errors = job.run()
    assert sorted(errors) == list(range(4)) and not job.loaded
    assert isinstance(errors[1], SourceChangedError)
    assert f"{iteration / name} was written to since it was chosen" in str(errors[1])
    # all ranks read it: who was quicker notices it while it reads, or is told of it by whoever noticed it first
    assert all(str(iteration / name) in str(error) for error in errors.values())


def test_rank_that_is_dead_is_named(job):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    job.processes[2] = dataclasses.replace(HERE, pid=done.pid)
    errors = job.run()
    assert isinstance(errors[0], RankLostError) and errors[0].rank == 2 and "rank 2" in str(errors[0])
    assert all(isinstance(errors[rank], RankFailedError) and "rank 2" in str(errors[rank]) for rank in (1, 3))
    assert not job.loaded, "no rank goes on alone"


def test_leader_that_is_dead_is_named_by_all(job):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    job.processes[0] = dataclasses.replace(HERE, pid=done.pid)
    errors = job.run()
    assert sorted(errors) == [1, 2, 3] and not job.loaded
    assert any(isinstance(error, RankLostError) and error.rank == 0 for error in errors.values())


def test_slices_that_do_not_fit_in_memory_stop_all(job, monkeypatch):
    needed = 4 * (16 + 8 + 1)

    def available():
        return needed - 1 if threading.current_thread().name == "rank 1" else needed

    monkeypatch.setattr(capacity, "available_memory", available)
    job.fails(InsufficientMemoryError, "the slices of this rank take 100 B of memory, but only 99 B", 1)


def test_slices_of_all_ranks_of_a_machine_must_fit(job, monkeypatch):
    monkeypatch.setattr(capacity, "all_memory", lambda: 4 * 4 * (16 + 8 + 1) - 1)
    errors = job.run()
    assert sorted(errors) == [0, 1, 2, 3]
    assert any("the slices of the 4 ranks of this machine take 400 B" in str(error) for error in errors.values())


def test_slices_that_just_fit_are_loaded(job, monkeypatch):
    monkeypatch.setattr(capacity, "all_memory", lambda: 4 * 4 * (16 + 8 + 1))
    monkeypatch.setattr(capacity, "available_memory", lambda: 4 * (16 + 8 + 1))
    job.succeeds()


# what is told


def test_report_tells_what_every_rank_has_loaded(job):
    report = job.succeeds()
    assert report.keys() == {"source", "load", "seconds", "ranks"}
    assert (report["source"], report["load"]) == (str(job.src), "direct")
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1, 2, 3]
    assert all(rank.keys() == {"rank", "parameters", "bytes", "files", "seconds"} for rank in report["ranks"])
    assert {(rank["parameters"], rank["bytes"]) for rank in report["ranks"]} == {(3, 4 * (16 + 8 + 1))}
    # a column lies in both slices of rows, which rank 0 and 1 are the first to hold
    assert [rank["files"] for rank in report["ranks"]] == [2, 2, 2, 2]
    assert all(0 < rank["seconds"] <= report["seconds"] for rank in report["ranks"])


@pytest.fixture
def told(caplog, monkeypatch):
    """The log lines."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    return lambda: [record.getMessage() for record in caplog.records]


def test_log_tells_why_and_how_fast(job, told):
    job.succeeds()
    (why,) = [line for line in told() if "do not match the strategy of this job" in line]
    assert str(job.src) in why and "layer.w cut 2 x 1 -> 1 x 2" in why and "nothing is written" in why
    for rank in range(4):
        (own,) = [line for line in told() if line.startswith(f"rank {rank}: loaded")]
        assert "3 parameters, 100 B, of " in own and str(job.src) in own
    (all_of_them,) = [line for line in told() if "ranks loaded" in line]
    assert all_of_them.startswith("4 ranks loaded 400 B from") and "the slowest, rank" in all_of_them


def test_log_tells_that_the_strategies_match(tmp_path, told):
    Job(tmp_path, ROWS, ROWS).succeeds()
    assert sum("match the strategy of this job: every rank loads them as they are" in line for line in told()) == 1


def test_log_tells_once_what_a_user_should_know(job, told):
    job.full = {**FULL, "table": np.arange(4)}
    job.options = {"allowed": Allowed(extra=("table",))}
    job.succeeds()
    assert sum("every rank gets the whole of table" in line for line in told()) == 1


def test_ranks_of_one_file_load_it_at_the_same_time(job):
    """Replicas of data parallel jobs: the source is complete, and every rank takes all of it."""
    job.source, job.target = Strategy.complete(), job.strategy(DP4)
    job.src = Path(job.folder / "net.ckpt")
    oracle.write_raw(job.src, {name: oracle.raw(array.astype(np.float32)) for name, array in FULL.items()})
    job.succeeds()
    assert {rank["files"] for rank in job.report["ranks"]} == {1}
