#!/usr/bin/env bash
# Makes a virtual environment for the tests and the demo: MindFormers, MindSpore, and auto_trans as it lies here. Sourced by
# the other scripts; leaves its bin folder first in PATH. AUTO_TRANS_VENV says where it lies, AUTO_TRANS_PAIR which MindFormers
# and MindSpore are in it: 1.7.0+2.7.1, say, or "newest", what a plain pip install gives. With AUTO_TRANS_BARE auto_trans is
# left out.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${AUTO_TRANS_VENV:-$root/.venv}
pair=${AUTO_TRANS_PAIR:-1.7.0+2.7.1}
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)

# What MindFormers requires but for MindSpore, of which each pair has its own: 2.1.0 asks for one that is not published. Nor
# is hyper-parallel, for which a package of empty classes stands in: only jobs in PyNative mode use it.
requirements() {
    "$venv/bin/python" - "$root/demo/hyper_parallel_stand_in.py" <<'END'
import shutil
import sys
import sysconfig
from importlib.metadata import requires
from pathlib import Path

for requirement in requires("mindformers"):
    if requirement.startswith("hyper-parallel"):
        package = Path(sysconfig.get_path("purelib"), "hyper_parallel")
        package.mkdir(exist_ok=True)
        shutil.copy(sys.argv[1], package / "__init__.py")
    elif not requirement.startswith("mindspore"):
        print(requirement.replace("pyarrow>=", "pyarrow=="))  # later ones need numpy 2, and MindFormers numpy 1
END
}

if [ ! -f "$venv/complete" ]; then
    python=${PYTHON:-python3.11}
    command -v "$python" >/dev/null || { echo "Python 3.11 is needed; set PYTHON to it" >&2; exit 1; }
    "$python" -m venv "$venv"
    if [ "$pair" = newest ]; then
        "${pip[@]}" install mindformers mindspore
    else
        "${pip[@]}" install --no-deps "mindformers==${pair%+*}"
        lines=$(requirements)
        mapfile -t required <<<"$lines"
        "${pip[@]}" install "mindspore==${pair#*+}" "${required[@]}"
    fi
    touch "$venv/complete"
fi
if [ -z "${AUTO_TRANS_BARE:-}" ]; then
    rm -rf "$root/build"
    "${pip[@]}" install "$root"
    "${pip[@]}" install --no-deps --force-reinstall "$root"
fi
export PATH="$venv/bin:$PATH" GLOG_v="${GLOG_v:-3}"
