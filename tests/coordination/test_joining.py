"""The ranks of one run find each other, and nobody else."""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import partial

import pytest

from auto_trans.config import Timing
from auto_trans.coordination import joining
from auto_trans.coordination.barrier import spread
from auto_trans.coordination.board import write_json
from auto_trans.coordination.joining import Arrival, Gathering, Joined, Member, join
from auto_trans.errors import CoordinationError, JoinTimeoutError, OutputBusyError, OutputError

TIMING = Timing(join_timeout=600)


@pytest.fixture
def arrive(world, tmp_path):
    """Has a rank come after some seconds."""

    def arrive(rank, world_size=4, after=0.0, settings="same", timing=TIMING):
        world.clock.sleep(after)
        return join(tmp_path, rank, world_size, settings=settings, timing=timing, clock=world.clock)

    return arrive


@pytest.fixture
def together(world, arrive):
    """Has all ranks come: what became of each."""

    def together(world_size=4, after=None, **options):
        functions = {f"rank_{r}": partial(arrive, r, world_size, (after or {}).get(r, 0.0), **options)
                     for r in range(world_size)}  # fmt: skip
        return list(world.run(**functions).values())

    return together


def directory_of(results):
    assert all(isinstance(result, Joined) for result in results), results
    (directory,) = {result.directory for result in results}
    return directory


def texts(results, kind):
    assert all(type(result) is kind for result in results), results
    return [str(result) for result in results]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_join_one_session(together, world_size):
    results = together(world_size)
    directory_of(results)
    assert all(len(result.processes) == world_size for result in results)


@pytest.mark.parametrize("late", [0, 3])
def test_late_rank_is_waited_for(world, together, late, caplog):
    caplog.set_level(logging.INFO)
    begin = world.clock.now()
    directory_of(together(after={late: 300.0}))
    assert 300 < world.clock.now() - begin < 303
    assert ("for rank 3 to arrive" if late else "for rank 0 to gather all ranks") in caplog.text
    assert f"all 4 ranks are there after {300 if late else 0}" in caplog.text


@pytest.mark.parametrize("missing", [0, 2])
def test_rank_that_never_arrives_is_named_by_all(world, arrive, missing):
    begin = world.clock.now()
    results = world.run(**{f"rank_{r}": partial(arrive, r) for r in range(4) if r != missing})
    for text in texts(results.values(), JoinTimeoutError):
        assert f"for rank {missing} to arrive" in text
    assert 600 <= world.clock.now() - begin < 601


def test_many_missing_ranks_are_counted(world, arrive):
    error = world.run(rank_0=partial(arrive, 0, 512))["rank_0"]
    assert "for rank 1, 2, 3, 4, 5, 6, 7, 8 and 503 more to arrive" in str(error)


def test_second_run_in_the_same_directory_has_a_session_of_its_own(together, tmp_path):
    first = directory_of(together())
    second = directory_of(together(after={0: 5.0}))
    assert first != second
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([second.name, "offer.json"]), "the first is removed"
    assert (second / "present_rank_0.json").exists()


@pytest.mark.parametrize("late", range(4))
def test_session_of_an_earlier_run_is_not_believed_whoever_is_late(together, late):
    first = directory_of(together())
    assert directory_of(together(after={late: 30.0})) != first


@pytest.mark.parametrize("late", range(4))
def test_earlier_run_that_died_while_joining_is_not_believed(world, arrive, together, tmp_path, late):
    short = dataclasses.replace(TIMING, join_timeout=3)
    died = world.run(**{f"rank_{r}": partial(arrive, r, timing=short) for r in range(3)})
    texts(died.values(), JoinTimeoutError)
    old = json.loads((tmp_path / "offer.json").read_text())["id"]
    assert directory_of(together(after={late: 30.0})).name != old
    assert not (tmp_path / old).exists()


def test_session_that_starts_without_this_process_is_not_joined(world, tmp_path):
    """Presence is answered by another nonce: a started session names it, and this process learns that it was replaced."""
    gathering, arrival = Gathering(tmp_path, 1, world.clock), arriving(world, tmp_path, 0)
    assert arrival.look() is None
    other = arriving(world, tmp_path, 0)
    other.look()
    gathering.look()
    assert isinstance(other.look(), Joined)
    with pytest.raises(OutputBusyError, match=r"another process \(host .*, pid .*\) also came as rank 0"):
        arrival.look()


def arriving(world, root, rank, **options):
    return Arrival(root, rank, Member.current(2, "same"), world.clock, **options)


