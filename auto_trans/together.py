"""One conversion by all ranks of a session: the elected ones convert, the others wait, all return together.

Rank 0 leads. What it has chosen it posts: the files of the source and the digests of the strategies, so that nobody looks
twice and nobody converts something else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from auto_trans.config import Timing
from auto_trans.conversion import Conversion
from auto_trans.coordination.barrier import Heartbeat, wait_until
from auto_trans.coordination.election import LEADER, Assignment
from auto_trans.coordination.session import Session
from auto_trans.core.consistency import check_heads, check_names, check_network, check_shapes
from auto_trans.core.edits import apply_edits
from auto_trans.core.rules import some, sort_parameters
from auto_trans.core.source import SlicedSource
from auto_trans.core.strategy import Strategy, describe_difference, same_slices
from auto_trans.core.work import assign_writers
from auto_trans.errors import CoordinationError, OutputError
from auto_trans.log import logger
from auto_trans.report import ConversionReport
from auto_trans.request import Request
from auto_trans.sizes import format_bytes
from auto_trans.storage.files import write_json
from auto_trans.storage.names import rank_file
from auto_trans.storage.sources import Checkpoint, ScannedFiles, find_sources
from auto_trans.storage.strategies import merge_strategies

__all__ = ["REPORT_NAME", "SharedConversion", "convert_together"]

REPORT_NAME = "auto_trans_report.json"


@dataclass(frozen=True)
class SharedConversion:
    """What the ranks of a session convert together.

    Attributes:
        request: The conversion; its ``dst`` gets a folder for every checkpoint. Its target strategy is not used.
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
    _await_visible(session, shared, lambda: _own_files(session, shared))


class _Converter:
    """A converter rank."""

    def __init__(self, session: Session, shared: SharedConversion, own: Assignment, heartbeat: Heartbeat) -> None:
        self._session, self._shared, self._own, self._heartbeat = session, shared, own, heartbeat

    def lead(self) -> None:
        """Chooses, prepares, converts its share, and reports."""
        begin = time.monotonic()
        shared, session = self._shared, self._session
        request = replace(shared.request, to_strategy=shared.read_target())
        _merge_stages(request.to_strategy, shared.strategy_dir)
        checkpoints = find_sources(request.src, request.from_strategy, request.resume_file)
        sources = [_open(checkpoint, request) for checkpoint in checkpoints]
        matches = all(_matches(source, request) for source in sources)
        if matches:
            for source in sources:
                _link(source, request)
            logger.info("the weights in %s already match the strategy of this job: nothing is converted", request.src)
        session.post("prepared", {"matches": matches, **_choice(request, checkpoints)})
        reports: list[dict[str, Any]] = []
        if not matches:
            difference = describe_difference(request.from_strategy, request.to_strategy)
            logger.info(
                "the weights in %s do not match the strategy of this job (%s): converting with rank %s",
                request.src, difference, ", ".join(str(a.rank) for a in shared.assignments),
            )  # fmt: skip
            self._convert(request, checkpoints)
            with self._heartbeat.idle():
                posts = session.await_posts(_converted(shared), "convert")
            reports = sorted(posts.values(), key=lambda report: int(report["rank"]))
            for checkpoint in checkpoints:
                _check_all_there(request, checkpoint)
        report = {
            "source": str(request.src),
            "target": str(request.dst),
            "matches": matches,
            "engine": request.engine,
            "seconds": time.monotonic() - begin,
            "bytes_written": sum(r["bytes_written"] for r in reports),
            "converters": reports,
        }
        write_json(shared.report, report)
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

    def _convert(self, request: Request, checkpoints: Sequence[Checkpoint]) -> None:
        """Converts this rank's share of the slices."""
        begin, written = time.monotonic(), 0
        for checkpoint in checkpoints:
            own = replace(request, dst=request.dst / checkpoint.name, ranks=tuple(self._own.slices))
            conversion = Conversion(own, checkpoint)
            report = self._convert_one(conversion)
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

    def _convert_one(self, conversion: Conversion) -> ConversionReport:
        assignments, rank = self._shared.assignments, self._session.rank
        # MindSpore's API knows no replicas, and does not tell how far it is
        native = conversion.request.engine == "native"
        writers = self._writers(conversion) if native else {}
        own = [file for file in conversion.files if writers.get(file.ranks[0], rank) == rank]
        part = len(own) / len(conversion.plan.replicas) if native and own else 1 / len(assignments)
        neighbours = self._session.neighbours(assignment.rank for assignment in assignments)
        conversion.check(neighbours, part, own, heads=False)  # rank 0 has compared them
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
    return {f"converted_rank_{assignment.rank}": assignment.rank for assignment in shared.assignments}


