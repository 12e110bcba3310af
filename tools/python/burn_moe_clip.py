#!/usr/bin/env python3
"""Sparse CLIP checkpoints of burn-moe in PyTorch, and through it in ONNX.

    import burn_moe_clip
    model = burn_moe_clip.load("FOLDER")            # an open_clip.CLIP, in eval mode
    image = burn_moe_clip.image_transform(model)    # a torchvision transform
    texts = burn_moe_clip.tokenizer(model)          # an open_clip tokenizer
    model.encode_image(image(photo)[None]), model.encode_text(texts(["a photo of a cat"]))

    python burn_moe_clip.py FOLDER --onnx OUT       # OUT/image.onnx and OUT/text.onnx

FOLDER holds burn_moe_config.json and burn_moe_model.safetensors, as `ClipCheckpoint::save_sparse` writes them. Needs torch, open_clip_torch and
safetensors; for ONNX also onnx and onnxscript, and onnxruntime to check what was exported.

The model is open_clip's CLIP with a feed-forward network of experts in its sparse blocks, and with modules of this file where open_clip has none (gated
networks, rotary positions, attention pooling). The names and shapes of its `state_dict` are those in the file. It computes what the Rust crate computes at inference, whether it is in train mode or not: no noise, and the capacity for inference. All of it
has gradients but the choice of experts, so that it can be fine-tuned. Everything in the configuration that is not known here is an error that names it.
"""

import argparse
import gzip
import json
import pathlib
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Optional

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNorm, ResidualAttentionBlock, Transformer, VisionTransformer
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

CONFIG, WEIGHTS = "burn_moe_config.json", "burn_moe_model.safetensors"
# Versions of the configuration that are read.
VERSIONS = (9,)
CLIP_VOCAB_SIZE = 49408
# Ids of CLIP's tokenizer without any merge.
SMALLEST_CLIP_VOCAB_SIZE = 514
# The smallest sum that gates are divided by.
MIN_GATE_SUM = 1e-18


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or has what this file does not compute."""


# The configuration: each function below reads one type of the Rust crate, as serde writes it.


def fields(value, where, *names):
    """The values of a struct in the order of `names`, which are all that it may have, and must."""
    if not isinstance(value, dict):
        raise CheckpointError(f"`{where}` = {json.dumps(value)} is not understood: expected an object")
    for name in value:
        if name not in names:
            raise CheckpointError(f"`{where}.{name}` = {json.dumps(value[name])} is not supported by this burn_moe_clip.py")
    for name in names:
        if name not in value:
            raise CheckpointError(f"`{where}.{name}` is missing")
    return [value[name] for name in names]


def variant(value, where, *names):
    """The name of an enum's variant, which must be one of `names`, and what it holds."""
    name, content = value, None
    if isinstance(value, dict) and len(value) == 1:
        [(name, content)] = value.items()
    if name not in names:
        raise CheckpointError(f"`{where}` = {json.dumps(value)} is not supported by this burn_moe_clip.py: expected one of {', '.join(names)}")
    return name, content


ACTIVATIONS = {
    "Gelu": F.gelu,
    "GeluTanh": partial(F.gelu, approximate="tanh"),
    "QuickGelu": lambda x: x * torch.sigmoid(1.702 * x),
    "Relu": F.relu,
    "Silu": F.silu,
}


@dataclass
class Routed:
    """How tokens reach the experts of a routed layer."""

    score: str
    logit_normalization: Optional[float]
    has_bias: bool
    has_balancing: bool
    has_momentum: bool
    has_warmup: bool
    shared_expert: Optional[int]
    gates_shared_expert: bool
    protects: bool
    is_expert_choice: bool
    top_k: int
    gate_normalization: str
    gate_scale: float
    # Number of groups of experts, and of those that a token may use.
    expert_groups: Optional[tuple]
    fill_order: str
    capacity: tuple
    groups: tuple


@dataclass
class Soft:
    """A soft layer."""

    slots_per_expert: int


@dataclass
class Form:
    """How a feed-forward network uses its activation; `limit` and `alpha` are None if it is not clamped."""

    is_gated: bool
    limit: Optional[float] = None
    alpha: Optional[float] = None


@dataclass
class Sparse:
    """The sparse blocks of a tower."""

    blocks: set
    num_experts: int
    d_ff: int
    form: Form
    has_bias: bool
    layer: object
    routes_padding: bool


@dataclass
class Encoder:
    """The transformer of a tower."""

    d_model: int
    n_heads: int
    n_layers: int
    d_ff: int
    activation: str
    form: Form
    # The base of the frequencies of rotary positions.
    rotary_theta: Optional[float]
    norm_epsilon: float
    sparse: Optional[Sparse]


@dataclass
class Images:
    """How images are prepared."""

    image_size: int
    mean: list
    std: list
    resize_mode: str
    interpolation: str
    resize_to: int


@dataclass
class Vision:
    encoder: Encoder
    patch_size: int
    channels: int
    images: Images
    has_class_token: bool
    has_position_table: bool
    has_norm_pre: bool
    has_norm_post: bool
    # Heads of attention pooling; None: the class token.
    pooling_heads: Optional[int]


@dataclass
class Text:
    encoder: Encoder
    vocab_size: int
    is_clip_bpe: bool
    context_length: int
    # The id of the end of a text; None: the highest id in it.
    end_id: Optional[int]
    projection_bias: bool
    has_norm_final: bool


@dataclass
class Config:
    """A checkpoint; a tower that it does not hold is None."""

    version: int
    embed_dim: int
    vision: Optional[Vision]
    text: Optional[Text]


