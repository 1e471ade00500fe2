"""Strategy files: read what MindSpore saved, and merge the files of all pipeline stages.

A strategy is given as a per-rank file (``ckpt_strategy_rank_N.ckpt`` or its ``.json`` form, which describes one pipeline
stage), as a folder of them, or as a merged file, whose parameter names carry the stage as ``<stage>-``. The files of a
folder may have any names. What the files hide is restored here: which file belongs to which stage, and that all ranks of a
stage agree. How many stages the job has is told by no file: a gap is noticed, a last stage that is missing is not.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Union

from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy, is_accumulated_gradient
from auto_trans.errors import ConfigError, OutputExistsError, StrategyError, StrategyNotFoundError
from auto_trans.log import logger
from auto_trans.storage.files import new_file
from auto_trans.storage.formats.strategy import StagePart, StrategyFile, merge, parse

__all__ = ["MERGED_NAME", "merge_strategies", "named_ranks", "read_strategy", "remerge_strategies", "single_file"]

MERGED_NAME = "merged_ckpt_strategy.ckpt"

PathLike = Union[str, "os.PathLike[str]"]

_RANK_FILE = re.compile(r"(?!merged).*_rank_([0-9]+)\.(?:ckpt|json)", re.DOTALL)
# The strategy of 100,000 parameters takes 10 MB; whatever is larger is a checkpoint, and not read.
_MOST_BYTES = 1 << 28


class _Found(NamedTuple):
    """A strategy file that was read."""

    file: Path
    content: StrategyFile


def read_strategy(path: PathLike) -> Strategy:
    """Reads a strategy file, a merged strategy file or a folder of strategy files.

    Args:
        path: A ``.ckpt`` or ``.json`` strategy file, or a folder that holds those of a job, whatever their names. A
            folder's per-stage files win over a merged file beside them, which may be stale.

    Returns:
        The strategy of the whole job.

    Raises:
        StrategyNotFoundError: There is nothing at the path.
        StrategyError: A file is no strategy file, the files are of different jobs, or stages are missing.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        by_stage, merged = _read_folder(path)
        return _assemble(by_stage.values() or merged[:1], path)
    if path.is_file():
        return _assemble(_read_files([path]), path)
    raise StrategyNotFoundError(f"strategy {path} is not found; set it to a strategy file or folder that exists")


def merge_strategies(folder: PathLike, output: PathLike | None = None) -> Path:
    """Merges a folder's per-stage strategy files into one file that MindSpore's own tools read, too.

    A warning is logged if the folder holds one stage which looks like that of a pipeline job.

    Args:
        folder: Holds the ``.ckpt`` files of all stages (or their ``.json`` form), one or several of each.
        output: Where to write; ``merged_ckpt_strategy.ckpt`` in the folder by default. An earlier file is replaced only
            once the new one is complete.

    Raises:
        ConfigError: ``output`` ends in ``.json``, which MindSpore would not read as what is written.
        StrategyNotFoundError: The folder holds no strategy files.
        StrategyError: The files do not make up one job.
        OutputError: The merged file cannot be written.
    """
    folder = Path(folder)
    output = Path(output) if output else folder / MERGED_NAME
    if output.suffix == ".json":
        raise ConfigError(f"merged strategy {output} is written as protobuf: give it a name that ends in .ckpt")
    if not folder.is_dir():
        raise StrategyNotFoundError(f"{folder} is no folder; set it to the folder of the strategy files to merge")
    by_stage, merged = _read_folder(folder)
    if not by_stage:
        raise StrategyNotFoundError(
            f"{folder} holds no per-stage strategy files (*_rank_N.ckpt or .json) to merge"
            + (f" that would add to {merged[0].file}" if merged else "")
        )
    _check_replaceable(output, folder)
    _write_merged(by_stage, folder, output)
    return output


def _check_replaceable(output: Path, folder: Path) -> None:
    """Only what is a merged strategy, or bears its usual name, is replaced.

    Raises:
        OutputExistsError: Something else would be lost.
    """
    usual = output.name == MERGED_NAME and output.parent.resolve() == folder.resolve()
    if output.exists() and not usual and not _read_if_merged([output]):
        raise OutputExistsError(f"{output} is there already and is no merged strategy file; give another name («dst»)")


