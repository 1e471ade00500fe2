"""The wrappers inside MindFormers' load of safetensors: what it merges and slices there, converter ranks convert.

MindFormers merges the source strategy, has rank 0 merge all weights, compiles, merges the target strategy, and has every
rank slice the merged weights. Where auto_trans converts, the merges are left out, and each rank loads its converted file as
MindFormers loads weights that match.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

from auto_trans.coordination.election import Assignment, elect
from auto_trans.hooks.direct import load_own_file, load_own_slices, read_names
from auto_trans.hooks.job import Job
from auto_trans.hooks.transform import convert_for_job, unify_for_job
from auto_trans.jobs import Load
from auto_trans.request import DEFAULT_PREFIX
from auto_trans.storage.names import rank_file

__all__ = [
    "check_concatenation",
    "choose_suffix",
    "find_concatenated",
    "load_slices",
    "merge_source_strategy",
    "merge_target_strategy",
    "unify",
]


def merge_source_strategy(original: Callable[..., str], config: Any) -> str:
    """Leaves out the merge of the source strategy, which auto_trans reads as it is."""
    return original(config) if _ours() is None else ""


def choose_suffix(original: Callable[..., Any], config: Any) -> Any:
    """Leaves out the choice of a step by rank 0's newest file; auto_trans has chosen one that all ranks have."""
    load = _ours()
    return original(config) if load is None else (load.config.load_checkpoint, None)


def unify(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Leaves out the merge of all weights, or has the converter ranks do it where ``unify`` is set.

    Args:
        original: MindFormers' own function.
        *args: Passed on.
        **kwargs: Passed on.

    Raises:
        AutoTransError: The merge failed here or on another rank.
    """
    load = _ours()
    if load is None:
        original(*args, **kwargs)
    elif load.config.unify:
        unify_for_job(Job.current(), load.config, _assignments(load))


def merge_target_strategy(original: Callable[..., str], config: Any, strategy_path: str) -> str:
    """Leaves out the merge of the target strategy, unless MindFormers slices by it."""
    load = _ours()
    slices = load is None or load.config.unify
    return original(config, strategy_path) if slices and not _is_whole() else strategy_path


def check_concatenation(load: Load, config: Any, network: Any) -> None:
    """Has MindFormers compare ``qkv_concat`` with the source, on every rank and before the graph is compiled.

    Args:
        load: What is loaded.
        config: The job's configuration.
        network: What is loaded into.

    Raises:
        ValueError: They contradict each other.
    """
    from mindformers.utils.load_checkpoint_utils import validate_qkv_concat

    checkpoint = load.find(load.source_strategy())[0]
    if checkpoint.format.name == "safetensors":
        concatenated = config.model.model_config.get("qkv_concat", False)
        where = checkpoint.path if checkpoint.is_sharded else checkpoint.all_files[0]
        validate_qkv_concat(network, concatenated, str(where))


def find_concatenated(original: Callable[..., None], network: Any, concatenated: bool, load_checkpoint: str) -> None:
    """Leaves out the look for concatenated weights among merged files; see `check_concatenation`."""
    if _ours() is None:
        original(network, concatenated, load_checkpoint)


def load_slices(
    original: Callable[..., None],
    config: Any,
    load_checkpoint_files: list[str],
    network: Any,
    strategy_path: str,
    load_ckpt_path: str,
    optimizer: Any,
) -> None:
    """Converts, then has MindFormers load this rank's file.

    Args:
        original: MindFormers' own function.
        config: The job's configuration.
        load_checkpoint_files: Passed on where MindFormers slices.
        network: What is loaded into.
        strategy_path: Passed on.
        load_ckpt_path: Passed on where MindFormers slices.
        optimizer: What a resumed training also loads.

    Raises:
        AutoTransError: The conversion failed here or on another rank.
    """
    load, running = _ours(), Job.running()
    if load is None or load.config.unify:
        # by no strategy MindFormers slices nothing, and fails
        settings = {"auto_trans_ckpt": False, "remove_redundancy": False} if _is_whole() else {}
        with _settings(config, **settings):
            original(config, load_checkpoint_files, network, strategy_path, load_ckpt_path, optimizer)
        return
    job = Job.current()
    known = running.network if running is not None else None
    if load.is_direct:
        _set(config, network, optimizer, load_own_slices(job, load, known, read_names(config, network)))
        return
    convert_for_job(job, load.config, _assignments(load), DEFAULT_PREFIX, known, format=load.format)
    folder = job.transformed_dir / Path(load.config.load_checkpoint).resolve().name
    own = rank_file(folder, DEFAULT_PREFIX, job.rank, ".safetensors")
    if load.config.loader == "native":
        _set(config, network, optimizer, load_own_file(job.rank, [own]))
        return
    # the file is this rank's own and complete, as where nothing is to be converted
    with _settings(config, auto_trans_ckpt=False, remove_redundancy=False):
        original(config, [str(own)], network, strategy_path, str(folder), optimizer)


def _set(config: Any, network: Any, optimizer: Any, parameters: dict[str, Any]) -> None:
    """Sets the parameters of the network as MindFormers does with those of a rank's own file."""
    import mindspore
    from mindformers.utils.load_checkpoint_utils import update_global_step

    if optimizer and config.resume_training:
        update_global_step(config, parameters)
    mindspore.load_param_into_net(network, parameters)


def _ours() -> Optional[Load]:
    """What is loaded, if auto_trans converts it."""
    running = Job.running()
    load = running.load if running is not None else None
    return load if load is not None and load.format == "safetensors" and not load.left else None


def _is_whole() -> bool:
    """Whether auto_trans_ckpt is True and every rank holds all weights whole, so that MindSpore saves no strategy."""
    from mindspore import context

    return Job.running() is not None and context.get_auto_parallel_context("parallel_mode") == "data_parallel"


def _assignments(load: Load) -> tuple[Assignment, ...]:
    return elect(Job.current().world_size, load.config.transform_process_num)


@contextlib.contextmanager
def _settings(config: Any, **values: Any) -> Iterator[None]:
    """A configuration with other values for a while."""
    before = {name: config[name] for name in values if name in config}
    try:
        for name, value in values.items():
            config[name] = value
        yield
    finally:
        for name in values:
            if name in before:
                config[name] = before[name]
            else:
                del config[name]
