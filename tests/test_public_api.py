from __future__ import annotations

import builtins
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import auto_trans
from auto_trans import errors


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_public_names_are_these():
    assert auto_trans.__all__ == [
        "AutoTransError", "ConversionReport", "Strategy", "convert", "install", "load", "load_each", "load_into",
        "merge_strategies", "read_strategy", "__version__",
    ]  # fmt: skip
    assert all(getattr(auto_trans, name) is not None for name in auto_trans.__all__)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        auto_trans.other  # noqa: B018


def test_error_tree_is_what_the_module_draws():
    drawn = {word for word in errors.__doc__.split() if word.endswith("Error")}
    ours = {name for name in drawn if not hasattr(builtins, name)}
    assert ours == set(errors.__all__)
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.AutoTransError)
        bases = [c for c in error.__mro__ if c.__module__ == "builtins" and c not in (Exception, BaseException, object)]
        assert bases or error is errors.AutoTransError


def test_functions_stay_functions_whatever_is_imported_before():
    assert (
        run(
            "import auto_trans.conversion, auto_trans.cli.convert; from auto_trans import convert; convert.__call__"
        ).returncode
        == 0
    )


def test_import_loads_neither_mindspore_nor_numpy():
    code = (
        "import sys, auto_trans; bad = {'mindspore', 'mindformers', 'numpy', 'typing'} & set(sys.modules); print(bad)"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import sys; sys.path.insert(0, '.');" + code], capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.mindspore
@pytest.mark.parametrize("first", ["auto_trans.storage.strategies", "auto_trans.conversion", "mindspore"])
def test_strategies_are_read_beside_mindspore_in_any_order(first):
    result = run(f"import {first}; import mindspore, auto_trans.storage.strategies")
    assert result.returncode == 0, result.stderr


def test_no_later_python_is_shut_out():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    assert setup["options"]["python_requires"] == ">=3.9"
