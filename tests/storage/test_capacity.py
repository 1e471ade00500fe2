"""What the machine has to offer."""

from __future__ import annotations

import psutil
import pytest

from auto_trans.errors import InsufficientDiskError, InsufficientMemoryError
from auto_trans.storage import capacity
from auto_trans.storage.capacity import available_memory, check_disk, check_memory, check_slices_fit, free_disk


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 1000 bytes of memory; the folder of its control groups, of which it has none yet."""
    memory = psutil.virtual_memory()
    monkeypatch.setattr(capacity.psutil, "virtual_memory", lambda: memory._replace(available=1000))
    monkeypatch.setattr(capacity, "_CGROUP", tmp_path)
    return tmp_path


def limited(folder, limit, usage, cache, version):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
             2: ("memory.max", "memory.current", "inactive_file")}[version]  # fmt: skip
    folder = folder / "memory" if version == 1 else folder
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file 7\n{names[2]} {cache}\n")


def test_memory_is_that_of_the_machine(machine):
    assert available_memory() == 1000


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limit, usage, cache, available", [
    (900, 300, 50, 650),
    (5000, 300, 50, 1000),
    (900, 1000, 50, 0),
    ("max", 300, 50, 1000),
])  # fmt: skip
def test_control_group_may_allow_less_and_gives_back_its_page_cache(machine, version, limit, usage, cache, available):
    limited(machine, limit, usage, cache, version)
    assert available_memory() == available


def test_every_process_needs_its_memory(machine):
    check_memory(500, 2)
    with pytest.raises(InsufficientMemoryError, match="in each of 3 processes"):
        check_memory(500, 3)


def test_slices_must_fit_in_memory(machine):
    check_slices_fit(1000)
    with pytest.raises(InsufficientMemoryError, match=r"slices of this rank take 1001 B .* only 1000 B .* fewer ranks"):
        check_slices_fit(1001)


@pytest.mark.parametrize("version", [1, 2])
def test_slices_of_all_ranks_of_a_machine_must_fit_whoever_has_taken_his_already(machine, version):
    check_slices_fit(1000, 4)
    limited(machine, 4000, 3000, 0, version)
    check_slices_fit(1000, 4)
    with pytest.raises(
        InsufficientMemoryError, match=r"slices of the 5 ranks of this machine take 4.9 KiB .* only 3.9 KiB"
    ):
        check_slices_fit(1000, 5)


def test_disk_is_that_of_the_folder_that_will_be_made(tmp_path):
    missing = tmp_path / "not" / "yet"
    assert free_disk(missing) > 0
    check_disk(missing, 1)
    with pytest.raises(InsufficientDiskError, match=r"need .* in .*not/yet"):
        check_disk(missing, 1 << 62)