def read_config(folder):
    """The configuration of a checkpoint."""
    path = pathlib.Path(folder) / CONFIG
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG}: it is not a checkpoint that `save_sparse` wrote") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    try:
        return config_of(value)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def config_of(value):
    version = value.get("version") if isinstance(value, dict) else None
    if version not in VERSIONS:
        raise CheckpointError(
            f"version {json.dumps(version)} is not supported: this burn_moe_clip.py reads {', '.join(map(str, VERSIONS))}. burn-moe's example `convert` "
            "writes an older checkpoint again in its own version; for a newer one, take the burn_moe_clip.py of that burn-moe"
        )
    _, clip = fields(value, "file", "version", "clip")
    # A tower alone stands in the place of a whole CLIP.
    alone = [name for name in ("vision", "text") if isinstance(clip, dict) and name in clip]
    names = alone if len(alone) == 1 else ["vision", "text", "logit_scale_init"]
    embed_dim, *values = fields(clip, "clip", "embed_dim", *names)
    values = dict(zip(names, values))
    vision = vision_of(values["vision"], "clip.vision") if "vision" in values else None
    text = text_of(values["text"], "clip.text") if "text" in values else None
    return Config(version, embed_dim, vision, text)


def vision_of(value, where):
    names = ["encoder", "image_size", "patch_size", "channels", "preprocessing"]
    parts = ["class_token", "position_table", "norm_pre", "norm_post"]
    encoder, image_size, patch_size, channels, preprocessing, *parts, pooling = fields(value, where, *names, *parts, "pooling")
    mean, std, resize_mode, interpolation, resize_to = fields(
        preprocessing, f"{where}.preprocessing", "mean", "std", "resize_mode", "interpolation", "resize_to"
    )
    resize_mode, _ = variant(resize_mode, f"{where}.preprocessing.resize_mode", "Shortest", "Squash")
    interpolation, _ = variant(interpolation, f"{where}.preprocessing.interpolation", "Bicubic", "Bilinear")
    images = Images(image_size, mean, std, resize_mode, interpolation, resize_to or image_size)
    kind, pooling = variant(pooling, f"{where}.pooling", "ClassToken", "Attention")
    pooling_heads = None
    if kind == "Attention":
        [pooling_heads] = fields(pooling, f"{where}.pooling.Attention", "n_heads")
    elif not parts[0]:
        raise CheckpointError(f"`{where}.class_token` is false, and `{where}.pooling` is ClassToken")
    return Vision(encoder_of(encoder, f"{where}.encoder"), patch_size, channels, images, *parts, pooling_heads)


def text_of(value, where):
    names = ["encoder", "vocab_size", "tokenizer", "context_length", "end_of_text", "projection_bias", "norm_final"]
    encoder, vocab_size, tokenizer, context_length, end_of_text, *parts = fields(value, where, *names)
    tokenizer, _ = variant(tokenizer, f"{where}.tokenizer", "ClipBpe", "Other")
    _, end_id = variant(end_of_text, f"{where}.end_of_text", "HighestId", "Id")
    encoder = encoder_of(encoder, f"{where}.encoder")
    if encoder.rotary_theta is not None:
        raise CheckpointError(f"`{where}.encoder.rotary` is not supported: the tokens of a text have no column and row")
    return Text(encoder, vocab_size, tokenizer == "ClipBpe", context_length, end_id, *parts)


def encoder_of(value, where):
    names = ["d_model", "n_heads", "n_layers", "d_ff", "activation", "form", "rotary", "norm_epsilon", "sparse"]
    *sizes, activation, form, rotary, norm_epsilon, sparse = fields(value, where, *names)
    activation, _ = variant(activation, f"{where}.activation", *ACTIVATIONS)
    form = form_of(form, f"{where}.form", "Plain", "Gated")
    theta = None
    if rotary is not None:
        [theta] = fields(rotary, f"{where}.rotary", "theta")
    sparse = sparse and sparse_of(sparse, f"{where}.sparse", form, *sizes[2:])
    return Encoder(*sizes, activation, form, theta, norm_epsilon, sparse)


def form_of(value, where, *names):
    name, numbers = variant(value, where, *names)
    if name == "ClampedGated":
        return Form(True, *fields(numbers, f"{where}.ClampedGated", "limit", "alpha"))
    return Form(name == "Gated")


def sparse_of(value, where, form_of_dense, n_layers, d_ff):
    blocks, num_experts, own_d_ff, form, has_bias, layer, padding = fields(
        value, where, "blocks", "num_experts", "d_ff", "form", "bias", "layer", "padding"
    )
    kind, which = variant(blocks, f"{where}.blocks", "EveryNth", "Last", "List")
    if kind == "EveryNth":
        blocks = set(range(which - 1, n_layers, which))
    elif kind == "Last":
        blocks = set(range(n_layers - which, n_layers))
    else:
        blocks = set(which)
    form = form_of_dense if form is None else form_of(form, f"{where}.form", "Plain", "Gated", "ClampedGated")
    padding, _ = variant(padding, f"{where}.padding", "Excluded", "Routed")
    kind, layer = variant(layer, f"{where}.layer", "Routed", "Soft")
    if kind == "Routed":
        layer = routed_of(layer, f"{where}.layer.Routed", num_experts)
    else:
        layer = Soft(*fields(layer, f"{where}.layer.Soft", "slots_per_expert"))
    return Sparse(blocks, num_experts, own_d_ff or d_ff, form, has_bias, layer, padding == "Routed")


