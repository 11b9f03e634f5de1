#!/usr/bin/env bash
# A TPU slice by queued resources: asks for it, installs, and starts the same command on every host. Run it again after
# a preemption: what is left of the slice is given back, another one is asked for, and the run goes on from its newest
# checkpoint.
#   PROJECT=... ZONE=us-east5-a TYPE=v5p-128 launch/tpu_queued.sh qwen2-7b-v5p-4x4x4 --out /mnt/RUN --data ...
# RUN must lie on a file system that all hosts share.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${TYPE:?the accelerator, as v5p-128}" "${NAME:=qwen2-$USER}"
case $TYPE in
  v5p-*) : "${RUNTIME:=v2-alpha-tpuv5}" ;;
  v5litepod-*) : "${RUNTIME:=v2-alpha-tpuv5-lite}" ;;
  v6e-*) : "${RUNTIME:=v2-alpha-tpuv6e}" ;;
  *) : "${RUNTIME:?the version of the software on a $TYPE}" ;;
esac
where=(--project "$PROJECT" --zone "$ZONE")
state() { gcloud compute tpus "$1" describe "$NAME" "${where[@]}" --format "value($2)" 2>/dev/null || true; }

slice=$(state tpu-vm state) request=$(state queued-resources state.state)
if [ "$slice" != READY ]; then
  case $slice/$request in
    PREEMPTED/* | */SUSPEND* | */FAILED) # these stay, and stand in the way of others of that name
      gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
      request=
      ;;
  esac
  if [ -z "$request" ]; then
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" "${where[@]}" \
      --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot
  fi
  until [ "$(state queued-resources state.state)" = ACTIVE ]; do sleep 30; done
fi
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command "$1"; }
gcloud compute tpus tpu-vm scp --recurse . "$NAME:qwen2-jax" "${where[@]}" --worker=all
everywhere "cd qwen2-jax && python3 -m venv .venv && .venv/bin/pip install -q '.[tpu]'"
# JAX finds the other hosts by itself here.
everywhere "cd qwen2-jax && .venv/bin/qwen2-jax train pretrain $(printf '%q ' "$@")"
