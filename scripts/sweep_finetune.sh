#!/usr/bin/env bash
# Finetune one family on every split at several learning rates: scripts/sweep_finetune.sh FAMILY [key=value ...]
#
#     SPLITS="full retain90" LRS="1e-5 2e-5" LAUNCH="torchrun --nproc_per_node=2" scripts/sweep_finetune.sh phi batch_size=4
#
# One launch runs all of them, one after another (Hydra's -m). From the environment: SPLITS, LRS, LAUNCH.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
family=$1; shift
splits=${SPLITS:-full retain90 retain95 retain99} lrs=${LRS:-1e-5 2e-5}
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck disable=SC2086 # a launcher is several words
exec ${LAUNCH:-python} "$here/finetune.py" --config-name="${CONFIG:-finetune}" -m model_family="$family" \
    split="${splits// /,}" lr="${lrs// /,}" "$@"
