"""This crate's layer against the fastest PyTorch layer, in turn on the same machine.

    python side_by_side.py [--rounds 2] [--shapes b16-image,b16-text,l14]

Each round runs `cargo bench --bench layer` on one shape, and then moe_layers.py on the same shape. It prints
`ratio peers/SHAPE/ROUTING/PASS VALUE`: our dropless layer's time over that of the fastest peer of the round, median of the rounds.
"""

import argparse
import pathlib
import re
import subprocess
import sys
from collections import defaultdict
from statistics import median

HERE = pathlib.Path(__file__).parent
LAYERS = "index-loop,index-bmm,transformers-eager,transformers-grouped-mm"


def times(command):
    """The `time NAME MILLISECONDS` lines that a command prints."""
    output = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout
    return {name: float(value) for name, value in re.findall(r"^time (\S+) (\S+)$", output, re.MULTILINE)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shapes", default="b16-image,b16-text,l14")
    parser.add_argument("--layers", default=LAYERS)
    args = parser.parse_args()
    cells = defaultdict(list)
    for _ in range(args.rounds):
        for shape in args.shapes.split(","):
            ours = times(["cargo", "bench", "--bench", "layer", "--", f"{shape}/dropless"])
            peers = times([sys.executable, "moe_layers.py", "--shapes", shape, "--rounds", "3", "--layers", args.layers])
            for name, own in ours.items():
                place = name.removeprefix("layer/").replace("/dropless", "")
                rivals = {layer: peers[f"{layer}/{place}"] for layer in args.layers.split(",") if f"{layer}/{place}" in peers}
                best = min(rivals, key=rivals.get)
                print(f"round {place}: ours {own:.1f} ms, {best} {rivals[best]:.1f} ms", flush=True)
                cells[place].append(own / rivals[best])
    for place, ratios in cells.items():
        print(f"ratio peers/{place} {median(ratios):.3f}")


if __name__ == "__main__":
    main()
