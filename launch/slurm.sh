#!/usr/bin/env bash
# GPUs by SLURM: one process per node, which JAX finds by itself.
#   sbatch --nodes 4 launch/slurm.sh my_run.yaml --out /shared/RUN
#SBATCH --job-name qwen2
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --signal TERM@120
#SBATCH --requeue
# 120 seconds before its time is over the run gets SIGTERM, saves, and exits with 75; then the job asks for its next turn.
set -uo pipefail
srun --kill-on-bad-exit=1 .venv/bin/qwen2-jax train pretrain "$@"
status=$?
[ "$status" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
