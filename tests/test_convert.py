"""The library call on real files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import oracle
import pytest
from builders import conversions, hold, large_source, load, planned, save, strategy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import auto_trans.storage.formats.ckpt as ckpt
from auto_trans import convert
from auto_trans.core.layout import Layout
from auto_trans.errors import (
    ConfigError,
    InsufficientDiskError,
    InsufficientMemoryError,
    OutputExistsError,
    PlanError,
    SourceChangedError,
)
from auto_trans.storage import capacity as resources
from auto_trans.storage import files as publish
from auto_trans.storage.manifest import MANIFEST_NAME


@given(conversions(), st.integers(16, 200), st.integers(5, 300), st.sampled_from([np.int8, np.float16, np.int64]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chunks_and_any_memory_give_the_same_bytes(tmp_path_factory, monkeypatch, case, memory, chunk, dtype):
    """Chunk borders fall in the middle of rows and elements; the buffer is smaller than a row."""
    source, target, full = case
    a, b = strategy({"w": source}), strategy({"w": target})
    folder = tmp_path_factory.mktemp("chunks")
    full = full % 100
    save(folder / "whole", hold({"w": full}, a), dtype)
    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "CHUNK_BYTES", chunk)
        patch.setattr(publish.os, "fsync", lambda fd: None)  # thousands of small files
        copied = {}
        for rank in range(a.world_size):  # the same source again, in chunks
            only = folder / f"only_{rank}.ckpt"
            shutil.copy(folder / "whole" / f"rank_{rank}" / f"net_rank_{rank}-1_1.ckpt", only)
            planned(only, folder / f"c{rank}").run(quiet=True)
            copied[rank] = folder / f"c{rank}" / "rank_0" / "checkpoint_0.ckpt"
            (folder / "chunked" / f"rank_{rank}").mkdir(parents=True)
            copied[rank].rename(folder / "chunked" / f"rank_{rank}" / f"n_rank_{rank}-1_1.ckpt")
        planned(folder / "chunked", folder / "out", a, b, memory_limit=memory).run(quiet=True)
    for rank, tensors in hold({"w": full}, b).items():
        got = load(folder / "out", rank, dtype)["w"]
        assert np.array_equal(got, tensors["w"].astype(dtype))


def test_report_and_manifest_tell_what_was_done(genuine, tmp_path):
    weights = genuine.model("mf_llama")
    report = convert(genuine.complete("mf_llama"), tmp_path, dst_strategy=weights.strategy("dp4mp2"))
    assert (report.converted, report.linked, report.reused) == ((0, 1), (2, 3, 4, 5, 6, 7), ())
    assert set(report.carried) == {"global_step", "scale_sense"}
    assert report.bytes_written == sum(f.size for f in report.files[:2])
    manifest = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert [f["rank"] for f in manifest["files"]] == list(range(8))
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST_NAME, *(f"rank_{r}" for r in range(8))]


def test_replicas_are_one_file_on_the_disk(genuine, tmp_path):
    convert(genuine.complete("mf_llama"), tmp_path, dst_strategy=genuine.model("mf_llama").strategy("dp4mp2"))
    files = [tmp_path / f"rank_{r}" / f"checkpoint_{r}.ckpt" for r in range(8)]
    assert len({f.stat().st_ino for f in files}) == 2
    assert os.path.samefile(files[1], files[7])


def test_source_and_strategies_are_untouched(genuine, tmp_path, snapshot):
    weights = genuine.model("mf_llama")
    source = genuine.source("mf_llama", "dp2mp2pp2")
    before = snapshot(source), snapshot(weights.strategy("dp2mp2pp2")), snapshot(weights.strategy("dp2mp2_opt"))
    convert(source, tmp_path, weights.strategy("dp2mp2pp2"), weights.strategy("dp2mp2_opt"))
    assert before == (
        snapshot(source),
        snapshot(weights.strategy("dp2mp2pp2")),
        snapshot(weights.strategy("dp2mp2_opt")),
    )


def test_same_inputs_again_are_reused_and_others_refused(genuine, tmp_path, snapshot):
    weights = genuine.model("mf_llama")
    arguments = genuine.complete("mf_llama"), tmp_path, None, weights.strategy("dp2mp2")
    convert(*arguments)
    before = snapshot(tmp_path)
    again = convert(*arguments)
    assert (again.converted, again.reused) == ((), (0, 1, 2, 3))
    assert {k: v for k, v in snapshot(tmp_path).items() if k != MANIFEST_NAME} == {
        k: v for k, v in before.items() if k != MANIFEST_NAME
    }
    with pytest.raises(OutputExistsError, match=r"checkpoint_0\.ckpt is there already"):
        convert(genuine.complete("mf_llama"), tmp_path, None, weights.strategy("dp1mp2"))
    assert snapshot(tmp_path)["rank_0/checkpoint_0.ckpt"] == before["rank_0/checkpoint_0.ckpt"]


@pytest.mark.parametrize("side", [0, 1])
def test_strategies_in_memory_that_differ_in_one_layout_are_not_taken_for_the_same(tmp_path, side):
    rows, columns = Layout((2,), ((0,), ())), Layout((2,), ((), (0,)))
    sides = [strategy({"w": rows, "v": rows}), strategy({"w": columns, "v": columns})]
    save(tmp_path / "src", hold({"w": np.arange(16).reshape(4, 4), "v": np.arange(16).reshape(4, 4)}, sides[0]))
    assert convert(tmp_path / "src", tmp_path / "out", *sides).converted == (0, 1)
    assert convert(tmp_path / "src", tmp_path / "out", *sides).reused == (0, 1)
    sides[side] = strategy({"w": rows, "v": columns})
    with pytest.raises(OutputExistsError):
        convert(tmp_path / "src", tmp_path / "out", *sides)


def test_files_of_another_source_are_not_taken_for_the_same(tmp_path):
    source = oracle.write_raw(tmp_path / "a.ckpt", {"w": oracle.raw(np.arange(4))})
    convert(source, tmp_path / "out")
    os.utime(source, ns=(1, source.stat().st_mtime_ns + 1))
    with pytest.raises(OutputExistsError):
        convert(source, tmp_path / "out")


def test_replicas_of_another_type_are_refused(tmp_path):
    a = strategy({"w": Layout((2,))})
    for rank, dtype in enumerate((np.float32, np.int32)):
        save(tmp_path / "src", {rank: {"w": np.arange(4)}}, dtype)
    with pytest.raises(PlanError, match=r"w is \[4\] Float32 in .*rank_0.* but \[4\] Int32 in .*rank_1"):
        convert(tmp_path / "src", tmp_path / "out", a)
    assert not (tmp_path / "out").exists()


def test_what_another_process_has_converted_meanwhile_is_linked(tmp_path):
    a, b = strategy({"w": Layout((2,), ((0,),))}), strategy({"w": Layout((4,))})
    save(tmp_path / "src", hold({"w": np.arange(4)}, a))
    one, other = (planned(tmp_path / "src", tmp_path / "out", a, b, ranks=ranks) for ranks in ((0, 1), (2, 3)))
    assert (one.run(quiet=True).converted, one.run(quiet=True).reused) == ((0,), (0, 1))
    report = other.run(quiet=True)
    assert (report.converted, report.linked, report.bytes_written) == ((), (2, 3), 0)
    assert len({(tmp_path / "out" / f"rank_{r}" / f"checkpoint_{r}.ckpt").stat().st_ino for r in range(4)}) == 1
    assert (tmp_path / "out" / MANIFEST_NAME).exists()


def test_every_process_and_every_neighbour_needs_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 5 << 20)
    source = oracle.write_raw(tmp_path / "a.ckpt", {"w": oracle.raw(np.arange(8))})
    target = strategy({"w": Layout((4,), ((0,),))})
    planned(source, tmp_path / "out", None, target, memory_limit=1 << 20).check(neighbours=5)
    conversion = planned(source, tmp_path / "out", None, target, memory_limit=1 << 20, processes=8)
    conversion.check()  # no more processes than files
    for neighbours, processes in ((6, 1), (2, 3)):
        conversion = planned(source, tmp_path / "out", None, target, memory_limit=1 << 20, processes=processes)
        with pytest.raises(InsufficientMemoryError, match="in each of 6 processes"):
            conversion.check(neighbours)


def test_damaged_target_is_not_reused(genuine, tmp_path):
    weights = genuine.model("mf_llama")
    arguments = genuine.complete("mf_llama"), tmp_path, None, weights.strategy("dp1mp2")
    convert(*arguments)
    (tmp_path / "rank_1" / "checkpoint_1.ckpt").write_bytes(b"damaged")
    with pytest.raises(OutputExistsError, match=r"checkpoint_1\.ckpt"):
        convert(*arguments)
    (tmp_path / "rank_1" / "checkpoint_1.ckpt").unlink()
    assert convert(*arguments).converted == (1,)


def test_converting_onto_the_source_is_refused(genuine, tmp_path, snapshot):
    weights = genuine.model("mf_llama")
    source = save(tmp_path / "src", {r: dict(s) for r, s in weights.slices("dp1mp2").items()})
    before = snapshot(source)
    with pytest.raises(OutputExistsError):
        convert(source, source, weights.strategy("dp1mp2"), weights.strategy("dp1mp1"))
    assert snapshot(source) == before


def test_ranks_apart_give_the_same_files_as_all_at_once(genuine, tmp_path):
    weights = genuine.model("mf_llama")
    source = genuine.source("mf_llama", "dp2mp2_opt")
    sides = weights.strategy("dp2mp2_opt"), weights.strategy("dp2mp2pp2")
    convert(source, tmp_path / "all", *sides)
    for part in (range(4), range(4, 8)):
        convert(source, tmp_path / "parts", *sides, ranks=part)
    for rank in range(8):
        name = f"rank_{rank}/checkpoint_{rank}.ckpt"
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert (tmp_path / "parts" / MANIFEST_NAME).exists()


@pytest.mark.mindspore
@pytest.mark.parametrize("target", ["dp2mp2pp2", None])
def test_mindspore_engine_agrees(genuine, tmp_path, target):
    weights = genuine.model("mf_llama")
    source = genuine.source("mf_llama", "dp2mp2_opt")
    sides = weights.strategy("dp2mp2_opt"), target and weights.strategy(target)
    convert(source, tmp_path / "ours", *sides)
    report = convert(source, tmp_path / "theirs", *sides, engine="mindspore")
    for record in report.files:
        assert oracle.read_raw(tmp_path / "ours" / record.file) == oracle.read_raw(tmp_path / "theirs" / record.file)
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir()) == sorted(
        p.name for p in (tmp_path / "ours").iterdir()
    )
    part = convert(source, tmp_path / "rank", *sides, engine="mindspore", ranks=[0])
    assert oracle.read_raw(tmp_path / "rank" / part.files[0].file) == oracle.read_raw(
        tmp_path / "ours" / part.files[0].file
    )


@pytest.mark.parametrize("source, target", [(24, 16), (16, 24), (3, 2), (1, 24)])
def test_numbers_of_devices_that_mindspore_refuses(tmp_path, source, target):
    full = {"w": np.arange(48 * 48).reshape(48, 48), "b": np.arange(48)}
    a, b = (
        strategy({"w": Layout((n // (3 if n % 3 == 0 else 2) or 1, 3 if n % 3 == 0 else min(2, n)), ((0,), (1,))),
                  "b": Layout((n,), ((0,),))}) for n in (source, target)
    )  # fmt: skip
    save(tmp_path / "src", hold(full, a))
    convert(tmp_path / "src", tmp_path / "out", a, b)
    for rank, tensors in hold(full, b).items():
        got = load(tmp_path / "out", rank)
        assert all(np.array_equal(got[n], t) for n, t in tensors.items())


def test_missing_rank_folder_whose_slices_another_rank_holds(genuine, tmp_path):
    weights = genuine.model("mf_llama")
    held = weights.slices("dp2mp2")
    source = oracle.save_genuine(tmp_path / "src", {r: held[r] for r in (0, 3)}, weights.dtypes)
    convert(source, tmp_path / "out", weights.strategy("dp2mp2"))
    whole = oracle.read_raw(tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt")
    assert whole == {n: whole[n] for n in whole} and set(whole) == set(held[0])
    for name, full in weights.full.items():
        if name in whole and weights.dtypes[name] == "Float32":
            assert whole[name] == oracle.raw(full)


def test_source_that_changes_meanwhile_is_noticed(tmp_path):
    a, b = strategy({"w": Layout((2,), ((0,),))}), strategy({"w": Layout((2,))})
    source = save(tmp_path / "src", hold({"w": np.arange(64)}, a))
    conversion = planned(source, tmp_path / "out", a, b)
    save(tmp_path / "src", hold({"w": np.arange(64) + 1}, a))
    os.utime(conversion.checkpoint.files[1][0], ns=(1, 1))
    with pytest.raises(SourceChangedError, match="was written to while"):
        conversion.run(quiet=True)
    assert not list((tmp_path / "out").rglob("*.ckpt"))


def test_folder_of_several_complete_files_asks_for_one(tmp_path):
    for name in ("a", "b"):
        oracle.write_raw(tmp_path / f"{name}.ckpt", {"w": oracle.raw(np.arange(3))})
    with pytest.raises(ConfigError, match=r"2 complete checkpoints \(a\.ckpt, b\.ckpt"):
        convert(tmp_path, tmp_path / "out")


def run_python(code, **options):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], text=True, **options)


def test_memory_is_bounded_whatever_the_size(tmp_path):
    large_source(tmp_path)
    code = f"""
        import threading, time
        from builders import strategy
        from auto_trans import convert
        from auto_trans.core.layout import Layout
        peak = 0
        def anonymous():
            fields = dict(line.split(":") for line in open("/proc/self/status"))
            return int(fields["RssAnon"].split()[0])
        def watch():
            global peak
            while True:
                peak = max(peak, anonymous())
                time.sleep(0.005)
        before = anonymous()
        threading.Thread(target=watch, daemon=True).start()
        layouts = {{f"w{{i}}": Layout((4,), ((0,), ()) if i % 2 else ((), (0,))) for i in range(8)}}
        convert({str(tmp_path / "large.ckpt")!r}, {str(tmp_path / "out")!r}, None, strategy(layouts))
        print(peak - before)
    """
    process = run_python(code, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)})
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    assert int(out.split()[-1]) < 64 * 1024, "KiB of anonymous memory on top of the interpreter's"


@pytest.mark.slow
def test_killed_half_way_only_what_is_missing_is_done_again(tmp_path):
    large_source(tmp_path, mib=1200)
    arguments = f"{str(tmp_path / 'large.ckpt')!r}, {str(tmp_path / 'out')!r}"
    code = f"""
        from builders import strategy
        from auto_trans import convert
        from auto_trans.core.layout import Layout
        layouts = {{f"w{{i}}": Layout((8,), ((0,), ())) for i in range(8)}}
        report = convert({arguments}, None, strategy(layouts))
        print(len(report.converted), len(report.reused))
    """
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    killed = run_python(code, env=environ)
    while len(list(tmp_path.glob("out/.auto_trans_records/rank_*.json"))) < 2:
        assert killed.poll() is None, "ended before it could be killed"
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    again = run_python(code, env=environ, stdout=subprocess.PIPE)
    out, _ = again.communicate(timeout=240)
    converted, reused = map(int, out.split())
    assert converted + reused == 8
    assert reused >= 2
    assert (tmp_path / "out" / MANIFEST_NAME).exists()
    for rank in range(8):
        assert len(list((tmp_path / "out" / f"rank_{rank}").glob("*.ckpt"))) == 1


def test_converters_beside_each_other_need_disk_for_every_file_once(genuine, tmp_path, monkeypatch):
    weights = genuine.model("mf_llama")
    conversion = planned(genuine.complete("mf_llama"), tmp_path, None, weights.strategy("dp4mp2"), ranks=(0, 1))
    first, second = (conversion.target.size(file) for file in conversion.files)
    monkeypatch.setattr(resources, "free_disk", lambda folder: first + second)
    conversion.check(part=1 / 2, files=conversion.files[:1])
    conversion.check()
    with pytest.raises(InsufficientDiskError):
        conversion.check(part=1 / 4, files=conversion.files[:1])
    conversion.check(part=1 / 4, files=[])


@pytest.mark.mindspore
def test_mindspore_engine_leaves_nothing_half_written(genuine, tmp_path, monkeypatch):
    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    strategy_file = genuine.model("mf_llama").strategy("dp1mp2")
    monkeypatch.setattr(publish.os, "write", full)
    with pytest.raises(InsufficientDiskError, match=r"checkpoint_0\.ckpt cannot be written"):
        convert(genuine.complete("mf_llama"), tmp_path, None, strategy_file, engine="mindspore")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
