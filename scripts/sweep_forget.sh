#!/usr/bin/env bash
# Unlearn every split with every loss at several learning rates: scripts/sweep_forget.sh FAMILY [key=value ...]
#
#     LOSSES="grad_diff KL" SPLITS=forget10 LAUNCH="torchrun --nproc_per_node=2" scripts/sweep_forget.sh phi batch_size=4
#
# One launch runs all of them, one after another (Hydra's -m). From the environment: LOSSES, SPLITS, LRS, LAUNCH.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
family=$1; shift
losses=${LOSSES:-grad_ascent grad_diff KL idk} splits=${SPLITS:-forget01 forget05 forget10} lrs=${LRS:-1e-5 2e-5}
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck disable=SC2086 # a launcher is several words
exec ${LAUNCH:-python} "$here/forget.py" --config-name="${CONFIG:-forget}" -m model_family="$family" \
    forget_loss="${losses// /,}" split="${splits// /,}" lr="${lrs// /,}" "$@"
