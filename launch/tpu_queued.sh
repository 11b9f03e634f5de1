#!/usr/bin/env bash
# A TPU slice by queued resources: asks for it, installs, and starts the same command on every host. Run it again after a
# preemption: the run goes on from its newest checkpoint.
#   PROJECT=... ZONE=us-east5-a TYPE=v5p-128 launch/tpu_queued.sh qwen2-7b-v5p-4x4x4 --out /mnt/RUN --data ...
# RUN must lie on a file system that all hosts share.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${TYPE:?the accelerator, as v5p-128}" "${NAME:=qwen2-$USER}" "${RUNTIME:=v2-alpha-tpuv5}"
where=(--project "$PROJECT" --zone "$ZONE")

if ! gcloud compute tpus tpu-vm describe "$NAME" "${where[@]}" >/dev/null 2>&1; then
  gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" "${where[@]}" \
    --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot
  until [ "$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format 'value(state.state)')" = ACTIVE ]; do
    sleep 30
  done
fi
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command "$1"; }
gcloud compute tpus tpu-vm scp --recurse . "$NAME:qwen2-jax" "${where[@]}" --worker=all
everywhere "cd qwen2-jax && python3 -m venv .venv && .venv/bin/pip install -q '.[tpu]'"
# JAX finds the other hosts by itself here.
everywhere "cd qwen2-jax && .venv/bin/qwen2-jax train pretrain $(printf '%q ' "$@")"
