"""The ranks of one run tell each other what they have done, and how they failed."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial

import pytest

from auto_trans.config import Timing
from auto_trans.coordination.joining import Joined
from auto_trans.coordination.session import Session, job_key
from auto_trans.errors import RankFailedError, RankLostError
from auto_trans.process import Process

TIMING = Timing(heartbeat_timeout=60, stall_timeout=1800, log_interval=10, heartbeat_interval=3600)
HERE = Process.current()
DEAD = dataclasses.replace(HERE, started=HERE.started - 1)


@pytest.fixture
def session(world, tmp_path):
    """Rank -> its place in a session of some processes, four living ones by default."""

    def session(rank, processes=(HERE,) * 4):
        return Session(Joined(tmp_path, tuple(processes)), rank, TIMING, world.clock)

    return session


def beating(world, session, seconds, then=lambda: None):
    """A rank that works for some seconds, with signs of life."""
    heart = session.heartbeat()
    for _ in range(int(seconds)):
        heart.beat()
        world.clock.sleep(1)
    return then()


def test_joined_ranks_speak_to_each_other(world, tmp_path):
    def live(rank):
        session = Session.join(tmp_path, rank, 2, settings="same", timing=TIMING, clock=world.clock)
        session.post(f"from_{rank}", {"rank": rank})
        return session.await_posts({"from_0": 0, "from_1": 1}, "speak"), session.is_leader, session.world_size

    said = {"from_0": {"rank": 0}, "from_1": {"rank": 1}}
    assert world.run(a=partial(live, 0), b=partial(live, 1)) == {"a": (said, True, 2), "b": (said, False, 2)}


def test_contents_come_in_the_order_of_the_names_whatever_arrived_first(world, session):
    names = {"b": 2, "c": 3, "a": 1}

    def post(name, rank, after):
        beating(world, session(rank), after, lambda: session(rank).post(name, {"rank": rank}))

    found = world.run(
        waiting=lambda: session(0).await_posts(names, "work"),
        a=partial(post, "a", 1, 1), c=partial(post, "c", 3, 3), b=partial(post, "b", 2, 5),
    )["waiting"]  # fmt: skip
    assert list(found.items()) == [("b", {"rank": 2}), ("c", {"rank": 3}), ("a", {"rank": 1})]


@pytest.mark.parametrize("last", ["a", "b", "c"])
def test_waiting_ends_only_when_the_last_is_there(world, session, last):
    names = {"a": 1, "b": 2, "c": 3}
    for name, rank in names.items():
        if name != last:
            session(rank).post(name, {})
    begin = world.clock.now()
    work = partial(beating, world, session(names[last]), 30, lambda: session(names[last]).post(last, {"late": 1}))
    found = world.run(waiting=lambda: session(0).await_posts(names, "work"), working=work)["waiting"]
    assert found[last] == {"late": 1} and len(found) == 3
    assert world.clock.now() - begin >= 30


def test_nothing_to_wait_for_is_there_at_once(session):
    assert session(1).await_posts({}, "work") == {}


def test_failure_of_any_rank_reaches_all_that_wait_with_its_traceback(world, session):
    def fail():
        world.clock.sleep(5)
        try:
            raise RuntimeError("a bad day")
        except RuntimeError as e:
            session(3).fail(e)

    begin = world.clock.now()
    work = partial(beating, world, session(0), 50)
    waiting = {f"rank_{r}": lambda r=r: session(r).await_posts({"done": 0}, "work") for r in (1, 2)}
    results = world.run(failing=fail, working=work, **waiting)
    for rank in (1, 2):
        error = results[f"rank_{rank}"]
        assert isinstance(error, RankFailedError) and error.rank == 3
        assert "rank 3 failed with RuntimeError: a bad day" in str(error) and "in fail" in error.original
    assert 50 <= world.clock.now() - begin < 51


def test_failure_is_noticed_within_two_seconds(world, session):
    session(3).fail(ValueError("bad"))
    begin = world.clock.now()
    assert isinstance(world.run(r=lambda: session(1).await_posts({"done": 0}, "work"))["r"], RankFailedError)
    assert world.clock.now() - begin < 2


def test_own_failure_is_not_taken_for_that_of_another(world, session):
    session(1).fail(ValueError("mine"))
    work = partial(beating, world, session(0), 10, lambda: session(0).post("done", {}))
    assert world.run(w=lambda: session(1).await_posts({"done": 0}, "work"), work=work)["w"] == {"done": {}}


def test_failure_that_cannot_be_told_is_logged(session, tmp_path, caplog):
    (tmp_path / "failed.json").mkdir()
    session(2).fail(ValueError("bad"))
    assert "the failure of rank 2 cannot be told to the others" in caplog.text


def test_who_failed_stays_until_all_know_it(world, session):
    """A launcher kills the others once one has ended."""
    begin = world.clock.now()

    def fail():
        session(3).fail(ValueError("bad"))
        session(3).await_told()
        return world.clock.now() - begin

    def follow(rank, seconds):
        world.clock.sleep(seconds)
        session(rank).await_told()
        return world.clock.now() - begin

    ends = world.run(failing=fail, a=partial(follow, 0, 1), b=partial(follow, 1, 3), c=partial(follow, 2, 2))
    assert all(3 <= end < 4 for end in ends.values())


def test_who_failed_does_not_stay_for_the_dead(world, session):
    begin = world.clock.now()
    world.run(failing=lambda: session(3).await_told())
    assert 5 <= world.clock.now() - begin < 10


def test_who_failed_and_cannot_say_so_ends_all_the_same(world, session, tmp_path):
    (tmp_path / "told").write_text("")
    world.run(failing=lambda: session(3).await_told())


def test_dead_rank_that_owes_a_post_is_named(world, session):
    error = world.run(w=lambda: session(1, [HERE, HERE, DEAD]).await_posts({"done": 2}, "work"))["w"]
    assert isinstance(error, RankLostError) and error.rank == 2 and f"rank 2 ({DEAD}) died" in str(error)


def test_dead_rank_that_owes_nothing_stops_nobody(world, session):
    processes = [HERE, HERE, DEAD, DEAD]
    session(2, processes).post("from_2", {})
    work = partial(beating, world, session(0), 300, lambda: session(0).post("from_0", {}))
    found = world.run(w=lambda: session(1, processes).await_posts({"from_0": 0, "from_2": 2}, "work"), work=work)["w"]
    assert list(found) == ["from_0", "from_2"]


def test_failure_of_a_rank_that_then_died_tells_more_than_its_death(world, session, monkeypatch):
    """It fails between the look for failures and the look at its process."""
    waiting = session(1, [DEAD, HERE])
    look, failed = waiting._board.failure, []

    def late():
        failed.append(look())
        if len(failed) == 1:
            session(0).fail(ValueError("bad"))
        return failed[-1]

    monkeypatch.setattr(waiting._board, "failure", late)
    error = world.run(w=lambda: waiting.await_posts({"done": 0}, "work"))["w"]
    assert isinstance(error, RankFailedError) and "rank 0 failed with ValueError: bad" in str(error)


def test_post_of_a_rank_that_then_died_counts(world, session, monkeypatch):
    """It posts and ends between the look for posts and the look at its process."""
    waiting = session(1, [DEAD, HERE])

    def late():
        session(0).post("done", {})

    monkeypatch.setattr(waiting._board, "failure", late)
    assert world.run(w=lambda: waiting.await_posts({"done": 0}, "work"))["w"] == {"done": {}}


def test_rank_that_gives_no_signs_of_life_is_lost(world, session):
    begin = world.clock.now()
    error = world.run(w=lambda: session(1).await_posts({"done": 2}, "work"))["w"]
    assert isinstance(error, RankLostError) and "rank 2" in str(error) and "gave no sign of life" in str(error)
    assert 60 < world.clock.now() - begin < 63


def test_a_rank_does_not_watch_itself(world, session):
    def post_late():
        world.clock.sleep(500)
        session(1).post("own", {})

    assert world.run(w=lambda: session(1).await_posts({"own": 1}, "work"), p=post_late)["w"] == {"own": {}}


def test_log_line_names_only_the_ranks_that_are_late(world, session, caplog):
    caplog.set_level(logging.INFO)
    session(3).post("c", {})
    session(1).heartbeat().progress(1, 4)

    def work(rank, name, seconds):
        session(rank).post("x", {})
        heart = session(rank).heartbeat()
        for second in range(seconds):
            heart.progress(second * 10, 1000)
            heart.beat()
            world.clock.sleep(1)
        session(rank).post(name, {})

    world.run(
        w=lambda: session(0).await_posts({"a": 1, "b": 2, "c": 3}, "convert"),
        a=partial(work, 1, "a", 25), b=partial(work, 2, "b", 15),
    )  # fmt: skip
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("waiting 10 s for rank 1 (") and "rank 2 (" in caplog.messages[0]
    assert caplog.messages[1].startswith("waiting 20 s for rank 1 (") and "%) to convert" in caplog.messages[1]
    assert "rank 2" not in caplog.messages[1] and "rank 3" not in caplog.text


def test_neighbours_are_the_ranks_of_the_same_host(session):
    there = dataclasses.replace(HERE, host="elsewhere")
    processes = [HERE, HERE, there, HERE, there]
    assert session(0, processes).neighbours([0, 1, 2, 3, 4]) == 3
    assert session(0, processes).neighbours([1, 2, 4]) == 1
    assert session(4, processes).neighbours(range(5)) == 2


def test_waiting_for_many_ranks_costs_a_few_looks(world, session, accesses):
    """64 ranks work for half a minute; all are watched, but not all at once."""
    number = 64
    processes = (HERE,) * (number + 1)
    names = {f"converted_rank_{r}": r for r in range(number)}

    def work(rank):
        beating(
            world, session(rank, processes), 30, lambda: session(rank, processes).post(f"converted_rank_{rank}", {})
        )

    results = world.run(
        waiting=lambda: session(number, processes).await_posts(names, "work"),
        **{f"rank_{r}": partial(work, r) for r in range(number)},
    )
    assert list(results["waiting"]) == list(names)
    seconds, looks = 30, 60 + 20
    lines = number * seconds / TIMING.log_interval
    assert accesses["read"] < looks + (8 + 1) * seconds + lines + number


def test_every_one_of_many_ranks_is_watched(world, session):
    number = 64
    processes = (*(HERE,) * 63, DEAD, HERE)
    names = {f"converted_rank_{r}": r for r in range(number)}
    begin = world.clock.now()
    error = world.run(w=lambda: session(number, processes).await_posts(names, "work"))["w"]
    assert isinstance(error, RankLostError) and error.rank == 63
    assert 8 <= world.clock.now() - begin < 12


def test_every_rank_begins_to_watch_with_others(world, session):
    processes = (*(HERE,) * 63, DEAD, HERE)
    names = {f"converted_rank_{r}": r for r in range(64)}
    begin = world.clock.now()
    error = world.run(w=lambda: session(7, processes).await_posts(names, "work"))["w"]
    assert isinstance(error, RankLostError) and error.rank == 63
    assert world.clock.now() - begin < 2


def test_many_ranks_look_less_often_each(world, tmp_path):
    timing = dataclasses.replace(TIMING, join_timeout=60)
    world.run(r=lambda: Session.join(tmp_path, 0, 1000, timing=timing, clock=world.clock))
    assert max(world.slept) == 2


def test_job_key_is_that_of_the_launch():
    one = {"MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118", "RANK_ID": "1"}
    assert job_key(one) == job_key({**one, "RANK_ID": "2"})
    assert job_key(one) != job_key({**one, "MS_SCHED_PORT": "8119"})
    assert job_key({"MS_SCHED_HOST": "a"}) != job_key({"MS_SCHED_PORT": "a"})
