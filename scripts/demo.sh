#!/usr/bin/env bash
# The whole protocol on the embedded data with the embedded model, no hub and no GPU: a few minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} RUNS=${RUNS:-runs/tiny} DATA=data/mini
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
losses="grad_ascent grad_diff KL"
settings="lr=7e-4 num_epochs=10 logging_steps=50"  # a million weights need larger steps than a billion
metrics="metrics=[extraction_strength,agg]"

$PYTHON scripts/make_tiny.py
FINETUNE=$settings EVALUATE=$metrics FORGET="lr=2e-4 num_epochs=10 batch_size=8 gradient_accumulation_steps=1 eval_while_train=true" \
    scripts/tofu.sh tiny forget10 "$losses"
# shellcheck disable=SC2086
$PYTHON finetune.py -m model_family=tiny data_path=$DATA split=retain90 seed=43 $settings save_dir="$RUNS/retain90_seed43"
for model in retain90 retain90_seed43; do  # a model's own log is there only once it has been evaluated
    $PYTHON evaluate_util.py -m model_family=tiny data_path=$DATA model_path="$RUNS/$model" split=forget10 "$metrics" \
        retain_result="$RUNS/retain90/eval_forget10/eval_log_aggregated.json" start_result="$RUNS/full/eval_forget10" \
        save_dir="$RUNS/$model/eval_compared"
done

rows=("finetuned=$RUNS/full/eval_forget10" "oracle=$RUNS/retain90/eval_compared")
rows+=("oracle, other seed=$RUNS/retain90_seed43/eval_compared")
for loss in $losses; do rows+=("$loss=$RUNS/forget10_$loss/eval_forget10"); done
echo
$PYTHON scripts/table.py "${rows[@]}"
echo
echo "forget quality of KL at its checkpoints (1: like the oracle)"
find "$RUNS/forget10_KL" -maxdepth 1 -name 'checkpoint-*' | sort -V | while read -r folder; do
    printf '%s\t%s\n' "$(basename "$folder")" "$($PYTHON scripts/table.py --only 'Forget Quality' "$folder")"
done
echo
$PYTHON report.py "$RUNS" save_dir="${RUNS%/}_report"
