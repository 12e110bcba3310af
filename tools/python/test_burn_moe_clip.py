#!/usr/bin/env python3
"""Whether burn_moe_clip.py computes what the Rust crate computes. Not in CI, which has no PyTorch; versions are in requirements.txt.

    python test_burn_moe_clip.py                   # the crate's tests write checkpoints, with what Rust makes of them; then all is compared
    python test_burn_moe_clip.py --write-names     # the same, and then tests/data/sparse_names.json is what was tested
    python test_burn_moe_clip.py --real-size       # B/32 with random weights: times and sizes, of PyTorch and of the exported graph
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import onnxruntime
import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import burn_moe_clip

ROOT = pathlib.Path(__file__).resolve().parents[2]
EMBEDDING, GRADIENT, ONNX = 1e-5, 1e-4, 1e-4


def write_checkpoints(folder, profile):
    """By the Rust crate."""
    command = ["cargo", "test", *profile, "--test", "it", "write_checkpoints_for_the_python_reader", "--", "--ignored"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "BURN_MOE_PYTHON_OUT": str(folder)}, check=True)


def error(found, expected):
    """Largest difference, in parts of the largest value if that is above 1; NaN if anything is."""
    assert found.shape == expected.shape, f"{list(found.shape)} instead of {list(expected.shape)}"
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def worse(a, b):
    """The larger error; a NaN is worse than any."""
    return max(a, b, key=lambda e: (e != e, e))


def gradient_error(model, reference):
    """Largest difference of the gradients that Rust recorded, in parts of the largest value of each."""
    names = [name.removeprefix("gradient.") for name in reference if name.startswith("gradient.")]
    model.zero_grad()
    if "images" in reference:
        (model.encode_image(reference["images"]) * reference["image_cotangent"]).sum().backward()
    if "texts" in reference:
        (model.encode_text(reference["texts"]) * reference["text_cotangent"]).sum().backward()
    parameters = dict(model.named_parameters())
    largest = 0
    for name in names:
        expected = reference[f"gradient.{name}"]
        assert expected.abs().max() > 0, f"no gradient of `{name}` to compare with"
        largest = worse(largest, ((parameters[name].grad - expected).abs().max() / expected.abs().max()).item())
    return largest


def alone_error(model, reference):
    """How far the first and second sample by themselves are from the same within the batch."""
    errors = []
    with torch.inference_mode():
        for name, encode in [("images", model.encode_image), ("texts", model.encode_text)]:
            if name in reference:
                batch = encode(reference[name])
                errors += [error(encode(reference[name][i : i + 1]), batch[i : i + 1]) for i in (0, 1)]
    return max(errors)


def is_independent(config):
    """Whether no sample can change another one's embedding, for all sparse blocks."""
    encoders = [tower.encoder for tower in (config.vision, config.text) if tower is not None]
    layers = [encoder.sparse.layer for encoder in encoders if encoder.sparse is not None]
    routed = [layer for layer in layers if isinstance(layer, burn_moe_clip.Routed)]
    return all(layer.capacity[0] == "Dropless" or layer.groups[0] == "PerSample" for layer in routed)


# What is compared, and how far it may be off; an image in steps of a pixel's 256 values.
ALLOWED = {
    "images": EMBEDDING,
    "texts": EMBEDDING,
    "gradients": GRADIENT,
    "images, ONNX": ONNX,
    "texts, ONNX": ONNX,
    "other batches, ONNX": ONNX,
    "samples alone": EMBEDDING,
    "prepared image": 1.01,
    "token ids": 0,
}


