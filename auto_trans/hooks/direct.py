"""What a rank of a job loads, read by auto_trans: its slices of the source, or the file that was converted for it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional

from auto_trans.core.consistency import Network
from auto_trans.hooks.job import Job, in_yaml_words
from auto_trans.hooks.transform import read_compiled_strategy
from auto_trans.jobs import Load
from auto_trans.load_together import SharedLoad, load_together
from auto_trans.loading import LoadReport, assemble, find_file
from auto_trans.log import logger
from auto_trans.network import as_parameters
from auto_trans.request import DEFAULT_PREFIX
from auto_trans.sizes import format_bytes
from auto_trans.storage.files import make_folder
from auto_trans.storage.names import rank_file
from auto_trans.storage.sources import Checkpoint
from auto_trans.together import REPORT_NAME

__all__ = ["judge_names", "load_own_file", "load_own_slices", "read_names", "read_parameters"]


def read_parameters(original: Callable[..., Any], config: Any) -> Any:
    """Reads what this rank of a .ckpt job loads.

    Args:
        original: MindFormers' own function, which has MindSpore load the converted file.
        config: The job's configuration.

    Returns:
        Parameter -> what it is set to, as ``mindspore.load_checkpoint`` gives it.

    Raises:
        AutoTransError: It cannot be read, here or, where nothing was written, on another rank.
    """
    running = Job.running()
    load = running.load if running is not None else None
    if load is None or load.left:
        return original(config)
    job = Job.current()
    if load.is_direct:
        return load_own_slices(job, load, running.network if running is not None else None)
    folders = sorted(folder for folder in job.transformed_dir.iterdir() if folder.is_dir())
    files = [rank_file(folder, DEFAULT_PREFIX, job.rank, ".ckpt") for folder in folders]
    if load.config.loader == "mindspore":
        _warn_of_memory(files)
        return original(config)
    return load_own_file(job.rank, files)


def load_own_slices(
    job: Job,
    load: Load,
    network: Optional[Network],
    read_names: Optional[Callable[[Checkpoint], Mapping[str, str]]] = None,
) -> dict[str, Any]:
    """Assembles the slices of this rank straight from the source; all ranks of the job call this.

    Args:
        job: The job.
        load: What is loaded.
        network: The network that it is loaded into, where it is known.
        read_names: Tells by which names a checkpoint holds the network's parameters.

    Raises:
        AutoTransError: The load failed here or on another rank.
    """
    config = load.config
    # a resumed training names every rank's own file
    common = json.dumps([Path(config.load_checkpoint).name, load.format, str(load.allowed)])
    with job.session("load", common, config.timing) as session:
        make_folder(job.transformed_dir)  # MindFormers looks into it
        shared = SharedLoad(
            Path(config.load_checkpoint), load.source_strategy, job.strategy_dir, lambda: read_compiled_strategy(job),
            job.output / REPORT_NAME, allowed=load.allowed, resume_file=config.resume_file, network=network,
        )  # fmt: skip
        if read_names is not None:
            shared = replace(shared, read_names=read_names)
        return load_together(session, shared, as_parameters)


def load_own_file(rank: int, files: Iterable[Path]) -> dict[str, Any]:
    """Reads the files of this rank, which hold its slices as they are.

    Raises:
        AutoTransError: One cannot be read.
    """
    parameters: dict[str, Any] = {}
    with in_yaml_words():
        for file in files:
            begin, tensors = time.monotonic(), find_file(file)
            parameters.update(as_parameters(assemble(tensors)))
            nbytes = sum(tensor.nbytes for tensor in tensors)
            report = LoadReport(len(tensors), nbytes, 1, time.monotonic() - begin)
            logger.info("rank %d: loaded %s from %s", rank, report, file)
    return parameters


def judge_names(load: Load, config: Any, network: Any) -> Load:
    """Leaves to MindFormers what its model cannot tell the names of, so that they could be read as they lie.

    Args:
        load: What is loaded.
        config: The job's configuration.
        network: What is loaded into.
    """
    if not load.is_direct or load.format != "safetensors":
        return load
    names = _Names(config, network)
    if not names.are_foreign(Path(load.config.load_checkpoint)):
        return load
    why = names.untold()
    return replace(load, left=why) if why else load


def read_names(config: Any, network: Any) -> Callable[[Checkpoint], Mapping[str, str]]:
    """What tells by which names a checkpoint holds the parameters of a network: the model's own map of HuggingFace's names.

    Args:
        config: The job's configuration.
        network: What is loaded into.
    """
    names = _Names(config, network)

    def read(checkpoint: Checkpoint) -> Mapping[str, str]:
        folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        return names.read(checkpoint) if not checkpoint.distributed and names.are_foreign(folder) else {}

    return read


class _Names:
    """The names that a model has for the weights of HuggingFace, asked for as MindFormers does."""

    def __init__(self, config: Any, network: Any) -> None:
        from mindformers.utils import load_checkpoint_utils as stock

        self._stock, self._concatenated = stock, config.model.model_config.get("qkv_concat", False)
        self._network, _ = stock._get_origin_network(network)

    def are_foreign(self, folder: Path) -> bool:
        """Whether a folder holds weights by the names of HuggingFace."""
        if self._concatenated or not hasattr(self._network, "convert_name"):
            return False
        return bool(self._stock.is_hf_safetensors_dir(str(folder), self._network))

    def untold(self) -> str:
        """Why the model does not tell its names, as a sentence without its beginning; empty if it does."""
        try:
            self._network.obtain_name_map([])
        except Exception as e:  # whatever a model raises that has none
            return f"the weights bear HuggingFace's names, which the model cannot map to its own ({e})"
        return ""

    def read(self, checkpoint: Checkpoint) -> Mapping[str, str]:
        """The network's name of a parameter -> that in the files."""
        found: Mapping[str, str] = self._network.obtain_name_map([str(file) for file in checkpoint.all_files])
        return found


def _warn_of_memory(files: Iterable[Path]) -> None:
    """MindSpore 2.10 and later refuses a file larger than the memory that is free even of page cache."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in files:
        if file.is_file() and file.stat().st_size > free:
            logger.warning(
                "%s is larger than the %s that are free without page cache, and MindSpore 2.10 and later refuses to load "
                "it; leave auto_trans: {loader: mindspore} out, which needs no such memory", file, format_bytes(free),
            )  # fmt: skip
