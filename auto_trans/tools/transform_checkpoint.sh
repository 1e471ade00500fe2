#!/usr/bin/env bash
# Drop-in for MindFormers' transform_checkpoint.sh: converts a checkpoint with several processes of this machine.
#
#   bash transform_checkpoint.sh SRC SRC_STRATEGY|None DST DST_STRATEGY|None WORLD_SIZE PROCESS_NUM [PREFIX]
#
# The log of every process is in DST_logs/rank_N.log. Exits with 1 if a process fails, naming it and its log. Interrupted or
# terminated it ends its processes; started again, they go on where they stopped.
set -uo pipefail

if [ $# -lt 6 ] || [ $# -gt 7 ]; then
    sed -n '4s/^# *//p' "$0" >&2
    exit 2
fi
src=$1 src_strategy=$2 dst=$3 dst_strategy=$4 world_size=$5 process_num=$6 prefix=${7:-checkpoint_}

case $world_size$process_num in
    *[!0-9]*) echo "WORLD_SIZE and PROCESS_NUM must be whole numbers, not $world_size and $process_num" >&2; exit 2 ;;
esac
if [ "$process_num" -lt 1 ] || [ "$process_num" -gt "$world_size" ] || [ $((world_size % process_num)) -ne 0 ]; then
    echo "PROCESS_NUM $process_num must be at least 1 and divide WORLD_SIZE $world_size" >&2
    exit 2
fi

here=$(cd "$(dirname "$0")" && pwd)
logs=${dst%/}_logs
mkdir -p "$logs" || exit 1
share=$((world_size / process_num))
ranks=() pids=()
for ((rank = 0; rank < world_size; rank += share)); do
    "${PYTHON:-python}" "$here/transform_checkpoint.py" \
        --src_checkpoint "$src" --src_strategy "$src_strategy" \
        --dst_checkpoint_dir "$dst" --dst_strategy "$dst_strategy" --prefix "$prefix" \
        --rank_id "$rank" --world_size "$world_size" --transform_process_num "$process_num" \
        >"$logs/rank_$rank.log" 2>&1 &
    ranks+=("$rank") pids+=("$!")
done
# the processes end as they do alone, and nothing half-written is left; then this does
end() {
    kill -TERM "${pids[@]}" 2>/dev/null
    wait
    trap - "$1"
    kill -s "$1" $$
}
trap 'end INT' INT
trap 'end TERM' TERM

failed=0
for i in "${!pids[@]}"; do
    if ! wait "${pids[$i]}"; then
        failed=1
        echo "the process of rank ${ranks[$i]} failed; see $logs/rank_${ranks[$i]}.log:" >&2
        tail -n 1 "$logs/rank_${ranks[$i]}.log" >&2
    fi
done
[ "$failed" = 0 ] || exit 1
tail -n 1 "$logs/rank_0.log"
