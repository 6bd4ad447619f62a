#!/usr/bin/env bash
#SBATCH --job-name=tofu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
# One script of the suite on one node or many: a torchrun on each node, which find each other at the first one.
#
#   sbatch scripts/slurm/run.sh finetune.py model_family=llama2-7b split=full batch_size=4
#   sbatch --nodes=2 scripts/slurm/run.sh forget.py engine=deepspeed split=forget10 forget_loss=grad_diff
#   sbatch --nodes=2 --gpus-per-node=4 scripts/slurm/run.sh forget.py engine=fsdp split=forget10 forget_loss=KL
#
# engine=deepspeed is ZeRO-3 (ds_config= is its json), engine=fsdp FSDP2: both share one model over all processes of all
# nodes. save_dir must lie on a file system that all nodes see. PORT=29500 is where the nodes meet.
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
gpus=${SLURM_GPUS_ON_NODE:-1}
cpus=${SLURM_CPUS_PER_TASK:-$gpus}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus / gpus > 0 ? cpus / gpus : 1))}
# srun does not take over sbatch's --cpus-per-task
srun --cpus-per-task="$cpus" torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$gpus" --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d --rdzv_endpoint="$head:${PORT:-29500}" "$repository/$script" "$@"
