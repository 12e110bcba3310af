"""A MoE layer of a language model: transformers' two implementations and this crate's, in turn, with the same weights and tokens.

    python language_models.py --work FOLDER [--family qwen3_moe] [--rounds 5] [--threads 1,2]
    python language_models.py --work FOLDER --family mixtral --only-write

The first run writes a model of one block and one layer of the published size into FOLDER (Qwen3-30B-A3B: D 2048, F 768, 128 experts of which a token passes 8, f32, 2.5 GB;
Mixtral 8x7B: D 4096, F 14336, 8 experts of which a token passes 2, bf16, 2.8 GB), with random weights and 512 random tokens. A round runs every implementation
once; `time NAME MILLISECONDS` is the median, `ratio language-model/FAMILY/THREADS/OURS VALUE` the median of the rounds' ratios to the fastest of transformers' (below 1 ours is faster).
"""

import argparse
import json
import os
import re
import subprocess
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENS = 512
SIZES = {
    "qwen3_moe": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    "mixtral": {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2},
}


def write(folder, family):
    """One layer of random weights, in the names of the family's files."""
    sizes = SIZES[family]
    d, e = sizes["hidden_size"], sizes.get("num_experts") or sizes["num_local_experts"]
    f = sizes.get("moe_intermediate_size") or sizes["intermediate_size"]
    layer, dtype = "model.layers.0.mlp.", torch.float32
    names = ["gate_proj", "up_proj", "down_proj"]
    if family == "mixtral":
        layer, dtype, names = "model.layers.0.block_sparse_moe.", torch.bfloat16, ["w1", "w3", "w2"]
    generator = torch.Generator().manual_seed(0)

    def random(rows, columns):
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)

    tensors = {f"{layer}gate.weight": random(e, d)}
    for expert in range(e):
        for name, shape in zip(names, [(f, d), (f, d), (d, f)]):
            tensors[f"{layer}experts.{expert}.{name}.weight"] = random(*shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({"tokens": torch.randn(TOKENS, d, generator=generator)}, folder / "tokens.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": family, "num_hidden_layers": 1, "hidden_act": "silu", **sizes}))


def theirs(folder, family):
    """transformers' layers, each a function of nothing."""
    from safetensors.torch import load_file
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    assert family == "qwen3_moe", "only that family is timed"
    weights = load_file(folder / "model.safetensors")
    tokens = load_file(folder / "tokens.safetensors")["tokens"].unsqueeze(0)
    layer = "model.layers.0.mlp."
    e = SIZES[family]["num_experts"]

    def stacked(*names):
        each = lambda name: torch.stack([weights[f"{layer}experts.{i}.{name}.weight"] for i in range(e)])
        return torch.nn.Parameter(torch.cat([each(name) for name in names], 1))

    gate_up, down = stacked("gate_proj", "up_proj"), stacked("down_proj")
    functions = {}
    for implementation in ["eager", "grouped_mm"]:
        config = Qwen3MoeConfig(**SIZES[family])
        config._experts_implementation = implementation
        with torch.device("meta"):
            block = Qwen3MoeSparseMoeBlock(config)
        block.gate.weight = torch.nn.Parameter(weights[f"{layer}gate.weight"])
        block.experts.gate_up_proj, block.experts.down_proj = gate_up, down
        functions[f"transformers-{implementation}"] = lambda block=block: block(tokens)
    return functions


def ours(program, folder, precision, threads):
    """Milliseconds of a forward pass, by the example."""
    command = [program, str(folder), "--input", str(folder / "tokens.safetensors"), "--repeats", "5"]
    command += ["--precision", precision] if precision else []
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(re.search(r"^\s+0\s+\S+\s+(\S+)", output, re.MULTILINE).group(1))


def measured(function):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        with torch.no_grad():
            function()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--family", choices=SIZES, default="qwen3_moe")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only-write", action="store_true")
    args = parser.parse_args()
    folder = args.work / args.family
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        write(folder, args.family)
    if args.only_write:
        return
    build = ["cargo", "build", "--release", "--example", "language_model", "--message-format", "json"]
    lines = subprocess.run(build, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    program = next(filter(None, (json.loads(line).get("executable") for line in reversed(lines))))
    peers = theirs(folder, args.family)
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        rounds = []
        for _ in range(args.rounds):
            times = {"ours-plain": ours(program, folder, None, threads), "ours-packed-f32": ours(program, folder, "f32", threads)}
            times |= {"ours-packed-bf16": ours(program, folder, "bf16", threads)}
            for name, function in peers.items():
                times[name] = measured(function)
            rounds.append(times)
        for name in rounds[0]:
            print(f"time {name}/{threads} {median(times[name] for times in rounds):.1f}", flush=True)
        for name in [name for name in rounds[0] if name.startswith("ours")]:
            ratios = [times[name] / min(times[peer] for peer in peers) for times in rounds]
            print(f"ratio language-model/{args.family}/{threads}/{name} {median(ratios):.3f}", flush=True)


if __name__ == "__main__":
    main()