def test_process_that_is_replaced_is_told_before_the_session_starts(world, arrive):
    results = world.run(
        first=partial(arrive, 1), second=partial(arrive, 1, after=5.0), rank_0=partial(arrive, 0, after=1.0)
    )
    (text,) = texts([results["first"]], OutputBusyError)
    assert "also came as rank 1" in text and "give each its own output_dir" in text
    assert isinstance(results["second"], JoinTimeoutError), "goes on waiting"


def test_rank_that_is_started_again_while_others_are_awaited_takes_its_place(world, arrive):
    short = dataclasses.replace(TIMING, join_timeout=3)
    results = world.run(
        rank_0=partial(arrive, 0, 3), first=partial(arrive, 1, 3, timing=short),
        again=partial(arrive, 1, 3, after=10.0), rank_2=partial(arrive, 2, 3, after=20.0),
    )  # fmt: skip
    texts([results.pop("first")], JoinTimeoutError)
    directory_of(results.values())


def test_second_rank_0_takes_the_place_of_the_first(world, arrive):
    results = world.run(
        first=partial(arrive, 0, 2), second=partial(arrive, 0, 2, after=5.0), rank_1=partial(arrive, 1, 2, after=15.0)
    )
    (text,) = texts([results.pop("first")], OutputBusyError)
    assert "also came as rank 0" in text
    directory_of(results.values())


def test_session_is_not_started_by_a_rank_0_that_was_replaced(world, tmp_path):
    gathering = Gathering(tmp_path, 1, world.clock)
    arriving(world, tmp_path, 0).look()
    Gathering(tmp_path, 1, world.clock)
    gathering.look()
    assert not (tmp_path / gathering.id / "started.json").exists()


@pytest.mark.parametrize("settings", [{"settings": "other"}, {"world_size": 5}])
def test_ranks_with_different_settings_are_told_on_every_rank(world, arrive, settings):
    functions = {f"rank_{r}": partial(arrive, r) for r in range(3)}
    results = world.run(**functions, rank_3=partial(arrive, 3, **settings))
    for text in texts(results.values(), CoordinationError):
        assert "rank 0 and rank 3 were started with different settings" in text
        assert ("(same and other)" if "settings" in settings else "(4 and 5)") in text


def test_files_of_another_version_are_an_error_that_says_so(world, tmp_path):
    gathering, arrival = Gathering(tmp_path, 2, world.clock), arriving(world, tmp_path, 1)
    arrival.look()
    write_json(tmp_path / gathering.id / "started.json", {"members": {}})
    with pytest.raises(CoordinationError, match="install the same version of auto_trans on all nodes"):
        arrival.look()


@pytest.mark.parametrize("offer", [{"id": 3}, {"id": "../elsewhere"}, {}])
def test_offer_that_is_none_is_not_followed(world, tmp_path, offer):
    write_json(tmp_path / "root" / "offer.json", offer)
    assert arriving(world, tmp_path / "root", 1).look() is None
    assert [p.name for p in tmp_path.rglob("*")] == ["root", "offer.json"]


def test_rank_whose_file_is_not_whole_yet_is_waited_for(world, tmp_path):
    gathering = Gathering(tmp_path, 2, world.clock)
    arriving(world, tmp_path, 0).look()
    (tmp_path / gathering.id / "present_rank_1.json").write_text('{"nonce": ')
    gathering.look()
    assert not (tmp_path / gathering.id / "started.json").exists()
    arrival = arriving(world, tmp_path, 1)
    arrival.look()
    gathering.look()
    assert isinstance(arrival.look(), Joined)


def test_directory_that_cannot_be_written_is_named(world, tmp_path):
    (tmp_path / "root").touch()
    with pytest.raises(OutputError, match=str(tmp_path / "root")):
        Gathering(tmp_path / "root", 2, world.clock)


def test_rank_that_a_listing_does_not_show_is_found_after_a_while(world, together, monkeypatch):
    """Some network file systems list a new file much later than they open it."""
    real = joining.os.listdir
    monkeypatch.setattr(joining.os, "listdir", lambda path: [name for name in real(path) if "rank_2" not in name])
    begin = world.clock.now()
    directory_of(together())
    assert 10 <= world.clock.now() - begin < 12


def test_many_ranks_join_with_few_looks_at_the_shared_disk(together, accesses):
    """512 ranks come one after the other within half a minute, after a run of as many that never was complete."""
    number = 512
    together(number, {number - 1: 60.0}, timing=dataclasses.replace(TIMING, join_timeout=1))
    accesses.clear()
    directory_of(together(number, {r: r / 16 for r in range(number)}, timing=spread(TIMING, number)))
    assert accesses["written"] == number + 2, "one for each, the offer and the start"
    assert accesses["read"] < 70 * number, "each looks once or twice a second at one small file"
    assert accesses["os.listdir"] + accesses["os.scandir"] < 60, "only rank 0 lists"
