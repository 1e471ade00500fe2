"""One load by all ranks of a session: each assembles its own slices in memory, straight from the old checkpoint.

Rank 0 leads. It reads the strategies, chooses the files, checks all that can be wrong on behalf of all ranks, and posts what
it has read and chosen: the others look at nothing but the files that they need. All return together, for a rank that trains
on while another has failed would wait for it in vain.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Callable, Optional, TypeVar

from auto_trans.coordination.barrier import Heartbeat
from auto_trans.coordination.election import LEADER
from auto_trans.coordination.session import Session
from auto_trans.core.consistency import Network, check_known
from auto_trans.core.edits import LeaveOut, Rename
from auto_trans.core.plan import TensorPlan
from auto_trans.core.rules import NOTHING, Allowed, some
from auto_trans.core.strategy import Strategy, describe_difference, same_slices
from auto_trans.loading import Loaded, LoadReport, assemble, file_of_rank
from auto_trans.log import logger
from auto_trans.planned import Planned
from auto_trans.progress import Meter
from auto_trans.sizes import format_bytes
from auto_trans.storage.capacity import check_slices_fit
from auto_trans.storage.files import write_json
from auto_trans.storage.scanned import FileState
from auto_trans.storage.sources import Checkpoint, find_sources
from auto_trans.together import merge_stages

__all__ = ["SharedLoad", "load_together"]

T = TypeVar("T")


@dataclass(frozen=True)
class SharedLoad:
    """What the ranks of a session load together.

    Attributes:
        src: The source, as `auto_trans.convert` takes it.
        read_source: Reads the strategy of the source.
        strategy_dir: Where the job saves the strategy that it compiled.
        read_target: Reads the strategy that the job compiled, of all stages.
        report: Where rank 0 writes what was done.
        allowed: What is allowed although it looks wrong.
        resume_file: Name of the file to take from the rank folders, where ``resume_training`` picked it.
        network: The network of this rank, where there is one.
        read_names: Tells by which names a checkpoint holds the network's parameters, where they are not the network's own.
    """

    src: Path
    read_source: Callable[[], Strategy]
    strategy_dir: Path
    read_target: Callable[[], Strategy]
    report: Path
    allowed: Allowed = NOTHING
    resume_file: Optional[str] = None
    network: Optional[Network] = None
    read_names: Callable[[Checkpoint], Mapping[str, str]] = lambda checkpoint: {}


@dataclass(frozen=True)
class _Chosen:
    """A checkpoint that rank 0 has chosen, and all that it has read of it on behalf of the others."""

    checkpoint: Checkpoint
    from_strategy: Strategy
    to_strategy: Strategy
    names: tuple[tuple[str, str], ...] = ()
    left_out: tuple[str, ...] = ()
    states: Optional[Mapping[Path, FileState]] = None
    holders: Optional[Mapping[str, int]] = None

    def planned(self, ranks: Sequence[int], allowed: Allowed) -> Planned:
        return Planned(
            self.checkpoint, self.from_strategy, self.to_strategy, ranks,
            edits=(Rename(self.names), LeaveOut(self.left_out)), allowed=allowed,
            states=self.states, holders=self.holders,
        )  # fmt: skip


def load_together(session: Session, shared: SharedLoad, make: Callable[[Iterable[Loaded]], T]) -> T:
    """Loads the slices of this rank; all ranks of the session call this.

    Args:
        session: The ranks.
        shared: What they load.
        make: Makes of the slices what is returned; if it fails, the load of all ranks does. Of several complete checkpoints
            the last that holds a parameter gives it.

    Raises:
        AutoTransError: The load failed here or on another rank.
    """
    begin = time.monotonic()
    with session.heartbeat() as heartbeat:
        if session.is_leader:
            chosen = _lead(session, shared)
        else:
            with heartbeat.idle():
                posted = session.await_posts({"prepared": LEADER}, "prepare the load")["prepared"]
            chosen = _from_json(posted)
        made, report = _load(session, shared, chosen, heartbeat, make)
        session.post(f"loaded_rank_{session.rank}", {"rank": session.rank, **_as_json(report)})
        if session.is_leader:
            with heartbeat.idle():
                owed = {f"loaded_rank_{rank}": rank for rank in range(session.world_size)}
                reports = session.await_posts(owed, "load")
            _tell(shared, list(reports.values()), time.monotonic() - begin)
            session.post("complete", {})
            return made
    # nobody waits for this rank any more
    session.await_posts({"complete": LEADER}, "see all ranks load")
    return made


def _lead(session: Session, shared: SharedLoad) -> list[_Chosen]:
    """Chooses, checks on behalf of all ranks, and tells them."""
    source, target = shared.read_source(), shared.read_target()
    merge_stages(target, shared.strategy_dir)
    first_ranks = range(0, target.world_size, target.stage_devices)
    found = []
    for checkpoint in find_sources(shared.src, source, shared.resume_file):
        names = shared.read_names(checkpoint)
        left_out = _unknown(names, target, shared.network, checkpoint)
        chosen = _Chosen(checkpoint, checkpoint.strategy(source), target, tuple(names.items()), left_out)
        planned = chosen.planned(first_ranks, shared.allowed)
        planned.check_heads()
        planned.check_whole()
        planned.check_carried()
        if shared.network is not None:
            check_known(shared.network, planned.names, str(checkpoint.path))
        planned.log()
        logger.info("%s", _reason(planned))
        found.append(replace(chosen, states=planned.heads.states(), holders=planned.source.holders))
    session.post("prepared", _to_json(found))
    return found


def _unknown(
    names: Mapping[str, str], target: Strategy, network: Optional[Network], checkpoint: Checkpoint
) -> tuple[str, ...]:
    """What a model has a name for, but no place: parts of a published model that this one does without."""
    held: Container[str] = () if network is None else network.shapes
    sure = network is not None or not target.is_complete
    unknown = tuple(name for name in names if sure and name not in held and not target.lists(name))
    if unknown:
        logger.warning(
            "%s: left out, the model does not have them: %s",
            checkpoint.path,
            some([names[name] for name in unknown], 5),
        )
    return unknown


def _load(
    session: Session,
    shared: SharedLoad,
    chosen: Sequence[_Chosen],
    heartbeat: Heartbeat,
    make: Callable[[Iterable[Loaded]], T],
) -> tuple[T, LoadReport]:
    """Assembles the slices of this rank."""
    begin = time.monotonic()
    tensors: dict[str, TensorPlan] = {}
    for one in chosen:
        planned = one.planned([session.rank], shared.allowed)
        if shared.network is not None:
            planned.check_network(shared.network)
        tensors.update({tensor.name: tensor for tensor in file_of_rank(planned, session.rank).tensors})
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    check_slices_fit(nbytes, session.neighbours(range(session.world_size)))
    meter = Meter(nbytes, f"rank {session.rank}: loading", listener=heartbeat.progress)
    try:
        made = make(assemble(list(tensors.values()), meter))
    finally:
        meter.close()
    files = {copy.shard.file.path for tensor in tensors.values() for copy in tensor.copies}
    report = LoadReport(len(tensors), nbytes, len(files), time.monotonic() - begin)
    logger.info("rank %d: loaded %s from %s", session.rank, report, shared.src)
    return made, report


def _reason(planned: Planned) -> str:
    path = planned.checkpoint.path
    if same_slices(planned.from_strategy, planned.to_strategy):
        return f"the weights in {path} match the strategy of this job: every rank loads them as they are"
    difference = describe_difference(planned.from_strategy, planned.to_strategy)
    return (
        f"the weights in {path} do not match the strategy of this job ({difference}): every rank loads its own slices "
        f"directly, and nothing is written"
    )


def _tell(shared: SharedLoad, ranks: Sequence[Mapping[str, Any]], seconds: float) -> None:
    """Writes the report and logs it."""
    nbytes = sum(rank["bytes"] for rank in ranks)
    slowest = max(ranks, key=lambda rank: float(rank["seconds"]))
    write_json(shared.report, {"source": str(shared.src), "load": "direct", "seconds": seconds, "ranks": list(ranks)})
    logger.info(
        "%d ranks loaded %s from %s in %.1f s; the slowest, rank %d, took %.1f s", len(ranks), format_bytes(nbytes),
        shared.src, seconds, slowest["rank"], slowest["seconds"],
    )  # fmt: skip


def _as_json(report: LoadReport) -> dict[str, Any]:
    return {
        "parameters": report.parameters, "bytes": report.nbytes, "files": report.files, "seconds": report.seconds,
    }  # fmt: skip


def _to_json(chosen: Sequence[_Chosen]) -> dict[str, Any]:
    return {
        "to_strategy": chosen[0].to_strategy.as_json(),
        "checkpoints": [
            {
                **one.checkpoint.as_json(),
                "from_strategy": one.from_strategy.as_json(),
                "names": one.names,
                "left_out": one.left_out,
                "states": {str(path): state for path, state in (one.states or {}).items()},
                "holders": _runs(one.holders or {}),
            }
            for one in chosen
        ],
    }


def _runs(holders: Mapping[str, int]) -> list[tuple[int, list[str]]]:
    """The parameters in their order, by the rank that holds them."""
    return [(rank, list(names)) for rank, names in groupby(holders, key=holders.__getitem__)]


def _from_json(content: Mapping[str, Any]) -> list[_Chosen]:
    target = Strategy.from_json(content["to_strategy"])
    return [
        _Chosen(
            Checkpoint.from_json(one),
            Strategy.from_json(one["from_strategy"]),
            target,
            tuple((name, old) for name, old in one["names"]),
            tuple(one["left_out"]),
            {Path(path): FileState(*state) for path, state in one["states"].items()},
            {name: rank for rank, names in one["holders"] for name in names},
        )
        for one in content["checkpoints"]
    ]