def check_case(folder, onnx_folder):
    """The errors of a checkpoint, each the larger one of both ways to compute experts."""
    reference = load_file(folder / "reference.safetensors")
    model = burn_moe_clip.load(folder)
    errors = {}

    def add(what, value):
        errors[what] = worse(errors.get(what, 0), value)

    for computes_all in (False, True):
        model.compute_all_experts(computes_all)
        # In train mode as in eval mode.
        model.train(computes_all)
        with torch.inference_mode():
            if "images" in reference:
                add("images", error(model.encode_image(reference["images"]), reference["image_features"]))
            if "texts" in reference:
                add("texts", error(model.encode_text(reference["texts"]), reference["text_features"]))
                add("texts", error(model.encode_text(reference["texts"][:, :4]), reference["short_text_features"]))
        add("gradients", gradient_error(model, reference))
        out = onnx_folder / ("all" if computes_all else "own")
        burn_moe_clip.export_onnx(model, out)
        for name, value in onnx_errors(out, reference).items():
            add(f"{name}, ONNX", value)
        # A sample alone and three: other sizes than the two that were exported, and the five above.
        for value in burn_moe_clip.check_onnx(model, out).values():
            add("other batches, ONNX", value)
    model.eval().compute_all_experts(False)

    alone = alone_error(model, reference)
    if is_independent(model.config):
        add("samples alone", alone)
    else:
        # Or the case would not show that samples compete as they do in Rust.
        assert alone > 1e-3, f"no sample changes another one: {alone}"
    dropped = sum(int(reference.get(f"{name}_dropped", 0)) for name in ("images", "texts"))
    assert dropped > 0 or not folder.name.startswith("capacity"), "nothing was dropped"
    if "rgb.png" in reference:
        image = Image.open(ROOT / "tests/data/preprocess/rgb.png")
        found = burn_moe_clip.image_transform(model)(image)[None]
        std = torch.tensor(model.config.vision.images.std).view(1, 3, 1, 1)
        add("prepared image", ((found - reference["rgb.png"]) * std * 255).abs().max().item())
    if "tokenized" in reference:
        found = burn_moe_clip.tokenizer(model)(["A cat’s cradle & 42 naïve dogs", "yes"])
        add("token ids", (found - reference["tokenized"]).abs().max().item())
    # What was loaded is what is in the file.
    stored = load_file(folder / burn_moe_clip.WEIGHTS)
    state = model.state_dict()
    for name, tensor in stored.items():
        if not name.endswith(".scale") and tensor.dtype != torch.int8:
            assert torch.equal(state[name], tensor.float()), f"`{name}` has changed"
    return errors


def onnx_errors(folder, reference):
    """Batches of another size than the one that was exported, against Rust."""
    errors = {}
    for name, given, expected in [("image", "images", "image_features"), ("text", "texts", "text_features")]:
        if given in reference:
            session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            [found] = session.run(None, {name: reference[given].numpy()})
            errors[given] = error(torch.from_numpy(found), reference[expected])
    return errors


