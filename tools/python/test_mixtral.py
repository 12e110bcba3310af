#!/usr/bin/env python3
"""Whether transformers computes what this crate computes with layers that `save_mixtral` wrote. Not in CI, which has no PyTorch.

    python test_mixtral.py                         # cargo reads the layers of tests/fixtures/lm-* that fit, and writes them; --dev builds in the dev profile
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Families whose layers fit Mixtral's layout, and what the reference calls the layer.
FAMILIES = {"mixtral": "mlp", "granitemoe": "block_sparse_moe"}
ALLOWED = 1e-5


def write_layers(family, out, profile):
    """By the Rust crate: read in the family's own layout, written in Mixtral's."""
    fixture = ROOT / f"tests/fixtures/lm-{family}"
    command = ["cargo", "run", "--quiet", *profile, "--example", "language_model", "--", fixture, "--save-mixtral", out]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def error(found, expected):
    """Largest difference, in parts of the largest value."""
    assert found.shape == expected.shape, f"{list(found.shape)} instead of {list(expected.shape)}"
    return ((found - expected).abs().max() / expected.abs().max()).item()


def check(family, name, folder):
    """The errors of each layer's output and input gradient against the family's own model in transformers, which wrote the reference."""
    model, loading = transformers.MixtralModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"], loading
    missing = [key for key in loading["missing_keys"] if ".mlp." in key]
    assert not missing, f"not in the file: {missing}"
    reference = load_file(ROOT / f"tests/fixtures/lm-{family}/reference.safetensors")
    for block, layer in enumerate(model.layers):
        of_layer = {part: reference[f"model.layers.{block}.{name}.{part}"] for part in ("input", "output", "cotangent", "grad_input")}
        given = of_layer["input"].requires_grad_()
        found = layer.mlp(given)
        (found * of_layer["cotangent"]).sum().backward()
        yield block, error(found.detach(), of_layer["output"]), error(given.grad, of_layer["grad_input"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dev", action="store_true", help="build the crate's example in the dev profile")
    args = parser.parse_args()
    # What is not in the file, which is said of every load: attention, embeddings and norms.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| layers of | block | output | gradient of the input |\n| --- | --- | --- | --- |")
    failed = 0
    for family, name in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_layers(family, folder, [] if args.dev else ["--release"])
            for block, *errors in check(family, name, folder):
                print(f"| {family} | {block} | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)
                failed += not all(value <= ALLOWED for value in errors)
    if failed:
        sys.exit(f"{failed} layers differ by more than {ALLOWED:.0e}")


if __name__ == "__main__":
    main()
