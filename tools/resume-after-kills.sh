#!/usr/bin/env bash
# Kills a training run with SIGKILL again and again, at random moments, while it saves included, and compares what it ends with to a run
# that was never stopped: the same weights and the same log, to the bit.
#
#     cargo build --release --example train --example make_shards
#     tools/resume-after-kills.sh [KILLS]
set -euo pipefail
cd "$(dirname "$0")/.."
kills=${1:-50}
bin=target/release/examples
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/make_shards" --out "$work/shards" >/dev/null
run() {
  "$bin/train" --data "$work/shards" --samples 7680 --batch-size 64 --micro-batch 32 --lr 5e-4 --sparse-every 1 --warmup 5 --average 0.9 \
    --checkpoint-every 2 --log-every 1 --workers 1 --out "$1"
}
run "$work/whole" >/dev/null
done=0
while [ "$done" -lt "$kills" ]; do
  run "$work/parts" >/dev/null 2>"$work/errors" &
  pid=$!
  sleep "$(awk -v seed="$RANDOM" 'BEGIN { srand(seed); print 0.4 + 1.8 * rand() }')"
  if pkill -9 -P "$pid" 2>/dev/null || kill -9 "$pid" 2>/dev/null; then
    wait "$pid" 2>/dev/null || true
    done=$((done + 1))
  elif ! wait "$pid"; then
    cat "$work/errors"
    echo "the run could not go on after $done kills"
    exit 1
  else
    # It ended before it was killed: another one begins.
    rm -rf "$work/parts"
  fi
  if [ -s "$work/errors" ]; then cat "$work/errors"; fi
done
run "$work/parts" >/dev/null
cmp "$work/whole/model/burn_moe_model.safetensors" "$work/parts/model/burn_moe_model.safetensors"
# All but times and memory.
lines() { sed -E 's/"(seconds|memory|peak_memory)":[^,}]*,?//g' "$1/log.jsonl"; }
diff <(lines "$work/whole") <(lines "$work/parts")
echo "after $done kills: the same weights and the same log as without"