def routed_of(value, where, num_experts):
    router, assignment, shared_expert, gates_shared_expert, protection = fields(
        value, where, "router", "assignment", "shared_expert", "shared_expert_gate", "protection"
    )
    if gates_shared_expert and shared_expert is None:
        raise CheckpointError(f"`{where}.shared_expert_gate` is true, and there is no shared expert")
    # How the weight started, noise and jitter say nothing of inference.
    _, score, _, _, has_bias, balancing, logit_normalization = fields(
        router, f"{where}.router", "init_std", "score", "noise", "jitter", "bias", "balancing", "logit_normalization"
    )
    score, _ = variant(score, f"{where}.router.score", "Softmax", "Sigmoid")
    momentum = warmup_steps = 0
    if balancing is not None:
        # How the bias moves says nothing of inference either, but for which tensors there are.
        _, rule, momentum, _, warmup_steps = fields(
            balancing, f"{where}.router.balancing", "rate", "rule", "momentum", "cap", "warmup_steps"
        )
        variant(rule, f"{where}.router.balancing.rule", "Sign", "ZScore")
    protection, _ = variant(protection, f"{where}.protection", "Pooled", "None")
    kind, rule = variant(assignment, f"{where}.assignment", "TokenChoice", "ExpertChoice")
    where = f"{where}.assignment.{kind}"
    top_k, gate_normalization, gate_scale, expert_groups, fill_order = num_experts, "None", 1.0, None, None
    if kind == "TokenChoice":
        names = ["top_k", "gate_normalization", "gate_scale", "expert_groups", "fill_order"]
        top_k, gate_normalization, gate_scale, expert_groups, fill_order, _, capacity, groups = fields(
            rule, where, *names, "training_capacity", "inference_capacity", "groups"
        )
        known = ["None", "BeforeDrop", "AfterDrop", "ConstantOne"]
        gate_normalization, _ = variant(gate_normalization, f"{where}.gate_normalization", *known)
        if expert_groups is not None:
            count, per_token = expert_groups = tuple(fields(expert_groups, f"{where}.expert_groups", "count", "per_token"))
            if num_experts % count != 0 or num_experts // count < 2 or not 1 <= per_token <= count:
                raise CheckpointError(f"`{where}.expert_groups` are {per_token} of {count}, and there are {num_experts} experts")
        fill_order, _ = variant(fill_order, f"{where}.fill_order", "ChoiceMajor", "TokenMajor", "BatchPriority")
        if not 1 <= top_k <= num_experts:
            raise CheckpointError(f"`{where}.top_k` is {top_k}, and there are {num_experts} experts")
    else:
        capacity, groups = fields(rule, where, "capacity", "groups")
    capacity = variant(capacity, f"{where}.capacity", "OfBalancedLoad", "OfTokens", "Fixed", "Dropless")
    groups = variant(groups, f"{where}.groups", "Whole", "OfSize", "PerSample")
    if kind == "ExpertChoice" and groups[0] == "Whole":
        # In a tower, no sample takes tokens' experts from another one.
        groups = ("PerSample", None)
    return Routed(
        score,
        logit_normalization,
        has_bias,
        balancing is not None,
        momentum > 0,
        warmup_steps > 0,
        shared_expert,
        gates_shared_expert,
        protection == "Pooled",
        kind == "ExpertChoice",
        top_k,
        gate_normalization,
        gate_scale,
        expert_groups,
        fill_order,
        capacity,
        groups,
    )


# The modules. Tokens are `[T, D]`, `T` those of a batch with padding; masks are `[T]`.


class Activation(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return ACTIVATIONS[self.name](x)

    def extra_repr(self):
        return self.name


class Experts(nn.Module):
    """`E` feed-forward networks side by side."""

    def __init__(self, num_experts, d_model, d_ff, config, activation):
        super().__init__()
        shapes = {"in": (d_model, d_ff), "out": (d_ff, d_model)}
        if config.form.is_gated:
            shapes["gate"] = (d_model, d_ff)
        for name, shape in shapes.items():
            self.register_parameter(f"w_{name}", nn.Parameter(torch.empty(num_experts, *shape)))
            if config.has_bias:
                self.register_parameter(f"b_{name}", nn.Parameter(torch.empty(num_experts, shape[1])))
        self.num_experts, self.form, self.activation = num_experts, config.form, Activation(activation)
        # Whether each expert computes every token, the most of them with a gate of zero: more to compute, and all shapes are known beforehand.
        self.computes_all = False

    def forward(self, x, gates, kept):
        """`Σ_e gates[t, e] · FFN_e(x_t)` over the experts that `kept [T, E]` a token; `gates [T, E]` is zero elsewhere."""
        if self.computes_all:
            computed = self.each(x.expand(self.num_experts, *x.shape))
            return (computed * gates.t().unsqueeze(2)).sum(0)
        out = torch.zeros_like(x)
        # One gradient of all experts' weights, where slices would make one for each.
        weights = {name: weight.unbind() for name, weight in self.named_parameters()}
        for expert in range(self.num_experts):
            [tokens] = kept[:, expert].nonzero(as_tuple=True)
            own = {name: weight[expert] for name, weight in weights.items()}
            computed = self.network(x[tokens], own) * gates[tokens, expert].unsqueeze(1)
            out = out.index_add(0, tokens, computed)
        return out

    def each(self, rows):
        """Every expert over rows of its own, `[E, R, D] -> [E, R, D]`."""
        return self.network(rows, {name: p.unsqueeze(1) if p.dim() == 2 else p for name, p in self.named_parameters()})

    def network(self, rows, weights):
        def mapped(rows, name):
            out = rows @ weights[f"w_{name}"]
            return out + weights[f"b_{name}"] if f"b_{name}" in weights else out

        hidden = mapped(rows, "in")
        limit, alpha = self.form.limit, self.form.alpha
        if limit is not None:
            gate = self.activation(mapped(rows, "gate").clamp(max=limit) * alpha) / alpha
            hidden = gate * (hidden.clamp(-limit, limit) + 1)
        elif self.form.is_gated:
            hidden = self.activation(mapped(rows, "gate")) * hidden
        else:
            hidden = self.activation(hidden)
        return mapped(hidden, "out")


class Router(nn.Module):
    """Scores, `[T, D] -> [T, E]`, and what is added to them where tokens choose."""

    def __init__(self, d_model, num_experts, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model, num_experts))
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_experts)) if config.has_bias else None)
        self.score, self.logit_normalization = config.score, config.logit_normalization
        self.register_buffer("balancing_bias", torch.zeros(num_experts) if config.has_balancing else None)
        # The state of its training, so that a state_dict is what the file is.
        self.register_buffer("balancing_momentum", torch.zeros(num_experts) if config.has_momentum else None)
        self.register_buffer("balancing_warmup", torch.zeros(1) if config.has_warmup else None)

    def forward(self, x):
        logits = x.float() @ self.weight.float()
        if self.bias is not None:
            logits = logits + self.bias.float()
        if self.logit_normalization is not None:
            # In a unit in which squares of the largest logits are finite.
            unit = logits.detach().abs().amax(1, keepdim=True).clamp(min=1)
            logits = logits / unit
            centred = logits - logits.mean(1, keepdim=True)
            least = (1e-4 / unit).square().clamp(min=torch.finfo(torch.float32).tiny)
            logits = centred / (centred.square().mean(1, keepdim=True) + least).sqrt() * self.logit_normalization
        if self.score == "Softmax":
            scores = logits.softmax(1)
        else:
            scores = torch.sigmoid(logits).masked_fill(~logits.isfinite(), torch.nan)
        return scores, scores if self.balancing_bias is None else scores + self.balancing_bias.float()


