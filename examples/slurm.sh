#!/bin/bash
#SBATCH --job-name=clipfast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Two nodes of eight GPUs. SIGTERM comes two minutes before the end: the step in progress is finished and saved, and the
# job that is queued again goes on there (resume = "auto"). Every node sees the data and the output folder.
set -euo pipefail

# as long as Slurm waits: torchrun kills ranks that still save after 30 seconds otherwise
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# without exec in the inner shell, the signal would end that shell and not torchrun
srun --kill-on-bad-exit=1 bash -c "exec torchrun \
    --nnodes $SLURM_NNODES --node-rank \$SLURM_NODEID --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint $first:29500 \
    -m clipfast train --config examples/train.toml"