def remerge_strategies(path: PathLike | None) -> None:
    """Writes the merged file of a strategy folder anew, as MindFormers' scripts do; an old one stays if that fails.

    Nothing is done for what is no folder, where pipeline parallelism is not used, or where the merged file is alone.
    """
    if path and path != "None" and Path(path).is_dir():
        by_stage, _ = _read_folder(Path(path))
        if len(by_stage) > 1:
            _write_merged(by_stage, Path(path), Path(path) / MERGED_NAME)


def single_file(path: PathLike, scratch: Path) -> Path:
    """One file that describes the whole job, as MindSpore's API wants it; merged into ``scratch`` if there is none.

    Raises:
        StrategyError: As `read_strategy`.
        OutputError: The merged file cannot be written.
    """
    path = Path(path)
    if path.is_file():
        return path
    by_stage, merged = _read_folder(path)
    if len(by_stage) > 1:
        _write_merged(by_stage, path, scratch)
        return scratch
    return (*by_stage.values(), *merged)[0].file


def named_ranks(folder: PathLike) -> frozenset[int]:
    """The ranks that the names of a folder's strategy files carry."""
    return frozenset(rank for file in _strategy_files(Path(folder)) if (rank := _rank_of(file)) is not None)


def _write_merged(by_stage: Mapping[int, _Found], folder: Path, output: Path) -> None:
    strategy = _assemble(by_stage.values(), folder)
    if strategy.stages == 1 and any(map(is_accumulated_gradient, (*strategy.layouts, *strategy.refused))):
        logger.warning(
            "%s holds one pipeline stage, but lists accu_grads.*, as the stages of a pipeline job do (or gradient "
            "accumulation): if the job has more stages, gather the strategy files of all nodes in this folder and merge "
            "them again",
            folder,
        )
    with new_file(output) as out:
        for piece in merge((stage, by_stage[stage].content) for stage in sorted(by_stage)):
            out.write(piece)


def _strategy_files(folder: Path) -> list[Path]:
    """What may be the strategy files of a folder, those of ranks first, in ascending order."""
    try:
        found = [f for f in folder.iterdir() if f.suffix in (".ckpt", ".json") and not f.name.startswith(".")]
    except OSError as e:
        raise StrategyError(f"strategy folder {folder} cannot be read: {e}") from e
    ranks = {file: _rank_of(file) for file in found}
    files = sorted(found, key=lambda file: (ranks[file] is None, ranks[file] or 0, file.name))
    _check_one_kind(folder, [file for file in files if ranks[file] is not None])
    for a, b in zip(files, files[1:]):
        if ranks[b] is not None and ranks[a] == ranks[b]:
            raise StrategyError(f"{folder} holds two strategy files of rank {ranks[b]}: {a.name}, {b.name}")
    return files


def _check_one_kind(folder: Path, files: list[Path]) -> None:
    other = next((file for file in files if file.suffix != files[0].suffix), None)
    if other is not None:
        raise StrategyError(
            f"{folder} holds strategy files of both kinds, .ckpt and .json, e.g. {files[0].name} and {other.name}; keep "
            f"one kind"
        )


def _rank_of(file: Path) -> int | None:
    match = _RANK_FILE.fullmatch(file.name)
    return int(match[1]) if match else None


def _read_folder(folder: Path) -> tuple[dict[int, _Found], list[_Found]]:
    """The first file of every stage, and merged files only where there is no such file."""
    files = _strategy_files(folder)
    usual = [file for file in files if file.stem == Path(MERGED_NAME).stem]
    by_stage: dict[int, _Found] = {}
    merged = []
    staged = []
    for found in _read_files(file for file in files if file not in usual):
        if found.content.is_merged:
            if _rank_of(found.file) is not None:
                raise StrategyError(
                    f"{found.file} is a merged strategy file under a per-rank name; rename or remove it"
                )
            merged.append(found)
        else:
            _add_stage(by_stage, found)
            staged.append(found.file)
    _check_one_kind(folder, staged)
    if by_stage:
        fuller = next((found for found in (*merged, *_read_if_merged(usual)) if _goes_on(found, by_stage)), None)
        if fuller is None:
            return by_stage, []
        logger.info(
            "%s describes more stages than the other files beside it, and the same of theirs: it is used", fuller.file
        )
        return {}, [fuller]
    merged += _read_files(usual)
    if not merged:
        raise StrategyNotFoundError(
            f"strategy folder {folder} holds no strategy file (*.ckpt or *.json); set it to output/strategy of the job "
            f"that saved the weights"
        )
    other = next((found for found in merged if found.content.parts != merged[0].content.parts), None)
    if other is not None:
        raise StrategyError(
            f"{merged[0].file} and {other.file} are merged strategy files of different jobs; remove one of them"
        )
    return {}, merged


