#!/usr/bin/env bash
# Tests the page that build.sh built, in headless Chromium; on Debian, what is missing is installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
missing=()
command -v "${CHROMIUM:-chromium}" >/dev/null || missing+=(chromium)
command -v npm >/dev/null || missing+=(nodejs npm)
if [ ${#missing[@]} -gt 0 ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
modules=target/browser/node
[ -d "$modules/node_modules/puppeteer-core" ] || npm install --silent --no-audit --no-fund --prefix "$modules" puppeteer-core@24
NODE_PATH="$modules/node_modules" node examples/browser/test.js "$@"
