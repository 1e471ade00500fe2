"""The records of a target folder: which files count as done."""

from __future__ import annotations

import json
import os

import pytest

from auto_trans.storage.manifest import MANIFEST_NAME, RECORDS_NAME, FileRecord, Manifest, read_manifest


def publish(folder, manifest, rank, content=b"weights"):
    """A file of a rank and its record."""
    name = f"rank_{rank}/x.ckpt"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    stat = (folder / name).stat()
    record = FileRecord(rank, name, stat.st_size, stat.st_mtime_ns, "digest")
    with manifest.adding([record]):
        pass
    return record


@pytest.fixture
def finished(tmp_path):
    """A folder with a manifest of two files."""
    manifest = Manifest(tmp_path, "request", 2)
    records = [publish(tmp_path, manifest, rank) for rank in range(2)]
    assert manifest.finish(record.file for record in records)
    return records


def change_manifest(folder, **changes):
    content = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps({**content, **changes}))


def test_finished_files_are_done_for_the_same_request_only(finished, tmp_path):
    assert [Manifest(tmp_path, "request", 2).done(record.file) for record in finished] == finished
    assert [Manifest(tmp_path, "another", 2).done(record.file) for record in finished] == [None, None]


@pytest.mark.parametrize("version", [1, 3, None, "2"])
def test_manifest_of_another_version_is_not_believed(finished, tmp_path, version):
    change_manifest(tmp_path, version=version)
    assert Manifest(tmp_path, "request", 2).done(finished[0].file) is None


@pytest.mark.parametrize("files", [None, "x", [{"rank": 0}], [1]])
def test_damaged_manifest_is_as_if_it_were_not_there(finished, tmp_path, files):
    change_manifest(tmp_path, files=files)
    assert Manifest(tmp_path, "request", 2).done(finished[0].file) is None
    assert read_manifest(tmp_path) is None


def test_file_that_was_written_to_since_is_not_done(finished, tmp_path):
    first, second = finished
    (tmp_path / first.file).write_bytes(b"weigh7s")
    os.utime(tmp_path / first.file, ns=(1, first.mtime_ns + 1))
    (tmp_path / second.file).write_bytes(b"longer weights")
    os.utime(tmp_path / second.file, ns=(1, second.mtime_ns))
    manifest = Manifest(tmp_path, "request", 2)
    assert manifest.done(first.file) is None and manifest.done(second.file) is None


def test_file_that_is_gone_is_not_done(finished, tmp_path):
    (tmp_path / finished[0].file).unlink()
    assert Manifest(tmp_path, "request", 2).done(finished[0].file) is None


def test_whoever_comes_last_finishes_with_what_others_have_published_meanwhile(tmp_path):
    one, other = (Manifest(tmp_path, "request", 2) for _ in range(2))
    records = [publish(tmp_path, one, 0)]
    assert not one.finish(["rank_0/x.ckpt", "rank_1/x.ckpt"])
    assert not (tmp_path / MANIFEST_NAME).exists() and (tmp_path / RECORDS_NAME).is_dir()
    records.append(publish(tmp_path, other, 1))
    assert other.finish(["rank_0/x.ckpt", "rank_1/x.ckpt"])
    assert read_manifest(tmp_path) == records and not (tmp_path / RECORDS_NAME).exists()


def test_what_others_have_published_is_seen_when_it_is_looked_for(tmp_path):
    one, other = (Manifest(tmp_path, "request", 2) for _ in range(2))
    record = publish(tmp_path, other, 1)
    assert one.done(record.file) is None
    one.refresh()
    assert one.done(record.file) == record