class _Opened(NamedTuple):
    """A checkpoint that rank 0 has chosen, looked at."""

    checkpoint: Checkpoint
    heads: ScannedFiles
    source: SlicedSource


def _open(checkpoint: Checkpoint, request: Request) -> _Opened:
    """Looks at all files of a checkpoint; linked or converted, they must make up what the job needs."""
    heads = ScannedFiles(checkpoint)
    check_heads(request.from_strategy, heads)
    source = SlicedSource(request.from_strategy, heads)
    check_names(source, heads)
    check_shapes(source, request.allowed)
    sorting = sort_parameters(source, request.to_strategy, apply_edits((), source.names), request.allowed)
    for warning in sorting.warnings:
        logger.warning("%s", warning)
    if sorting.absent:
        logger.warning("not in the source, the model keeps its initial values: %s", some(sorting.absent, 5))
    return _Opened(checkpoint, heads, source)


def _matches(opened: _Opened, request: Request) -> bool:
    """Whether every rank can load a source file as it is."""
    checkpoint, heads, source = opened
    if checkpoint.format.name != "ckpt" or checkpoint.is_sharded:
        return False
    if not same_slices(request.from_strategy, request.to_strategy):
        return False
    if request.from_strategy.is_complete:
        return True
    held = set(source.names)
    return all(
        rank in checkpoint.files
        and all(name in heads.tensors(rank) for name in request.from_strategy.names(stage) if name in held)
        for stage in range(request.from_strategy.stages)
        for rank in _ranks_of(request.from_strategy, stage)
    )


def _ranks_of(strategy: Strategy, stage: int) -> range:
    return range(stage * strategy.stage_devices, (stage + 1) * strategy.stage_devices)


def _merge_stages(target: Strategy, strategy_dir: Path) -> None:
    """Leaves one file that describes all stages, as MindFormers does."""
    if target.stages > 1:
        logger.info("the strategies of %d stages are merged into %s", target.stages, merge_strategies(strategy_dir))


def _link(opened: _Opened, request: Request) -> None:
    """Has the loader find the source as it is, once it is seen to be what the network expects."""
    checkpoint, _, source = opened
    if request.network is not None:
        shapes = ((name, source.tensor(name).shape, [source.held_shape(name)]) for name in source.names)
        check_network(request.network, shapes, request.from_strategy.origin)
    for rank in range(request.to_strategy.world_size):
        link = rank_file(request.dst / checkpoint.name, request.prefix, rank)
        (original,) = checkpoint.files[rank if checkpoint.distributed and len(checkpoint.files) > 1 else 0]
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(original.resolve())
        except OSError as e:
            raise OutputError(f"{link} cannot be made: {e}; set an output directory that is writable («dst»)") from e


def _check_all_there(request: Request, checkpoint: Checkpoint) -> None:
    folder = request.dst / checkpoint.name
    ranks = range(request.to_strategy.world_size)
    missing = [rank for rank in ranks if not rank_file(folder, request.prefix, rank).is_file()]
    if missing:
        raise OutputError(
            f"all converters are done, but {rank_file(folder, request.prefix, missing[0])} is not there; check that the "
            f"output directory («dst») is shared by all ranks and that nothing else deletes files there"
        )


def _own_files(session: Session, shared: SharedConversion) -> list[Path]:
    """The file of this rank in every converted checkpoint."""
    folder = shared.request.dst
    names = [child for child in folder.iterdir() if child.is_dir()] if folder.is_dir() else []
    return [rank_file(name, shared.request.prefix, session.rank) for name in names]


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
