"""CLIP embeddings on a CPU: ONNX Runtime, OpenVINO, candle and this crate, in turn, with the same weights.

    python inference.py --work FOLDER [--rounds 7] [--threads 1,2] [--peers ort,openvino,ours-plain] [--cells 'b16/*'] [--prepare]

The first run writes random weights of B/32 and B/16 into FOLDER (6 GB), in every form that is read, and builds both Rust programs. Then, for
each number of threads and each tower, it starts a process for each peer, and asks one at a time: in each round, each cell is measured once by
each peer. A measurement is the mean of calls for at least 0.2 s. It prints the medians, `ratio inference/THREADS/CELL/OURS/RIVAL VALUE` (median of
the rounds' ratios, below 1 ours is faster), and the cosine of each peer's embeddings to those of PyTorch in f32; FOLDER/results.json has all.

A cell is MODEL/image/BATCH, or MODEL/text/KIND/BATCH with `full`, texts that fill the 77 places; `short`, texts of 5 to 15 tokens with start
and end, padded to 77; and `cut`, the same texts cut to the longest of the batch.

A peer is one of ort, ort-int8, openvino, openvino-bf16, candle; or ours-PRECISION or ours-sparse-PRECISION (B/16, 8 experts of which each token
passes 2, every second block), where PRECISION is what `cargo bench --bench inference -- --precision` knows.
"""

import argparse
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODELS = {"b32": "ViT-B-32-quickgelu", "b16": "ViT-B-16-quickgelu"}
PEERS = "ort,ort-int8,openvino,openvino-bf16,candle,ours-plain,ours-sparse-plain"
PACKAGES = ("onnxruntime", "openvino", "torch", "open_clip_torch")
ENOUGH = 0.2  # seconds; a measurement repeats what takes less


# What is compared.


def inputs(model):
    """The batch of each cell, by name: images f32 [B, 3, 224, 224], tokens i64 [B, 77] or less."""
    random = numpy.random.default_rng(0)
    coarse = random.standard_normal((32, 3, 14, 14), numpy.float32).repeat(16, 2).repeat(16, 3)
    images = coarse + 0.5 * random.standard_normal((32, 3, 224, 224), numpy.float32)
    cells = {f"image/{batch}": images[:batch] for batch in (1, 8, 32)}
    if model == "b16":  # both have the same text tower
        full, short = numpy.zeros((2, 64, 77), numpy.int64)
        lengths = numpy.concatenate([[10], random.integers(5, 16, 63)])
        for texts, words in ((full, [75] * 64), (short, lengths)):
            for row, length in zip(texts, words):
                row[: length + 2] = 49406, *random.integers(1, 49406, length), 49407
        for batch in (1, 64):
            cells |= {f"text/full/{batch}": full[:batch], f"text/short/{batch}": short[:batch]}
            cells[f"text/cut/{batch}"] = short[:batch, : lengths[:batch].max() + 2]
    return {cell: numpy.ascontiguousarray(batch) for cell, batch in cells.items()}


def graph(batch):
    """The exported graph that embeds a batch: one for images, one for each length of texts."""
    return "image" if batch.ndim == 4 else f"text-{batch.shape[1]}"


def prepare(folder, model):
    """Writes weights, graphs, inputs and reference of a model."""
    import onnx
    import open_clip
    import torch
    from onnxruntime.quantization import quantize_dynamic

    sys.path.insert(0, str(ROOT / "tools" / "fixtures"))
    import real_size

    cells = inputs(model)
    save_file(cells, folder / "inputs.safetensors")
    real_size.openclip(folder / "open_clip", MODELS[model], seed=1)
    clip = open_clip.create_model(MODELS[model], pretrained=str(folder / "open_clip" / "open_clip_model.safetensors"), precision="fp32")
    clip.eval()
    # PyTorch's fused attention has no counterpart in ONNX.
    torch.backends.mha.set_fastpath_enabled(False)

    class Tower(torch.nn.Module):
        def __init__(self, encode):
            super().__init__()
            self.clip, self.encode = clip, encode

        def forward(self, batch):
            return self.encode(batch)

    positions, mask = clip.positional_embedding, clip.attn_mask
    reference, exported = {}, set()
    for cell, batch in cells.items():
        tower = Tower(clip.encode_image if batch.ndim == 4 else clip.encode_text).eval()
        name, batch = graph(batch), torch.from_numpy(batch)
        if batch.ndim == 2:  # open_clip reads 77 places and no fewer
            length = batch.shape[1]
            clip.positional_embedding, clip.attn_mask = torch.nn.Parameter(positions[:length]), mask[:length, :length]
        with torch.no_grad():
            reference[cell] = tower(batch).numpy()
        if name in exported:
            continue
        exported.add(name)
        file = folder / f"{name}.onnx"
        shapes = ({0: torch.export.Dim("batch", max=1024)},)
        example = batch[:1].repeat(2, *[1] * (batch.ndim - 1))  # an example of one would fix the batch
        names = {"input_names": ["input"], "output_names": ["output"]}
        torch.onnx.export(tower, (example,), file, dynamo=True, dynamic_shapes=shapes, external_data=False, **names)
        # Products with weights alone: a convolution of integers is slow, and a table of embeddings is no product.
        quantize_dynamic(file, folder / f"{name}-int8.onnx", op_types_to_quantize=["MatMul"])
        nodes = [node.op_type for node in onnx.load(folder / f"{name}-int8.onnx").graph.node]
        # Of 12 blocks: queries with keys and values, output, and the two of the feed-forward network.
        assert nodes.count("MatMulInteger") >= 48, f"{name}: {nodes.count('MatMulInteger')} products are int8, expected 48 or more"
    save_file(reference, folder / "reference.safetensors")

    run = ["cargo", "run", "--release", "--example"]
    open_clip_folder = str(folder / "open_clip")
    convert = [*run, "convert", "--", "--model", open_clip_folder, "--to", "hugging-face", "--out", str(folder / "hugging_face")]
    subprocess.run(convert, cwd=ROOT, check=True)
    if model == "b16":
        upcycle = [*run, "upcycle_checkpoint", "--", "--dense", open_clip_folder, "--out", str(folder / "sparse"), "--seed", "1"]
        subprocess.run(upcycle, cwd=ROOT, check=True)
    (folder / "prepared").touch()


