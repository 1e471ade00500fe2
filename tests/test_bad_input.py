"""Bad input gets a clear error, and nothing is lost: source and earlier output stay as they were."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import builders
import numpy as np
import oracle
import psutil
import pytest

from auto_trans import convert
from auto_trans.core.layout import Layout
from auto_trans.errors import (
    AutoTransError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    EncryptedCheckpointError,
    InsufficientDiskError,
    InsufficientMemoryError,
    LayoutError,
    OutputError,
    PlanError,
    StrategyNotFoundError,
    UnsupportedCheckpointError,
)
from auto_trans.storage import capacity as resources
from auto_trans.storage.formats import scan

CASE, TARGET = "dp2mp2pp2", "dp2mp2"


@pytest.fixture
def case(genuine, tmp_path):
    """A writable copy of a pipeline source, its strategies, and a target folder."""
    return Case(genuine, tmp_path)


class Case:
    def __init__(self, genuine, folder: Path) -> None:
        self.weights = genuine.model("mf_llama")
        self.source = folder / "source"
        shutil.copytree(genuine.source("mf_llama", CASE), self.source)
        self.target = folder / "target"
        self.source_strategy, self.target_strategy = self.weights.strategy(CASE), self.weights.strategy(TARGET)

    def file(self, rank: int) -> Path:
        return next(iter((self.source / f"rank_{rank}").glob("*.ckpt")))

    def replace(self, rank: int, content: bytes) -> None:
        path = self.file(rank)
        path.unlink()
        path.write_bytes(content)

    def convert(self, **changes):
        sides = {"src_strategy": self.source_strategy, "dst_strategy": self.target_strategy}
        arguments = {"src": self.source, "dst": self.target, **sides}
        return convert(**{**arguments, **changes})

    def refused(self, snapshot, error, message, **changes):
        before = snapshot(self.source)
        with pytest.raises(error, match=message) as caught:
            self.convert(**changes)
        assert snapshot(self.source) == before
        assert not list(self.target.rglob("*.ckpt")) if self.target.exists() else True
        return caught.value


def test_missing_rank_folders(case, snapshot):
    # rank 2 holds the same slices as rank 0, and 3 as 1; without both the plan has a gap
    for rank in (1, 3):
        shutil.rmtree(case.source / f"rank_{rank}")
    error = case.refused(snapshot, FileNotFoundError, r"held by source rank 1, 3 only.*copy the missing rank folders")
    assert isinstance(error, PlanError)


def test_missing_stage(case, snapshot):
    for rank in range(4):
        shutil.rmtree(case.source / f"rank_{rank}")
    case.refused(snapshot, FileNotFoundError, r"no rank folder of pipeline stage 0 \(rank 0 to 3\) is there")


def test_empty_rank_folder(case, snapshot):
    case.file(5).unlink()
    case.refused(snapshot, CheckpointNotFoundError, "rank_5 holds no checkpoint file")


def test_truncated_checkpoint(case, snapshot):
    content = case.file(0).read_bytes()
    case.replace(0, content[: len(content) - 100])
    case.refused(snapshot, CorruptCheckpointError, r"rank_0-1_1\.ckpt is not a complete MindSpore checkpoint")


def test_truncation_between_two_parameters(case, snapshot):
    content = case.file(1).read_bytes()
    (offset, nbytes) = list(scan(case.file(1)).tensors.values())[3].segments[-1]
    for rank in (1, 3):
        case.replace(rank, content[: offset + nbytes])
    case.refused(snapshot, FileNotFoundError, "held by source rank 1, 3 only")


def test_not_a_checkpoint(case, snapshot):
    case.replace(0, b"PK\x03\x04 this is a zip file")
    case.refused(snapshot, CorruptCheckpointError, r"rank_0-1_1\.ckpt")


@pytest.mark.mindspore
def test_encrypted_checkpoint(case, snapshot):
    import mindspore

    path = case.file(0)
    path.unlink()
    mindspore.save_checkpoint([{"name": "w", "data": mindspore.Tensor([1.0])}], str(path), enc_key=b"0123456789abcdef")
    case.refused(snapshot, EncryptedCheckpointError, r"rank_0-1_1\.ckpt is encrypted; decrypt it")


def test_distributed_source_without_strategy(case, snapshot):
    case.refused(snapshot, ConfigError, "8 rank folders, but no source strategy.*src_strategy", src_strategy=None)


def test_single_file_with_a_strategy_of_many_ranks(case, snapshot):
    case.refused(snapshot, ConfigError, "is complete, but its strategy .* describes 8 ranks", src=case.file(0))


def test_one_stages_unmerged_file_for_a_pipeline_source(case, snapshot):
    one = case.source_strategy / "ckpt_strategy_rank_0.ckpt"
    case.refused(
        snapshot, PlanError, r"8 rank folders.*describes 4 ranks.*strategy folder or the merged file", src_strategy=one
    )


def test_one_stages_unmerged_file_for_a_pipeline_target(case, snapshot):
    one = case.source_strategy / "ckpt_strategy_rank_0.ckpt"
    error = case.refused(snapshot, PlanError, "not in the target strategy .*of all pipeline stages", dst_strategy=one)
    assert "layers." in str(error) or "norm_out" in str(error)


def test_strategy_of_another_model(case, snapshot):
    other = oracle.DATA / "toy_moe" / "dp2mp2ep2" / "strategy"
    case.refused(snapshot, PlanError, "another model", dst_strategy=other)


def test_strategy_of_another_job_of_the_same_model(case, snapshot):
    # mp2 on half the ranks: the folders say that it cannot be
    wrong = case.weights.strategy("dp2mp2")
    case.refused(snapshot, PlanError, "8 rank folders.*describes 4 ranks", src_strategy=wrong)


@pytest.mark.mindspore
def test_parameter_in_the_checkpoint_but_not_in_its_strategy(case, snapshot, tmp_path):
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    stripped = tmp_path / "stripped"
    stripped.mkdir()
    for file in case.source_strategy.iterdir():
        message = ParallelStrategyMap.FromString(file.read_bytes())
        kept = [i for i in message.parallel_layout_item if i.param_name != "model.layers.3.feed_forward.w1.weight"]
        del message.parallel_layout_item[:]
        message.parallel_layout_item.extend(kept)
        (stripped / file.name).write_bytes(message.SerializeToString())
    case.refused(snapshot, PlanError, r"w1\.weight is in the source and in the target strategy", src_strategy=stripped)
    # without a target strategy that tells, the other layers do
    case.refused(
        snapshot, PlanError, r"does not list parameter model\.layers\.3\.feed_forward\.w1\.weight.* of other layers",
        src_strategy=stripped, dst_strategy=None,
    )  # fmt: skip


def test_buffer_that_is_sliced_although_no_strategy_lists_it(tmp_path):
    """What looks like a buffer is carried only if the ranks hold the same of it."""
    a = builders.strategy({"w": Layout((2,), ((0,),))})
    held = builders.hold({"w": np.arange(4), "freqs_cos": np.arange(8).reshape(4, 2)}, a)
    builders.save(tmp_path / "same", held)
    report = convert(tmp_path / "same", tmp_path / "out", a)
    assert report.carried == ("freqs_cos",)
    held[1]["freqs_cos"] = held[1]["freqs_cos"] + 1
    builders.save(tmp_path / "differ", held)
    with pytest.raises(PlanError, match="freqs_cos is in no strategy, but differs between source rank 0 and 1"):
        convert(tmp_path / "differ", tmp_path / "out2", a)


def test_shapes_that_do_not_divide(case, snapshot, tmp_path):
    from strategy_files import strategy_file

    names = {name: ([3], [[0] + [-1] * (a.ndim - 1)]) for name, a in case.weights.full.items() if a.size > 1}
    target = strategy_file(tmp_path / "three_rank_0.ckpt", names)
    case.refused(
        snapshot, PlanError, r"parameter .* has full shape .*does not divide evenly into \[3", dst_strategy=target
    )


def test_uneven_layout(case, snapshot, tmp_path):
    from strategy_files import strategy_file

    names = {name: ([2], [[-1] * a.ndim]) for name, a in case.weights.full.items() if a.size > 1}
    target = strategy_file(tmp_path / "u_rank_0.ckpt", names, field=4)
    case.refused(snapshot, AutoTransError, "sliced unevenly", dst_strategy=target)


def test_both_formats_in_one_folder(case, snapshot):
    (case.source / "rank_2" / "x.safetensors").write_bytes(b"x")
    case.refused(snapshot, UnsupportedCheckpointError, "rank_2 holds both .ckpt and .safetensors")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"src": "/nowhere/weights"}, FileNotFoundError, "/nowhere/weights is not found"),
        ({"src_strategy": "/nowhere/s.ckpt"}, StrategyNotFoundError, r"/nowhere/s\.ckpt is not found"),
        ({"dst_strategy": "/nowhere/s.ckpt"}, StrategyNotFoundError, r"/nowhere/s\.ckpt is not found"),
        ({"ranks": [9]}, ConfigError, r"rank 9 is not in the target, which has ranks 0 to 3"),
        ({"engine": "fast"}, ConfigError, "engine must be one of native, mindspore"),
        ({"memory_limit": "lots"}, ConfigError, "memory_limit must be a size"),
        ({"memory_limit": "1KiB"}, ConfigError, "at least 1MiB"),
        ({"prefix": "a/b"}, ConfigError, "prefix"),
    ],
)
def test_wrong_arguments(case, snapshot, changes, error, message):
    case.refused(snapshot, error, message, **changes)


def test_output_that_cannot_be_a_folder(case, snapshot, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OutputError, match="set an output directory that is writable"):
        case.convert(dst=tmp_path / "file" / "out")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_unwritable_output(case, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    code = f"""
        import os, sys
        from auto_trans import convert
        from auto_trans.errors import OutputError
        arguments = {str(case.source)!r}, {str(tmp_path / "strategy")!r}
        convert(arguments[0], {str(tmp_path / "warm")!r}, arguments[1])  # loads what only root may read
        if os.getuid() == 0:  # root may write anywhere
            os.setgid(65534), os.setuid(65534)
        try:
            convert(arguments[0], {str(tmp_path / "locked" / "out")!r}, arguments[1])
        except OutputError as e:
            sys.exit(f"OutputError: {{e}}")
    """
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    for file in case.source.rglob("*.ckpt"):
        file.chmod(0o444)
    shutil.copytree(case.source_strategy, tmp_path / "strategy", copy_function=shutil.copyfile)
    (tmp_path / "strategy").chmod(0o755)
    packages = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": packages},
    )
    assert result.returncode == 1, result.stderr
    assert "OutputError" in result.stderr and "locked" in result.stderr
    assert list((tmp_path / "locked").iterdir()) == []


def test_no_space_known_before_any_work(case, snapshot, monkeypatch):
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    case.refused(snapshot, InsufficientDiskError, r"need .* in .*target, but only 1000 B is free")


def test_disk_that_fills_up_meanwhile(case, tmp_path, snapshot):
    """A file size limit of the system stands for the full disk."""
    before = snapshot(case.source)
    limit = 50_000

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "auto_trans.cli.main", "convert", str(case.source), str(case.target)]
    command += ["--src-strategy", str(case.source_strategy), "--dst-strategy", str(case.target_strategy)]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert result.returncode == 1
    assert "cannot be written" in result.stderr and "free space there" in result.stderr
    assert "Traceback" not in result.stderr
    assert not [f for f in case.target.rglob("*") if f.is_file()], "nothing half-written is left"
    assert snapshot(case.source) == before


def test_too_little_memory_known_before_any_work(case, snapshot, monkeypatch):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: memory._replace(available=1 << 20))
    case.refused(snapshot, InsufficientMemoryError, r"needs 64\.0 MiB of memory .* only 1\.0 MiB is available")


def test_control_group_limits_memory(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)
    assert resources.available_memory() == 150000
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.available_memory() > 1 << 20


def test_every_error_is_ours_and_a_builtin():
    for error in (CheckpointNotFoundError, StrategyNotFoundError):
        assert issubclass(error, (AutoTransError, FileNotFoundError)) and issubclass(error, ValueError)
    assert issubclass(LayoutError, ValueError) and issubclass(InsufficientMemoryError, MemoryError)
