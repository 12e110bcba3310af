"""MoE feed-forward layers in PyTorch, each against a dense feed-forward network of equal active FLOPs in the same run.

    pip install -r requirements.txt
    python moe_layers.py                                  # CPU, all cores, float32; or --device cuda --dtype bfloat16
    python moe_layers.py --tiny --rounds 1                # smoke test, seconds

For every layer, shape, routing and pass it prints `ratio LAYER/SHAPE/ROUTING/PASS VALUE` (the layer's time over the
dense network's, median of paired rounds; below 1 the layer is faster) and `time LAYER/SHAPE/ROUTING/PASS MILLISECONDS`
(median), or `skip LAYER/SHAPE/ROUTING/PASS REASON`, and at the end one table of it all. README.md describes the layers.

The first 8 dimensions of the input carry the router logits and every router's weight is the identity on them, so that
all layers route the same tokens to the same experts: `even` gives each expert equally many, `skewed` gives one expert
twice the mean. The routers' own work is part of every time.
"""

import argparse
import importlib.metadata
import itertools
import math
import os
import time
from collections import defaultdict, namedtuple
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

EXPERTS = 8
CHOICES = 2


class Shape(namedtuple("Shape", "name sequences length width hidden")):
    @property
    def tokens(self):
        return self.sequences * self.length

    @property
    def gated_hidden(self):
        """Hidden width at which a gated expert's three matrices cost what the two of a plain one do."""
        return 8 * round(2 * self.hidden / 3 / 8)

    def tiny(self):
        return self._replace(length=self.length // 16, width=self.width // 16, hidden=self.hidden // 16)


SHAPES = {
    "b16-image": Shape("b16-image", 16, 197, 768, 3072),
    "b16-text": Shape("b16-text", 16, 77, 512, 2048),
    "l14": Shape("l14", 8, 257, 1024, 4096),
}


def capacity_of(tokens):
    return math.ceil(CHOICES * tokens / EXPERTS)


def even_choices(tokens):
    """The two experts of each token, [tokens, 2]."""
    token = torch.arange(tokens)
    return torch.stack([token % EXPERTS, (token + 1 + token // EXPERTS % (EXPERTS - 1)) % EXPERTS], dim=1)


def skewed_choices(tokens):
    """Expert 0 takes every second token, which is twice the mean load; the others take turns in what is left."""
    to_first = torch.arange(CHOICES * tokens) % (2 * CHOICES) == 0
    turns = torch.cumsum(~to_first, dim=0) % (EXPERTS - 1)
    return torch.where(to_first, 0, 1 + turns).view(tokens, CHOICES)


ROUTINGS = {"even": (even_choices, 1), "skewed": (skewed_choices, 2)}  # with the busiest load over the mean


def checked_choices(routing, tokens):
    choose, factor = ROUTINGS[routing]
    choices = choose(tokens)
    *others, busiest = sorted(torch.bincount(choices.flatten(), minlength=EXPERTS).tolist())
    assert (choices[:, 0] != choices[:, 1]).all(), "a token chose one expert twice"
    assert busiest * EXPERTS == factor * choices.numel() and others[-1] - others[0] < factor, "loads are off"
    return choices


def input_for(shape, choices):
    """Random tokens whose first dimensions are the logits of `choices`, exact in bfloat16."""
    x = torch.randn(shape.tokens, shape.width).index_fill_(1, torch.arange(EXPERTS), -4.0)
    x.scatter_(1, choices, torch.tensor([1.0, 0.5]).expand(shape.tokens, CHOICES))
    return x.view(shape.sequences, shape.length, shape.width)


def inject_routing(router_weight, x, choices):
    """Makes the router read its logits off the input, and checks that this gives the choices."""
    with torch.no_grad():
        nn.init.eye_(router_weight)
        chosen = F.linear(x.flatten(0, 1), router_weight).topk(CHOICES).indices
    assert torch.equal(chosen.cpu(), choices), "the router does not choose what was injected"


def mlp(width, hidden):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def route(router, tokens):
    """Gates and experts of each token, both [tokens, 2]; the softmax over the two is the normalised softmax."""
    logits, choices = router(tokens).topk(CHOICES)
    return logits.softmax(dim=-1), choices


class IndexLoop(nn.Module):
    """One expert after the other: select its rows, apply it, add back. Dropless."""

    def __init__(self, shape):
        super().__init__()
        self.router = nn.Linear(shape.width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(mlp(shape.width, shape.hidden) for _ in range(EXPERTS))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        gates, choices = route(self.router, tokens)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, choice = torch.where(choices == index)
            rows = expert(tokens.index_select(0, token)) * gates[token, choice, None]
            output.index_add_(0, token, rows)
        return output.view_as(x)


class IndexBmm(nn.Module):
    """All experts in two batched products over rows gathered to [experts, capacity, width]; the excess is dropped."""

    def __init__(self, shape):
        super().__init__()
        self.capacity = capacity_of(shape.tokens)
        self.router = nn.Linear(shape.width, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, shape.width, shape.hidden) * shape.width**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(EXPERTS, 1, shape.hidden))
        self.down = nn.Parameter(torch.randn(EXPERTS, shape.hidden, shape.width) * shape.hidden**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(EXPERTS, 1, shape.width))

    def slots(self, choices):
        """Slot of every choice, first choices first, [2 * tokens], and the token of every slot.
        The last slot is a bin for what is dropped; free slots compute token 0 and are read by no one."""
        bin_slot = EXPERTS * self.capacity
        experts = choices.t().flatten()
        position = F.one_hot(experts, EXPERTS).cumsum(dim=0).gather(1, experts[:, None])[:, 0] - 1
        slot = torch.where(position < self.capacity, experts * self.capacity + position, bin_slot)
        token = torch.arange(len(choices), device=choices.device).repeat(CHOICES)
        return slot, slot.new_zeros(bin_slot + 1).scatter(0, slot, token)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        gates, choices = route(self.router, tokens)
        slot, token_of_slot = self.slots(choices)
        dropped = slot == EXPERTS * self.capacity
        rows = tokens.index_select(0, token_of_slot[:-1]).view(EXPERTS, self.capacity, -1)
        rows = torch.baddbmm(self.down_bias, F.gelu(torch.baddbmm(self.up_bias, rows, self.up)), self.down)
        picked = rows.flatten(0, 1).index_select(0, slot.masked_fill(dropped, 0))
        weighted = picked * gates.t().flatten().masked_fill(dropped, 0)[:, None]
        return weighted.view(CHOICES, *x.shape).sum(dim=0)


def transformers_block(shape, implementation):
    """Mixtral's block of transformers: SwiGLU, no biases, dropless."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.width,
        intermediate_size=shape.gated_hidden,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOICES,
        experts_implementation=implementation,
    )
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():  # left uninitialised outside of a model
        nn.init.normal_(parameter, std=0.02)
    block.router = block.gate
    return block


class StMoe(nn.Module):
    """The MoE of st-moe-pytorch: GEGLU, biases, dispatch by one-hot products, the excess over a group's capacity is
    dropped. It mixes float32 into lower precisions, so these need autocast."""

    def __init__(self, shape, groups):
        super().__init__()
        from st_moe_pytorch import MoE

        self.groups = groups
        tokens = shape.tokens // groups
        multiple = 1.5 * (shape.gated_hidden + 0.5) / shape.width  # the halves are rounded away there
        factor = EXPERTS * (capacity_of(tokens) + 0.5) / tokens
        capacity = {"capacity_factor_train": factor, "capacity_factor_eval": factor}
        always_both = {"threshold_train": 0.0, "threshold_eval": 0.0}
        self.moe = MoE(shape.width, EXPERTS, multiple, gating_top_n=CHOICES, **capacity, **always_both)
        self.router = self.moe.gate.to_gates

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            return self.moe(x.view(self.groups, -1, x.shape[-1])).outputs.view_as(x)


LAYERS = {
    "index-loop": IndexLoop,
    "index-bmm": IndexBmm,
    "transformers-eager": lambda shape: transformers_block(shape, "eager"),
    "transformers-grouped-mm": lambda shape: transformers_block(shape, "grouped_mm"),
    "st-moe-pytorch": lambda shape: StMoe(shape, groups=1),
    "st-moe-pytorch-per-sequence": lambda shape: StMoe(shape, groups=shape.sequences),
}


def milliseconds(layer, x, backward):
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    layer.zero_grad()
    x.grad = None
    synchronize()
    start = time.perf_counter()
    with torch.inference_mode(not backward):
        output = layer(x)
    if backward:
        output.sum().backward()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(build, shape, routing, backward, args):
    """Times of the dense network and of the layer, one pair a round, after one pair to warm up."""
    torch.manual_seed(0)
    choices = checked_choices(routing, shape.tokens)
    to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    x = input_for(shape, choices).to(**to).requires_grad_(backward)
    dense = mlp(shape.width, CHOICES * shape.hidden).to(**to).train(backward)
    layer = build(shape).to(**to).train(backward)
    inject_routing(layer.router.weight, x, choices)
    return [[milliseconds(module, x, backward) for module in (dense, layer)] for _ in range(args.rounds + 1)][1:]


def measure_all(layers, shapes, args):
    """Prints every cell as it is measured, and then the table."""
    rows, dense_times = [], defaultdict(list)
    for shape, routing, layer in itertools.product(shapes, ROUTINGS, layers):
        row = [layer, shape.name, routing]
        for name in ("forward", "forward-backward"):
            place = f"{shape.name}/{routing}/{name}"
            try:
                pairs = measure(LAYERS[layer], shape, routing, name == "forward-backward", args)
            except Exception as error:  # a layer that fails must not stop the others
                print(f"skip {layer}/{place} {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
                row += ["skipped", ""]
                continue
            ratio = median(sparse / dense for dense, sparse in pairs)
            layer_time = median(sparse for _, sparse in pairs)
            print(f"ratio {layer}/{place} {ratio:.3f}\ntime {layer}/{place} {layer_time:.3f}", flush=True)
            dense_times[place] += [dense for dense, _ in pairs]
            row += [f"{ratio:.2f}", f"{layer_time:.2f}"]
        rows.append(row)
    for place, times in dense_times.items():
        print(f"time dense/{place} {median(times):.3f}")
    head = ["layer", "shape", "routing", "forward: ratio", "ms", "forward-backward: ratio", "ms"]
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]))


def print_setting(shapes, args):
    installed = {str(package.name): package.version for package in importlib.metadata.distributions()}
    for package in ("torch", "transformers", "st-moe-pytorch"):
        print(package, installed.get(package, "absent"))
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"device {device}, {args.dtype}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    for shape in shapes:
        flops = 1.5 * shape.gated_hidden / shape.hidden
        print(
            f"{shape.name}: {shape.tokens} tokens ({shape.sequences} x {shape.length}), width {shape.width}, "
            f"{EXPERTS} experts of hidden {shape.hidden}, {CHOICES} a token; dense: hidden {CHOICES * shape.hidden}; "
            f"gated (transformers, st-moe-pytorch): hidden {shape.gated_hidden}, {flops:.4f} of the dense FLOPs"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma separated; default: %(default)s")
    parser.add_argument("--layers", default=",".join(LAYERS), help="comma separated; default: %(default)s")
    parser.add_argument("--batch", type=int, help="sequences of every shape; default: 16, 16 and 8")
    parser.add_argument("--tiny", action="store_true", help="sequence length, width and hidden divided by 16")
    args = parser.parse_args()
    shapes, layers = args.shapes.split(","), args.layers.split(",")
    if unknown := set(shapes) - set(SHAPES) | set(layers) - set(LAYERS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    shapes = [SHAPES[name].tiny() if args.tiny else SHAPES[name] for name in shapes]
    if args.batch:
        shapes = [shape._replace(sequences=args.batch) for shape in shapes]
    print_setting(shapes, args)
    measure_all(layers, shapes, args)


if __name__ == "__main__":
    main()
