"""Converted weights are compared with their digests, and with their source."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from builders import conversions, hold, planned, save, strategy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from auto_trans import verify
from auto_trans.core.layout import Layout
from auto_trans.core.plan import Plan
from auto_trans.core.strategy import Strategy
from auto_trans.errors import CheckpointNotFoundError, ConfigError
from auto_trans.storage.manifest import MANIFEST_NAME, FileRecord, Manifest, read_records
from auto_trans.storage.readers import digest_extents
from auto_trans.storage.sources import find_checkpoints
from auto_trans.verify import DigestCheck, verify_against, verify_digests

MP2, DP2 = Layout((2,), ((0,),)), Layout((2,), ((),))
A, B = strategy({"w": MP2, "v": MP2}), strategy({"w": DP2, "v": MP2})


class Converted:
    """A small conversion."""

    def __init__(self, folder, source, target):
        self.out, self.source, self.target = folder / "out", source, target
        (self.original,) = find_checkpoints(folder / "src")

    def file(self, rank):
        (file,) = (self.out / f"rank_{rank}").iterdir()
        return file

    def rewrite(self, rank, **changes):
        """Gives a file other tensors."""
        held = {**oracle.read_raw(self.file(rank)), **changes}
        file = self.file(rank)
        file.unlink()
        oracle.write_raw(file, held)

    def differences(self, **options):
        return verify_against(self.out, self.original, self.source, self.target, **options)


@pytest.fixture
def converted(tmp_path):
    full = {"w": np.arange(8), "v": np.arange(4), "step": np.array([3])}
    planned(save(tmp_path / "src", hold(full, A)), tmp_path / "out", A, B).run(quiet=True)
    return Converted(tmp_path, A, B)


@given(conversions(), st.integers(8, 60))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_conversion_is_equal_and_any_changed_byte_is_found(tmp_path_factory, monkeypatch, case, read_bytes):
    source, target, full = case
    folder = tmp_path_factory.mktemp("verify")
    a, b = strategy({"w": source}), strategy({"w": target})
    save(folder / "src", hold({"w": full}, a))
    save(folder / "out", hold({"w": full}, b))
    done = Converted(folder, a, b)
    with monkeypatch.context() as patch:
        patch.setattr(verify, "_READ_BYTES", read_bytes)
        nbytes = 4 * sum(array["w"].size for array in hold({"w": full}, done.target).values())
        assert done.differences() == ([], nbytes)
        rank = target.devices - 1
        raw = oracle.read_raw(done.file(rank))["w"]
        done.rewrite(rank, w=raw._replace(content=raw.content[:-1] + bytes([raw.content[-1] ^ 1])))
        (difference,), _ = done.differences()
        assert (difference.rank, difference.parameter) == (rank, "w") and "differs from" in difference.what


def test_other_type_is_a_difference_though_the_bytes_are_the_same(converted):
    raw = oracle.read_raw(converted.file(1))["w"]
    converted.rewrite(1, w=raw._replace(dtype="Int32"))
    (difference,), _ = converted.differences()
    assert "is [8] Int32 as a whole, but [8] Float32 in the source" in str(difference)


def test_other_shape_is_a_difference(converted):
    raw = oracle.read_raw(converted.file(1))["w"]
    converted.rewrite(1, w=raw._replace(dims=(4,), content=raw.content[:16]))
    (difference,), _ = converted.differences()
    assert "is [4] Float32 as a whole, but [8] Float32 in the source" in str(difference)


def test_parameter_and_rank_that_are_missing_are_told(converted):
    converted.rewrite(0, strange=oracle.raw(np.arange(3)))
    (converted.out / "rank_1" / "checkpoint_1.ckpt").unlink()
    (converted.out / "rank_1").rmdir()
    differences, _ = converted.differences()
    assert [(d.rank, d.parameter, d.what) for d in differences] == [
        (0, "strange", "is not in the source"),
        (1, "", "is missing"),
    ]
    assert converted.differences(ranks=[1])[0] == differences[1:]


def test_comparison_ends_after_so_many_differences(converted):
    for rank in range(2):
        converted.rewrite(rank, **{f"strange_{n}": oracle.raw(np.arange(3)) for n in range(5)})
    assert [len(converted.differences(limit=limit)[0]) for limit in (1, 7, 20)] == [1, 7, 10]


def test_slice_that_no_source_rank_holds_is_not_taken_for_equal(converted, monkeypatch):
    """The rules refuse such a source before; the comparison does not rely on them."""
    (converted.original.path / "rank_1" / "net_rank_1-1_1.ckpt").unlink()
    (converted.original.path / "rank_1").rmdir()
    (half,) = find_checkpoints(converted.original.path)
    monkeypatch.setattr(verify, "make_plan", lambda *args, **options: Plan(()))
    differences, _ = verify_against(converted.out, half, A, B)
    assert [(d.rank, d.parameter) for d in differences] == [(0, "w"), (1, "w"), (1, "v")]
    assert all(d.what == "is not covered by the source ranks that are there" for d in differences)


def test_folder_of_several_complete_files_asks_for_one(tmp_path, converted):
    for name in ("a", "b"):
        oracle.write_raw(tmp_path / "many" / f"{name}.ckpt", {"w": oracle.raw(np.arange(3))})
    with pytest.raises(ConfigError, match=r"2 complete checkpoints \(a\.ckpt, b\.ckpt"):
        verify_against(tmp_path / "many", converted.original, A, Strategy.complete())


def test_digests_tell_changed_and_missing_files(converted):
    assert verify_digests(converted.out) == DigestCheck((), 2, finished=True)
    converted.rewrite(0, w=oracle.raw(np.arange(8, dtype=np.float32) + 1))
    converted.file(1).unlink()
    changed, missing = verify_digests(converted.out).differences
    assert (changed.rank, changed.what) == (0, "differs from its digest in the manifest")
    assert (missing.rank, missing.what) == (1, "is missing")
    assert verify_digests(converted.out, [1]) == DigestCheck((missing,), 1, finished=True)
    (unknown,) = verify_digests(converted.out, [7]).differences
    assert (unknown.rank, unknown.what) == (7, "is not on record")


def test_digests_of_several_checkpoints_are_found_below(converted, tmp_path):
    converted.file(1).unlink()
    assert [d.rank for d in verify_digests(tmp_path).differences] == [1]
    (converted.out / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointNotFoundError, match="has no readable auto_trans_manifest"):
        verify_digests(tmp_path)


def test_digests_of_a_conversion_that_is_not_finished_are_those_on_record(tmp_path):
    save(tmp_path / "src", hold({"w": np.arange(8), "v": np.arange(4)}, A))
    planned(tmp_path / "src", tmp_path / "out", A, A, ranks=(1,)).run(quiet=True)
    part = Converted(tmp_path, A, A)
    assert verify_digests(part.out) == verify_digests(tmp_path) == DigestCheck((), 1, finished=False)
    assert [d.what for d in verify_digests(part.out, [0, 1]).differences] == ["is not on record"]
    part.rewrite(1, w=oracle.raw(np.zeros(4, np.float32)))
    assert [(d.rank, d.what) for d in verify_digests(part.out).differences] == [
        (1, "differs from its digest on record")
    ]


@pytest.mark.parametrize("there", [True, False])
def test_file_about_to_be_published_is_on_record_only_if_it_is_there(tmp_path, there):
    manifest = Manifest(tmp_path, "request", 2)
    record = FileRecord(0, "rank_0/x.ckpt", 3, 0, digest_of(b"abc", tmp_path))
    with manifest.adding([record]):
        if there:
            (tmp_path / "rank_0").mkdir()
            (tmp_path / "rank_0" / "x.ckpt").write_bytes(b"abc")
        assert read_records(tmp_path) == [record] * there


def digest_of(content, folder):
    (folder / "content").write_bytes(content)
    return digest_extents(folder / "content", [(0, len(content))])


@pytest.mark.parametrize("wrong", [0, 1])
def test_copy_in_the_source_that_differs_is_named(tmp_path, wrong):
    """Both ranks hold the whole of w; the conversion takes it from the lower."""
    held = hold({"w": np.arange(8), "v": np.arange(4)}, B)
    save(tmp_path / "src", held)
    planned(tmp_path / "src", tmp_path / "out", B, B).run(quiet=True)
    save(tmp_path / "src", {wrong: {**held[wrong], "w": np.arange(8) + 1}})
    (difference, *more), _ = Converted(tmp_path, B, B).differences()
    assert (difference.rank, difference.parameter) == (0, "w")
    assert f"differs from {tmp_path / 'src' / f'rank_{wrong}'}" in difference.what
    assert ("but not from another copy" in difference.what) == (wrong == 1)
    assert len(more) == 1


def test_single_number_that_no_strategy_lists_may_be_another_on_every_rank(tmp_path):
    held = hold({"w": np.arange(8), "v": np.arange(4), "seed": np.array([1])}, B)
    held[1]["seed"] = np.array([2])
    save(tmp_path / "src", held)
    planned(tmp_path / "src", tmp_path / "out", B, B).run(quiet=True)
    assert Converted(tmp_path, B, B).differences()[0] == []


def test_copies_of_another_stage_do_not_count(tmp_path):
    """A weight that two stages share is read from the first, as by the conversion."""
    pp2 = strategy({"w": {0: MP2, 1: MP2}, "v": {1: MP2}}, stages=2)
    held = hold({"w": np.arange(8), "v": np.arange(4)}, pp2)
    held[2]["w"] = held[2]["w"] + 1
    save(tmp_path / "src", held)
    planned(tmp_path / "src", tmp_path / "out", pp2, A).run(quiet=True)
    assert Converted(tmp_path, pp2, A).differences()[0] == []