def _read_if_merged(files: Iterable[Path]) -> list[_Found]:
    """Merged files, which may be stale or damaged where there are others."""
    found = []
    for file in files:
        with contextlib.suppress(StrategyError):
            found += [read for read in _read_files([file]) if read.content.is_merged]
    return found


def _goes_on(merged: _Found, by_stage: Mapping[int, _Found]) -> bool:
    """Whether a merged file says the same of the stages that other files describe, and describes more."""
    parts = {part.stage: part for part in merged.content.parts}
    return len(parts) > len(by_stage) and all(
        found.content.parts == (parts.get(stage),) for stage, found in by_stage.items()
    )


def _add_stage(by_stage: dict[int, _Found], found: _Found) -> None:
    (part,) = found.content.parts
    first = by_stage.setdefault(part.stage, found)
    if first.content is not found.content and first.content.parts != found.content.parts:
        raise StrategyError(
            f"{first.file} and {found.file} both describe stage {part.stage} but differ: they are of different jobs; "
            f"gather the strategy files of one job"
        )
    rank, devices = _rank_of(found.file), _devices(part, found.file)
    if rank is not None and rank // devices != part.stage:
        raise StrategyError(
            f"{found.file} describes stage {part.stage} of {devices} ranks, to which rank {rank} does not belong: the "
            f"folder mixes files of different jobs"
        )


def _read_files(files: Iterable[Path]) -> list[_Found]:
    """Reads every file once, and parses equal ones once: all ranks of a stage write the same bytes."""
    known: dict[tuple[str, bytes], StrategyFile] = {}
    found = []
    for file in files:
        key = file.suffix, _read_bytes(file)
        if key not in known:
            known[key] = parse(file, key[1])
        found.append(_Found(file, known[key]))
    return found


def _read_bytes(file: Path) -> bytes:
    try:
        with open(file, "rb") as f:
            if os.fstat(f.fileno()).st_size <= _MOST_BYTES:
                return f.read()
    except OSError as e:
        raise StrategyError(f"strategy file {file} cannot be read: {e}") from e
    raise StrategyError(f"{file} is larger than any strategy file: it is a checkpoint; set the strategy files instead")


def _assemble(files: Iterable[_Found], origin: Path) -> Strategy:
    """The strategy that files make up, which describe different stages."""
    parts = sorted((part for found in files for part in found.content.parts), key=lambda part: part.stage)
    devices = {_devices(part, origin) for part in parts}
    if len(devices) > 1:
        raise StrategyError(f"strategy {origin}: its stages have different numbers of ranks: {sorted(devices)}")
    (stage_devices,) = devices
    _check_no_gap([part.stage for part in parts], stage_devices, origin)
    layouts: dict[str, dict[int, Layout]] = {}
    refused: dict[str, str] = {}
    for part in parts:
        refused.update(part.refused)
        for name, layout in part.layouts.items():
            layouts.setdefault(name, {})[part.stage] = layout
    return Strategy(len(parts), stage_devices, layouts, refused, str(origin))


def _check_no_gap(stages: list[int], devices: int, origin: Path) -> None:
    gaps = [(a + 1, b - 1) for a, b in zip([-1, *stages], stages) if b - a > 1]
    if gaps:
        missing = [
            f"{_span('stage', a, b)} ({_span('rank', a * devices, (b + 1) * devices - 1)})" for a, b in gaps
        ]  # fmt: skip
        raise StrategyError(
            f"strategy {origin} describes pipeline stage {', '.join(map(str, stages))} only; give the folder with the "
            f"strategy files of all stages, or the merged file: missing are {', '.join(missing)}"
        )


def _span(what: str, first: int, last: int) -> str:
    return f"{what} {first}" if first == last else f"{what}s {first} to {last}"


def _devices(part: StagePart, origin: Path) -> int:
    """Number of ranks of a stage; every layout must agree on it (their dev_matrix may differ)."""
    found = {layout.devices: name for name, layout in part.layouts.items()}
    if not found:
        name, reason = next(iter(part.refused.items()))
        raise StrategyError(f"{origin}: stage {part.stage}: parameter {name}: {reason}")
    if len(found) > 1:
        raise StrategyError(f"{origin}: stage {part.stage}: parameters disagree on the number of ranks: {found}")
    return next(iter(found))