def descending(x, dim):
    """Indices by descending value; of equal values the first comes first."""
    if torch.compiler.is_exporting():
        # ONNX has no other order of equal values.
        return x.sort(dim=dim, descending=True)[1]
    return x.sort(dim=dim, descending=True, stable=True)[1]


class RoutedExperts(nn.Module):
    """A layer whose router chooses experts for tokens, or tokens for experts."""

    def __init__(self, d_model, activation, config):
        super().__init__()
        self.config, layer = config, config.layer
        self.router = Router(d_model, config.num_experts, layer)
        self.experts = Experts(config.num_experts, d_model, config.d_ff, config, activation)
        self.shared_expert = None
        if layer.shared_expert is not None:
            self.shared_expert = Experts(1, d_model, layer.shared_expert, config, activation)
        gate = nn.Parameter(torch.empty(d_model, 1)) if layer.gates_shared_expert else None
        self.register_parameter("shared_expert_gate", gate)

    def forward(self, x, valid, protected):
        """`x [B, N, D]`; `valid [B, N]` is false for padding, and `protected [B, N]` true for tokens that get their slots first."""
        batch, length, d_model = x.shape
        x = x.reshape(-1, d_model)
        protected = protected.reshape(-1)
        valid = torch.ones_like(protected) if self.config.routes_padding else valid.reshape(-1)
        x = x.masked_fill(~valid.unsqueeze(1), 0)
        scores, selection = self.router(x)
        # A token whose scores are not finite takes no slot from others, and comes out as NaN.
        requests = valid & selection.isfinite().all(1)
        if self.config.layer.is_expert_choice:
            gates, kept = self.experts_choose(scores, requests, (batch, length))
        else:
            gates, kept = self.tokens_choose(scores, selection, requests, protected, (batch, length))
        out = self.experts(x, gates.to(x.dtype), kept)
        if self.shared_expert is not None:
            shared = self.shared_expert.each(x.unsqueeze(0)).squeeze(0)
            if self.shared_expert_gate is not None:
                shared = shared * torch.sigmoid(x.float() @ self.shared_expert_gate.float()).to(x.dtype)
            out = out + shared.masked_fill(~valid.unsqueeze(1), 0)
        out = out.masked_fill((valid & ~requests).unsqueeze(1), torch.nan)
        return out.reshape(batch, length, d_model)

    def tokens_choose(self, scores, selection, requests, protected, shape):
        """Gates `[T, E]`, and whether a token has a slot of an expert, `[T, E]`."""
        layer = self.config.layer
        if layer.expert_groups is not None:
            selection = self.limited_to_groups(selection, *layer.expert_groups)
        chosen = descending(selection, 1)[:, : layer.top_k]
        kept = requests.unsqueeze(1).expand(chosen.shape)
        if layer.capacity[0] != "Dropless":
            kept = kept & self.has_slot(chosen, scores, requests, protected, self.groups(*shape, scores.device))
        gates = scores.gather(1, chosen)
        if layer.gate_normalization in ("BeforeDrop", "ConstantOne"):
            gates = gates / gates.sum(1, keepdim=True).clamp(min=MIN_GATE_SUM)
        gates = gates.masked_fill(~kept, 0)
        if layer.gate_normalization == "AfterDrop":
            gates = gates / gates.sum(1, keepdim=True).clamp(min=MIN_GATE_SUM)
        of_expert = self.one_hot(chosen) & kept.unsqueeze(2)
        return (gates.unsqueeze(2) * of_expert).sum(1) * layer.gate_scale, of_expert.any(1)

    def limited_to_groups(self, selection, count, per_token):
        """Lowers what chooses experts outside of each token's best groups, which are judged by their two best experts."""
        grouped = selection.unflatten(1, (count, self.config.num_experts // count))
        rank = descending(grouped.topk(2, dim=2)[0].sum(2), 1).argsort(1)
        return grouped.masked_fill((rank >= per_token).unsqueeze(2), torch.finfo(torch.float32).min).flatten(1)

    def experts_choose(self, scores, requests, shape):
        """As `tokens_choose`: in each group, each expert takes the tokens of highest score."""
        groups = self.groups(*shape, scores.device)
        ranked = scores.masked_fill(~requests.unsqueeze(1), -1)[groups.tokens].masked_fill(~groups.exists.unsqueeze(2), -2)
        rank = descending(ranked, 1).argsort(1)
        kept = groups.back(rank < self.slots(groups, 1)[:, None, None]) & requests.unsqueeze(1)
        return scores.masked_fill(~kept, 0), kept

    def has_slot(self, chosen, scores, requests, protected, groups):
        """Whether a choice comes before its expert's slots are taken, `[T, K]`."""
        layer, top_k = self.config.layer, self.config.layer.top_k
        count, size = groups.tokens.shape
        # Places of tokens in the order in which they are served, protected ones aside.
        place = torch.arange(size, device=chosen.device).expand(count, size)
        if layer.fill_order == "BatchPriority":
            place = descending(scores.amax(1)[groups.tokens].masked_fill(~groups.exists, -1), 1).argsort(1)
        place, rank = place.unsqueeze(2), torch.arange(top_k, device=chosen.device)
        turn = place * top_k + rank if layer.fill_order == "TokenMajor" else rank * size + place
        if layer.protects:
            turn = turn + (~protected[groups.tokens]).long().unsqueeze(2) * (size * top_k)
        order = turn.flatten(1).argsort(1)
        wanted = self.one_hot(chosen[groups.tokens]) & (requests[groups.tokens] & groups.exists)[:, :, None, None]
        wanted = wanted.flatten(1, 2).int()
        in_turn = wanted.gather(1, order.unsqueeze(2).expand(wanted.shape))
        before = in_turn.cumsum(1, dtype=torch.int32) - in_turn
        before = before.gather(1, order.argsort(1).unsqueeze(2).expand(wanted.shape))
        fits = (before * wanted).sum(2) < self.slots(groups, top_k).unsqueeze(1)
        return groups.back(fits.unflatten(1, (size, top_k)))

    def one_hot(self, chosen):
        """`[..] -> [.., E]`"""
        return chosen.unsqueeze(-1) == torch.arange(self.config.num_experts, device=chosen.device)

    def slots(self, groups, top_k):
        """Slots of each expert in each group, `[G]`, f64."""
        tokens, num_experts = groups.exists.double().sum(1), self.config.num_experts
        kind, value = self.config.layer.capacity
        if kind == "Fixed":
            return torch.full_like(tokens, value)
        # A tensor, because the exporter makes f32 of a number.
        value = torch.tensor(value, dtype=torch.float64, device=tokens.device)
        slots = value * tokens * top_k / num_experts if kind == "OfBalancedLoad" else value * (tokens / num_experts)
        nearest = slots.round()
        slots = torch.where((slots - nearest).abs() <= 1e-9, nearest, slots.ceil())
        return slots.clamp(min=1).minimum(tokens)

    def groups(self, batch, length, device):
        """The tokens that compete for the same slots."""
        kind, size = self.config.layer.groups
        num_tokens = batch * length
        if kind == "Whole":
            count, size = 1, num_tokens
        elif kind == "PerSample":
            count, size = batch, length
        else:
            if not torch.compiler.is_exporting():
                size = max(1, min(size, num_tokens))
            # ONNX rounds a negative quotient the other way.
            count = (num_tokens + size - 1) // size
        tokens = torch.arange(count, device=device).unsqueeze(1) * size + torch.arange(size, device=device)
        return Groups(num_tokens, tokens.clamp(max=num_tokens - 1), tokens < num_tokens)


@dataclass
class Groups:
    """`G` groups of `S` tokens, of which the last one may have fewer."""

    num_tokens: int
    # Indices of tokens, `[G, S]`.
    tokens: torch.Tensor
    # `[G, S]`, false where the last group has no token.
    exists: torch.Tensor

    def back(self, x):
        """`[G, S, ..] -> [T, ..]`"""
        return x.flatten(0, 1)[torch.arange(self.num_tokens, device=x.device)]


class SoftExperts(nn.Module):
    """A layer whose experts compute mixtures of the tokens of each sample."""

    def __init__(self, d_model, activation, config):
        super().__init__()
        self.config = config
        self.slots = nn.Parameter(torch.empty(d_model, config.num_experts * config.layer.slots_per_expert))
        self.experts = Experts(config.num_experts, d_model, config.d_ff, config, activation)

    def forward(self, x, valid, protected):
        """As `RoutedExperts.forward`; nothing is protected, as nothing is dropped."""
        batch, _, d_model = x.shape
        num_experts, per_expert = self.config.num_experts, self.config.layer.slots_per_expert
        padding = torch.zeros_like(valid) if self.config.routes_padding else ~valid
        padding = padding.unsqueeze(2)
        x = x.masked_fill(padding, 0)
        logits = x.float() @ self.slots.float()
        # Far below any logit, and finite.
        dispatch = logits.masked_fill(padding, -1e30).softmax(1).to(x.dtype)
        combine = logits.softmax(2).to(x.dtype)
        mixed = (dispatch.transpose(1, 2) @ x).reshape(batch, num_experts, per_expert, d_model)
        computed = self.experts.each(mixed.transpose(0, 1).reshape(num_experts, -1, d_model))
        computed = computed.reshape(num_experts, batch, per_expert, d_model).transpose(0, 1)
        out = combine @ computed.reshape(batch, num_experts * per_expert, d_model)
        return out.masked_fill(padding, 0)


class GatedMlp(nn.Module):
    """A dense network whose activation is that of a gate."""

    def __init__(self, encoder):
        super().__init__()
        self.c_fc, self.c_gate = (nn.Linear(encoder.d_model, encoder.d_ff) for _ in range(2))
        self.activation = Activation(encoder.activation)
        self.c_proj = nn.Linear(encoder.d_ff, encoder.d_model)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_gate(x)) * self.c_fc(x))


