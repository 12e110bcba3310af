#!/usr/bin/env bash
# Rebuilds data/emoji from pinned npm packages. Needs npm, cargo and sha256sum.
# Usage: tools/emoji-pack/build.sh [OUT] [more arguments for emoji-pack]
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${1:-$here/../../data/emoji}"
shift || true
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# short name, npm package, version, SHA-256 of the package file
while read -r short package version sum; do
  case "$short" in '' | '#'*) continue ;; esac
  echo "fetching $package@$version" >&2
  (cd "$work" && npm pack --silent --ignore-scripts "$package@$version" 2>/dev/null >"$short.name") || {
    echo "build.sh: npm cannot fetch $package@$version" >&2
    exit 1
  }
  archive="$work/$(tail -n 1 "$work/$short.name")"
  if ! echo "$sum  $archive" | sha256sum --check --status; then
    echo "build.sh: $package@$version does not have the pinned SHA-256 sum $sum" >&2
    exit 1
  fi
  mkdir "$work/$short"
  tar -xzf "$archive" -C "$work/$short" --strip-components=1
done <"$here/sources.txt"

cargo run --release --locked --quiet --manifest-path "$here/Cargo.toml" -- \
  --sources "$work" --out "$out" "$@"
