#!/usr/bin/env bash
# Builds the page into target/browser/page. Needs Rust (rustup) and, for the models, ten minutes on two cores if there are none yet.
#
#   examples/browser/build.sh [FOLDER]    where the main job wrote `dense` and `sparse`; without it, out/clip_up
set -euo pipefail
models=$(realpath -m "${1:-$(dirname "$0")/../../out/clip_up}")
cd "$(dirname "$0")/../.."
page=target/browser/page

if [ ! -e "$models/sparse/burn_moe_config.json" ]; then
  echo "no models in $models: the main job makes them, in some 7 minutes on two cores"
  cargo run --release --locked --example clip_up -- --out "$models"
fi
cargo run --release --locked --example browser_data -- --models "$models" --out "$page" --test target/browser/test

rustup target list --installed | grep -qx wasm32-unknown-unknown || rustup target add wasm32-unknown-unknown
RUSTFLAGS="-C target-feature=+simd128" cargo build --release --locked --target wasm32-unknown-unknown \
  --manifest-path examples/browser/Cargo.toml --target-dir target/browser

# The tool must be of the version of the library.
version=$(grep -A1 '^name = "wasm-bindgen"$' examples/browser/Cargo.lock | sed -n 's/version = "\(.*\)"/\1/p')
tool=target/browser/tools/bin/wasm-bindgen
if [ "$("$tool" --version 2>/dev/null)" != "wasm-bindgen $version" ]; then
  # Not with its own lock, which may name crates that a mirror of the registry does not have yet.
  cargo install wasm-bindgen-cli --version "$version" --root target/browser/tools --target-dir target/browser/cli
fi
"$tool" --target web --no-typescript --out-dir "$page/pkg" target/browser/wasm32-unknown-unknown/release/burn_moe_browser.wasm
cp examples/browser/page/* "$page/"

wasm=$page/pkg/burn_moe_browser_bg.wasm
echo "WebAssembly: $(wc -c < "$wasm") bytes, $(gzip -9 -c "$wasm" | wc -c) with gzip"
for model in dense sparse; do echo "$model: $(wc -c < "$page/$model/burn_moe_model.safetensors") bytes"; done
echo "the page is in $page; examples/browser/serve.sh serves it"
