#!/usr/bin/env bash
# Everything that needs a GPU, in one report: tests, reference cases, benches, the same layers in PyTorch, and the main job.
#
#   tools/gpu-report.sh build cuda             # or vulkan, metal, wgpu: builds and collects the programs in target/gpu-report-cuda
#   tools/gpu-report.sh cuda > report.txt      # builds if there are none, and runs them; the report says of which commit they are
#
# A machine with a GPU needs neither cargo nor a network: bring the repository and the folder of programs (stripped; packed together with
# `tar cJ` a few dozen megabytes). CUDA programs need the driver and the toolkit's headers (CUDA_PATH) and NVRTC there. Where burn's build
# script cannot download LLVM, run .ci/offline-llvm.sh once and build with EXTRA_FEATURES=cubecl/cuda-cpp.
#
# Compiling takes longer than all else. With EXTRA_FEATURES=cubecl/persistence, kernels are compiled once and kept in target/environment;
# tools/cuda-without-a-card/compile.sh compiles them beforehand, on a machine without a card.
#
# BATCH (64) is the batch of the benches, SHAPES ('image|l14') says which, DTYPES (bf16 f32) in which numbers, TESTS may name some of the
# tests, and MAIN_JOB (--quick) is how the main job is run. PYTHON (python3) needs the packages of benches/peers/requirements.txt for
# PyTorch's part, which is left out on other devices than CUDA or without them. Sections end after LIMIT (240) seconds.
set -uo pipefail
cd "$(dirname "$0")/.."
build() {
  local features="flex,clip,store,train,fusion,$device${EXTRA_FEATURES:+,$EXTRA_FEATURES}"
  local args=(--locked --no-default-features --features "$features") programs
  mkdir -p "$folder"
  programs=$({
    cargo test --release "${args[@]}" --test gpu --no-run &&
    cargo bench "${args[@]}" --bench kernels --bench layer --no-run &&
    cargo build --release "${args[@]}" --example verify --example clip_up
  } 2>&1 | tee /dev/stderr | sed -nE 's/^ *Executable .*\((.*)\)$/\1/p')
  for program in $programs target/release/examples/{verify,clip_up}; do
    local name
    name=$(basename "$program" | sed -E 's/-[0-9a-f]{16}$//')
    strip -o "$folder/$name" "$program" 2>/dev/null || cp "$program" "$folder/$name"
  done
  git describe --always --dirty > "$folder/commit" 2>/dev/null || echo 'no commit' > "$folder/commit"
  pwd > "$folder/built-in"
}

if [ "${1:-}" = build ]; then
  device=${2:?which device: cuda, vulkan, metal or wgpu}
  folder=target/gpu-report-$device
  set -e
  build
  exit
fi
device=${1:?which device: cuda, vulkan, metal or wgpu}
folder=target/gpu-report-$device
[ -e "$folder/built-in" ] || (set -e; build) || exit
# Programs look for data where they were built.
built_in=$(cat "$folder/built-in")
[ -e "$built_in" ] || { mkdir -p "$(dirname "$built_in")" && ln -s "$PWD" "$built_in"; } || exit

limit="timeout ${LIMIT:-240}"
# Where the programs can keep compiled kernels, they do.
[ -e cubecl.toml ] || { printf '[compilation]\ncache = true\n' > cubecl.toml && trap 'rm -f cubecl.toml' EXIT; }
python=${PYTHON:-python3}
section() { printf '\n## %s (%d s)\n\n' "$1" "$SECONDS"; }
# What criterion says of itself is left out.
lines() { grep -E '^(ratio|time|gflops|teraflops|gigabytes|share|skip) ' || echo "nothing was measured: see the messages above"; }

export BURN_MOE_DEVICE=$device BURN_MOE_BATCH=${BATCH:-64}
echo "# burn-moe on $device, batch $BURN_MOE_BATCH, programs of $(cat "$folder/commit"), $(date -u +%F)"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || true

# Where it is not about speed, burn need not try as many products.
quick=(env CUBECL_AUTOTUNE_LEVEL=minimal $limit)
section "Tests"
# shellcheck disable=SC2086 # several names
"${quick[@]}" "$folder/gpu" --nocapture ${TESTS:-} 2>&1 | grep -E '^(test |untested|running)|test result|panicked| differs | are off'

section "Reference cases"
"${quick[@]}" "$folder/verify" --device "$device" tests/fixtures/*/ 2>&1 | grep -E 'passed|FAILED|ABOVE'

for dtype in ${DTYPES:-bf16 f32}; do
  export BURN_MOE_DTYPE=$dtype
  section "Kernels, $dtype"
  $limit "$folder/kernels" --bench "${SHAPES:-image|l14}" 2>&1 | lines
  section "Layer over burn's dense layer of equal active operations, $dtype"
  $limit "$folder/layer" --bench "${SHAPES:-image|l14}" 2>&1 | lines
done

section "PyTorch, bf16"
if [ "$device" = cuda ] && "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  $limit "$python" benches/peers/moe_layers.py --device cuda --dtype bfloat16 --batch "$BURN_MOE_BATCH" --shapes b16-image,l14 --rounds 5 | lines
else
  echo "left out: no PyTorch with CUDA"
fi

section "The main job"
# shellcheck disable=SC2086 # several flags
"${quick[@]}" "$folder/clip_up" --device "$device" ${MAIN_JOB:---quick} --out "$(mktemp -d)" 2>&1 | tail -n 20

section "done"