def rotation_of(encoder, side, has_class_token):
    """Cosines and sines by which queries and keys turn, `[N, h / 2]` each, for patches in a square grid and, before them, a class token that does not turn."""
    half = encoder.d_model // encoder.n_heads // 2
    # As many frequencies for columns as for rows; what is left of a head stays.
    frequencies = encoder.rotary_theta ** (-2 * torch.arange(half // 2, dtype=torch.float64) / half)
    place = torch.arange(1, side + 1, dtype=torch.float64)
    row, column = torch.meshgrid(place, place, indexing="ij")
    angles = torch.cat([column.reshape(-1, 1) * frequencies, row.reshape(-1, 1) * frequencies], 1)
    angles = F.pad(angles, (0, half - angles.shape[1], int(has_class_token), 0))
    return angles.cos().float(), angles.sin().float()


class RotaryAttention(nn.MultiheadAttention):
    """Self-attention whose queries and keys turn by where their tokens are."""

    def __init__(self, encoder, rotation):
        super().__init__(encoder.d_model, encoder.n_heads, batch_first=True)
        # No buffers, which a model in half precision would round; and each block's own, as ONNX's exporter has no others.
        self.cos, self.sin = (table.clone() for table in rotation)

    def forward(self, query, key=None, value=None, need_weights=False, attn_mask=None):
        """As that of PyTorch, of which it takes what a tower asks for."""
        if not (key is value is query) or need_weights:
            raise RuntimeError("rotary positions are for self-attention without weights")
        projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        projected = projected.unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = projected[0], projected[1], projected[2]
        out = F.scaled_dot_product_attention(self.turn(query), self.turn(key), value, attn_mask=attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def turn(self, x):
        """Pairs of neighbouring numbers, `[B, heads, N, h]`, in f32."""
        cos, sin = self.cos.to(x.device), self.sin.to(x.device)
        pairs = x.float().unflatten(3, (-1, 2))
        a, b = pairs[..., 0], pairs[..., 1]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], 4).flatten(3).to(x.dtype)


class SparseBlock(ResidualAttentionBlock):
    """open_clip's block with experts in place of the feed-forward network. `protects_first` is None in a text tower, whose marks are in the texts."""

    def __init__(self, encoder, norm_layer, protects_first):
        super().__init__(encoder.d_model, encoder.n_heads, mlp_ratio=1.0, norm_layer=norm_layer)
        del self.mlp
        layer = RoutedExperts if isinstance(encoder.sparse.layer, Routed) else SoftExperts
        self.moe = layer(encoder.d_model, encoder.activation, encoder.sparse)
        self.protects_first = protects_first

    def get_weight_dtype(self):
        return self.attn.in_proj_weight.dtype

    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None, marks=None):
        if marks is None:
            if self.protects_first is None:
                raise RuntimeError("a sparse block of a text tower must be told where texts end: call the model's `encode_text`")
            # A class token is protected, and there is no padding.
            is_class = torch.arange(q_x.shape[1], device=q_x.device) < int(self.protects_first)
            is_class = is_class.expand(q_x.shape[:2])
            marks = torch.ones_like(is_class), is_class
        x = q_x + self.attention(self.ln_1(q_x), attn_mask=attn_mask)
        return x + self.moe(self.ln_2(x), *marks)


