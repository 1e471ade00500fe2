"""One conversion by all ranks of a session: the elected ones convert, the others wait, all return together.

To rank folders each converter writes the slices of some target ranks; to a complete set each writes some of its files.

Rank 0 leads. What it has chosen it posts: the files of the source and the digests of the strategies, so that nobody looks
twice and nobody converts something else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Optional

from auto_trans.config import Timing
from auto_trans.conversion import Conversion
from auto_trans.coordination.barrier import Heartbeat, wait_until
from auto_trans.coordination.election import LEADER, Assignment
from auto_trans.coordination.session import Session
from auto_trans.core.strategy import Strategy, describe_difference
from auto_trans.core.work import assign_writers
from auto_trans.errors import CoordinationError, OutputError
from auto_trans.log import logger
from auto_trans.matching import Opened, link_source, matches, open_source, target_file
from auto_trans.report import ConversionReport
from auto_trans.request import Request
from auto_trans.sizes import format_bytes
from auto_trans.storage.files import write_json
from auto_trans.storage.names import INDEX_NAMES
from auto_trans.storage.sources import Checkpoint, find_sources
from auto_trans.storage.strategies import merge_strategies

__all__ = ["REPORT_NAME", "SharedConversion", "convert_together", "merge_stages"]

REPORT_NAME = "auto_trans_report.json"

_SHARED_DISK = (
    "check that the output directory («dst») is shared by all ranks and that nothing else deletes files there"
)


@dataclass(frozen=True)
class SharedConversion:
    """What the ranks of a session convert together.

    Attributes:
        request: The conversion; its ``dst`` gets a folder for every checkpoint, or is that of a complete set where the
            request has a ``shard_size``. Its target strategy is not used.
        strategy_dir: Where the job saves the strategy that it compiled.
        read_target: Reads the strategy that the job compiled, of all stages.
        report: Where rank 0 writes what was done.
        assignments: The converter ranks and their slices.
        timing: How long to wait for each other.
    """

    request: Request
    strategy_dir: Path
    read_target: Callable[[], Strategy]
    report: Path
    assignments: tuple[Assignment, ...]
    timing: Timing

    @property
    def merges(self) -> bool:
        """Whether a complete set of files is made, and not rank folders."""
        return self.request.shard_size is not None

    @property
    def converters(self) -> list[int]:
        """The converter ranks."""
        return [assignment.rank for assignment in self.assignments]

    def part(self, request: Request, checkpoint: Checkpoint, own: Assignment) -> Conversion:
        """What a converter rank does of the conversion of a checkpoint."""
        if self.merges:
            return Conversion(request, checkpoint, (self.assignments.index(own), len(self.assignments)))
        return Conversion(replace(request, dst=request.dst / checkpoint.name, ranks=tuple(own.slices)), checkpoint)


def convert_together(session: Session, shared: SharedConversion) -> None:
    """Converts the checkpoint of a job; all ranks of the session call this.

    Raises:
        AutoTransError: The conversion failed here or on another rank.
    """
    own = next((assignment for assignment in shared.assignments if assignment.rank == session.rank), None)
    if own is None:
        _await_complete(session, shared)
    else:
        with session.heartbeat() as heartbeat:
            converter = _Converter(session, shared, own, heartbeat)
            if session.is_leader:
                converter.lead()
            else:
                converter.follow()
    own_files = _own_files(session, shared)
    _await_visible(session, shared, lambda: own_files)


class _Converter:
    """A converter rank."""

    def __init__(self, session: Session, shared: SharedConversion, own: Assignment, heartbeat: Heartbeat) -> None:
        self._session, self._shared, self._own, self._heartbeat = session, shared, own, heartbeat
        self._done: list[Conversion] = []

    def lead(self) -> None:
        """Chooses, prepares, converts its share, and reports."""
        begin = time.monotonic()
        shared, session = self._shared, self._session
        request = replace(shared.request, to_strategy=shared.read_target())
        merge_stages(request.to_strategy, shared.strategy_dir)
        checkpoints = find_sources(request.src, request.from_strategy, request.resume_file)
        sources = [open_source(checkpoint, request) for checkpoint in checkpoints]
        fitting = not shared.merges and all(matches(source, request) for source in sources)
        if fitting:
            for source in sources:
                link_source(source, request)
            logger.info(
                "the weights in %s already match the strategy of this job: nothing is converted, the files are linked",
                request.src,
            )
        session.post("prepared", {"matches": fitting, **_choice(request, checkpoints)})
        reports: list[dict[str, Any]] = []
        if not fitting:
            logger.info(
                "%s: converting with rank %s", self._reason(request, sources), ", ".join(map(str, shared.converters))
            )
            self._convert(request, checkpoints)
            with self._heartbeat.idle():
                posts = session.await_posts(_converted(shared), "convert")
            reports = sorted(posts.values(), key=lambda report: int(report["rank"]))
            for conversion in self._done:
                _finish(conversion)
        report = {
            "source": str(request.src),
            "target": str(request.dst),
            "matches": fitting,
            "engine": request.engine,
            "seconds": time.monotonic() - begin,
            "bytes_written": sum(r["bytes_written"] for r in reports),
            "converters": reports,
        }
        write_json(shared.report, report, durable=request.durable)
        if reports:
            logger.info(
                "converted %s with rank %s: %s written in %.1f s to %s", request.src,
                ", ".join(str(r["rank"]) for r in reports), format_bytes(report["bytes_written"]), report["seconds"],
                request.dst,
            )  # fmt: skip
        session.post("complete", report)

    def follow(self) -> None:
        """Converts its share of what rank 0 has chosen."""
        with self._heartbeat.idle():
            prepared = _await_prepared(self._session)
        if not prepared["matches"]:
            request = replace(self._shared.request, to_strategy=self._shared.read_target())
            checkpoints = [Checkpoint.from_json(content) for content in prepared["checkpoints"]]
            _check_same_choice(self._session.rank, prepared, _choice(request, checkpoints))
            self._convert(request, checkpoints)
        with self._heartbeat.idle():
            _await_complete(self._session, self._shared)

    def _reason(self, request: Request, sources: Sequence[Opened]) -> str:
        if self._shared.merges:
            return f"the weights in {request.src} are to be merged in {request.dst}"
        difference = describe_difference(sources[0].source.strategy, request.to_strategy)
        return f"the weights in {request.src} do not match the strategy of this job ({difference})"

    def _convert(self, request: Request, checkpoints: Sequence[Checkpoint]) -> None:
        """Converts this rank's share of the slices."""
        begin, written = time.monotonic(), 0
        for checkpoint in checkpoints:
            conversion = self._shared.part(request, checkpoint, self._own)
            report = self._merge(conversion) if self._shared.merges else self._convert_one(conversion)
            self._done.append(conversion)
            written += report.bytes_written
            logger.info("rank %d: %s", self._session.rank, report)
        self._session.post(
            f"converted_rank_{self._session.rank}",
            {
                "rank": self._session.rank,
                "slices": [self._own.slices[0], self._own.slices[-1]],
                "bytes_written": written,
                "seconds": time.monotonic() - begin,
            },
        )

    def _neighbours(self) -> int:
        """How many converters share the memory of this machine."""
        return self._session.neighbours(self._shared.converters)

    def _merge(self, conversion: Conversion) -> ConversionReport:
        """Writes its share of the files of a complete set."""
        conversion.check(self._neighbours(), 1 / len(self._shared.assignments), heads=False)
        conversion.log_plan()
        return run_conversion(conversion, listener=self._heartbeat.progress)

    def _convert_one(self, conversion: Conversion) -> ConversionReport:
        assignments, rank = self._shared.assignments, self._session.rank
        # MindSpore's API knows no replicas, and does not tell how far it is
        native = conversion.request.engine == "native"
        writers = self._writers(conversion) if native else {}
        own = [file for file in conversion.files if writers.get(file.ranks[0], rank) == rank]
        part = len(own) / len(conversion.plan.replicas) if native and own else 1 / len(assignments)
        conversion.check(self._neighbours(), part, own, heads=False)  # rank 0 has compared them
        conversion.log_plan()
        with contextlib.nullcontext() if native else self._heartbeat.idle():
            report = run_conversion(conversion, listener=self._heartbeat.progress, files=own)
        return self._link_others(conversion, report, writers) if native else report

    def _writers(self, conversion: Conversion) -> dict[int, int]:
        """Target rank -> the converter rank that writes its file, of which the others with such a rank make links."""
        assignments = self._shared.assignments
        shares = assign_writers(conversion.plan.replicas, [assignment.slices for assignment in assignments])
        return {rank: assignments[share].rank for rank, share in shares.items()}

    def _link_others(
        self, conversion: Conversion, report: ConversionReport, writers: Mapping[int, int]
    ) -> ConversionReport:
        """Links what other converters have written for replicas of this one's slices; tells them what is there for them."""
        session, target = self._session, conversion.target
        name = f"{conversion.checkpoint.name}_written_rank_"
        session.post(f"{name}{session.rank}", {"ranks": [record.rank for record in report.files]})
        rest = [file for file in conversion.files if writers[file.ranks[0]] != session.rank]
        if not rest:
            return report
        needed = {writers[file.ranks[0]] for file in rest}
        with self._heartbeat.idle():
            done = session.await_posts({f"{name}{rank}": rank for rank in needed}, "write what others link")
            there = {rank for content in done.values() for rank in content["ranks"]}
            originals = [rank for file in rest for rank in conversion.replicas(file) if rank in there]
            _await_visible(session, self._shared, lambda: [target.path(target.name(rank, 0)) for rank in originals])
        return ConversionReport.merged([report, conversion.run(listener=self._heartbeat.progress, files=rest)])


