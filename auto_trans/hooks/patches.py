"""What is replaced in a MindFormers that looks as expected (`auto_trans.hooks.compatibility`)."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any, Callable

from auto_trans.hooks.compatibility import Verdict, judge_installed
from auto_trans.log import logger, use_mindformers_logger

__all__ = ["patch"]

_MARK = "_auto_trans_original"
_BEFORE_THE_LOGGER = "mindformers.tools.utils"  # MindFormers' logger imports it, and is not there yet


def patch(module: ModuleType) -> None:
    """Replaces what a freshly imported MindFormers module defines; leaves one that looks otherwise as it is."""
    use_mindformers_logger()
    verdict = judge_installed()
    if verdict is None:
        return
    if module.__name__ != _BEFORE_THE_LOGGER:
        _tell(verdict)
    if not verdict.fits:
        return
    for name, make in _REPLACEMENTS[module.__name__].items():
        original = module.__dict__.get(name)
        if original is not None and not hasattr(original, _MARK):
            replacement = make(original)
            setattr(replacement, _MARK, original)
            _replace(name, original, replacement)


@functools.cache
def _tell(verdict: Verdict) -> None:
    """Tells what is not as it was tested, once."""
    if not verdict.fits:
        logger.warning("%s; %s", verdict.what, verdict.remedy)
    elif not verdict.tested:
        logger.info("%s", verdict.what)


def _replace(name: str, original: Any, replacement: Any) -> None:
    """Replaces an object in the module that defines it and in those that have imported it from there."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "mindformers" and getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, replacement)


def _around(module: str, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a replacement that hands the original to a function of `auto_trans.hooks`, imported when it is made."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        ours = getattr(importlib.import_module(f"auto_trans.hooks.{module}"), name)

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return ours(original, *args, **kwargs)

        return replacement

    return make


def _trainer(original: type) -> type:
    """The Trainer itself, which makes its settings known while it checks them."""
    from auto_trans.hooks.load import check_settings

    check = original.__dict__.get(_CHECK)
    if check is not None:

        @functools.wraps(check)
        def checking(self: Any, *args: Any, **kwargs: Any) -> None:
            check_settings(check, self, *args, **kwargs)

        setattr(original, _CHECK, checking)
    return original


def _transform(original: type) -> type:
    from auto_trans.hooks.transform import TransformCkpt

    class Transform(TransformCkpt):
        """MindFormers' ``TransformCkpt`` as auto_trans does it."""

        stock = original

    return Transform


_CHECK = "_check_config_rules"
_CLEAR = {"clear_auto_trans_output": _around("clear", "clear_auto_trans_output")}
_REPLACEMENTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "mindformers.tools.utils": _CLEAR,
    "mindformers.utils.file_utils": _CLEAR,
    "mindformers.utils.load_checkpoint_utils": {
        "_get_src_file_suffix": _around("safetensors", "choose_suffix"),
        "get_merged_dst_strategy_path": _around("safetensors", "merge_target_strategy"),
        "get_merged_src_strategy_path": _around("safetensors", "merge_source_strategy"),
        "load_safetensors_checkpoint": _around("safetensors", "load_slices"),
        "unify_safetensors": _around("safetensors", "unify"),
        "validate_qkv_concat": _around("safetensors", "find_concatenated"),
    },
    "mindformers.models.modeling_utils": {"TransformCkpt": _transform},
    "mindformers.trainer.trainer": {"Trainer": _trainer},
    "mindformers.trainer.utils": {
        "TransformCkpt": _transform,
        "get_load_checkpoint_result": _around("direct", "read_parameters"),
        "preload_ckpt": _around("load", "preload"),
        "transform_and_load_checkpoint": _around("load", "load_checkpoint"),
    },
}