class SparseTransformer(Transformer):
    """open_clip's transformer with the sparse blocks, gated networks and rotary positions that a configuration names."""

    def __init__(self, encoder, protects_first=None, rotation=None):
        norm_layer = partial(LayerNorm, eps=encoder.norm_epsilon)
        super().__init__(
            encoder.d_model,
            encoder.n_layers,
            encoder.n_heads,
            # open_clip rounds the product down.
            mlp_ratio=(encoder.d_ff + 0.5) / encoder.d_model,
            act_layer=lambda: Activation(encoder.activation),
            norm_layer=norm_layer,
        )
        for index in range(encoder.n_layers):
            if encoder.sparse and index in encoder.sparse.blocks:
                self.resblocks[index] = SparseBlock(encoder, norm_layer, protects_first)
            elif encoder.form.is_gated:
                self.resblocks[index].mlp = GatedMlp(encoder)
            if rotation is not None:
                self.resblocks[index].attn = RotaryAttention(encoder, rotation)

    def forward(self, x, attn_mask=None, marks=None):
        for block in self.resblocks:
            inputs = (x, None, None, attn_mask) + ((marks,) if isinstance(block, SparseBlock) else ())
            x = checkpoint(block, *inputs, use_reentrant=False) if self.grad_checkpointing else block(*inputs)
        return x


class AttentionPooling(nn.Module):
    """A learned probe attends to all tokens, `[B, N, D] -> [B, D]`."""

    def __init__(self, d_model, n_heads, norm_layer):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(d_model))
        self.attn = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
        self.layernorm = norm_layer(d_model)
        maps = [("c_fc", nn.Linear(d_model, 4 * d_model)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * d_model, d_model))]
        self.mlp = nn.Sequential(OrderedDict(maps))

    def forward(self, x):
        seen = self.attn(self.probe.expand(x.shape[0], 1, -1), x, x, need_weights=False)[0].squeeze(1)
        return seen + self.mlp(self.layernorm(seen))


