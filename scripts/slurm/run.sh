#!/usr/bin/env bash
#SBATCH --job-name=tofu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# One script of the suite on one node or many: a torchrun on each node, which find each other at the first one.
#
#   sbatch scripts/slurm/run.sh finetune.py model_family=llama2-7b split=full batch_size=4
#   sbatch --nodes=2 scripts/slurm/run.sh forget.py engine=deepspeed split=forget10 forget_loss=grad_diff
#   sbatch --nodes=2 --gpus-per-node=4 scripts/slurm/run.sh forget.py engine=fsdp split=forget10 forget_loss=KL
#
# engine=deepspeed is ZeRO-3 (ds_config= is its json), engine=fsdp FSDP2: both share one model over all processes of all
# nodes. save_dir must lie on a file system that all nodes see. PORT=29500 is where the nodes meet.
#
# Two minutes before the time limit slurm warns this script. It passes the warning on, the run saves a checkpoint and
# says so in interrupted.json, and the job goes back into the queue: at most MAX_REQUEUE=10 times.
# SAVE_SECONDS=100 is how long a step and the save may take; with more, let slurm warn earlier
# (sbatch --signal=B:USR1@600).
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: sbatch [--nodes=N --gpus-per-node=G] scripts/slurm/run.sh SCRIPT.py key=value ..." >&2
    exit 2
fi
repository=$(cd "${TOFU:-$SLURM_SUBMIT_DIR}" && pwd) # slurm runs a copy of this file: TOFU= where you submit elsewhere
if [ ! -f "$repository/$1" ]; then
    echo "error: $repository/$1 is not there: submit from the repository, or set TOFU to it" >&2
    exit 2
fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # head would end the pipe early
script=$1
shift
args=()
for arg in "$@"; do # what this job has begun it goes on with, when it comes out of the queue again
    [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$arg" = overwrite_dir=true ] || args+=("$arg")
done
gpus=${SLURM_GPUS_ON_NODE:-1}
cpus=${SLURM_CPUS_PER_TASK:-$gpus}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus / gpus > 0 ? cpus / gpus : 1))}
# rank 0 writes a copy of interrupted.json here: this script does not know the run's folder
export TOFU_INTERRUPTED="$repository/.interrupted-$SLURM_JOB_ID.json"
rm -f "$TOFU_INTERRUPTED"
# srun makes a SIGTERM that it gets a SIGKILL of its tasks, but passes SIGUSR1 on; torchrun then tells its workers
warned=''
trap 'warned=1; again=1; kill -USR1 "$run" 2>/dev/null || true' USR1 TERM
# srun does not take over sbatch's --cpus-per-task
srun --cpus-per-task="$cpus" torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$gpus" --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d --rdzv_endpoint="$head:${PORT:-29500}" --shutdown-timeout="${SAVE_SECONDS:-100}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$repository/$script" "${args[@]}" &
run=$!
code=0
again=1
while [ -n "$again" ]; do # a trapped signal ends the wait, not the run; 127: the run's code is known already
    again=''
    wait "$run" && now=0 || now=$?
    [ "$now" -eq 127 ] || code=$now
done
if [ ! -f "$TOFU_INTERRUPTED" ]; then
    [ -z "$warned" ] || echo "warned, but nothing was saved: the run had not begun, or SAVE_SECONDS was too short" >&2
    exit "$code"
fi
rm -f "$TOFU_INTERRUPTED"
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUE:-10}" ]; then
    echo "interrupted, and not put back into the queue: MAX_REQUEUE=${MAX_REQUEUE:-10} is reached" >&2
    exit 75
fi
echo "interrupted: back into the queue, the run goes on from there"
scontrol requeue "$SLURM_JOB_ID"
