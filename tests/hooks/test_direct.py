"""What a rank of a job reads itself: its slices of the source, or the file that was converted for it."""

from __future__ import annotations

import json
import logging

import numpy as np
import oracle
import pytest
from builders import hold, save, strategy

from auto_trans.core.consistency import Network
from auto_trans.core.layout import Layout
from auto_trans.errors import CheckpointError, CorruptCheckpointError, PlanError
from auto_trans.hooks import direct
from auto_trans.hooks.job import Job, Running
from auto_trans.jobs import Load
from auto_trans.log import logger

FULL = {"layer.w": np.arange(16).reshape(4, 4), "layer.v": np.arange(8).reshape(4, 2)}
ROWS = strategy(dict.fromkeys(FULL, Layout((2,), ((0,), ()))), origin="rows")


@pytest.fixture
def job(monkeypatch, tmp_path):
    """A job of one rank; a source of two ranks."""
    save(tmp_path / "net", hold(FULL, ROWS))
    running = Job(0, 1, tmp_path / "output")
    monkeypatch.setattr(Job, "current", staticmethod(lambda: running))
    monkeypatch.setattr(Load, "source_strategy", lambda self: ROWS)
    yield running
    running.release()


@pytest.fixture
def told(caplog, monkeypatch):
    """The log lines."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    return lambda: [record.getMessage() for record in caplog.records]


def converted(job, name, arrays):
    """A file as a converter leaves it for rank 0."""
    raws = {key: oracle.raw(array.astype(np.float32)) for key, array in arrays.items()}
    return oracle.write_raw(job.transformed_dir / name / "rank_0" / "checkpoint_0.ckpt", raws)


def read(job, network=None, auto_trans_ckpt=True, **settings):
    """What the wrapper of MindFormers' reading gives; that itself reads "theirs"."""
    src = str(job.output.parent / "net")
    config = {"auto_trans_ckpt": auto_trans_ckpt, "load_checkpoint": src, "auto_trans": settings}
    with Job.knowing(Running(config, network, Load.of(config))):
        return direct.read_parameters(lambda config: "theirs", config)


def values(parameters):
    return {name: parameter.asnumpy().tolist() for name, parameter in parameters.items()}


def test_what_is_not_ours_mindformers_reads(job):
    assert direct.read_parameters(lambda config: "theirs", {}) == "theirs"
    assert read(job, auto_trans_ckpt=False) == "theirs"
    converted(job, "net", FULL)
    assert read(job, loader="mindspore") == "theirs"


@pytest.mark.parametrize("free, warned", [(0, True), (1, False)])
def test_user_is_warned_of_a_file_that_mindspore_will_refuse(job, monkeypatch, told, free, warned):
    """MindSpore 2.10 compares with the memory that is free even of page cache."""
    size = converted(job, "net", FULL).stat().st_size
    monkeypatch.setattr(
        direct.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_AVPHYS_PAGES": size - 1 + free}[name]
    )
    read(job, loader="mindspore")
    assert any("leave auto_trans: {loader: mindspore} out" in line for line in told()) == warned


@pytest.mark.mindspore
def test_own_file_is_read_by_us(job, told):
    converted(job, "net", FULL)
    assert values(read(job)) == {name: array.tolist() for name, array in FULL.items()}
    assert any(line.startswith("rank 0: loaded 2 parameters, 96 B, of 1 file in") for line in told())


@pytest.mark.mindspore
def test_of_several_checkpoints_the_last_that_holds_a_parameter_gives_it(job):
    converted(job, "a", FULL)
    converted(job, "b", {"layer.v": FULL["layer.v"] + 1})
    assert values(read(job)) == {"layer.w": FULL["layer.w"].tolist(), "layer.v": (FULL["layer.v"] + 1).tolist()}


@pytest.mark.mindspore
def test_own_file_that_is_missing_or_damaged_is_named(job):
    file = converted(job, "net", FULL)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint_0\.ckpt"):
        read(job)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint_0\.ckpt"):
        read(job)


@pytest.mark.mindspore
def test_slices_are_loaded_directly_and_no_file_is_converted(job, snapshot):
    before = snapshot(job.output.parent / "net")
    got = read(job, load="direct")
    assert values(got) == {name: array.tolist() for name, array in FULL.items()}
    assert job.transformed_dir.is_dir() and not any(job.transformed_dir.iterdir()), "MindFormers looks into it"
    report = json.loads((job.output / "auto_trans_report.json").read_text())
    assert report["load"] == "direct" and report["ranks"][0]["parameters"] == 2
    assert snapshot(job.output.parent / "net") == before


@pytest.mark.mindspore
def test_network_that_expects_something_else_is_told_in_the_words_of_the_yaml(job):
    with pytest.raises(PlanError, match="set src_strategy_path_or_dir to the one in the output"):
        read(job, network=Network({"layer.w": (5, 5)}), load="direct")