class VisionTower(VisionTransformer):
    """open_clip's vision tower with the parts that a configuration names."""

    def __init__(self, config, embed_dim):
        encoder, norm_layer = config.encoder, partial(LayerNorm, eps=config.encoder.norm_epsilon)
        # One dense block, which does not stay.
        super().__init__(
            config.images.image_size,
            config.patch_size,
            encoder.d_model,
            layers=1,
            heads=encoder.n_heads,
            mlp_ratio=1.0,
            output_dim=embed_dim,
            no_ln_pre=not config.has_norm_pre,
            norm_layer=norm_layer,
        )
        rotation = None
        if encoder.rotary_theta is not None:
            rotation = rotation_of(encoder, self.grid_size[0], config.has_class_token)
        self.transformer = SparseTransformer(encoder, config.has_class_token, rotation)
        if config.channels != 3:
            sizes = encoder.d_model, config.patch_size
            self.conv1 = nn.Conv2d(config.channels, sizes[0], sizes[1], stride=sizes[1], bias=False)
        if not config.has_class_token:
            self.class_embedding = None
            self.positional_embedding = nn.Parameter(self.positional_embedding.detach()[1:])
        if not config.has_position_table:
            self.positional_embedding = None
        if not config.has_norm_post:
            self.ln_post = nn.Identity()
        if config.pooling_heads is not None:
            self.attn_pool = AttentionPooling(encoder.d_model, config.pooling_heads, norm_layer)

    def _embeds(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        if self.positional_embedding is not None:
            x = x + self.positional_embedding.to(x.dtype)
        return self.ln_pre(x)

    def _pool(self, x):
        x = self.ln_post(x)
        return self._global_pool(x) if self.attn_pool is None else (self.attn_pool(x), x)

    def forward_intermediates(self, *args, **kwargs):
        if self.class_embedding is None:
            raise RuntimeError("open_clip's `forward_intermediates` takes the first token for a class token, which this tower does not have")
        return super().forward_intermediates(*args, **kwargs)


class SparseCLIP(open_clip.CLIP):
    """open_clip's CLIP with sparse blocks. Of a checkpoint with one tower, the other one is missing, and so is the logit scale."""

    def __init__(self, config):
        # A vision tower and a transformer of texts that do not stay.
        smallest, text = open_clip.CLIPVisionCfg(layers=1, width=1, head_width=1, patch_size=1, image_size=1), config.text
        if text is None:
            texts = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
        else:
            texts = open_clip.CLIPTextCfg(
                context_length=text.context_length,
                vocab_size=text.vocab_size,
                width=text.encoder.d_model,
                heads=text.encoder.n_heads,
                layers=1,
                norm_kwargs={"eps": text.encoder.norm_epsilon},
                proj_bias=text.projection_bias,
                pool_type="argmax" if text.end_id is None else "eos",
                eos_id=text.end_id or 0,
            )
        super().__init__(config.embed_dim, smallest, texts)
        self.config = config
        if config.vision is None:
            del self.visual, self.logit_scale
        else:
            self.visual = VisionTower(config.vision, config.embed_dim)
        if text is None:
            del self.transformer, self.token_embedding, self.positional_embedding, self.ln_final, self.text_projection, self.attn_mask
            del self.logit_scale
        else:
            self.transformer = SparseTransformer(text.encoder)
            if not text.has_norm_final:
                self.ln_final = nn.Identity()

    def encode_image(self, image, normalize=False):
        """Embeddings of images, `[B, channels, image_size, image_size] -> [B, P]`."""
        if self.config.vision is None:
            raise RuntimeError("this checkpoint holds a text tower alone")
        return super().encode_image(image, normalize)

    def encode_text(self, text, normalize=False):
        """Embeddings of texts, `[B, N] -> [B, P]`, of at most `context_length` ids each."""
        if self.config.text is None:
            raise RuntimeError("this checkpoint holds an image tower alone")
        length = text.shape[1]
        if length > self.context_length:
            raise ValueError(f"texts of {length} tokens are longer than the context of {self.context_length}")
        end = self.end_of_text(text)
        place = torch.arange(length, device=text.device)
        marks = place <= end, place == end
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[:length].to(dtype)
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length], marks=marks)
        x = x.gather(1, end.unsqueeze(2).expand(-1, -1, x.shape[2])).squeeze(1)
        x = self.ln_final(x)
        x = self.text_projection(x) if isinstance(self.text_projection, nn.Linear) else x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x

    def end_of_text(self, text):
        """Where each text ends, `[B, N] -> [B, 1]`: at the first token that is an end, or at the first of all if none is."""
        end_id = self.config.text.end_id
        is_end = text == (text.amax(1, keepdim=True) if end_id is None else end_id)
        return is_end.int().argmax(1, keepdim=True)

    def compute_all_experts(self, on=True):
        """Whether each expert computes every token instead of its own: more to compute, and all shapes are known beforehand."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.computes_all = on
        return self


def read_weights(path):
    """The tensors of a file as f32; weights in 8 bits are multiplied by their scales."""
    try:
        stored = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    weights = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            scale = stored.get(f"{name}.scale")
            # One for each output: `[E, F]` for `[E, D, F]`, and `[out]` for `[out, in]`.
            if scale is None or scale.dtype != torch.float32 or scale.shape != tensor.shape[:1] + tensor.shape[2:]:
                raise CheckpointError(f"{path}: `{name}` is in 8 bits and has no `{name}.scale` that fits")
            tensor = tensor.float() * scale.unsqueeze(1)
        elif name.endswith(".scale") and stored.get(name.removesuffix(".scale"), tensor).dtype == torch.int8:
            continue
        elif not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{path}: `{name}` has the dtype {tensor.dtype}")
        weights[name] = tensor.float()
        if not weights[name].isfinite().all():
            raise CheckpointError(f"{path}: `{name}` has values that are not finite")
    return weights


def load(folder, device="cpu"):
    """The model of a checkpoint, in eval mode; `model.config` is its configuration."""
    model = SparseCLIP(read_config(folder))
    path = pathlib.Path(folder) / WEIGHTS
    weights, expected = read_weights(path), model.state_dict()
    for what, names in [("has no", expected.keys() - weights.keys()), ("has an unexpected", weights.keys() - expected.keys())]:
        if names:
            raise CheckpointError(f"{path} {what} {', '.join(f'`{name}`' for name in sorted(names)[:3])} ({len(names)} in all)")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise CheckpointError(f"{path}: `{name}` has the shape {list(weight.shape)}, expected {list(expected[name].shape)}")
    model.load_state_dict(weights, assign=True)
    return model.eval().to(device)


def to_rgb(image):
    return image.convert("RGB")


def image_transform(model):
    """What makes the tower's input of a Pillow image, as in training; the same settings are in `model.config.vision.images`."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    if model.config.vision is None:
        raise RuntimeError("this checkpoint holds a text tower alone")
    images = model.config.vision.images
    filter = InterpolationMode.BICUBIC if images.interpolation == "Bicubic" else InterpolationMode.BILINEAR
    size = images.resize_to if images.resize_mode == "Shortest" else (images.resize_to,) * 2
    steps = [Resize(size, filter), CenterCrop(images.image_size), to_rgb, ToTensor(), Normalize(images.mean, images.std)]
    return Compose(steps)