def check_refusals(folder, scratch):
    """Checkpoints that must not be read, and what the error must name."""
    config = json.loads((folder / burn_moe_clip.CONFIG).read_text())
    weights = load_file(folder / burn_moe_clip.WEIGHTS)
    router = "/clip/text/encoder/sparse/layer/Routed/router"
    choice = "/clip/text/encoder/sparse/layer/Routed/assignment/TokenChoice"

    def changed(path, value):
        copy = json.loads(json.dumps(config))
        *parents, last = path.strip("/").split("/")
        at = copy
        for parent in parents:
            at = at[parent]
        if value is None:
            del at[last]
        else:
            at[last] = value
        return copy, weights

    name = "visual.transformer.resblocks.1.moe.experts.w_in"
    cases = [
        (changed("/version", 99), "version 99 is not supported"),
        (changed("/version", 8), "version 8 is not supported"),
        (changed("/clip/vision/deep_tokens", True), "`clip.vision.deep_tokens` = true is not supported"),
        (changed("/clip/vision/class_token", False), "class_token` is false, and `clip.vision.pooling` is ClassToken"),
        (changed("/clip/vision/encoder/rotary", {"theta": 1e4, "scale": 2.0}), "rotary.scale` = 2.0 is not supported"),
        (changed("/clip/text/encoder/rotary", {"theta": 1e4}), "`clip.text.encoder.rotary` is not supported"),
        (changed("/clip/text/encoder/form", {"ClampedGated": {"limit": 7.0, "alpha": 1.7}}), "expected one of Plain, Gated"),
        (changed(f"{choice}/expert_groups", {"count": 3, "per_token": 1}), "expert_groups` are 1 of 3, and there are 4 experts"),
        (changed("/clip/text/encoder/sparse/layer/Routed/shared_expert_gate", True), "and there is no shared expert"),
        (changed(f"{router}/groups", {"count": 2}), "router.groups` = {\"count\": 2} is not supported"),
        (changed(f"{router}/score", None), "router.score` is missing"),
        (changed(f"{router}/score", "Tanh"), "router.score` = \"Tanh\" is not supported"),
        (changed("/clip/text/encoder/activation", {"Clamped": 7.0}), "activation` = {\"Clamped\": 7.0} is not supported"),
        (changed(f"{choice}/top_k", 5), "top_k` is 5, and there are 4 experts"),
        ((config, {k: v for k, v in weights.items() if k != name}), f"has no `{name}`"),
        ((config, weights | {"visual.rotary": torch.ones(1)}), "has an unexpected `visual.rotary`"),
        ((config, weights | {name: weights[name][:, :1].clone()}), f"`{name}` has the shape [4, 1, 32], expected [4, 16, 32]"),
        ((config, weights | {name: weights[name] * torch.nan}), f"`{name}` has values that are not finite"),
        ((config, weights | {name: weights[name].to(torch.int8)}), f"`{name}` is in 8 bits and has no"),
        ((config, weights | {name: weights[name].to(torch.int32)}), f"`{name}` has the dtype torch.int32"),
    ]
    for (case_config, case_weights), expected in cases:
        (scratch / burn_moe_clip.CONFIG).write_text(json.dumps(case_config))
        save_file({k: v.contiguous() for k, v in case_weights.items()}, scratch / burn_moe_clip.WEIGHTS)
        try:
            burn_moe_clip.load(scratch)
        except burn_moe_clip.CheckpointError as refused:
            assert expected in str(refused), f"expected `{expected}`, got `{refused}`"
        else:
            raise AssertionError(f"read, although {expected}")
    return len(cases)


def check_tokens_that_are_not_finite(folder):
    """A sample of NaN comes out as NaN, takes no slot, and changes no other sample that has slots of its own."""
    model = burn_moe_clip.load(folder)
    images = load_file(folder / "reference.safetensors")["images"]
    images[2] = torch.nan
    for computes_all in (False, True):
        with torch.inference_mode():
            found = model.compute_all_experts(computes_all).encode_image(images)
            expected = model.encode_image(images[:2])
        assert found[2].isnan().all() and error(found[:2], expected) <= EMBEDDING


def check_open_clips_own(folder):
    """The image transform and the tokenizer are open_clip's, where it has the same."""
    model = burn_moe_clip.load(folder)
    image = Image.open(ROOT / "tests/data/preprocess/rgba.png")
    theirs = open_clip.image_transform(model.config.vision.images.image_size, is_train=False)
    # The mean and standard deviation of the checkpoint are f32.
    assert (burn_moe_clip.image_transform(model)(image) - theirs(image)).abs().max() < 1e-6
    model.config.text.vocab_size = burn_moe_clip.CLIP_VOCAB_SIZE
    texts = ["A cat’s cradle & 42 naïve dogs", ""]
    ours, theirs = burn_moe_clip.tokenizer(model), open_clip.SimpleTokenizer(context_length=10)
    assert ours.vocab_size == theirs.vocab_size == burn_moe_clip.CLIP_VOCAB_SIZE and torch.equal(ours(texts), theirs(texts))


def check_open_clips_habits(folder):
    """open_clip's gradient checkpointing, its normalised outputs, and models in half precision."""
    model = burn_moe_clip.load(folder)
    reference = load_file(folder / "reference.safetensors")
    model.set_grad_checkpointing(True)
    assert gradient_error(model, reference) <= GRADIENT
    image, text, scale = model(reference["images"], reference["texts"])
    for found, name in [(image, "image_features"), (text, "text_features")]:
        assert error(found, torch.nn.functional.normalize(reference[name], dim=-1)) <= EMBEDDING
    assert error(scale, model.logit_scale.exp()) == 0
    pooled = model.forward_intermediates(image=reference["images"], normalize=False)["image_features"]
    assert error(pooled, reference["image_features"]) <= EMBEDDING
    try:
        model.forward_intermediates(text=reference["texts"])
    except RuntimeError as refused:
        assert "call the model's `encode_text`" in str(refused)
    else:
        raise AssertionError("a sparse text tower must know where texts end")
    with torch.inference_mode():
        half = model.bfloat16().encode_image(reference["images"].bfloat16()).float()
    assert torch.nn.functional.cosine_similarity(half, reference["image_features"]).min() > 0.99


