"""Which MindFormers the hook takes, and which it leaves alone as a whole: decided by how its functions look."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import oracle
import pytest

from auto_trans.hooks.clear import clear_auto_trans_output
from auto_trans.hooks.compatibility import TESTED, judge
from auto_trans.hooks.expected import EXPECTED
from auto_trans.hooks.finder import WATCHED
from auto_trans.hooks.patches import _REPLACEMENTS
from auto_trans.hooks.transform import TransformCkpt

ROOT = Path(__file__).parents[2]
OTHER_VERSIONS = Path(sys.prefix) / "other_mindformers"  # put there by scripts/test.sh
SAFETENSORS = "utils/load_checkpoint_utils.py"

# the smallest MindFormers that looks as expected; like the real one, its logger imports tools/utils
FITTING = {
    "__init__.py": '__version__ = "9.9.0"\nfrom mindformers import tools, models, trainer\n',
    "tools/__init__.py": "from .logger import get_logger\n",
    "tools/logger.py": (
        "import logging\nfrom .utils import get_real_rank\nlogging.basicConfig(level=logging.INFO)\n"
        'def get_logger(name="mindformers"):\n    return logging.getLogger(name)\n'
    ),
    "tools/utils.py": (
        "def get_real_rank(): return 0\ndef get_real_group_size(): return 1\n"
        'def get_output_root_path(): return "output"\ndef check_in_modelarts(): return False\n'
    ),
    "tools/ckpt_transform/__init__.py": "from .transform_checkpoint import *\n",
    "tools/ckpt_transform/transform_checkpoint.py": (
        "class TransformCkpt:\n"
        "    def __init__(self, auto_trans_ckpt=False, rank_id=None, world_size=None, transform_process_num=1,\n"
        "                 transform_by_rank=False, npu_num_per_node=None): pass\n"
        "    def __call__(self, src_checkpoint, dst_checkpoint_dir=None, src_strategy=None, dst_strategy=None,\n"
        '                 prefix="checkpoint_"): pass\n'
    ),
    "utils/__init__.py": "from .file_utils import clear_auto_trans_output\n",
    "utils/file_utils.py": (
        "def clear_auto_trans_output(load_checkpoint=None, src_strategy_path_or_dir=None, load_ckpt_format='ckpt'): pass\n"
    ),
    SAFETENSORS: (
        "def load_checkpoint_with_safetensors(config, model, network, input_data, do_eval=False, do_predict=False,\n"
        "                                     optimizer=None): pass\n"
        "def unify_safetensors(src_checkpoint, src_strategy_path, unified_path, use_parallel=False, file_suffix=None,\n"
        "                      remove_redundancy=False): pass\n"
        "def load_safetensors_checkpoint(config, load_checkpoint_files, network, strategy_path, load_ckpt_path,\n"
        "                                optimizer): pass\n"
        "def get_merged_src_strategy_path(config): pass\n"
        "def get_merged_dst_strategy_path(config, strategy_path): pass\n"
        "def _get_src_file_suffix(config): pass\n"
        "def validate_qkv_concat(model_cls_or_instance, qkv_concat_config, load_checkpoint): pass\n"
        "def _get_origin_network(network): pass\n"
        "def is_hf_safetensors_dir(safetensors_dir, model_cls_or_instance): pass\n"
        "def update_global_step(config, hyper_param_dict): pass\n"
    ),
    "models/__init__.py": "from . import modeling_utils\n",
    "models/modeling_utils.py": (
        "from mindformers.tools.ckpt_transform import TransformCkpt\n"
        "from mindformers.utils import clear_auto_trans_output\n"
    ),
    "trainer/__init__.py": "from .trainer import Trainer\n",
    "trainer/base_trainer.py": "from .utils import transform_and_load_checkpoint\n",
    "trainer/utils.py": (
        "from ..tools.ckpt_transform import TransformCkpt\n"
        "from ..utils.load_checkpoint_utils import load_checkpoint_with_safetensors\n"
        "def transform_and_load_checkpoint(config, model, network, dataset, optimizer=None, do_eval=False): pass\n"
        "def get_load_checkpoint_result(config): pass\n"
    ),
    "trainer/trainer.py": (
        "from mindformers.utils import clear_auto_trans_output\nfrom . import base_trainer\n"
        "class Trainer:\n    def _check_config_rules(self): pass\n"
    ),
}
LOOK = """
import auto_trans
auto_trans.install()
import mindformers.models.modeling_utils as models, mindformers.trainer.base_trainer as base
import mindformers.trainer.trainer as trainer, mindformers.trainer.utils as utils
seen = [
    getattr(base, "transform_and_load_checkpoint", None), getattr(utils, "TransformCkpt", None),
    trainer.clear_auto_trans_output, models.TransformCkpt, models.clear_auto_trans_output, trainer.Trainer,
]
print("PATCHED", sum(hasattr(thing, "_auto_trans_original") for thing in seen))
"""


@pytest.fixture
def fake(tmp_path):
    """Writes a MindFormers that fits, but for one change: in a file, from a text to another."""

    def write(file: str = "", old: str = "", new: str = "") -> Path:
        for name, content in FITTING.items():
            path = tmp_path / "mindformers" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == file:
                assert old in content
                content = content.replace(old, new)
            path.write_text(content)
        (tmp_path / "mindformers" / "moved.py").write_text(FITTING["utils/file_utils.py"])
        return tmp_path / "mindformers"

    return write


def run(code: str, first_on_path: Path) -> str:
    path = os.pathsep.join([str(first_on_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    return done.stdout + done.stderr


def test_unheard_of_version_that_looks_as_expected_is_used_with_one_line(fake):
    out = run(LOOK, fake().parent)
    assert "PATCHED 6" in out, out
    assert out.count("MindFormers 9.9.0 with MindSpore") == 1
    assert out.count("expected to work, for its functions look as they should; tested on 1.6.0 with 2.7.0, ") == 1


TRANSFORM, FILES, TRAINER = "tools/ckpt_transform/transform_checkpoint.py", "utils/file_utils.py", "trainer/trainer.py"
CLEAR, MERGED = "clear_auto_trans_output in mindformers.utils.file_utils", "get_merged_src_strategy_path"
GROUP = "get_real_group_size in mindformers.tools.utils needs the parameter group"
DIFFERENCES = [
    ("trainer/utils.py", "optimizer=None, ", "",
     "transform_and_load_checkpoint in mindformers.trainer.utils has no parameter optimizer"),
    ("trainer/utils.py", "model, network", "network, model",
     "begins with the parameters config, network, model, dataset, optimizer, not config, model"),
    (TRANSFORM, "def __call__(self, src", "def __call__(self, source, src",
     "TransformCkpt.__call__ in mindformers.tools.ckpt_transform.transform_checkpoint begins with the parameters source"),
    (FILES, "'ckpt'", "'ckpt', keep=None", f"{CLEAR} has the unknown parameter keep"),
    (FILES, "'ckpt'", "'ckpt', **more", f"{CLEAR} has the unknown parameter **more"),
    ("tools/utils.py", "group_size()", "group_size(group, strict=True)", GROUP),
    ("tools/utils.py", "group_size()", "group_size(*, group)", GROUP),
    (SAFETENSORS, "def _get_src", "def get_src",
     "module mindformers.utils.load_checkpoint_utils has no _get_src_file_suffix"),
    (SAFETENSORS, f"def {MERGED}(config)", f"class {MERGED}",
     f"{MERGED} in mindformers.utils.load_checkpoint_utils is a class, not a function"),
    (TRAINER, "_check_config_rules", "_check_rules",
     "Trainer in mindformers.trainer.trainer has no method _check_config_rules of its own"),
    (FILES, FITTING[FILES], "from mindformers.moved import clear_auto_trans_output",
     "clear_auto_trans_output is defined in mindformers.moved, not in mindformers.tools.utils or mindformers.utils"),
    ("trainer/base_trainer.py", FITTING["trainer/base_trainer.py"], "",
     "module mindformers.trainer.base_trainer has no transform_and_load_checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "difference"), DIFFERENCES)
def test_one_that_looks_otherwise_is_left_alone_as_a_whole_with_one_warning_of_what_differs(
    fake, file, old, new, difference
):
    root = fake(file, old, new)
    verdict = judge(root, "2.10.0")
    assert difference in "; ".join(verdict.differences)
    assert all(re.search(r"\bmindformers\.", each) for each in verdict.differences), "each names the module"
    out = run(LOOK, root.parent)
    assert "PATCHED 0" in out, out
    assert out.count("left alone") == 1 and out.count(difference) == 1
    assert out.count("convert offline (auto-trans convert), or use a MindFormers tested on: 1.6.0 with 2.7.0") == 1


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("trainer/utils.py", "do_eval=False", "do_eval=False, more=None"),
        ("trainer/trainer.py", "(self)", "(self, strict=True)"),
        ("tools/utils.py", "get_real_rank()", "get_real_rank(group=None)"),
        ("utils/file_utils.py", ", load_ckpt_format='ckpt'", ""),  # as before 1.8
        ("trainer/utils.py", "from ..tools", "try:\n    import nothing\nexcept ImportError:\n    pass\nfrom ..tools"),
    ],
)
def test_more_parameters_with_defaults_fit_where_the_hook_passes_all_on(fake, file, old, new):
    assert judge(fake(file, old, new), "2.10.0").differences == ()


def test_source_that_cannot_be_parsed_is_left_alone(fake):
    verdict = judge(fake("trainer/trainer.py", "def ", "deff "), "")
    assert verdict.differences == ("module mindformers.trainer.trainer is not there, or its source is not",)
    assert "MindFormers 9.9.0 with MindSpore (none found): left alone" in verdict.what


def test_modules_that_import_each_other_end_the_search(fake):
    root = fake(
        "utils/file_utils.py", FITTING["utils/file_utils.py"], "from mindformers.utils import clear_auto_trans_output"
    )
    assert "module mindformers.trainer.trainer has no clear_auto_trans_output" in judge(root, "").differences


@pytest.mark.parametrize("change", [(), ("trainer/utils.py", "optimizer=None, ", "")])
def test_doctor_says_what_the_hook_says(fake, change):
    root = fake(*change)
    told = run("from auto_trans.doctor import examine\nfor check in examine()[0]: print(check)", root.parent)
    verdict = judge(root, _mindspore())
    status = "warning" if change else "ok"
    assert f"Check(status='{status}', what={verdict.what!r}, remedy={verdict.remedy!r})" in told
    assert verdict.what in run(LOOK, root.parent)


@pytest.mark.parametrize("change", [(), ("trainer/utils.py", "optimizer=None, ", "")])
def test_doctor_has_no_rank_convert_where_mindformers_is_left_alone(fake, tmp_path, change):
    source = oracle.write_raw(tmp_path / "llama.ckpt", {"w": oracle.Raw("Int8", (1,), b"x")})
    config = tmp_path / "job.yaml"
    config.write_text(f"{{auto_trans_ckpt: True, load_checkpoint: {source}, output_dir: {tmp_path / 'output'}}}")
    code = "import sys; from pathlib import Path; from auto_trans.doctor import examine\n"
    out = run(
        f"{code}checks, ranks = examine(Path({str(config)!r}))\nprint(*checks, len(ranks), sep='\\n')",
        fake(*change).parent,
    )
    assert "1 file readable and complete" in out, out
    assert ("1 of 1 rank will convert" in out) is not bool(change)
    assert out.endswith("0\n" if change else "1\n")


def _mindspore() -> str:
    try:
        return metadata.version("mindspore")
    except metadata.PackageNotFoundError:
        return ""


@pytest.mark.mindspore
@pytest.mark.parametrize("version", ["1.6.0", "1.8.0", "1.9.0", "2.0.0", "2.1.0"])
def test_released_versions_look_as_expected(version):
    path = OTHER_VERSIONS / version / "mindformers"
    assert path.is_dir(), f"run scripts/test.sh, which installs MindFormers {version} there"
    verdict = judge(path, dict(TESTED)[version])
    assert verdict.tested, verdict.what
    other = judge(path, "2.99.0")
    assert other.fits and not other.tested and "expected to work" in other.what


@pytest.mark.mindspore
def test_version_of_the_documentation_is_left_alone_and_all_its_differences_are_told():
    path = OTHER_VERSIONS / "1.3.2" / "mindformers"
    assert path.is_dir(), "run scripts/test.sh, which installs MindFormers 1.3.2 there"
    assert judge(path, "2.7.0").differences == (
        "clear_auto_trans_output in mindformers.tools.utils has no parameter load_checkpoint, src_strategy_path_or_dir",
        "module mindformers.trainer.utils has no get_load_checkpoint_result",
        "module mindformers.trainer.utils has no load_checkpoint_with_safetensors",
        "module mindformers.utils.load_checkpoint_utils is not there, or its source is not",
    )


def test_all_that_is_replaced_is_expected_and_watched():
    assert set(_REPLACEMENTS) == WATCHED
    expected = {(module, e.name.partition(".")[0]) for e in EXPECTED for module in (*e.used_in, *e.defined_in)}
    assert {(module, name) for module, names in _REPLACEMENTS.items() for name in names} <= expected


def test_what_takes_the_place_of_a_function_takes_its_parameters():
    (clear,) = (e for e in EXPECTED if e.name == "clear_auto_trans_output")
    assert list(inspect.signature(clear_auto_trans_output).parameters)[1:] == [*clear.parameters, *clear.optional]
    for method in ("__init__", "__call__"):
        (expected,) = (e for e in EXPECTED if e.name == f"TransformCkpt.{method}")
        assert list(inspect.signature(getattr(TransformCkpt, method)).parameters)[1:] == list(expected.parameters)


def test_readme_and_results_hold_the_pairs_that_are_tested():
    told = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert tuple(told) == TESTED
    results = (ROOT / "scripts" / "versions.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| (\w+) \| (.*) \|$", results, re.MULTILINE)
    assert {row[:2] for row in rows} == set(TESTED)
    assert all(result == "converts, bit-equal, trains on" for *_, result in rows)


def test_nothing_of_mindformers_is_imported_to_judge_it(fake):
    root = fake("trainer/trainer.py", "class Trainer", "raise SystemExit('imported')\nclass Trainer")
    code = "import sys; from auto_trans.hooks.compatibility import judge_installed\n"
    out = run(code + "print(judge_installed().fits, 'mindformers' in sys.modules)", root.parent)
    assert "True False" in out