def tokenizer(model):
    """open_clip's tokenizer with as many of CLIP's merges as the vocabulary has ids for; an error if texts are for another tokenizer."""
    text = model.config.text
    if text is None:
        raise RuntimeError("this checkpoint holds an image tower alone")
    if not (text.is_clip_bpe and SMALLEST_CLIP_VOCAB_SIZE <= text.vocab_size <= CLIP_VOCAB_SIZE):
        raise RuntimeError("the token ids of this model are those of another tokenizer than CLIP's, which the checkpoint does not hold")
    with tempfile.TemporaryDirectory() as folder:
        merges = pathlib.Path(folder) / "merges.txt.gz"
        lines = gzip.open(open_clip.tokenizer.default_bpe()).read().decode().split("\n")
        # The first line is no merge.
        first = "\n".join(lines[: 1 + text.vocab_size - SMALLEST_CLIP_VOCAB_SIZE])
        merges.write_bytes(gzip.compress(first.encode()))
        return open_clip.SimpleTokenizer(str(merges), context_length=text.context_length)


# ONNX.


class ImageTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model.encode_image(image)


class TextTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, text):
        return self.model.encode_text(text)


def towers(model, batch=2):
    """Name, module in eval mode and random input of each tower, `batch` samples."""
    vision, text = model.config.vision, model.config.text
    if vision is not None:
        size = vision.images.image_size
        yield "image", ImageTower(model).eval(), torch.randn(batch, vision.channels, size, size)
    if text is not None:
        ids = torch.randint(text.vocab_size, (batch, text.context_length))
        yield "text", TextTower(model).eval(), ids


def export_onnx(model, folder):
    """Writes `image.onnx` and `text.onnx`, of the towers that there are. Batches may be of any size; texts have `context_length` ids, as the
    tokenizer pads them. Outputs are embeddings, not normalised: `image_features` and `text_features`, `[B, P]`.

    Each expert computes its own tokens, of which the graph finds the number when it runs. For runtimes that need to know all shapes beforehand, call
    `model.compute_all_experts()` first."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, tower, example in towers(model):
        paths.append(folder / f"{name}.onnx")
        torch.onnx.export(
            tower,
            (example,),
            str(paths[-1]),
            input_names=[name],
            output_names=[f"{name}_features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    return paths


def check_onnx(model, folder, batches=(1, 3)):
    """The largest difference of each exported tower from the model, `|a − b| / max(1, max|b|)`, in ONNX Runtime."""
    import onnxruntime

    errors = {}
    for batch in batches:
        for name, tower, example in towers(model, batch):
            session = onnxruntime.InferenceSession(str(pathlib.Path(folder) / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            [found] = session.run(None, {name: example.numpy()})
            with torch.inference_mode():
                expected = tower(example)
            error = ((torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
            # Also where it is NaN, which no other error is above.
            errors[name] = max(errors.get(name, 0), error, key=lambda e: (e != e, e))
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="a checkpoint that `save_sparse` wrote")
    parser.add_argument("--onnx", type=pathlib.Path, metavar="OUT", help="export the towers to this folder, and check them in ONNX Runtime if it is installed")
    parser.add_argument("--all-experts", action="store_true", help="with --onnx: each expert computes every token, so that all shapes are known beforehand")
    args = parser.parse_args()
    model = load(args.folder).compute_all_experts(args.all_experts)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.folder}: {parameters / 1e6:.1f} million parameters, embeddings of width {model.config.embed_dim}")
    if args.onnx is None:
        return
    start = time.perf_counter()
    paths = export_onnx(model, args.onnx)
    print(f"exported {', '.join(map(str, paths))} in {time.perf_counter() - start:.0f} s")
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        print("not checked: onnxruntime is not installed")
        return
    errors = check_onnx(model, args.onnx)
    print("largest difference in ONNX Runtime: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    # `not` lets no NaN pass.
    if not all(error <= 1e-4 for error in errors.values()):
        raise SystemExit("what was exported does not compute what the model computes")


if __name__ == "__main__":
    main()
