#!/usr/bin/env bash
# Fuzzes every parser for ten minutes, or for as many seconds as the first argument says. Needs a nightly toolchain and cargo-fuzz.
# What is found that widens the cover goes to corpus-found/, and what stays after taking away the superfluous to corpus/.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-600}
for target in ${2:-weights index pickle config lists pairs image tokenizer}; do
  mkdir -p "corpus-found/$target"
  echo "== $target"
  cargo +nightly fuzz run --release "$target" "corpus-found/$target" "corpus/$target" -- \
    -max_total_time="$seconds" -timeout=10 -max_len=8192 -rss_limit_mb=4096 -print_final_stats=1 2>&1 | tail -n 12
done
