#!/usr/bin/env bash
# Everything that needs a GPU, in one report: tests, reference cases, benches, the same layers in PyTorch, and the main job.
#
#   tools/gpu-report.sh cuda    > report.txt     # or vulkan, metal, wgpu
#   tools/gpu-report.sh build cuda               # only build: for a machine with a network and no GPU
#
# Meant to take under ten minutes on one card once everything is built (not timed: no card was at hand). BATCH (64) is the batch of the benches; PYTHON (python3) needs the packages of
# benches/peers/requirements.txt for PyTorch's part, which is left out on other devices than CUDA or without them.
set -uo pipefail
cd "$(dirname "$0")/.."
only_build=
if [ "${1:-}" = build ]; then only_build=1; shift; fi
device=${1:?which device: cuda, vulkan, metal or wgpu}
batch=${BATCH:-64}
python=${PYTHON:-python3}
cargo=(--release --locked --no-default-features --features "flex,clip,store,train,fusion,$device")
bench=(--locked --no-default-features --features "flex,clip,store,train,fusion,$device")
if [ -n "$only_build" ]; then
  set -e
  cargo test "${cargo[@]}" --test gpu --no-run
  cargo build "${cargo[@]}" --example verify --example clip_up
  cargo bench "${bench[@]}" --bench kernels --bench layer --no-run
  exit
fi

section() { printf '\n## %s (%d s)\n\n' "$1" "$SECONDS"; }
# What criterion says of itself is left out.
lines() { grep -E '^(ratio|time|gflops|teraflops|gigabytes|share|skip) ' || echo "nothing was measured: see the messages above"; }

echo "# burn-moe on $device, batch $batch, $(git log -1 --format=%h 2>/dev/null || echo 'no commit'), $(date -u +%F)"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || true
export BURN_MOE_DEVICE=$device BURN_MOE_BATCH=$batch

section "Tests"
cargo test "${cargo[@]}" --test gpu -- --nocapture 2>&1 | grep -E '^(test |untested|running|test result)|panicked'

section "Reference cases"
cargo run "${cargo[@]}" --example verify -- --device "$device" tests/fixtures/* 2>&1 | grep -E 'passed|FAILED|above'

for dtype in bf16 f32; do
  export BURN_MOE_DTYPE=$dtype
  section "Kernels, $dtype"
  cargo bench "${bench[@]}" --bench kernels 2>&1 | lines
  section "Layer over burn's dense layer of equal active operations, $dtype"
  cargo bench "${bench[@]}" --bench layer -- 'image|l14' 2>&1 | lines
done

section "PyTorch, bf16"
if [ "$device" = cuda ] && "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  "$python" benches/peers/moe_layers.py --device cuda --dtype bfloat16 --batch "$batch" --shapes b16-image,l14 --rounds 5 | lines
else
  echo "left out: no PyTorch with CUDA"
fi

section "The main job, shortened"
cargo run "${cargo[@]}" --example clip_up -- --device "$device" --quick --out "$(mktemp -d)" 2>&1 | tail -n 12

section "done"