def check_tower_of_our_own(folder):
    """Without a class token, with rotary positions: what open_clip would mistake is refused, and half precision does not round angles."""
    model = burn_moe_clip.load(folder)
    reference = load_file(folder / "reference.safetensors")
    try:
        model.forward_intermediates(image=reference["images"])
    except RuntimeError as refused:
        assert "takes the first token for a class token" in str(refused)
    else:
        raise AssertionError("the first patch is no class token")
    model.set_grad_checkpointing(True)
    assert gradient_error(model, reference) <= GRADIENT
    half = model.bfloat16()
    assert half.visual.transformer.resblocks[0].attn.cos.dtype == torch.float32
    with torch.inference_mode():
        half = half.encode_image(reference["images"].bfloat16()).float()
    assert torch.nn.functional.cosine_similarity(half, reference["image_features"]).min() > 0.99


def real_config(folder):
    """B/32 as CLIP-UP makes it sparse."""
    config = json.loads((folder / burn_moe_clip.CONFIG).read_text())
    clip = config["clip"] | {"embed_dim": 512}
    for tower, sizes in {"vision": (768, 12), "text": (512, 8)}.items():
        encoder = clip[tower]["encoder"]
        encoder |= {"d_model": sizes[0], "n_heads": sizes[1], "n_layers": 12, "d_ff": 4 * sizes[0], "activation": "QuickGelu"}
        encoder["sparse"] |= {"num_experts": 8, "blocks": {"EveryNth": 2}}
    clip["vision"] |= {"image_size": 224, "patch_size": 32}
    clip["text"] |= {"vocab_size": burn_moe_clip.CLIP_VOCAB_SIZE, "context_length": 77}
    return config | {"clip": clip}


def random_model(config):
    """As open_clip starts, with experts and routers drawn."""
    torch.manual_seed(1)
    model = burn_moe_clip.SparseCLIP(config).eval()
    for name, parameter in model.named_parameters():
        if ".moe." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def compare_with_rust(folder, binary):
    """A checkpoint of real size that Python writes, embedded by the crate's benchmark."""
    config = real_config(folder)
    model = random_model(burn_moe_clip.config_of(config))
    # Texts of different lengths.
    texts = torch.randint(49406, (8, 77))
    texts[torch.arange(8), 4 + 9 * torch.arange(8)] = 49407
    inputs = {"images": torch.randn(8, 3, 224, 224), "texts": texts}
    with tempfile.TemporaryDirectory() as out, torch.inference_mode():
        out = pathlib.Path(out)
        (out / burn_moe_clip.CONFIG).write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out / burn_moe_clip.WEIGHTS)
        save_file(inputs, out / "inputs")
        cells = "".join(f"{name} {out / name}.f32\n" for name in inputs)
        command = [binary, "--checkpoint", out, "--serve", "--inputs", out / "inputs"]
        subprocess.run(command, input=cells, text=True, stdout=subprocess.DEVNULL, check=True)
        for name, encode in [("images", model.encode_image), ("texts", model.encode_text)]:
            found = encode(inputs[name])
            expected = torch.from_file(f"{out / name}.f32", size=found.numel()).view(found.shape)
            print(f"{name} of B/32 against Rust: {error(found, expected):.1e} (largest value {expected.abs().max():.2f})", flush=True)


