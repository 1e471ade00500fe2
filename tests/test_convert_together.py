"""The ranks of a session convert together; here they are threads of one process."""

from __future__ import annotations

import dataclasses
import json
import threading

import numpy as np
import pytest
from builders import hold, load, request, save, strategy
from safetensors.numpy import load_file, save_file

from auto_trans import together
from auto_trans.config import Timing
from auto_trans.conversion import plan_conversion
from auto_trans.coordination.election import elect
from auto_trans.coordination.joining import Joined
from auto_trans.coordination.session import Session
from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.errors import (
    AutoTransError,
    CoordinationError,
    InsufficientMemoryError,
    OutputError,
    PlanError,
    RankFailedError,
)
from auto_trans.process import Process
from auto_trans.storage import capacity
from auto_trans.together import SharedConversion, convert_together

TIMING = Timing(poll_min=0.005, poll_max=0.05, heartbeat_interval=0.5, heartbeat_timeout=20)
HERE = Process.current()
DP2, MP2 = Layout((2,), ((),)), Layout((2,), ((0,),))
FULL = {"w": np.arange(8), "v": np.arange(4)}


class Job:
    """Two ranks that load what was saved under one strategy into another."""

    def __init__(self, folder, source, target, converters=1, processes=(HERE, HERE)):
        self.folder, self.processes = folder, processes
        self.source, self.target = (strategy(dict.fromkeys(FULL, layout)) for layout in (source, target))
        self.held = hold(FULL, self.source)
        self.options = {"format": "ckpt"}
        self.assignments = elect(2, converters)
        self.results = {}

    def shared(self):
        return SharedConversion(
            request(self.folder / "net", self.folder / "out", self.source, **self.options), self.folder / "strategy",
            lambda: self.target, self.folder / "report.json", self.assignments, TIMING,
        )  # fmt: skip

    def session(self, rank):
        return Session(Joined(self.folder / "session", self.processes), rank, TIMING)

    def run(self):
        """Runs both ranks: what each raised, or None."""
        if not (self.folder / "net").exists():
            save(self.folder / "net", self.held)
        threads = [threading.Thread(target=self._live, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.results

    def succeeds(self):
        results = self.run()
        assert results == {0: None, 1: None}, results
        for rank, tensors in hold(FULL, self.target).items():
            got = load(self.folder / "out" / "net", rank)
            assert all(np.array_equal(got[name], array) for name, array in tensors.items())
        return json.loads((self.folder / "report.json").read_text())

    def _live(self, rank):
        session = self.session(rank)
        try:
            convert_together(session, self.shared())
            self.results[rank] = None
        except AutoTransError as e:
            session.fail(e)
            self.results[rank] = e

    def file(self, rank):
        return self.folder / "out" / "net" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"


@pytest.mark.parametrize("converters", [1, 2])
def test_both_ranks_get_their_slices(tmp_path, converters):
    report = Job(tmp_path, MP2, DP2, converters).succeeds()
    assert not report["matches"] and [c["rank"] for c in report["converters"]] == list(range(converters))


@pytest.mark.parametrize("converters", [1, 2])
def test_safetensors_job_gets_safetensors(tmp_path, converters):
    job = Job(tmp_path, MP2, DP2, converters)
    job.options = {"format": "safetensors"}
    assert job.run() == {0: None, 1: None}
    for rank, tensors in hold(FULL, job.target).items():
        got = load_file(tmp_path / "out" / "net" / f"rank_{rank}" / f"checkpoint_{rank}.safetensors")
        assert got.keys() == tensors.keys() and all(np.array_equal(got[n], a) for n, a in tensors.items())


@pytest.mark.parametrize("matching", [True, False])
def test_safetensors_that_match_are_linked(tmp_path, matching):
    job = Job(tmp_path, MP2, MP2 if matching else DP2)
    whole = request(save(tmp_path / "ckpt", job.held), tmp_path / "net", job.source, job.source, format="safetensors")
    plan_conversion(whole).run(quiet=True)
    job.options = {"format": "safetensors"}
    assert job.run() == {0: None, 1: None}
    assert json.loads((tmp_path / "report.json").read_text())["matches"] == matching
    for rank in range(2):
        target = tmp_path / "out" / "net" / f"rank_{rank}" / f"checkpoint_{rank}.safetensors"
        assert target.is_symlink() == matching


def merging(folder, converters, shard_size):
    """A job whose weights are merged, 8 and 4 float32 of two parameters and one that no strategy lists."""
    job = Job(folder, MP2, DP2, converters)
    job.held = {rank: {**held, "global_step": np.array([3])} for rank, held in job.held.items()}
    job.target = Strategy.complete()
    job.options = {"format": "safetensors", "shard_size": shard_size}
    return job


@pytest.mark.parametrize("converters", [1, 2])
@pytest.mark.parametrize(("shard_size", "files"), [(16, 2), (1000, 1)])
def test_converters_merge_together(tmp_path, converters, shard_size, files):
    job = merging(tmp_path, converters, shard_size)
    assert job.run() == {0: None, 1: None}
    out = tmp_path / "out"
    merged = sorted(out.glob("model-*.safetensors"))
    assert len(merged) == files
    got = {name: array for file in merged for name, array in load_file(file).items()}
    assert got.keys() == FULL.keys() and all(np.array_equal(got[name], array) for name, array in FULL.items())
    assert load_file(out / "hyper_param.safetensors")["global_step"] == [3]
    report = json.loads((tmp_path / "report.json").read_text())
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert report["bytes_written"] == written, "each file is written once"
    names = json.loads((out / "param_name_map.json").read_text())["weight_map"]
    assert all(name in load_file(out / names[name]) for name in FULL)


def test_weights_of_one_rank_are_merged_though_they_match(tmp_path):
    """What MindFormers slices is a set of files with its index, and no link."""
    job = merging(tmp_path, 1, 1000)
    job.source = Strategy.complete()
    (tmp_path / "net" / "rank_0").mkdir(parents=True)
    save_file(FULL, tmp_path / "net" / "rank_0" / "net_rank_0-1_1.safetensors")
    assert job.run() == {0: None, 1: None}
    assert (tmp_path / "out" / "model-00001-of-00001.safetensors").is_file()


def test_merge_is_complete_only_when_all_converters_are_done(tmp_path, monkeypatch):
    job = merging(tmp_path, 2, 16)
    run = together.run_conversion

    def run_and_lose(conversion, **options):
        report = run(conversion, **options)
        for file in (tmp_path / "out").glob("model-00001*"):
            file.unlink(missing_ok=True)
        return report

    monkeypatch.setattr(together, "run_conversion", run_and_lose)
    results = job.run()
    assert isinstance(results[0], OutputError) and "is not complete" in str(results[0])
    assert isinstance(results[1], RankFailedError)


@pytest.mark.parametrize("converters", [1, 2])
def test_weights_that_match_are_linked(tmp_path, converters):
    job = Job(tmp_path, MP2, MP2, converters)
    report = job.succeeds()
    assert report["matches"] and report["converters"] == [] and report["bytes_written"] == 0
    for rank in range(2):
        assert job.file(rank).resolve() == tmp_path / "net" / f"rank_{rank}" / f"net_rank_{rank}-1_1.ckpt"


def test_weights_that_match_but_lack_a_rank_are_converted(tmp_path):
    """Rank 1 holds the same slices as rank 0, and its folder is not there: there is nothing to link."""
    job = Job(tmp_path, DP2, DP2)
    del job.held[1]
    assert not job.succeeds()["matches"]
    assert not job.file(1).is_symlink()


def test_weights_of_the_other_format_are_converted_though_the_strategies_match(tmp_path):
    job = Job(tmp_path, MP2, MP2)
    whole = request(save(tmp_path / "ckpt", job.held), tmp_path / "net", job.source, job.source, format="safetensors")
    plan_conversion(whole).run(quiet=True)
    assert not job.succeeds()["matches"]


def test_weights_that_match_are_not_linked_where_a_rank_holds_something_else(tmp_path):
    job = Job(tmp_path, DP2, DP2)
    job.held[1]["w"] = np.arange(9)
    results = job.run()
    assert isinstance(results[0], PlanError) and "rank_1" in str(results[0])
    assert isinstance(results[1], RankFailedError)


def test_file_that_is_missing_in_the_end_is_named(tmp_path, monkeypatch):
    job = Job(tmp_path, MP2, DP2)
    run = together.run_conversion

    def run_and_lose(conversion, **options):
        report = run(conversion, **options)
        job.file(1).unlink()
        return report

    monkeypatch.setattr(together, "run_conversion", run_and_lose)
    results = job.run()
    assert isinstance(results[0], OutputError)
    assert f"all converters are done, but {job.file(1)} is not there" in str(results[0])
    assert isinstance(results[1], RankFailedError) and not (tmp_path / "report.json").exists()


def test_rank_that_would_convert_something_else_is_told(tmp_path):
    job = Job(tmp_path, MP2, DP2, converters=2)
    save(tmp_path / "net", job.held)
    other = strategy({"w": DP2, "v": MP2})
    shared = dataclasses.replace(job.shared(), read_target=lambda: other)
    prepared = together._choice(job.shared().request, together.find_sources(tmp_path / "net", job.source))
    job.session(0).post("prepared", {"matches": False, **prepared})
    with pytest.raises(CoordinationError, match="rank 1 would convert something else than rank 0"):
        convert_together(job.session(1), shared)
    assert not job.file(1).exists()


def test_converters_of_one_machine_share_its_memory_and_those_of_others_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "available_memory", lambda: 100 << 20)
    results = Job(tmp_path / "one", MP2, DP2, converters=2).run()
    assert any(isinstance(result, InsufficientMemoryError) for result in results.values())
    there = dataclasses.replace(HERE, host="elsewhere")
    Job(tmp_path / "two", MP2, DP2, converters=2, processes=(HERE, there)).succeeds()
