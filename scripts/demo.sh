#!/usr/bin/env bash
# The main job on a machine with nothing but Python 3.11: a tiny LLaMA is trained by the real MindFormers Trainer, its
# weights are sliced four ways, and a job of four ranks with auto_trans_ckpt: True converts them, loads them and trains on.
# Arguments: the folder of its output, and the jobs, all by default: ckpt and safetensors, which convert, and direct, in which
# every rank loads its slices of the safetensors itself.
set -euo pipefail

cd "$(dirname "$0")/.."
output=${1:-demo_output}
read -ra jobs <<<"${2:-ckpt safetensors direct}"
for job in "${jobs[@]}"; do
    [[ $job =~ ^(ckpt|safetensors|direct)$ ]] || { echo "there is no job $job, only ckpt, safetensors and direct" >&2; exit 2; }
done
echo "== installing (the first time takes a few minutes)"
source scripts/venv.sh
rm -rf "$output"
mkdir -p "$output"

train() { # name, ranks, settings...
    local name=$1 ranks=$2
    shift 2
    local job=(demo/start.py demo/tiny_llama.yaml "output_dir=$output/$name" "train_dataset.data_loader.dataset_dir=$output/data" "$@")
    if [ "$ranks" = 1 ]; then
        python "${job[@]}" >"$output/$name.log" 2>&1
    else
        msrun --worker_num="$ranks" --local_worker_num="$ranks" --master_port="${MASTER_PORT:-8118}" --join=True \
            --cluster_time_out=120 --log_dir="$output/${name}_logs" "${job[@]}" use_parallel=True \
            "parallel_config.data_parallel=$ranks" >"$output/$name.log" 2>&1
    fi || { echo "$name failed; see $output/$name.log" >&2; exit 1; }
}

echo "== training a tiny LLaMA with the MindFormers Trainer"
python demo/prepare.py data "$output/data" >/dev/null
train first 1
complete=$output/first/checkpoint/rank_0/tiny_rank_0-1_8.ckpt

echo "== four ranks load the unsliced weights with MindFormers alone, for comparison"
AUTO_TRANS_DISABLE=1 train unsliced 4 "load_checkpoint=$complete"

for job in "${jobs[@]}"; do
    form=$job settings=(transform_process_num=2)
    [ "$job" = direct ] && form=safetensors settings=("auto_trans={load: direct}")
    if [ ! -d "$output/mp4_$form" ]; then
        echo "== slicing its weights as a job with model_parallel: 4 would have saved them, as $form files"
        python demo/prepare.py slice "$complete" "$output/mp4_$form" 4 "$form"
    fi
    echo "== four ranks start with auto_trans_ckpt: True, load_ckpt_format: $form, ${settings[0]/=/: }"
    # the strategy of a data parallel job of safetensors is that there is none
    [ "$form" = ckpt ] && settings+=(compile_stand_in=4x1)
    train "$job" 4 auto_trans_ckpt=True "load_ckpt_format=$form" "${settings[@]}" \
        "load_checkpoint=$output/mp4_$form/checkpoint" "src_strategy_path_or_dir=$output/mp4_$form/strategy"
done

python demo/summary.py "$output" "${jobs[@]}"
