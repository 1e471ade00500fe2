"""How the hook gets into MindFormers, in one version and another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from auto_trans.hooks.load import load_path

OTHER_VERSIONS = Path(sys.prefix) / "other_mindformers"  # put there by scripts/test.sh
CHECK = """
import mindformers.trainer.utils as trainer_utils
import mindformers.trainer.trainer as trainer
import mindformers.trainer.base_trainer as base_trainer
import mindformers.models.modeling_utils as modeling_utils
ours = [
    trainer_utils.transform_and_load_checkpoint, base_trainer.transform_and_load_checkpoint, trainer_utils.TransformCkpt,
    trainer.clear_auto_trans_output, modeling_utils.TransformCkpt, modeling_utils.clear_auto_trans_output,
]
print("PATCHED", sum(hasattr(thing, "_auto_trans_original") for thing in ours), "OF", len(ours))
"""
# as in an environment that ignores .pth files
NO_FINDER = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_Finder']\n"


def run(code, **environ):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environ}
    )
    return done.stdout + done.stderr


@pytest.mark.mindspore
@pytest.mark.pairs
def test_wheel_installs_the_hook():
    assert "PATCHED 6 OF 6" in run(CHECK)


@pytest.mark.mindspore
def test_hook_can_be_turned_off():
    assert "PATCHED 0 OF 6" in run(CHECK, AUTO_TRANS_DISABLE="1")


@pytest.mark.mindspore
@pytest.mark.parametrize("version", ["1.6.0", "1.8.0", "1.9.0"])
def test_other_versions_that_look_as_expected(version):
    path = OTHER_VERSIONS / version
    assert path.is_dir(), f"run scripts/test.sh, which installs MindFormers {version} there"
    assert "PATCHED 6 OF 6" in run(CHECK, PYTHONPATH=str(path))


@pytest.mark.mindspore
def test_version_of_the_documentation_is_left_as_it_is_with_one_warning():
    path = OTHER_VERSIONS / "1.3.2"
    assert path.is_dir(), "run scripts/test.sh, which installs MindFormers 1.3.2 there"
    out = run(CHECK, PYTHONPATH=str(path))
    assert "PATCHED 0 OF 6" in out
    assert out.count("MindFormers 1.3.2 with MindSpore") == out.count("left alone") == 1


@pytest.mark.mindspore
def test_install_works_after_mindformers_was_imported():
    code = CHECK.replace("print", "0 and print", 1) + "import auto_trans; auto_trans.install()\n" + CHECK
    assert "PATCHED 6 OF 6" in run(NO_FINDER + code)


@pytest.mark.mindspore
def test_run_module_starts_a_script_with_the_hook(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, helper\nprint('ARGUMENTS', sys.argv, __name__)\n" + CHECK)
    (tmp_path / "helper.py").write_text("")
    argv = ["x", str(script), "--config", "my.yaml"]
    start = f"{NO_FINDER}import runpy; sys.argv = {argv}; runpy.run_module('auto_trans.run', run_name='__main__')"
    out = run(start)
    assert "PATCHED 6 OF 6" in out
    assert f"ARGUMENTS ['{script}', '--config', 'my.yaml'] __main__" in out


def test_finder_imports_nothing_that_the_interpreter_has_not():
    code = """
import os, sys
before = set(sys.modules)
import auto_trans.hooks.finder as finder
finder.install()
finder.install()
print("NEW", sorted(set(sys.modules) - before), sum(type(f).__name__ == "_Finder" for f in sys.meta_path))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(root)}
    )
    assert "NEW ['auto_trans', 'auto_trans.hooks', 'auto_trans.hooks.finder'] 1" in done.stdout, done.stderr


@pytest.mark.mindspore
def test_module_looks_as_if_never_touched():
    loader = "m = trainer_utils; print(type(m.__spec__.loader).__name__, m.__loader__.get_source(m.__name__)[:1])"
    assert "SourceFileLoader #" in run(CHECK + loader)


class Config(dict):
    __getattr__ = dict.get


@pytest.mark.parametrize(
    "config, path",
    [
        (Config(load_checkpoint="old"), "old"),
        (Config(load_checkpoint="old", checkpoint=Config(load_path="new")), "new"),
        (Config(load_checkpoint="old", checkpoint=Config(load_path="")), "old"),
    ],
)
def test_path_of_the_weights_is_found_in_every_version(config, path):
    assert load_path(config) == path
