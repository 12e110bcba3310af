#!/usr/bin/env bash
# Serves the page that build.sh built, at http://localhost:8000 or another port.
set -euo pipefail
exec python3 -m http.server --bind 127.0.0.1 --directory "$(dirname "$0")/../../target/browser/page" "${1:-8000}"
