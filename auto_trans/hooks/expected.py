"""What of MindFormers the hook wraps, replaces and calls, and how it must look: an entry for each function."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["EXPECTED", "Expected", "Others"]


class Others(Enum):
    """What becomes of parameters that the hook does not know."""

    PASSED_ON = "the hook passes on what it is given"
    DEFAULTED = "the hook calls it without them, so each needs a default"
    NONE = "the hook takes its place, so there must be none"


@dataclass(frozen=True)
class Expected:
    """A function of MindFormers that the hook wraps, replaces or calls.

    Attributes:
        name: Its name, or those of a class and its method.
        parameters: The parameters that it begins with, without ``self``; the hook reads them by name or place.
        others: What else it may have.
        used_in: The modules that use it, by its own name.
        defined_in: The modules that may define it, where the hook replaces it; none: any.
        optional: Parameters that may come after `parameters`, and that the hook knows.
        may_lack: Whether a version without it is as good.
    """

    name: str
    parameters: tuple[str, ...]
    others: Others
    used_in: tuple[str, ...]
    defined_in: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    may_lack: bool = False


_TRAINER, _TRAINER_UTILS = "mindformers.trainer.trainer", "mindformers.trainer.utils"
_MODELS, _TOOLS = "mindformers.models.modeling_utils", "mindformers.tools.utils"
_SAFETENSORS = "mindformers.utils.load_checkpoint_utils"

EXPECTED = (
    # replaced (hooks/clear.py): moved from tools/utils to utils/file_utils in 1.8, which added load_ckpt_format
    Expected(
        "clear_auto_trans_output",
        ("load_checkpoint", "src_strategy_path_or_dir"),
        Others.NONE,
        used_in=(_TRAINER, _MODELS),
        defined_in=(_TOOLS, "mindformers.utils.file_utils"),
        optional=("load_ckpt_format",),
    ),
    # replaced (hooks/transform.py)
    Expected(
        "TransformCkpt.__init__",
        (
            "auto_trans_ckpt", "rank_id", "world_size", "transform_process_num", "transform_by_rank", "npu_num_per_node",
        ),
        Others.NONE,
        used_in=(_TRAINER_UTILS, _MODELS),
    ),
    Expected(
        "TransformCkpt.__call__",
        ("src_checkpoint", "dst_checkpoint_dir", "src_strategy", "dst_strategy", "prefix"),
        Others.NONE,
        used_in=(_TRAINER_UTILS, _MODELS),
    ),
    # wrapped (hooks/load.py)
    Expected("Trainer._check_config_rules", (), Others.PASSED_ON, used_in=(_TRAINER,), defined_in=(_TRAINER,)),
    Expected(
        "transform_and_load_checkpoint",
        ("config", "model", "network", "dataset", "optimizer"),
        Others.PASSED_ON,
        used_in=("mindformers.trainer.base_trainer",),
        defined_in=(_TRAINER_UTILS,),
    ),
    Expected("preload_ckpt", ("config",), Others.NONE, used_in=(_TRAINER_UTILS,), may_lack=True),  # from 1.8 on
    # wrapped (hooks/direct.py)
    Expected(
        "get_load_checkpoint_result", ("config",), Others.NONE, used_in=(_TRAINER_UTILS,), defined_in=(_TRAINER_UTILS,)
    ),
    # called (hooks/job.py)
    *(
        Expected(name, (), Others.DEFAULTED, used_in=(_TOOLS,))
        for name in ("get_real_rank", "get_real_group_size", "get_output_root_path", "check_in_modelarts")
    ),
    # a safetensors job: it calls what is below
    Expected(
        "load_checkpoint_with_safetensors",
        ("config", "model", "network", "input_data", "do_eval", "do_predict", "optimizer"),
        Others.PASSED_ON,
        used_in=(_TRAINER_UTILS,),
        defined_in=(_SAFETENSORS,),
    ),
    # wrapped (hooks/safetensors.py)
    *(
        Expected(name, parameters, others, used_in=(_SAFETENSORS,), defined_in=(_SAFETENSORS,))
        for name, parameters, others in (
            ("unify_safetensors", ("src_checkpoint", "src_strategy_path", "unified_path"), Others.PASSED_ON),
            (
                "load_safetensors_checkpoint",
                ("config", "load_checkpoint_files", "network", "strategy_path", "load_ckpt_path", "optimizer"),
                Others.NONE,
            ),
            ("get_merged_src_strategy_path", ("config",), Others.NONE),
            ("get_merged_dst_strategy_path", ("config", "strategy_path"), Others.NONE),
            ("_get_src_file_suffix", ("config",), Others.NONE),
            (
                "validate_qkv_concat",
                ("model_cls_or_instance", "qkv_concat_config", "load_checkpoint"),
                Others.NONE,
            ),
        )
    ),
    # called (hooks/direct.py, hooks/safetensors.py)
    Expected("_get_origin_network", ("network",), Others.DEFAULTED, used_in=(_SAFETENSORS,)),
    Expected(
        "is_hf_safetensors_dir", ("safetensors_dir", "model_cls_or_instance"), Others.DEFAULTED, used_in=(_SAFETENSORS,)
    ),
    Expected("update_global_step", ("config", "hyper_param_dict"), Others.DEFAULTED, used_in=(_SAFETENSORS,)),
)  # fmt: skip
