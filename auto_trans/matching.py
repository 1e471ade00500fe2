"""Weights that match the strategy of the job as they are: every rank loads the file that lies there already."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from auto_trans.core.consistency import check_heads, check_names, check_network, check_shapes
from auto_trans.core.edits import apply_edits
from auto_trans.core.rules import some, sort_parameters
from auto_trans.core.source import SlicedSource
from auto_trans.core.strategy import Strategy, same_slices
from auto_trans.errors import OutputError
from auto_trans.log import logger
from auto_trans.request import Request
from auto_trans.storage.names import rank_file
from auto_trans.storage.sources import Checkpoint, ScannedFiles

__all__ = ["Opened", "link_source", "matches", "open_source", "target_file"]


class Opened(NamedTuple):
    """A checkpoint that rank 0 has chosen, looked at."""

    checkpoint: Checkpoint
    heads: ScannedFiles
    source: SlicedSource


def open_source(checkpoint: Checkpoint, request: Request) -> Opened:
    """Looks at all files of a checkpoint; linked or converted, they must make up what the job needs.

    Raises:
        AutoTransError: They do not.
    """
    heads, strategy = ScannedFiles(checkpoint), checkpoint.strategy(request.from_strategy)
    check_heads(strategy, heads)
    source = SlicedSource(strategy, heads)
    check_names(source, heads)
    check_shapes(source, request.allowed)
    sorting = sort_parameters(source, request.to_strategy, apply_edits((), source.names), request.allowed)
    for warning in sorting.warnings:
        logger.warning("%s", warning)
    if sorting.absent:
        logger.warning("not in the source, the model keeps its initial values: %s", some(sorting.absent, 5))
    return Opened(checkpoint, heads, source)


def matches(opened: Opened, request: Request) -> bool:
    """Whether every rank can load a source file as it is."""
    checkpoint, heads, source = opened
    if checkpoint.format.name != request.format or checkpoint.is_sharded or checkpoint.iteration:
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


def link_source(opened: Opened, request: Request) -> None:
    """Has the loader find the source as it is, once it is seen to be what the network expects.

    Raises:
        PlanError: The network expects something else.
        OutputError: The links cannot be made.
    """
    checkpoint, _, source = opened
    if request.network is not None:
        shapes = ((name, source.tensor(name).shape, [source.held_shape(name)]) for name in source.names)
        check_network(request.network, shapes, request.from_strategy.origin)
    for rank in range(request.to_strategy.world_size):
        link = target_file(request, request.dst / checkpoint.name, rank)
        (original,) = checkpoint.files[rank if checkpoint.distributed and len(checkpoint.files) > 1 else 0]
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(original.resolve())
        except OSError as e:
            raise OutputError(f"{link} cannot be made: {e}; set an output directory that is writable («dst»)") from e


def target_file(request: Request, folder: Path, rank: int) -> Path:
    """Where the loader finds the file of a rank, in the folder of a checkpoint."""
    return rank_file(folder, request.prefix, rank, f".{request.format}")
