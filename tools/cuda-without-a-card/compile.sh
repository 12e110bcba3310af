#!/usr/bin/env bash
# Compiles the kernels of a program on a machine without a card, for a machine with one, where compiling takes longer than all else.
#
#   XDG_DATA_HOME=/tmp/llvm bash .ci/offline-llvm.sh                                          # once, where LLVM cannot be downloaded
#   XDG_DATA_HOME=/tmp/llvm EXTRA_FEATURES=cubecl/cuda-cpp,cubecl/persistence tools/gpu-report.sh build cuda
#   tools/cuda-without-a-card/compile.sh kernels target/gpu-report-cuda/layer --bench b16-image
#
# The folder (here `kernels`) is what `cubecl.toml` names on the other machine, in the folder where the program is started:
#
#   [compilation]
#   cache = true
#   [environment]
#   path = { directory = "kernels" }
#
# Launches do nothing here, so the program computes nonsense and may stop early; a test compiles what it launches before its first assertion.
# NVRTC (13.0) must not be newer than the other machine's driver; COMPUTE_CAPABILITY (90) names the card. Needs gcc and python3 with pip.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
program=$(realpath "$2")
shift 2
version=${NVRTC:-13.0}
tools=$here/../../target/cuda-tools-$version
cuda=$tools/nvidia/cu13
[ -e "$cuda/lib/libnvrtc.so.13" ] || python3 -m pip install -q --no-deps --target "$tools" nvidia-cuda-{nvrtc,runtime,crt,cccl}=="$version".*
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/lib"
gcc -shared -fPIC -O1 "$here/driver.c" -o "$work/lib/libcuda.so"
ln -s "$(realpath "$cuda/lib/libnvrtc.so.13")" "$work/lib/libnvrtc.so"
printf '[compilation]\ncache = true\n[environment]\npath = { directory = "%s" }\n' "$folder" > "$work/cubecl.toml"
cd "$work"
# Times mean nothing here: none is kept, and none decides which candidates are compiled.
export CUBECL_AUTOTUNE_SHORT_CIRCUIT=off CUBECL_AUTOTUNE_BENCH_ADAPTIVE=off CUBECL_AUTOTUNE_CACHE=false CUBECL_THROUGHPUT_CACHE=false BURN_MOE_CALLS=1
export COMPUTE_CAPABILITY=${COMPUTE_CAPABILITY:-90} BURN_MOE_DEVICE=cuda CUDA_PATH=$cuda LD_LIBRARY_PATH=$work/lib:$cuda/lib
"$program" "$@"
