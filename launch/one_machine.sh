#!/usr/bin/env bash
# One machine: goes on after crashes, but not after what only a person can mend (2), nor when it was asked to stop (75).
#   launch/one_machine.sh my_run.yaml --out RUN
set -uo pipefail
while true; do
  qwen2-jax train pretrain "$@"
  status=$?
  case $status in
    0 | 2 | 75) exit "$status" ;;
  esac
  echo "the run ended with $status; again in 10 seconds" >&2
  sleep 10
done
