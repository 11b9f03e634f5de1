#!/usr/bin/env bash
# What is to be run on an NVIDIA GPU: attention's paths and gradients beside the reference, then speed. Reports go to
# docs/benchmarks. `benchmarks/gpu.sh toy` runs the same commands in small on any machine; its reports go to build/toy.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ "${1:-}" = toy ]; then
  out=build/toy platform=cpu
  sizes=(qwen2-0.5b) bench=(--prefill-length 256 --batches 1 2 --prompt-length 32 --new-tokens 8 --questions 2 --repeats 1)
  training=(--size tiny --dtype bfloat16 --batch 2 --seq 64 --steps 1 --repeats 1)
  lengths=(256) harness=(--size tiny --repeats 1)
else
  out=docs/benchmarks platform=cuda
  sizes=(qwen2-0.5b qwen2-1.5b qwen2-7b) bench=(--xla-flags recommended)
  training=(--size qwen2-0.5b --dtype bfloat16 --batch 4 --seq 4096 --remat full)
  lengths=(4096 32768) harness=(--size small)
fi
mkdir -p "$out"
name=$out/$(date +%F)-$platform

QWEN2_JAX_TEST_PLATFORM=$platform "$python" -m pytest -p no:cacheprovider tests/qwen2_jax/attention/test_cudnn.py
for size in "${sizes[@]}"; do
  "$python" -m qwen2_jax evaluate bench --size "$size" --dtype bfloat16 "${bench[@]}" --out "$name-$size.json"
done
"$python" -m benchmarks attention --lengths "${lengths[@]}" --chunk-size 2112 --local-size 64 --dtype bfloat16 \
  --implementation "$([ $platform = cuda ] && echo cudnn || echo chunked)" --json "$name-attention.json"
"$python" -m benchmarks training "${training[@]}" --json "$name-training.json"
"$python" -m benchmarks harness "${harness[@]}" --json "$name-harness.json"