def built(command, cwd):
    """The program that a cargo command builds."""
    output = subprocess.run([*command, "--message-format", "json"], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout
    programs = [json.loads(line).get("executable") for line in output.splitlines()]
    return next(program for program in reversed(programs) if program)


# A process for each peer and model. It says `ready`, and then answers each line: `CELL` with milliseconds, `CELL FILE` with `written`.


def ort(folder, threads, suffix=""):
    """A function that embeds a batch by ONNX Runtime."""
    import onnxruntime

    sessions = {}

    def embed(batch):
        if batch.shape not in sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            options.add_free_dimension_override_by_name("batch", batch.shape[0])
            file = str(folder / f"{graph(batch)}{suffix}.onnx")
            sessions[batch.shape] = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return sessions[batch.shape].run(None, {"input": batch})[0]

    return embed


def openvino(folder, threads, precision="f32"):
    """A function that embeds a batch by OpenVINO."""
    from openvino import Core

    core, requests = Core(), {}
    setting = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}

    def embed(batch):
        if batch.shape not in requests:
            model = core.read_model(folder / f"{graph(batch)}.onnx")
            model.reshape(batch.shape)
            requests[batch.shape] = core.compile_model(model, "CPU", setting).create_infer_request()
        requests[batch.shape].infer([batch], share_inputs=True)
        return requests[batch.shape].get_output_tensor(0).data

    return embed


ENGINES = {
    "ort": ort,
    "ort-int8": lambda folder, threads: ort(folder, threads, "-int8"),
    "openvino": openvino,
    "openvino-bf16": lambda folder, threads: openvino(folder, threads, "bf16"),
}


def serve(peer, folder, threads):
    embed = ENGINES[peer](folder, threads)
    batches = load_file(folder / "inputs.safetensors")
    print("ready", flush=True)
    for line in sys.stdin:
        cell, *file = line.split()
        batch = batches[cell]
        if file:
            numpy.ascontiguousarray(embed(batch), dtype=numpy.float32).tofile(file[0])
            print("written", flush=True)
        else:
            print(milliseconds(lambda: embed(batch)), flush=True)


def milliseconds(call):
    """The mean of as many calls as take ENOUGH, after one that finds other data in the caches; of that one alone if it takes as long by itself."""
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first >= ENOUGH:
        return 1e3 * first
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < ENOUGH:
        call()
        calls += 1
    return 1e3 * (time.perf_counter() - start) / calls


class Server:
    """The process of a peer and model, asked one line at a time."""

    def __init__(self, name, command, threads):
        self.name = name
        setting = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=setting)
        self.answer("its start")

    def answer(self, question):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended at {question}: its messages are above")
        return line.strip()

    def ask(self, question):
        print(question, file=self.process.stdin, flush=True)
        return self.answer(question)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def command(peer, folder, threads, programs):
    """What starts a peer on a model, or None where it has no such model."""
    if peer in ENGINES:
        return [sys.executable, __file__, "--work", str(folder.parent), "--serve", peer, folder.name, str(threads)]
    if peer == "candle":
        return [programs["candle"], str(folder / "hugging_face"), str(folder / "inputs.safetensors")]
    _, *sparse, precision = peer.split("-")
    checkpoint = folder / ("sparse" if sparse else "open_clip")
    if not checkpoint.exists():
        return None
    place = ["--checkpoint", str(checkpoint), "--inputs", str(folder / "inputs.safetensors")]
    return [programs["ours"], "--serve", *place, "--precision", precision]


# Measuring, and what is said of it.


