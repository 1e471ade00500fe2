#!/usr/bin/env bash
# Makes the virtual environment of the tests and the demo: MindSpore, MindFormers and auto_trans as it lies here.
# Sourced by the other scripts; leaves its bin folder first in PATH. AUTO_TRANS_VENV says where it lies.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${AUTO_TRANS_VENV:-$root/.venv}
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)

if [ ! -f "$venv/complete" ]; then
    python=${PYTHON:-python3.11}
    command -v "$python" >/dev/null || { echo "Python 3.11 is needed; set PYTHON to it" >&2; exit 1; }
    "$python" -m venv "$venv"
    "${pip[@]}" install mindspore==2.7.1 mindformers==1.7.0
    touch "$venv/complete"
fi
rm -rf "$root/build"
"${pip[@]}" install "$root[mindformers]"
"${pip[@]}" install --no-deps --force-reinstall "$root"
export PATH="$venv/bin:$PATH" GLOG_v="${GLOG_v:-3}"
