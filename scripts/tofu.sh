#!/usr/bin/env bash
# The whole TOFU protocol for one family, one forget split and a list of losses; what is complete is skipped.
#
#     scripts/tofu.sh FAMILY SPLIT "LOSS LOSS ..."
#     scripts/tofu.sh phi forget10 "grad_ascent grad_diff KL"
#     LAUNCH="torchrun --nproc_per_node=8" FINETUNE="lr=2e-5" FORGET="lr=2e-5" scripts/tofu.sh phi forget01 "grad_diff KL"
#
# From the environment: RUNS (folder of all runs: runs/FAMILY), DATA (data_path), LAUNCH (python, or a torchrun line),
# FINETUNE, FORGET, EVALUATE (more key=value for each script), TEAM (the Submitted By column).
# A complete run that was made with other settings, or from another model, stops the script: it never passes as new.
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
family=$1 split=$2 losses=$3
fail() { echo "error: $*" >&2; exit 2; }
[[ $split =~ ^forget[0-9]{2}$ && $split != forget00 ]] || fail "SPLIT=$split: it must be forget01, forget05, forget10 or the like"
here=$(cd "$(dirname "$0")/.." && pwd)
runs=${RUNS:-runs/$family} data=${DATA:-locuslab/TOFU}
launch=${LAUNCH:-${PYTHON:-python}}
percent=$((10#${split#forget}))
retain=retain$(printf '%02d' $((100 - percent)))
log=eval_log_aggregated.json

# run SAVE_DIR SCRIPT key=value ...: as a sweep of one job (-m), which goes on where it was cut off; a complete run is
# known here, without a launch
run() {
    local save=$1 script=$2 state; shift 2
    state=$(${PYTHON:-python} "$here/scripts/complete.py" "$save" model_family="$family" "$@")
    case $state in
        complete) echo "complete: $save"; return ;;
        "made with other settings"*) fail "$save was $state; remove it or set RUNS=..." ;;
        "made from another"*) [ "$script" = evaluate_util.py ] || fail "$save was $state than is there now; remove it or set RUNS=..." ;;
    esac
    echo "== $script $* save_dir=$save"
    # shellcheck disable=SC2086 # a launcher is several words
    $launch "$here/$script" -m model_family="$family" "$@" save_dir="$save"
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
watched=()  # of an unlearning's own evaluations; how the model is computed with follows the run's own keys
if [[ " ${FORGET:-} " == *" eval_while_train="* || " ${FORGET:-} " == *" evaluate=end "* ]]; then
    for one in ${EVALUATE:-}; do
        case $one in engine=* | ds_config=* | precision=*) ;; *) watched+=("eval.$one") ;; esac
    done
    watched+=("eval.retain_result=$oracle")
fi
for loss in $losses; do
    # shellcheck disable=SC2086
    run "$runs/${split}_$loss" forget.py model_path="$runs/full" data_path="$data" split="$split" forget_loss="$loss" \
        ${watched[@]+"${watched[@]}"} ${FORGET:-}
    evaluate "$runs/${split}_$loss" retain_result="$oracle"
    ${PYTHON:-python} "$here/aggregate_eval_stat.py" retain_result="$oracle" method_name="$loss" \
        ckpt_result="$runs/${split}_$loss/eval_$split/$log" submitted_by="${TEAM:-${USER:-me}}" \
        save_file="$runs/${split}_$loss/leaderboard.csv" overwrite=true >/dev/null
done