def measure(args, threads, programs):
    """Milliseconds by cell and peer, one a round, and cosines by cell and peer, one an input."""
    times, cosines = {}, {}
    for model in MODELS:
        for tower in ("image", "text"):  # by themselves: all processes at once would take more memory than many machines have
            names = [cell for cell in load_file(args.work / model / "inputs.safetensors") if cell.startswith(tower)]
            names = [cell for cell in names if any(fnmatch.fnmatch(f"{model}/{cell}", pattern) for pattern in args.cells.split(","))]
            names.sort(key=lambda cell: (cell.rsplit("/", 1)[0], int(cell.rsplit("/", 1)[1])))
            if names:
                measure_tower(args, threads, programs, model, names, times, cosines)
    return times, cosines


def measure_tower(args, threads, programs, model, names, times, cosines):
    """The cells `names` of one tower."""
    folder = args.work / model
    commands = {peer: command(peer, folder, threads, programs) for peer in args.peers.split(",")}
    servers = {peer: Server(f"{peer} of {model}", line, threads) for peer, line in commands.items() if line}
    if not servers:
        return
    peers, reference = list(servers), load_file(folder / "reference.safetensors")
    for cell in names:
        for peer in peers:
            file = args.work / "embeddings.f32"
            servers[peer].ask(f"{cell} {file}")
            cosines.setdefault(f"{model}/{cell}", {})[peer] = cosine(numpy.fromfile(file, numpy.float32), reference[cell])
    for turn in range(args.rounds):
        first = turn % len(peers)
        for cell in names:
            taken = times.setdefault(f"{model}/{cell}", {peer: [] for peer in peers})
            for peer in peers[first:] + peers[:first]:
                time.sleep(0.05)  # threads that wait for work stop spinning
                taken[peer].append(float(servers[peer].ask(cell)))
        print(f"{threads} threads, {model}/{names[0].split('/')[0]}: {turn + 1} of {args.rounds} rounds", file=sys.stderr, flush=True)
    for server in servers.values():
        server.end()


def cosine(found, expected):
    found, expected = found.reshape(expected.shape).astype(float), expected.astype(float)
    lengths = numpy.linalg.norm(found, axis=1) * numpy.linalg.norm(expected, axis=1)
    return ((found * expected).sum(1) / lengths).tolist()


def rivals(peer, peers):
    """The lists of peers of which the best is what one of ours is held against."""
    if not peer.startswith("ours-"):
        return []
    _, *sparse, precision = peer.split("-")
    if sparse:
        lists = [[f"ours-{precision}"]]
    else:
        others = {"int8": [["ort-int8"]], "bf16": [["openvino-bf16"], ["ort", "openvino"]]}
        lists = [*others.get(precision, [["ort", "openvino"]]), ["candle"]]
    found = [[rival for rival in rivals if rival in peers] for rivals in lists]
    return [rivals for rivals in found if rivals]


def report(threads, times, cosines):
    """Prints it, and returns the ratios."""
    ratios = {}
    table(f"ms, {threads} threads", times, lambda values: f"{median(values):.2f}")
    table("cosine to PyTorch, mean and smallest", cosines, lambda values: f"{sum(values) / len(values):.6f} {min(values):.6f}")
    for cell, peers in times.items():
        for peer, own in peers.items():
            for group in rivals(peer, peers):
                best = min(group, key=lambda rival: median(peers[rival]))
                value = median(a / b for a, b in zip(own, peers[best]))
                ratios[f"{cell}/{peer}/{best}"] = value
                print(f"ratio inference/{threads}/{cell}/{peer}/{best} {value:.3f}")
    return ratios


def table(title, cells, text):
    peers = list(dict.fromkeys(peer for values in cells.values() for peer in values))
    rows = [[cell, *(text(values[peer]) if peer in values else "-" for peer in peers)] for cell, values in cells.items()]
    rows.insert(0, [title, *peers])
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *(value.rjust(width) for value, width in zip(rest, widths[1:]))]))
    print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--peers", default=PEERS)
    parser.add_argument("--cells", default="*", help="patterns, such as b32/*,*/text/short/*")
    parser.add_argument("--prepare", action="store_true", help="stop before measuring")
    parser.add_argument("--serve", nargs=3, metavar=("PEER", "MODEL", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work = args.work.resolve()
    if args.serve:
        peer, model, threads = args.serve
        return serve(peer, args.work / model, int(threads))
    for model in MODELS:
        folder = args.work / model
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "prepared").exists():
            prepare(folder, model)
    programs = {
        "ours": built(["cargo", "bench", "--bench", "inference", "--no-run"], ROOT),
        "candle": built(["cargo", "build", "--release", "--locked", "--target-dir", str(args.work / "candle")], HERE / "candle"),
    }
    if args.prepare:
        return
    results = {"machine": platform.platform(), "cores": os.cpu_count(), "versions": {name: version(name) for name in PACKAGES}}
    results["runs"] = []
    for threads in map(int, args.threads.split(",")):
        times, cosines = measure(args, threads, programs)
        ratios = report(threads, times, cosines)
        results["runs"].append({"threads": threads, "milliseconds": times, "cosines": cosines, "ratios": ratios})
        (args.work / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