def real_size(folder):
    """B/32 as CLIP-UP makes it sparse, and dense: the image tower, random weights."""
    vision = real_config(folder)["clip"]["vision"]
    images = torch.randn(16, 3, 224, 224)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    rows, runs = [], []
    with tempfile.TemporaryDirectory() as out:
        for title in ("experts compute their own tokens", "experts compute all tokens", "dense"):
            if title == "dense":
                vision["encoder"]["sparse"] = None
            config = burn_moe_clip.config_of({"version": burn_moe_clip.VERSIONS[-1], "clip": {"embed_dim": 512, "vision": vision}})
            model = random_model(config).compute_all_experts(title == "experts compute all tokens")
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            start = time.perf_counter()
            [path] = burn_moe_clip.export_onnx(model, f"{out}/{len(rows)}")
            seconds = time.perf_counter() - start
            size = sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6
            difference = burn_moe_clip.check_onnx(model, path.parent)["image"]
            rows.append(f"| {title} | {parameters:.0f} | {seconds:.0f} | {size:.0f} | {difference:.1e} |")
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            runs.append(lambda model=model: model.encode_image(images))
            runs.append(lambda session=session: session.run(None, {"image": images.numpy()}))
        rates = [len(images) / seconds for seconds in fastest(runs)]
    print(f"image tower of B/32, {torch.get_num_threads()} threads, batches of {len(images)}")
    print("| model | parameters, millions | export, s | files, MB | largest difference | PyTorch, images/s | ONNX Runtime, images/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for index, row in enumerate(rows):
        print(f"{row} {rates[2 * index]:.1f} | {rates[2 * index + 1]:.1f} |")


@torch.inference_mode()
def fastest(runs, times=8):
    """The best time of each, in turn, so that what else the machine does hits all alike."""
    best = [float("inf")] * len(runs)
    for _ in range(times):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=pathlib.Path, help="a folder that an earlier run has left: nothing is built")
    parser.add_argument("--keep", type=pathlib.Path, help="leave the checkpoints in this folder")
    parser.add_argument("--dev", action="store_true", help="build the crate's tests in the dev profile")
    parser.add_argument("--only", help="the case of this name")
    parser.add_argument("--write-names", action="store_true", help="write tests/data/sparse_names.json when all is well")
    parser.add_argument("--real-size", action="store_true", help="measure B/32 instead")
    parser.add_argument("--inference", type=pathlib.Path, help="with --real-size: the crate's benchmark of this name as it was built, to compare with Rust")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        temporary = pathlib.Path(temporary)
        folder = args.checkpoints or args.keep or temporary / "checkpoints"
        if args.checkpoints is None:
            write_checkpoints(folder.resolve(), [] if args.dev else ["--release"])
        if args.real_size:
            if args.inference is not None:
                compare_with_rust(folder / "top-2", args.inference)
            return real_size(folder / "top-2")
        worst, failed = {}, 0
        cases = sorted(path.parent for path in folder.glob("*/reference.safetensors"))

        def show(name, errors):
            shown = (f"{errors[what]:.1e}" if what in errors else "–" for what in ALLOWED)
            print(f"| {name} | {' | '.join(shown)} |", flush=True)

        print(f"| checkpoint | {' | '.join(ALLOWED)} |\n|{' --- |' * (1 + len(ALLOWED))}")
        for case in cases:
            if args.only not in (None, case.name):
                continue
            errors = check_case(case, temporary / "onnx" / case.name)
            show(case.name, errors)
            for what, value in errors.items():
                worst[what] = worse(worst.get(what, 0), value)
                if not value <= ALLOWED[what]:
                    print(f"FAILED: {case.name}, {what}: {value:.1e} is above {ALLOWED[what]:.0e}")
                    failed += 1
        show("**all**", worst)
        show("allowed", ALLOWED)
        if args.only is None:
            (temporary / "refused").mkdir()
            count = check_refusals(folder / "top-2", temporary / "refused")
            for name in ("top-2", "capacity-of-sample", "expert-choice", "soft"):
                check_tokens_that_are_not_finite(folder / name)
            check_open_clips_own(folder / "top-2")
            check_open_clips_habits(folder / "shared-expert")
            check_tower_of_our_own(folder / "moe-vie")
            print(f"\n{len(cases)} checkpoints; {count} damaged ones are refused by name")
        if failed:
            sys.exit(f"{failed} comparisons failed")
        if args.write_names:
            shutil.copy(folder / "sparse_names.json", ROOT / "tests/data/sparse_names.json")


if __name__ == "__main__":
    main()
