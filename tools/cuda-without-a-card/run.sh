#!/usr/bin/env bash
# What CUDA's own compiler makes of the kernels, on a machine without a card: whether they compile, for which card you like, and how many
# instructions, registers and spills each has. Nothing is computed: launches do nothing, so tests fail by their values.
#
#   XDG_DATA_HOME=/tmp/llvm bash .ci/offline-llvm.sh                                          # once, where LLVM cannot be downloaded
#   XDG_DATA_HOME=/tmp/llvm EXTRA_FEATURES=cubecl/cuda-cpp tools/gpu-report.sh build cuda
#   tools/cuda-without-a-card/run.sh target/gpu-report-cuda/gpu half brain
#
# COMPUTE_CAPABILITY (90) names the card; with TRACE=1 every launch is printed. Needs gcc and python3 with pip, which brings NVIDIA's tools.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
tools=$root/target/cuda-tools
cuda=$tools/nvidia/cu13
if [ ! -x "$cuda/bin/nvdisasm" ]; then
  python3 -m pip install -q --no-deps --target "$tools" nvidia-cuda-{nvcc,nvrtc,runtime,crt,cccl}==13.2.* nvidia-cuda-nvdisasm
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/lib" "$work/ptx"
gcc -shared -fPIC -O1 "$here/driver.c" -o "$work/lib/libcuda.so"
ln -s "$cuda"/lib/libnvrtc.so.13 "$work/lib/libnvrtc.so"

export COMPUTE_CAPABILITY=${COMPUTE_CAPABILITY:-90}
# As many candidates as must be: each costs a second of compiling.
CUBECL_AUTOTUNE_LEVEL=minimal BURN_MOE_DEVICE=cuda CUDA_PATH=$cuda PTX_DIR=$work/ptx LD_LIBRARY_PATH=$work/lib:$cuda/lib "$@" \
  > "$work/output" 2>&1 || true
grep -E '^(LAUNCH|REFUSED) |Compilation Error|stand-in driver' "$work/output" || true

arch=sm_$COMPUTE_CAPABILITY
[ "$COMPUTE_CAPABILITY" -lt 90 ] || arch=${arch}a
ours=$(sed -nE 's/^fn ([a-z_]+_kernel).*/\1/p' "$root"/src/ops/cube/*.rs | sort -u | paste -sd '|')
printf '%-58s %6s %5s %5s %5s %5s %5s %5s  %s\n' kernel instr LDG STG FFMA LDS BAR regs spills
for ptx in "$work"/ptx/*.ptx; do
  name=$(sed -nE 's/.*\.entry ([A-Za-z0-9_]+).*/\1/p' "$ptx" | head -1)
  [[ $name =~ ^($ours)_ ]] || continue
  said=$("$cuda/bin/ptxas" -arch="$arch" -v "$ptx" -o "$work/cubin" 2>&1) || { echo "$name: $said"; continue; }
  "$cuda/bin/nvdisasm" -c "$work/cubin" | grep -E '^ +/\*[0-9a-f]{4,}\*/' | grep -v NOP > "$work/sass"
  count() { grep -cE "[[:space:]]$1" "$work/sass" || true; }
  printf '%-58s %6d %5d %5d %5d %5d %5d %5s  %s\n' "${name%_*}" "$(wc -l < "$work/sass")" "$(count LDG)" "$(count STG)" "$(count FFMA)" \
    "$(count LDS)" "$(count BAR)" "$(sed -nE 's/.*Used ([0-9]+) registers.*/\1/p' <<< "$said")" \
    "$(sed -nE 's/.* ([0-9]+) bytes spill stores.*/\1/p' <<< "$said" | head -1)"
done | sort -u
