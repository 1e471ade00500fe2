#!/usr/bin/env bash
# Runs all benchmarks one after the other (more than an hour): tables to standard output, samples as JSON to
# benchmarks/results/. The machine should have nothing else to do. Arguments: a folder on the disk that is to be measured,
# and how many gigabytes the checkpoints that go side by side with MindSpore's tools have.
set -euo pipefail

cd "$(dirname "$0")/.."
export GLOG_v=3
results=$PWD/benchmarks/results
folder=${1:-$(mktemp -d)} gigabytes=${2:-1}
mkdir -p "$results"
python - <<'EOF'
import datetime, importlib.metadata as metadata, os, platform, psutil
versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("mindspore", "mindformers", "numpy"))
memory = psutil.virtual_memory().total / 2**30
print(f"{datetime.date.today()}; {os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, Linux {platform.release()}; "
      f"Python {platform.python_version()}, {versions}")
EOF
run() { # name of the results, then the command
    local name=$1
    shift
    printf '\n    python benchmarks/%s\n' "$*"
    [ "$name" = plan_scale ] || [[ "$*" == *--folder* ]] || set -- "$@" --folder "$folder"
    python benchmarks/"$@" --json "$results/$name.json"
}
run compare compare.py --gigabytes "$gigabytes"
run compare_tmpfs compare.py --only float16 replicas --against cp --folder /dev/shm # without a disk to wait for
run merge merge.py --gigabytes "$gigabytes"
run job job.py --gigabytes "$gigabytes"
run load load.py --gigabytes "$gigabytes"
run readers readers.py --gigabytes 0.5 # with fusepy and libfuse also on a disk that is slow to answer
run limits limits.py
run plan_scale plan_scale.py
