#!/usr/bin/env bash
# GPUs by SLURM: one process per GPU, which JAX finds by itself. Each takes the GPU of its SLURM_LOCALID among all of its
# node's, so tasks and GPUs of a node must be as many, and must not be bound to each other (no --gpus-per-task).
#   sbatch --nodes 4 launch/slurm.sh my_run.yaml --out /shared/RUN
#SBATCH --job-name qwen2
#SBATCH --ntasks-per-node 8
#SBATCH --gpus-per-node 8
#SBATCH --signal TERM@120
#SBATCH --requeue
# 120 seconds before its time is over the run gets SIGTERM, saves, and exits with 75; then the job asks for its next turn.
# No process may be killed because another one has exited with 75 already: srun would pass on that status instead.
set -uo pipefail
srun --kill-on-bad-exit=0 .venv/bin/qwen2-jax train pretrain "$@"
status=$?
[ "$status" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
