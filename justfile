# `just` lists these; each is one command that can also be typed.

# The main job: upcycle the small CLIP, train it beside the dense one, compare
main *args:
    cargo run --release --example clip_up -- {{args}}

# All tests
test:
    cargo test --release

# Reference cases on a device of yours
verify device="cpu":
    cargo run --release --example verify -- --device {{device}} tests/fixtures/*

# Benchmarks
bench:
    cargo bench

# What must be true on main
ci:
    bash .ci/run

# The emoji pack from its npm packages
pack:
    tools/emoji-pack/build.sh