def run_conversion(conversion: Conversion, **options: Any) -> ConversionReport:
    """Runs the share of a converter rank; a place of its own, so that tests can put faults here."""
    return conversion.run(**options)


def _choice(request: Request, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """What rank 0 has chosen, for all to read."""
    return {
        "checkpoints": [checkpoint.as_json() for checkpoint in checkpoints],
        "requests": [request.digest(checkpoint) for checkpoint in checkpoints],
    }


def _check_same_choice(rank: int, chosen: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if chosen["requests"] != own["requests"]:
        raise CoordinationError(
            f"rank {rank} would convert something else than rank {LEADER}: the source files («src») or strategy files "
            f"(«src_strategy», «dst_strategy») changed meanwhile, or are not the same on all nodes; have all nodes see the "
            f"same files and start again"
        )


def _await_prepared(session: Session) -> dict[str, Any]:
    return session.await_posts({"prepared": LEADER}, "prepare the conversion")["prepared"]


def _await_complete(session: Session, shared: SharedConversion) -> None:
    prepared = _await_prepared(session)
    owed = {} if prepared["matches"] else _converted(shared)
    session.await_posts({**owed, "complete": LEADER}, "convert")


def _converted(shared: SharedConversion) -> dict[str, int]:
    return {f"converted_rank_{rank}": rank for rank in shared.converters}


def merge_stages(target: Strategy, strategy_dir: Path) -> None:
    """Leaves one file that describes all stages, as MindFormers does."""
    if target.stages > 1:
        logger.info("the strategies of %d stages are merged into %s", target.stages, merge_strategies(strategy_dir))


def _finish(conversion: Conversion) -> None:
    """Looks whether everything is there now that all converters are done."""
    request, target = conversion.request, conversion.target
    if request.shard_size is not None:
        if not target.finish():
            raise OutputError(f"all converters are done, but {request.dst} is not complete; {_SHARED_DISK}")
        return
    ranks = range(request.to_strategy.world_size)
    missing = next((path for rank in ranks if not (path := target.path(target.name(rank, 0))).is_file()), None)
    if missing is not None:
        raise OutputError(f"all converters are done, but {missing} is not there; {_SHARED_DISK}")


def _own_files(session: Session, shared: SharedConversion) -> list[Path]:
    """The file of this rank in every checkpoint that rank 0 has chosen, or the index of the complete set."""
    folder = shared.request.dst
    if shared.merges:
        return [folder / name for name in INDEX_NAMES]
    names = [content["name"] for content in _await_prepared(session)["checkpoints"]]
    return [target_file(shared.request, folder / name, session.rank) for name in names]


def _await_visible(session: Session, shared: SharedConversion, files: Callable[[], list[Path]]) -> None:
    """Waits for network file systems that show other machines' files late."""

    def look() -> Optional[bool]:
        found = files()
        return True if found and all(file.is_file() for file in found) else None

    def invisible(seconds: float) -> Exception:
        missing = next((file for file in files() if not file.is_file()), shared.request.dst)
        return CoordinationError(
            f"{missing} is complete, but rank {session.rank} does not see it after {seconds:.0f} s; check that the output "
            f"directory («dst») is shared by all nodes"
        )

    wait_until(
        look, shared.timing, waiting_for=lambda: f"files to become visible to rank {session.rank}",
        deadline=shared.timing.heartbeat_timeout, on_timeout=invisible,
    )  # fmt: skip
