#!/usr/bin/env bash
# Runs the demo's jobs with every pair of MindFormers and MindSpore that is told to be tested, each in a virtual environment
# of its own, and tells the results in scripts/versions.md. Arguments are the pairs to run (2.1.0+2.10.0), all by default.
# AUTO_TRANS_JOBS names the jobs, AUTO_TRANS_PAIRS the folder of environments, outputs and logs; another Python (PYTHON) needs
# another folder.
set -euo pipefail

cd "$(dirname "$0")/.."
folder=${AUTO_TRANS_PAIRS:-$PWD/.venv-versions}
table=scripts/versions.md
python=${PYTHON:-python3.11}
read -ra jobs <<<"${AUTO_TRANS_JOBS:-ckpt safetensors direct}"
pairs=("$@")
[ $# != 0 ] || mapfile -t pairs < <("$python" -c '
from auto_trans.hooks.compatibility import TESTED
for pair in TESTED:
    print("+".join(pair))')
[ "${#pairs[@]}" != 0 ] || { echo "no pairs are known" >&2; exit 1; }
export MASTER_PORT=${MASTER_PORT:-$("$python" -c '
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')}

tell() { # pair, job, result: replaces the row of these and of this Python in the table
    local row version
    version=$("$folder/$1/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' || echo -)
    row="| ${1%+*} | ${1#*+} | $version | $2 | $3 |"
    { grep -E '^\| [0-9]' "$table" | grep -vE "^\| ${1%+*} \| ${1#*+} \| $version \| $2 \|" || true; } >"$folder/rows"
    {
        sed '/^| [0-9]/d' "$table"
        { cat "$folder/rows"; echo "$row"; } | sort -V
    } >"$folder/table"
    cp "$folder/table" "$table"
    echo "$row"
}

mkdir -p "$folder"
failed=0
for pair in "${pairs[@]}"; do
    export AUTO_TRANS_VENV=$folder/$pair AUTO_TRANS_PAIR=$pair
    for job in "${jobs[@]}"; do
        log=$folder/$pair-$job.log
        echo "== MindFormers ${pair%+*} with MindSpore ${pair#*+}: $job"
        if bash scripts/demo.sh "$folder/$pair-$job" "$job" >"$log" 2>&1 &&
            "$AUTO_TRANS_VENV/bin/auto-trans" doctor | grep -F "MindFormers ${pair%+*} with MindSpore ${pair#*+}: tested" >>"$log"; then
            tell "$pair" "$job" "converts, bit-equal, trains on"
        else
            failed=1
            tail -n 20 "$log"
            tell "$pair" "$job" "FAILED"
        fi
    done
done
exit "$failed"
