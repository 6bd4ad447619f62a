#!/usr/bin/env bash
# The whole TOFU protocol for one family, one forget split and a list of losses; what is complete is skipped.
#
#     scripts/tofu.sh FAMILY SPLIT "LOSS LOSS ..."
#     scripts/tofu.sh phi forget10 "grad_ascent grad_diff KL"
#     LAUNCH="torchrun --nproc_per_node=8" FINETUNE="lr=2e-5" FORGET="lr=2e-5" scripts/tofu.sh phi forget01 "grad_diff KL"
#
# From the environment: RUNS (folder of all runs: runs/FAMILY), DATA (data_path), LAUNCH (python, or a torchrun line),
# FINETUNE, FORGET, EVALUATE (more key=value for each script), TEAM (the Submitted By column).
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
family=$1 split=$2 losses=$3
here=$(cd "$(dirname "$0")/.." && pwd)
runs=${RUNS:-runs/$family} data=${DATA:-locuslab/TOFU}
launch=${LAUNCH:-${PYTHON:-python}}
percent=$((10#${split#forget}))
retain=retain$((100 - percent))
log=eval_log_aggregated.json

# run SAVE_DIR SCRIPT key=value ...: nothing where the run is complete, again from the start where it was cut off
run() {
    local save=$1 script=$2; shift 2
    if [ -f "$save/finished.json" ]; then echo "complete: $save"; return; fi
    local again=overwrite_dir=true
    [ "$script" = evaluate_util.py ] && again=overwrite=true
    echo "== $script $* save_dir=$save"
    # shellcheck disable=SC2086 (a launcher is several words)
    $launch "$here/$script" model_family="$family" "$@" save_dir="$save" $again
}

# evaluate RUN [retain_result=LOG]
evaluate() {
    local model=$1; shift
    # shellcheck disable=SC2086
    run "$model/eval_$split" evaluate_util.py model_path="$model" data_path="$data" split="$split" ${EVALUATE:-} "$@"
}

# shellcheck disable=SC2086
{
    run "$runs/full" finetune.py data_path="$data" split=full ${FINETUNE:-}
    run "$runs/$retain" finetune.py data_path="$data" split="$retain" ${FINETUNE:-}
}
evaluate "$runs/$retain"
oracle=$runs/$retain/eval_$split/$log
evaluate "$runs/full" retain_result="$oracle"
for loss in $losses; do
    # shellcheck disable=SC2086
    run "$runs/${split}_$loss" forget.py model_path="$runs/full" data_path="$data" split="$split" forget_loss="$loss" \
        ${EVALUATE:+$(printf 'eval.%s ' $EVALUATE)} eval.retain_result="$oracle" ${FORGET:-}
    evaluate "$runs/${split}_$loss" retain_result="$oracle"
    ${PYTHON:-python} "$here/aggregate_eval_stat.py" retain_result="$oracle" method_name="$loss" \
        ckpt_result="$runs/${split}_$loss/eval_$split/$log" submitted_by="${TEAM:-${USER:-me}}" \
        save_file="$runs/${split}_$loss/leaderboard.csv" >/dev/null
done
